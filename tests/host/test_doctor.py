"""What doctor says is what a start does: on hosts that lack something, made of namespaces of their own."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from typing import Any, Dict

from thirstys_waterfall.security.microvm_isolation import DoctorReport, doctor

from ..support import DATA, IMPORT, VMTestCase, find_tool, make_rootfs, misfits

CODE = """
import json
from {} import *
report = doctor()
manager = MicroVMIsolationManager({{"start_timeout_s": 120, "templates": False}})
vm = manager.get_vm(manager.create_vm("plugin", VMResourceLimits(memory_mb=128, disk_size_mb=64)))
started = vm.start()
error = vm.last_error and {{"code": vm.last_error.code, "message": str(vm.last_error), "details": vm.last_error.details}}
told = {{"report": report, "started": started, "error": error, "info": vm.get_info()}}
manager.stop()
print(json.dumps(told))
""".format(IMPORT)
LEASED = """
import json, os, subprocess, sys
from {0} import *
report = doctor()
manager = MicroVMIsolationManager({{"start_timeout_s": 120, "templates": False}})
vm = manager.get_vm(manager.create_vm("plugin", VMResourceLimits(memory_mb=128, disk_size_mb=64)))
started = vm.start()
leases, runtime = "/dev/shm/tw-microvm-uids", "/dev/shm/tw-microvm-0"
names = lambda folder: sorted(os.listdir(folder)) if os.path.isdir(folder) else []
held = [name for name in names(leases) if name.isdigit()]
code = "import json, sys; from {0} import *; channel = CommunicationChannel(sys.argv[1]); "
code += "print(json.dumps([doctor()['runtime_dir'], channel.connect(30)]))"
other = subprocess.run([sys.executable, "-c", code, vm.vm_id], stdout=subprocess.PIPE, check=True).stdout
told = {{"started": started, "error": str(vm.last_error)}}
told.update({{"verdict": report["verdict"], "runtime_dir": report["runtime_dir"], "vm_id": vm.vm_id, "leases": held}})
told.update({{"socket": vm.get_info()["socket_path"], "other": json.loads(other)}})
manager.destroy_all_vms()
manager.stop()
told["left"] = names(leases) + names(runtime)
print(json.dumps(told))
""".format(IMPORT)
HOW = r"^VMs start here: yes{} \(\S+ on (kvm|tcg): (hardware|emulated); jail (complete|without [\w, ]+); isolated (and connected|only)\)"
CACHE = "/var/cache/tw-microvm"
OURS = "mkdir -p {0} && mount -t tmpfs -o mode=700 tmpfs {0}".format(CACHE)


class Hosts(unittest.TestCase):
    def setUp(self) -> None:
        if os.geteuid() != 0:
            self.skipTest("needs root: it mounts other folders, in a namespace of its own")
        scratch = tempfile.TemporaryDirectory(dir="/dev/shm")
        self.addCleanup(scratch.cleanup)
        self.scratch = scratch.name

    def told(self, script: str, code: str = CODE, after: str = "exec") -> Dict[str, Any]:
        """Runs the code where the script has been run as root; ``after`` begins the line of the interpreter."""
        command = "set -e; d={}; mount -t tmpfs -o mode=755 tmpfs $d; {}; {} {} -c \"$1\"".format(self.scratch, script, after, sys.executable)
        unshare = [find_tool("unshare") or "unshare", "--mount", "--propagation", "private"]
        done = subprocess.run(
            unshare + ["/bin/sh", "-c", command, "sh", code],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True, timeout=240,
        )
        self.assertEqual(done.returncode, 0, done.stderr)
        told: Dict[str, Any] = json.loads(done.stdout)
        return told

    def refused(self, told: Dict[str, Any], *words: str) -> None:
        """A start fails, and doctor has said so, both in these words."""
        self.assertFalse(told["started"])
        self.assertFalse(told["report"]["verdict"]["starts"])
        self.assertEqual(told["report"]["verdict"]["text"], "VMs start here: no")
        (first,) = [each["what"] for each in told["report"]["problems"] if each["what"].startswith("no VM starts: ")]
        for word in words:
            with self.subTest(word):
                self.assertIn(word, told["error"]["message"])
                self.assertIn(word, first)

    def test_cache_on_a_read_only_file_system(self) -> None:
        self.refused(self.told(OURS + " && mount -o remount,ro " + CACHE), "Read-only file system", "cache_dir", CACHE)

    def test_cache_on_a_full_file_system(self) -> None:
        # The filler lies in disks/, because a foreign file directly in cache_dir is refused before the space is checked.
        fill = "dd if=/dev/zero of={}/disks/full bs=64k 2>/dev/null || true".format(CACHE)
        made = "mkdir -p {0} && mount -t tmpfs -o mode=700,size=1m tmpfs {0} && mkdir -m 700 {0}/disks".format(CACHE)
        self.refused(self.told(made + " && " + fill), "No space left on device", "cache_dir", CACHE)

    def test_runtime_folders_on_read_only_file_systems(self) -> None:
        # Both places of the default runtime folder.
        mount = "mkdir -p {0}; mount -t tmpfs -o mode=700,ro tmpfs {0}; "
        mounts = "".join(mount.format(folder) for folder in ("/run/tw-microvm", "/dev/shm/tw-microvm-0"))
        self.refused(self.told(OURS + "; " + mounts + "true"), "Read-only file system", "runtime_dir")

    def test_read_only_run_and_a_writable_shared_memory(self) -> None:
        # With /run in memory, as on most hosts, and on a disk, as in a container.
        for run in ("mount -t tmpfs -o ro tmpfs /run", "mount --bind /etc /run && mount -o remount,bind,ro /run"):
            with self.subTest(run):
                # An empty /dev/shm, without leases and VMs of other processes.
                shared = "mount -t tmpfs -o mode=1777 tmpfs /dev/shm"
                told = self.told("{}; {}; {}".format(OURS, run, shared), LEASED)
                self.assertTrue(told["started"], told["error"])
                self.assertTrue(told["verdict"]["starts"], told)
                self.assertEqual(told["runtime_dir"], "/dev/shm/tw-microvm-0")
                # A client in another process finds the VM's socket.
                self.assertEqual(told["socket"], "/dev/shm/tw-microvm-0/" + told["vm_id"] + "/sock")
                self.assertEqual(told["other"], ["/dev/shm/tw-microvm-0", True])
                self.assertEqual(len(told["leases"]), 1, told)
                self.assertEqual(told["left"], [".tw-microvm"] * 2)

    def test_package_on_a_file_system_without_exec(self) -> None:
        noexec = "mount --bind {0} {0} && mount -o remount,bind,noexec {0}".format(DATA)
        self.refused(self.told(OURS + " && " + noexec), "noexec")

    def test_kvm_that_is_a_file_is_not_usable_and_a_vm_is_emulated(self) -> None:
        told = self.told(OURS + " && " + self.with_vmx("echo >$d/kvm; mount --bind $d/kvm /dev/kvm"))
        self.assertFalse(told["report"]["kvm"]["usable"])
        self.assertIn("a regular file", told["report"]["kvm"]["reason"])
        self.assertTrue(told["started"], told["error"])
        self.assertEqual(told["info"]["isolation_grade"], "emulated")
        self.assertIn("emulated", told["report"]["verdict"]["text"])

    def test_kvm_that_is_another_device_is_refused_where_hardware_is_demanded(self) -> None:
        code = CODE.replace('{"start_timeout_s"', '{"min_isolation": "hardware", "start_timeout_s"')
        self.assertNotEqual(code, CODE)
        told = self.told(OURS + " && " + self.with_vmx("mount --bind /dev/zero /dev/kvm"), code)
        self.assertEqual(told["error"]["code"], "isolation_unavailable")
        self.assertIn("the character device 1:5", told["error"]["message"])
        self.assertEqual(told["error"]["details"]["limited_by"], "this host")

    def with_vmx(self, script: str) -> str:
        """The script, on a host whose CPU says that it can virtualize."""
        if not Path("/dev/kvm").exists():
            self.skipTest("needs a /dev/kvm to mount something in its place")
        flags = "sed 's/^flags\\t\\t:/flags\\t\\t: vmx/' /proc/cpuinfo >$d/cpuinfo; mount --bind $d/cpuinfo /proc/cpuinfo"
        return "{}; {}".format(flags, script)

    def test_chroot_is_named_as_the_cause(self) -> None:
        # The same files, but for the mounts, below a root that is no mount itself.
        tree = (
            "mkdir $d/tree; for f in /*; do "
            "if [ -L $f ]; then cp -d $f $d/tree; elif [ -d $f ]; then mkdir $d/tree$f; mount --rbind $f $d/tree$f; fi; done"
        )
        told = self.told(OURS + "; " + tree, after="exec chroot $d/tree")
        jail = told["report"]["jail"]
        self.assertFalse(told["report"]["privileges"]["user_namespaces"])
        self.assertFalse(jail["namespaces"]["given"])
        self.assertIn("in a chroot", jail["namespaces"]["how"])
        self.assertEqual(told["started"], told["report"]["verdict"]["starts"], told["error"])


class Agreement(VMTestCase):
    def test_layers_are_those_of_the_vm_in_the_same_words(self) -> None:
        report, jail = doctor(), self.running().get_info()["jail"]
        self.assertTrue({"namespaces", "root", "seccomp", "seccomp_allow_list", "vmm_sandbox"} <= set(report["jail"]))
        for name, layer in report["jail"].items():
            with self.subTest(name):
                self.assertEqual(layer["given"], jail[name]["given"])
                if name != "uid" and not name.startswith("cgroup_"):
                    self.assertEqual(layer["how"], jail[name]["how"])
        self.assertEqual(report["privileges"]["user_namespaces"], report["jail"]["namespaces"]["given"])

    def test_verdict_is_the_first_line_and_names_backend_and_reason(self) -> None:
        verdict = doctor()["verdict"]
        self.assertRegex(verdict["text"], HOW.format("") + r"; no start was tried$")
        done = self.microvm("--quick")
        self.assertEqual((done.returncode, done.stdout.splitlines()[0], done.stderr), (0, verdict["text"], ""))
        self.assertIn(verdict["backend_reason"], done.stdout)

    def test_verdict_is_measured_by_a_start_and_what_to_do_comes_before_what_was_found(self) -> None:
        done = self.microvm()
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        first, second, _, third = done.stdout.splitlines()[:4]
        self.assertRegex(first, HOW.format(r", in \d+\.\d s") + "$")
        self.assertRegex(second, r"^  with {}: ".format(first.split("(")[1].split()[0]))
        self.assertIn(third, ("Problems", "No problems found."))
        self.assertRegex(done.stdout, r"\nStarted\n  \S+ (isolated|connected) VM: answered after \d+\.\d s ")

    def test_measured_report_has_the_jail_that_the_vm_got(self) -> None:
        report = doctor(start=True)
        self.assertEqual(misfits(report, DoctorReport, "report"), [])
        start = next(each for each in report["starts"] if each["error"] is None)
        self.assertGreater(start["seconds"], 0.0)
        told = {"{} on {}: {}".format(start["backend"], start["accelerator"], start["isolation_grade"])}
        self.assertEqual({report["verdict"]["text"].split("(")[1].split(";")[0]}, told)
        for name, layer in report["jail"].items():
            with self.subTest(name):
                self.assertEqual(layer["given"], start["jail"][name]["given"])
        self.assertLessEqual(set(doctor()["jail"]), set(report["jail"]))

    def test_vmm_that_ends_at_once_shows_in_a_start_alone(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            # It answers --version, and prints its arguments when it is to run a VM.
            shutil.copy("/bin/echo", folder + "/qemu-system-x86_64")
            os.chmod(folder, 0o755)
            env = dict(os.environ, PATH=folder + ":" + os.environ["PATH"])
            quick, real, told = self.microvm("--quick", env=env), self.microvm(env=env), self.microvm("--json", env=env)
        self.assertEqual((quick.returncode, real.returncode, told.returncode), (0, 1, 1))
        self.assertEqual(real.stdout.splitlines()[0], "VMs start here: no")
        report = json.loads(told.stdout)
        self.assertEqual(report["verdict"]["error"], "start_failed")
        self.assertIn("no VM starts: ", report["problems"][0]["what"])
        isolated = [one["error"] for one in report["starts"] if not one["connected"]]
        self.assertIn(isolated[0], report["problems"][0]["what"])

    def test_doctor_leaves_nothing(self) -> None:
        report = doctor(start=True)
        bases = [Path(report[name]) for name in ("runtime_dir", "cache_dir")]
        # Of VMs; locks and marks stay where they are.
        content = lambda: sorted(path for base in bases for path in base.rglob("*") if "templates" not in path.parts)
        before = content()
        doctor(start=True)
        self.assertEqual(content(), before)

    def test_suspended_vm_that_cannot_come_back_is_told_with_the_way_out(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            image = make_rootfs(Path(folder) / "root.ext4")
            vm = self.running(rootfs_path=str(image))
            self.addCleanup(self.manager.destroy_vm, vm.vm_id)
            self.assertTrue(vm.suspend(), vm.last_error)
            told = lambda: [one for one in doctor()["problems"] if vm.vm_id in one["what"]]
            self.assertEqual(told(), [])
            with image.open("r+b") as file:
                file.seek(3 << 20)
                file.write(b"replaced")
            (problem,) = told()
            self.assertIn("rootfs", problem["what"])
            self.assertIn("export_disk()", problem["remedy"] or "")

    def microvm(self, *options: str, **kwargs: Any) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", IMPORT, "doctor", *options]
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True, **kwargs)

    def test_each_backend_tells_what_it_lacks(self) -> None:
        for backend in doctor()["backends"]:
            with self.subTest(backend["backend"]):
                self.assertEqual(backend["lacks_layers"] is not None, backend["available"])
                self.assertEqual(backend["snapshots"], backend["backend"] == "qemu" if backend["available"] else None)


if __name__ == "__main__":
    unittest.main()
