"""VMs run in containers, and on hosts that lack something else, with the missing layers named."""

import json
import shlex
import unittest
from typing import Any, Dict, List

from ..support import DATA, IMPORT
from .container import CLONE3, PATH, PIDFD_OPEN, Container

# The first process of a container: it reaps no process that it did not start.
LIFE = """
import json, os
from {module} import *
# Here, as --user would before the interpreter is loaded: it may be in a folder that is root's alone.
if {uid}:
    os.setgroups([]); os.setresgid({uid}, {uid}, {uid}); os.setresuid({uid}, {uid}, {uid})
told = {{}}
manager = MicroVMIsolationManager(dict({{"start_timeout_s": 60}}, **{config}))
vm = manager.get_vm(manager.create_vm("plugin", VMResourceLimits(memory_mb=128, disk_size_mb=64)))
told["started"] = vm.start()
told["error"] = vm.last_error and {{"code": vm.last_error.code, "message": str(vm.last_error)}}
if told["started"]:
    info = vm.get_info()
    told["grade"], told["socket"] = info["isolation_grade"], info["socket_path"]
    told["missing"] = {{name: layer["how"] for name, layer in info["jail"].items() if isinstance(layer, dict) and not layer["given"]}}
    script = "dd if=/dev/zero of=/data/x bs=1M count=4 2>/dev/null && sync && echo written"
    told["said"] = vm.send_command("exec", {{"program": "/bin/sh", "args": ["-c", script]}})["result"]["stdout"]
manager.destroy_all_vms()
manager.stop()
state = lambda pid: open("/proc/" + pid + "/stat").read().rpartition(")")[2].split()[0]
told["zombies"] = [pid for pid in os.listdir("/proc") if pid.isdigit() and state(pid) == "Z"]
names = lambda *folders: {{folder: sorted(os.listdir(folder)) for folder in folders if os.path.isdir(folder)}}
told["made"] = names("/run", "/var/cache", "/tmp", "/dev/shm")
print(json.dumps(told))
"""
DOCTOR = """
import json
from {module} import doctor
print(json.dumps([[each["what"], each["remedy"]] for each in doctor(start=False)["problems"]]))
"""
VICTIM = """
import os
from {module} import *
manager = MicroVMIsolationManager({{"templates": False, "raise_on_error": True}})
vm = manager.get_vm(manager.create_vm("plugin", VMResourceLimits(memory_mb=128, disk_size_mb=64)))
vm.start()
os.kill(os.getpid(), 9)
"""
# The first process waits for the victim, and for none of its children.
KILLED = """
import json, os, subprocess, sys, time
assert subprocess.call([sys.executable, "-c", {victim!r}]) == -9

def others():
    for pid in os.listdir("/proc"):
        if pid.isdigit() and pid != "1":
            name, _, rest = open("/proc/" + pid + "/stat").read().partition("(")[2].rpartition(")")
            yield name, rest.split()[0] == "Z"

end = time.monotonic() + 10
while time.monotonic() < end and not all(dead for _, dead in others()):
    time.sleep(0.05)
found = list(others())
told = {{"alive": [name for name, dead in found if not dead], "zombies": [name for name, dead in found if dead]}}
told["left"] = os.listdir("/dev/shm/tw-microvm-0")
print(json.dumps(told))
"""
READ_ONLY_GROUPS = (
    "for path in $(awk '$5 ~ \"^/sys/fs/cgroup\" {print $5}' /proc/self/mountinfo); do mount -o remount,bind,ro $path; done"
)
GROUPS = {"cgroup_cpu", "cgroup_memory", "cgroup_pids"}
PODMAN = (("PATH", PATH), ("HOME", "/root"), ("container", "podman"))
# With Docker's default profile no namespace can be made, and its control groups are read-only.
BY_DOCKER = {"namespaces", "root", "namespace_limits", "keyring", "uid"} | GROUPS
# What depends on the host's control groups, or on whether a zygote stands by.
VARYING = {"cgroup_devices", "cgroup_io", "address_layout", "network_namespace"}


class ContainerTestCase(unittest.TestCase):
    def told(self, container: Container, uid: int = 0, head: str = "", **config: Any) -> Dict[str, Any]:
        config = dict({"templates": False}, **config)
        done = container.run(head + LIFE.format(module=IMPORT, config=ascii(config), uid=uid))
        self.assertEqual(done.returncode, 0, done.stderr)
        told: Dict[str, Any] = json.loads(done.stdout)
        return told

    def runs(self, container: Container, uid: int = 0, head: str = "", **config: Any) -> Dict[str, Any]:
        """A VM starts in the container, writes to its disk, and leaves neither a zombie nor a file."""
        told = self.told(container, uid, head, **config)
        self.assertTrue(told["started"], told["error"])
        self.assertEqual(told["said"], "written\n")
        self.assertEqual(told["zombies"], [])
        return told

    def ours(self, told: Dict[str, Any]) -> List[str]:
        """The folders of the package's own that were made."""
        return sorted("{}/{}".format(folder, name) for folder, names in told["made"].items() for name in names if "tw-microvm" in name)


class Docker(ContainerTestCase):
    """What ``docker run`` gives without an option, and with some."""

    def test_defaults(self) -> None:
        told = self.runs(Container())
        self.assertEqual(set(told["missing"]) - VARYING, BY_DOCKER)
        self.assertEqual(self.ours(told), ["/dev/shm/tw-microvm-0", "/var/cache/tw-microvm"])

    def test_a_template_and_its_clone(self) -> None:
        told = self.runs(Container(), templates=True)
        self.assertEqual(set(told["missing"]) - VARYING, BY_DOCKER)

    def test_an_ordinary_user(self) -> None:
        told = self.runs(Container(), uid=61234)
        self.assertEqual(set(told["missing"]) - VARYING, BY_DOCKER - {"uid"})

    def test_read_only_with_a_tmpfs_at_tmp(self) -> None:
        told = self.runs(Container(read_only=True, tmpfs=("/tmp",)))
        self.assertEqual(set(told["missing"]) - VARYING, BY_DOCKER)
        self.assertEqual(self.ours(told), ["/dev/shm/tw-microvm-0", "/tmp/tw-microvm-cache-0"])

    def test_read_only_with_a_tmpfs_at_tmp_for_an_ordinary_user(self) -> None:
        told = self.runs(Container(read_only=True, tmpfs=("/tmp",)), uid=61234)
        self.assertEqual(self.ours(told), ["/tmp/tw-microvm-61234", "/tmp/tw-microvm-cache-61234"])

    def test_read_only_without_shared_memory(self) -> None:
        told = self.runs(Container(read_only=True, tmpfs=("/tmp",), shm_size=0))
        self.assertEqual(self.ours(told), ["/tmp/tw-microvm-0", "/tmp/tw-microvm-cache-0"])

    def test_read_only_without_a_tmpfs_is_refused_with_the_option_that_it_wants(self) -> None:
        told = self.told(Container(read_only=True))
        self.assertEqual((told["started"], told["error"]["code"]), (False, "folder_refused"))
        for word in ('config["cache_dir"]', "/var/cache/tw-microvm", "Read-only file system", "docker run --tmpfs /tmp"):
            with self.subTest(word):
                self.assertIn(word, told["error"]["message"])

    def test_little_shared_memory(self) -> None:
        self.runs(Container(shm_size=1 << 20), templates=True)

    def test_privileged_lacks_nothing(self) -> None:
        told = self.runs(Container(privileged=True))
        self.assertEqual(set(told["missing"]) - VARYING, set())
        self.assertIn("/run/tw-microvm-uids", self.ours(told))

    def test_privileged_with_a_read_only_root_leases_uids_elsewhere(self) -> None:
        told = self.runs(Container(privileged=True, read_only=True, tmpfs=("/tmp",)))
        self.assertNotIn("uid", told["missing"])
        self.assertIn("/dev/shm/tw-microvm-uids", self.ours(told))
        told = self.runs(Container(privileged=True, read_only=True, tmpfs=("/tmp",), shm_size=0))
        self.assertNotIn("uid", told["missing"])
        self.assertIn("/tmp/tw-microvm-uids", self.ours(told))

    def test_control_groups_that_are_read_only_are_all_that_is_missing(self) -> None:
        told = self.runs(Container(privileged=True, script=READ_ONLY_GROUPS, environment=PODMAN))
        self.assertEqual(set(told["missing"]) - VARYING, GROUPS)
        for name in GROUPS:
            self.assertIn("Read-only file system", told["missing"][name])
            self.assertIn("-v /sys/fs/cgroup:/sys/fs/cgroup:rw", told["missing"][name])

    def test_doctors_remedies_are_options_of_the_container(self) -> None:
        marked = (("PATH", PATH), ("container", "podman"))
        done = Container(privileged=True, script=READ_ONLY_GROUPS, environment=marked).run(DOCTOR.format(module=IMPORT))
        self.assertEqual(done.returncode, 0, done.stderr)
        remedies = {what.split(":")[0].split()[-1]: remedy for what, remedy in json.loads(done.stdout)}
        self.assertLessEqual(GROUPS, set(remedies))
        for name in GROUPS:
            self.assertIn("-v /sys/fs/cgroup:/sys/fs/cgroup:rw", remedies[name])
        self.assertNotIn("systemd", done.stdout)


class Podman(ContainerTestCase):
    """What ``podman run`` gives to an ordinary user: root is root in a user namespace alone."""

    def test_without_root(self) -> None:
        told = self.runs(Container(rootless=True, seccomp=False, environment=PODMAN))
        # The limits of namespaces are in /proc/sys, which is read-only.
        self.assertEqual(set(told["missing"]) - VARYING, {"uid", "namespace_limits"} | GROUPS)
        self.assertIn("start the container by root of its host, with --privileged", told["missing"]["uid"])

    def test_without_root_and_with_a_filter_that_denies_namespaces(self) -> None:
        told = self.runs(Container(rootless=True, environment=PODMAN))
        self.assertEqual(set(told["missing"]) - VARYING, BY_DOCKER)

    def test_without_root_a_template_and_its_clone(self) -> None:
        self.runs(Container(rootless=True, seccomp=False, environment=PODMAN), templates=True)

    def test_without_root_and_read_only_with_a_tmpfs_at_tmp(self) -> None:
        self.runs(Container(rootless=True, read_only=True, tmpfs=("/tmp",), environment=PODMAN))


class Hosts(ContainerTestCase):
    """What a service manager or an odd host takes away."""

    def test_a_devices_folder_without_null_is_named(self) -> None:
        told = self.told(Container(nodes=("random", "urandom", "zero")))
        self.assertEqual((told["started"], told["error"]["code"]), (False, "host_error"))
        self.assertIn("open failed on /dev/null: No such file", told["error"]["message"])
        self.assertIn("mknod -m 666 /dev/null c 1 3", told["error"]["message"])

    def test_a_system_that_is_protected_but_for_a_cache_folder(self) -> None:
        # systemd's ProtectSystem=strict with CacheDirectory=; /dev and what is mounted below stay as they are.
        cache = "mkdir -m 700 /var/cache/tw-microvm; mount -t tmpfs -o mode=700 tmpfs /var/cache/tw-microvm"
        protect = "for path in / /run /var/cache /tmp /var/tmp; do mount -o remount,bind,ro $path; done"
        told = self.runs(Container(privileged=True, script="{}; {}".format(cache, protect)))
        self.assertEqual(set(told["missing"]) - VARYING, set())
        self.assertEqual(self.ours(told), ["/dev/shm/tw-microvm-0", "/dev/shm/tw-microvm-uids", "/var/cache/tw-microvm"])

    def test_no_environment_but_a_path(self) -> None:
        self.runs(Container(environment=(("PATH", PATH),)), uid=61234)

    def test_folders_of_the_environment(self) -> None:
        script = "mkdir -m 700 /run/mine /var/cache/mine; chown 61234:61234 /run/mine /var/cache/mine"
        xdg = (("PATH", PATH), ("XDG_RUNTIME_DIR", "/run/mine"), ("XDG_CACHE_HOME", "/var/cache/mine"))
        told = self.runs(Container(script=script, environment=xdg), uid=61234)
        self.assertTrue(told["socket"].startswith("/run/mine/tw-microvm/"), told["socket"])
        self.assertEqual(self.ours(told), [])

    def killed(self, container: Container) -> Dict[str, Any]:
        """What is left of a manager that was killed while its VM ran."""
        done = container.run(KILLED.format(victim=VICTIM.format(module=IMPORT)))
        self.assertEqual(done.returncode, 0, done.stderr)
        told: Dict[str, Any] = json.loads(done.stdout)
        return told

    def test_first_process_that_reaps_nobody_when_the_manager_is_killed(self) -> None:
        told = self.killed(Container())
        self.assertEqual(told["alive"], [])
        self.assertEqual(sorted(told["zombies"]), ["microvm-jail", "microvm-janitor", "microvm-zygote"])
        self.assertEqual(told["left"], [".tw-microvm"])

    def test_system_calls_of_linux_4_19(self) -> None:
        without = "import ctypes\nfor call in ({}, {}):\n    assert ctypes.CDLL(None).syscall(call, 0, 0) == -1\n".format(PIDFD_OPEN, CLONE3)
        told = self.runs(Container(privileged=True, old_kernel=True), head=without, templates=True)
        self.assertEqual(set(told["missing"]) - VARYING, {"landlock"})

    def test_system_calls_of_linux_4_19_when_the_manager_is_killed(self) -> None:
        # Its janitor and the sweep of control groups do without descriptors of processes.
        told = self.killed(Container(privileged=True, old_kernel=True))
        self.assertEqual((told["alive"], told["left"]), ([], [".tw-microvm"]))

    def test_paths_that_the_locale_cannot_say(self) -> None:
        # Python has them as bytes that are no text to it; the package is in such a folder, too.
        homes = "for name in 'k\\303\\244se' '\\377'; do home=$(printf /tmp/$name); mkdir -m 700 $home; chown 61234 $home; done"
        package = "package=$(printf '/tmp/p\\303\\244ckage'); mkdir $package; mount --bind {} $package".format(shlex.quote(str(DATA.parents[3])))
        head = "import os, sys; sys.path.insert(0, os.fsdecode(bytes({})))\n".format(list("/tmp/p\u00e4ckage".encode()))
        plain = (("PATH", PATH), ("LC_ALL", "C"), ("PYTHONUTF8", "0"), ("PYTHONCOERCECLOCALE", "0"))
        for home in ("/tmp/k\u00e4se", "/tmp/\udcff"):
            with self.subTest(ascii(home)):
                environment = plain + (("HOME", home), ("XDG_RUNTIME_DIR", home))
                self.runs(Container(script=homes + "; " + package, environment=environment), uid=61234, head=head)
        self.runs(Container(script=package, environment=plain), head=head, cache_dir="/var/cache/k\u00e4se", runtime_dir="/run/k\u00e4se")

    def test_locales(self) -> None:
        for locale in ("C", "tr_TR.UTF-8", "no such locale"):
            with self.subTest(locale):
                self.runs(Container(environment=(("PATH", PATH), ("LC_ALL", locale), ("LANG", locale))))


if __name__ == "__main__":
    unittest.main()
