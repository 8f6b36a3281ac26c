"""The jail and the limits as a user of the package meets them."""

import json
import os
import re
import signal
import stat
import tempfile
import time
import unittest
import unittest.mock
from pathlib import Path
from typing import Any, List

from thirstys_waterfall.security.microvm_isolation import MicroVMIsolationManager, VMResourceLimits, doctor

from ..support import IMPORT, VMTestCase, eventually, limits, make_rootfs, run_python, shell
from ..surface.test_process import HEAD, RUNNING

CGROUPS = Path("/sys/fs/cgroup")
LEASES = Path("/run/tw-microvm-uids")


def our_groups() -> List[str]:
    # Path.rglob fails when a folder goes while it looks; this passes it over.
    folders = (os.path.join(above, name) for above, names, _ in os.walk(str(CGROUPS)) for name in names)
    return sorted(folder for folder in folders if os.path.basename(folder).startswith("tw-microvm-"))


def all_given(report: Any) -> bool:
    """Whether nothing is missing; where cgroups cannot restrict devices (v2), a root without any does it."""
    missing = {name for name, layer in report.items() if name != "mode" and not layer["given"]}
    return missing <= ({"cgroup_devices"} if report["root"]["given"] else set())


class Modes(VMTestCase):
    def test_default_reports_every_layer_and_limit(self) -> None:
        info = self.running().get_info()
        self.assertEqual(info["jail"]["mode"], "default")
        for name in ("namespaces", "root", "uid", "capabilities", "landlock", "seccomp", "vmm_sandbox", "cgroup_memory"):
            with self.subTest(name):
                self.assertEqual(set(info["jail"][name]), {"given", "how"})
                self.assertTrue(info["jail"][name]["how"])
        self.assertEqual(set(info["limits"]), set(info["resource_limits"]))
        self.assertTrue(all(where for where in info["limits"].values()))

    def test_report_of_a_vm_that_does_not_run_is_empty(self) -> None:
        info = self.manager.get_vm_info(self.create())
        self.assertEqual((info["jail"], info["limits"]), (None, None))

    def test_doctor_and_vm_agree_on_what_this_host_gives(self) -> None:
        report, jail = doctor()["jail"], self.running().get_info()["jail"]
        for name, layer in report.items():
            with self.subTest(name):
                self.assertEqual(layer["given"], jail[name]["given"])

    def test_strict_starts_where_everything_is_given_and_only_there(self) -> None:
        manager = MicroVMIsolationManager({"jail": "strict"})
        self.addCleanup(manager.stop)
        started = manager.start_vm(manager.create_vm("plugin", limits()))
        self.assertEqual(started, all_given(self.running().get_info()["jail"]), manager.last_error)

    def test_strict_names_what_is_missing(self) -> None:
        # The process moves into a v2 group that has no controllers, so that the layers are missing for root, too.
        if os.geteuid() != 0 or not (CGROUPS / "unified").is_dir():
            self.skipTest("needs root and a cgroup v2 hierarchy without controllers beside v1")
        code = RUNNING.replace('"default_memory_mb": 128', '"jail": "strict", "default_memory_mb": 128')
        # First the imports: the interpreter's files may be closed to that user.
        become = HEAD.partition("manager")[0] + "os.setgroups([]); os.setresuid(61234, 61234, 61234)\n"
        done = run_python(become + code)
        self.assertIn("jail=strict was asked for", done.stderr)
        self.assertIn("cgroup_memory", done.stderr)

    def test_without_user_namespaces_a_vm_starts_with_what_is_left_and_says_so(self) -> None:
        if os.geteuid() != 0:
            self.skipTest("needs root: it becomes another user who may make no namespaces")
        # First the imports: the interpreter's files may be closed to that user. Then a namespace in which there may be
        # no others: nothing of it is seen elsewhere.
        without = (
            "import ctypes, json\nlibc = ctypes.CDLL(None)\n"
            "os.setgroups([]); os.setresgid(61234, 61234, 61234); os.setresuid(61234, 61234, 61234)\n"
            "libc.prctl(4, 1, 0, 0, 0)\nassert libc.unshare(0x10000000) == 0\n"
            "for name, text in (('setgroups', 'deny'), ('uid_map', '61234 61234 1'), ('gid_map', '61234 61234 1')):\n"
            "    open('/proc/self/' + name, 'w').write(text)\n"
            "open('/proc/sys/user/max_user_namespaces', 'w').write('0')\n"
        )
        report = "print(json.dumps([vm.send_command('ping')['result'], vm.get_info()['jail']]))"
        # That user may have no KVM: in the nested lab the VM is emulated by a VM that is emulated.
        patient = RUNNING.replace('"default_memory_mb": 128', '"start_timeout_s": 240, "default_memory_mb": 128')
        self.assertNotEqual(patient, RUNNING)
        done = run_python(HEAD.partition("manager")[0] + without + patient + report)
        self.assertEqual(done.returncode, 0, done.stderr)
        pong, jail = json.loads(done.stdout)
        self.assertEqual(pong, "pong")
        given = {name: layer["given"] for name, layer in jail.items() if name != "mode"}
        self.assertFalse(given["namespaces"] or given["root"])
        self.assertIn("max_user_namespaces", jail["namespaces"]["how"])
        self.assertTrue(given["landlock"] and given["seccomp"] and given["rlimits"] and given["vmm_sandbox"])

    def test_audit_starts_and_finds_nothing_in_an_ordinary_life(self) -> None:
        manager = MicroVMIsolationManager({"jail": "audit"})
        manager.start()
        self.addCleanup(manager.stop)
        vm = manager.get_vm(manager.create_vm("plugin", limits(vcpu_count=2)))
        self.assertTrue(vm.start(), vm.last_error)
        self.result(vm, "exec", shell("dd if=/dev/zero of=/data/x bs=1M count=20; sync; cat /data/x >/dev/null"))
        self.assertTrue(vm.pause() and vm.resume())
        self.assertEqual(vm.get_health_metrics().health_status, "healthy")
        self.assertEqual(vm.get_info()["jail"]["would_deny"], [])

    def test_audit_copies_a_vm_that_runs_and_takes_one_back(self) -> None:
        # A clone is handed the most descriptors, and they must not collide with the audit's own.
        manager, name = MicroVMIsolationManager({"jail": "audit", "start_timeout_s": 120}), "audited-{}".format(os.getpid())
        manager.start()
        self.addCleanup(manager.stop)
        vm = manager.get_vm(manager.create_vm("plugin", limits()))
        self.assertTrue(vm.start(), vm.last_error)
        vm.snapshot(name)
        self.addCleanup(manager.delete_template, name)
        clone = manager.get_vm(manager.create_vm("plugin", template=name))
        self.assertTrue(clone.start(), clone.last_error)
        self.assertTrue(vm.suspend(), vm.last_error)
        self.assertTrue(manager.resume_vm(vm.vm_id), manager.last_error)
        for each in (vm, clone):
            self.assertEqual(self.result(each, "ping"), "pong")
            self.assertEqual(each.get_info()["jail"]["would_deny"], [])

    def test_another_release_of_qemu_gets_the_deny_list_and_says_so(self) -> None:
        with tempfile.TemporaryDirectory(dir="/tmp") as name:
            os.chmod(name, 0o755)
            # A copy of QEMU whose version string is changed, so that it reports a newer release.
            real = Path(next(b["path"] for b in doctor()["backends"] if b["backend"] == "qemu")).resolve()
            content = real.read_bytes()
            if b"QEMU emulator version 7.2." not in content:
                self.skipTest("needs QEMU 7.2, whose version the test changes in a copy")
            # Beside the copy there are no firmware and modules: the copy lies in a tree like the original's.
            folder = Path(name) / "bin"
            folder.mkdir()
            for part in ("share", "lib"):
                (Path(name) / part).symlink_to(real.parent.parent / part)
            copy = folder / real.name
            copy.write_bytes(content.replace(b"QEMU emulator version 7.2.", b"QEMU emulator version 9.9."))
            copy.chmod(0o755)
            manager = MicroVMIsolationManager({"qemu_binary": str(copy)})
            self.addCleanup(manager.stop)
            vm = manager.get_vm(manager.create_vm("plugin", limits()))
            self.assertTrue(vm.start(), vm.last_error)
            jail = vm.get_info()["jail"]
            self.assertFalse(jail["seccomp_allow_list"]["given"])
            self.assertIn("9.9", jail["seccomp_allow_list"]["how"])
            self.assertIn("deny-list", jail["seccomp"]["how"])
            with unittest.mock.patch.dict(os.environ, PATH="{}:{}".format(folder, os.environ["PATH"])):
                report = doctor()["jail"]
            self.assertEqual((report["seccomp"], report["seccomp_allow_list"]), (jail["seccomp"], jail["seccomp_allow_list"]))
            strict = MicroVMIsolationManager({"qemu_binary": str(copy), "jail": "strict"})
            self.assertFalse(strict.start_vm(strict.create_vm("plugin", limits())))
            error = strict.last_error
            self.assertEqual(error.code, "isolation_unavailable")
            self.assertIn("backend qemu", error.details["limited_by"])
            self.assertIn("9.9", error.details["missing"]["seccomp_allow_list"])
            self.assertIn("release of QEMU that was measured", error.details["remedy"])
            manager.stop()


class Traces(VMTestCase):
    def test_emulator_has_no_huge_pages(self) -> None:
        info = self.running().get_info()
        told = re.search(r"^THP_enabled:\s*(\d)", Path("/proc/{}/status".format(info["pid"])).read_text(), re.M)
        if told is None:
            self.skipTest("kernels before 5.0 do not tell")
        self.assertEqual(told.group(1), "0" if info["accelerator"] == "tcg" else "1")

    def test_groups_and_uid_go_with_the_vm(self) -> None:
        if os.geteuid() != 0 or not (CGROUPS / "memory").is_dir():
            self.skipTest("needs root and cgroup v1: four hierarchies, and a uid for each VM")
        vm = self.running()
        lease = LEASES / str(Path("/proc/{}".format(vm.get_info()["pid"])).stat().st_uid)
        self.assertTrue(lease.exists())
        self.assertEqual(len([group for group in our_groups() if vm.vm_id in group]), 4)
        self.assertTrue(self.manager.destroy_vm(vm.vm_id))
        self.assertEqual([group for group in our_groups() if vm.vm_id in group], [])
        self.assertFalse(lease.exists())

    def test_two_vms_have_two_uids(self) -> None:
        if os.geteuid() != 0:
            self.skipTest("needs root: only root gives each VM a uid")
        pids = [self.running().get_info()["pid"] for _ in range(3)]
        self.assertEqual(len({Path("/proc/{}".format(pid)).stat().st_uid for pid in pids}), 3)

    def test_groups_of_a_killed_manager_are_gone_within_a_second(self) -> None:
        done = run_python(RUNNING + "print(vm.vm_id, flush=True); os.kill(os.getpid(), 9)")
        self.assertEqual(done.returncode, -signal.SIGKILL)
        left = lambda: [group for group in our_groups() if done.stdout.strip() in group]
        # The janitor outlives the killed manager and cleans up; tests/chaos/kill.py kills at random moments.
        self.assertTrue(eventually(lambda: not left(), 20.0), left())

    def test_failed_start_leaves_nothing(self) -> None:
        manager = MicroVMIsolationManager({"qemu_binary": "/bin/false"})
        self.addCleanup(manager.stop)
        vm_id = manager.create_vm("plugin", limits())
        self.assertFalse(manager.start_vm(vm_id))
        self.assertTrue(eventually(lambda: not any(vm_id in group for group in our_groups())), our_groups())


LIMITED = """
import json, resource
for name, value in {limits}.items():
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))
from {module} import *
manager = MicroVMIsolationManager({{"default_backend": "QEMU", "start_timeout_s": 120}})
vm = manager.get_vm(manager.create_vm("plugin", VMResourceLimits(memory_mb=128, disk_size_mb=64)))
started = vm.start()
told = {{"started": started, "code": vm.last_error and vm.last_error.code, "message": str(vm.last_error)}}
if started:
    asked = {{"program": "/bin/sh", "args": ["-c", "ulimit -n; ulimit -s; dd if=/dev/zero of=/data/x bs=1M count=20 2>/dev/null; sync; ls /data"]}}
    told["guest"] = vm.send_command("exec", asked)["result"]["stdout"].split()
    told["limits"] = open("/proc/{{}}/limits".format(vm.get_info()["pid"])).read()
    told["info"] = vm.get_info()["limits"]
manager.stop()
print(json.dumps(told))
"""


class Inherited(unittest.TestCase):
    """A hard limit that the manager's process was started with."""

    def told(self, **limits: int) -> Any:
        done = run_python(LIMITED.format(limits=limits, module=IMPORT), timeout=180)
        self.assertEqual(done.returncode, 0, done.stderr)
        return json.loads(done.stdout)

    def test_lower_ones_are_kept_and_the_vm_runs(self) -> None:
        mib = 1 << 20
        told = self.told(NOFILE=150, NPROC=100, CORE=0, MEMLOCK=0, STACK=2 * mib, FSIZE=300 * mib, DATA=2048 * mib, AS=8192 * mib)
        self.assertTrue(told["started"], told)
        # The guest's own limits are the guest's.
        self.assertEqual((told["guest"][0], told["guest"][-1]), ("1024", "x"))
        for name, value in (("open files", 150), ("stack size", 2 * mib), ("address space", 8192 * mib), ("core file size", 0)):
            self.assertRegex(told["limits"], r"Max {} +{v} +{v} ".format(name, v=value))
        self.assertIn("RLIMIT_NOFILE 150", " ".join(told["info"]["max_file_handles"]))

    def test_too_low_a_one_is_named_with_its_value_and_what_is_needed(self) -> None:
        cases = {"NOFILE": 70, "FSIZE": 32 << 20, "STACK": 900 << 10, "DATA": 900 << 20, "AS": 1400 << 20}
        if os.geteuid() == 0:
            # RLIMIT_NPROC counts all processes of a uid, so only root's remaining number is known.
            cases["NPROC"] = 50
        for name, value in cases.items():
            with self.subTest(name):
                told = self.told(**{name: value})
                self.assertEqual((told["started"], told["code"]), (False, "limit_too_low"), told)
                self.assertIn("RLIMIT_{} of this process is {} ".format(name, value), told["message"])
                self.assertIn("--ulimit {}=".format(name.lower()), told["message"])


class Borders(VMTestCase):
    def test_busy_guest_stays_within_its_cpu_quota(self) -> None:
        vm = self.running(resource_limits=limits(vcpu_count=1))
        pid = vm.get_info()["pid"]

        def cpu() -> float:
            fields = Path("/proc/{}/stat".format(pid)).read_text().rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

        script = "for i in 1 2 3; do (while :; do dd if=/dev/zero of=/data/$i bs=64k count=64 2>/dev/null; done) & done; sleep 8; kill 0"
        begun, before = time.monotonic(), cpu()
        vm.send_command("exec", shell(script, timeout=8))
        share = (cpu() - before) / (time.monotonic() - begun)
        self.assertLess(share, 1.1 * 1.1)

    def test_disk_rate_is_held_within_a_tenth(self) -> None:
        rate = 4 << 20
        vm = self.running(resource_limits=VMResourceLimits(1, 128, 128, disk_bytes_per_s=rate))
        # An idle token bucket is full, so the first second's worth of bytes goes through at once.
        script = "dd if=/dev/zero of=/data/x bs=1M count=8; sync; a=$(cut -d. -f1 /proc/uptime); " \
            "dd if=/dev/zero of=/data/y bs=1M count=48; sync; b=$(cut -d. -f1 /proc/uptime); echo $((b-a))"
        seconds = int(self.result(vm, "exec", shell(script, timeout=60))["stdout"])
        self.assertGreaterEqual(seconds, 0.9 * 48 * (1 << 20) / rate - 1)
        by_vmm, by_group = vm.get_info()["limits"]["disk_bytes_per_s"]
        self.assertIn("bytes/s", by_vmm)
        on_a_device = os.major(Path("/var/cache").stat().st_dev) != 0
        has_groups = os.geteuid() == 0 and "blkio" in Path("/proc/self/cgroup").read_text()
        self.assertIn("blkio.throttle" if on_a_device and has_groups else "cgroup", by_group)

    def test_disk_operations_are_held(self) -> None:
        vm = self.running(resource_limits=VMResourceLimits(1, 128, 64, disk_ops_per_s=50))
        script = "a=$(cut -d. -f1 /proc/uptime); for i in $(seq 200); do dd if=/dev/zero of=/data/x bs=4k count=1 " \
            "oflag=direct conv=notrunc 2>/dev/null || dd if=/dev/zero of=/data/x bs=4k count=1 conv=notrunc,fsync 2>/dev/null; " \
            "done; b=$(cut -d. -f1 /proc/uptime); echo $((b-a))"
        seconds = int(self.result(vm, "exec", shell(script, timeout=90))["stdout"])
        self.assertGreaterEqual(seconds, 0.9 * 200 / 50 - 2)

    def test_host_memory_is_not_overcommitted_unless_asked(self) -> None:
        kib = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
        total_mb = int(kib.split()[1]) >> 10
        config = {"max_memory_mb": 4 * total_mb}
        manager = MicroVMIsolationManager(config)
        too_much = VMResourceLimits(memory_mb=min(total_mb, 1 << 20))
        self.assertIsNone(manager.create_vm("plugin", too_much))
        self.assertEqual(manager.last_error.code, "quota_exceeded")
        self.assertIn("host memory", str(manager.last_error))
        willing = MicroVMIsolationManager(dict(config, overcommit_memory=True))
        self.assertIsNotNone(willing.create_vm("plugin", too_much), willing.last_error)

    def test_images_that_only_root_may_read_are_refused_with_the_way_out(self) -> None:
        if os.geteuid() != 0:
            self.skipTest("needs root: an ordinary user's VMs run as that user")
        with tempfile.TemporaryDirectory() as name:
            image = make_rootfs(Path(name) / "root.ext4")
            image.chmod(stat.S_IRUSR | stat.S_IWUSR)
            vm_id = self.create(rootfs_path=str(image))
            self.assertFalse(self.manager.start_vm(vm_id))
            self.assertEqual(self.manager.last_error.code, "image_unreadable")
            self.assertIn("chmod o+r", str(self.manager.last_error))
            image.chmod(0o644)
            self.assertTrue(self.manager.start_vm(vm_id), self.manager.last_error)


if __name__ == "__main__":
    unittest.main()
