"""VMMs that are forked out of a zygote: like executed ones in all that the host can see, and never needed."""

import ctypes
import importlib.util
import os
import shutil
import signal
import tempfile
import unittest
from pathlib import Path
from typing import Any, Dict, List, Optional, Set

from thirstys_waterfall.security.microvm_isolation import MicroVMIsolationManager

from .. import own_qemu
from ..support import DATA, ROOT, VMTestCase, alive, children, eventually, limits, run_python


def cmdline(pid: int) -> List[bytes]:
    return Path("/proc/{}/cmdline".format(pid)).read_bytes().rstrip(b"\0").split(b"\0")


def environment(pid: int) -> bytes:
    return Path("/proc/{}/environ".format(pid)).read_bytes().rstrip(b"\0")


def mounted(pid: int) -> Set[str]:
    """Where something is mounted in a process's root."""
    return {line.split()[4] for line in Path("/proc/{}/mountinfo".format(pid)).read_text().splitlines()}


def zygotes(parent: Optional[int] = None) -> List[int]:
    return [pid for pid in children(parent) if cmdline(pid)[0] == b"microvm-zygote"]


def is_forked(vm: Any) -> bool:
    return not vm.get_info()["jail"]["address_layout"]["given"]


def status(pid: int) -> Dict[str, str]:
    """What /proc tells of a process's rights."""
    lines = Path("/proc/{}/status".format(pid)).read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    names = ("Umask", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp", "Seccomp_filters")
    names += ("SigBlk", "SigIgn")
    return {name: fields[name].strip() for name in names if name in fields}


def descriptors(pid: int) -> List[str]:
    """What the open descriptors are, without the numbers of pipes and sockets; QEMU's own threads number them by chance."""
    return sorted(os.readlink(str(entry)).partition(":[")[0] for entry in Path("/proc/{}/fd".format(pid)).iterdir())


def limits_of(pid: int) -> str:
    return Path("/proc/{}/limits".format(pid)).read_text()


def canary(pid: int) -> int:
    """The stack protector's, which glibc keeps 0x28 behind the main thread's FS base."""
    attach, detach, peek_user = 16, 17, 3
    fs_base = 21 * 8
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    libc.ptrace.restype = ctypes.c_long
    if libc.ptrace(attach, pid, None, None) != 0:
        raise unittest.SkipTest("needs the right to trace the VMM: {}".format(os.strerror(ctypes.get_errno())))
    try:
        os.waitpid(pid, 0x40000000)  # __WALL
        base = libc.ptrace(peek_user, pid, fs_base, None) & (1 << 64) - 1
        with open("/proc/{}/mem".format(pid), "rb", 0) as memory:
            memory.seek(base + 0x28)
            return int.from_bytes(memory.read(8), "little")
    finally:
        libc.ptrace(detach, pid, None, None)


class Zygotes(VMTestCase):
    def setUp(self) -> None:
        if importlib.util.find_spec(own_qemu.MODULE):
            self.skipTest("our own QEMU is static: no zygote can be loaded into it")
        super().setUp()

    def forked(self) -> Any:
        """A VM whose VMM was forked."""
        for _ in range(100):
            vm = self.running()
            if is_forked(vm):
                return vm
            self.manager.destroy_vm(vm.vm_id)
        return self.fail("no VMM was forked")

    def test_forked_vmm_has_what_an_executed_one_has(self) -> None:
        forked = self.forked()
        with MicroVMIsolationManager({"jail": "strict"}) as manager:
            executed = manager.get_vm(manager.create_vm("browser_tab", limits()))
            if not executed.start():
                self.skipTest("needs a host that gives every layer: {}".format(executed.last_error))
            pids = [vm.get_info()["pid"] for vm in (forked, executed)]
            for look in (status, descriptors, limits_of, cmdline, environment):
                with self.subTest(look.__name__):
                    mine, theirs = map(look, pids)
                    self.assertEqual(mine, theirs)
            seen = [mounted(pid) for pid in pids]
            more = seen[1] - seen[0]
            self.assertEqual(seen[0] - seen[1], set())
            self.assertIn("/vmm/qemu-system-x86_64", more)
            self.assertTrue(all(path.startswith(("/lib", "/vmm/qemu")) for path in more), more)
            comm = [Path("/proc/{}/comm".format(pid)).read_text() for pid in pids]
            self.assertEqual(*comm)
            uids = {Path("/proc/{}/mem".format(pid)).stat().st_uid for pid in pids}
            self.assertEqual(len(uids), 2, "each is its own user's")
            reports = [vm.get_info()["jail"] for vm in (forked, executed)]
            differ = {name for name in reports[0] if reports[0][name] != reports[1][name]}
            self.assertEqual(differ - {"uid"}, {"mode", "address_layout"})

    def test_strict_has_no_zygote_and_a_layout_for_each_vm(self) -> None:
        with MicroVMIsolationManager({"jail": "strict"}) as manager:
            bases = set()
            for _ in range(3):
                vm = manager.get_vm(manager.create_vm("browser_tab", limits()))
                if not vm.start():
                    self.skipTest("needs a host that gives every layer: {}".format(vm.last_error))
                self.assertFalse(is_forked(vm))
                bases.add(Path("/proc/{}/maps".format(vm.get_info()["pid"])).read_text().split("-", 1)[0])
        self.assertEqual((len(bases), zygotes()), (3, []))

    def test_forked_vmms_have_a_canary_each(self) -> None:
        self.forked()
        pids = [self.running().get_info()["pid"] for _ in range(3)]
        self.assertEqual(len({canary(pid) for pid in pids}), 3)

    def test_killed_zygote_is_missed_by_nobody(self) -> None:
        vm = self.forked()
        (zygote,) = zygotes()
        os.kill(zygote, signal.SIGKILL)
        self.assertTrue(eventually(lambda: not alive(zygote)))
        self.assertEqual(self.result(vm, "ping"), "pong")
        self.assertFalse(is_forked(self.running()))
        self.forked()
        self.assertNotEqual(zygotes(), [zygote])

    def test_stopped_zygote_delays_a_start_once(self) -> None:
        self.forked()
        (zygote,) = zygotes()
        os.kill(zygote, signal.SIGSTOP)
        self.assertFalse(is_forked(self.running()))
        self.assertTrue(eventually(lambda: not alive(zygote)))

    def test_zygote_ends_with_its_manager(self) -> None:
        vm = self.forked()
        pid = vm.get_info()["pid"]
        self.manager.stop()
        self.assertEqual((zygotes(), alive(pid)), ([], False))

    def test_killed_process_takes_its_zygote_along(self) -> None:
        code = (
            "import os, time\nfrom thirstys_waterfall.security.microvm_isolation import *\n"
            "manager = MicroVMIsolationManager({'default_memory_mb': 128, 'default_disk_size_mb': 64})\n"
            "for _ in range(50):\n    vm = manager.get_vm(manager.create_vm('plugin'))\n    assert vm.start(), vm.last_error\n"
            "    if not vm.get_info()['jail']['address_layout']['given']: break\n    manager.destroy_vm(vm.vm_id)\n"
            "from tests.host.test_zygote import zygotes\nprint(*zygotes(), vm.get_info()['pid'], flush=True)\n"
            "os.kill(os.getpid(), 9)"
        )
        done = run_python(code, cwd=str(ROOT))
        pids = [int(word) for word in done.stdout.split()]
        self.assertEqual((done.returncode, len(pids)), (-9, 2), done.stderr)
        self.assertTrue(eventually(lambda: not any(map(alive, pids)), 20.0))

    def test_descriptor_that_others_left_open_is_not_kept(self) -> None:
        code = (
            "import os\nfrom thirstys_waterfall.security.microvm_isolation import *\n"
            "ours, theirs = os.pipe()\nos.set_inheritable(theirs, True)\n"
            "with MicroVMIsolationManager({'default_memory_mb': 128, 'default_disk_size_mb': 64}) as manager:\n"
            "    for _ in range(4):\n        vm = manager.get_vm(manager.create_vm('plugin'))\n"
            "        assert vm.start(), vm.last_error\n"
            "    os.close(theirs)\n    os.set_blocking(ours, False)\n    print(os.read(ours, 1))"
        )
        done = run_python(code)
        # End-of-file: neither zygote nor janitor nor VM holds the other end.
        self.assertEqual((done.returncode, done.stdout), (0, "b''\n"), done.stderr)

    def test_package_in_a_folder_that_the_loader_would_split_has_a_zygote(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            os.chmod(folder, 0o755)
            copy = Path(folder) / "a b:c" / "thirstys_waterfall" / "security"
            copy.parent.mkdir(parents=True)
            shutil.copytree(str(DATA.parent.parent), str(copy))
            code = (
                "import sys, time\nsys.path.insert(0, {!r})\n"
                "from thirstys_waterfall.security import microvm_isolation as package\n"
                "with package.MicroVMIsolationManager({{'default_memory_mb': 128, 'default_disk_size_mb': 64, 'start_timeout_s': 120}}) as manager:\n"
                "    for _ in range(50):\n        vm = manager.get_vm(manager.create_vm('plugin'))\n"
                "        assert vm.start(), vm.last_error\n"
                "        if not vm.get_info()['jail']['address_layout']['given']: break\n"
                "        manager.destroy_vm(vm.vm_id)\n"
                "    print(package.__file__, vm.send_command('ping')['result'], not vm.get_info()['jail']['address_layout']['given'])"
            ).format(str(copy.parent.parent))
            done = run_python(code, env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"})
        self.assertEqual((done.returncode, done.stdout[-10:]), (0, "pong True\n"), done.stderr)
        self.assertIn("a b:c", done.stdout)

    def test_package_without_the_library_executes_each_vmm(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "thirstys_waterfall" / "security"
            copy.parent.mkdir(parents=True)
            shutil.copytree(str(DATA.parent.parent), str(copy))
            (copy / "microvm_isolation" / "_data" / "libmicrovm_zygote.so").unlink()
            code = (
                "from thirstys_waterfall.security.microvm_isolation import *\n"
                "with MicroVMIsolationManager({'default_memory_mb': 128, 'default_disk_size_mb': 64}) as manager:\n"
                "    for _ in range(3):\n        vm = manager.get_vm(manager.create_vm('plugin'))\n"
                "        assert vm.start(), vm.last_error\n"
                "        print(vm.get_info()['jail']['address_layout']['given'])"
            )
            done = run_python(code, env=dict(os.environ, PYTHONPATH=folder))
        self.assertEqual((done.returncode, done.stdout.split()), (0, ["True"] * 3), done.stderr)
