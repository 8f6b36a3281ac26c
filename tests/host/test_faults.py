"""Faults of the host, made for real: each is a clear error or a recovery, and never a wrong state."""

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
import unittest
from pathlib import Path
from typing import Any, Dict, List, Tuple

from ..network.frames import borrow
from ..support import IMPORT, VMTestCase, eventually, find_tool, limits, run_python, shell

# Where QEMU has its end of QMP (src/vmm/qemu/args.rs).
QMP_FD = 4
HEAD = """
import os, sys
from {} import *
config = {{"default_memory_mb": 128, "default_disk_size_mb": 64, "health_interval_s": 0.3}}
""".format(IMPORT)


@unittest.skipUnless(os.geteuid() == 0, "needs root to mount a small file system")
class SmallDisk(VMTestCase):
    """The VMs' disks on a file system that fills up."""

    def setUp(self) -> None:
        folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, folder)
        self.disk = Path(folder) / "disk"
        self.disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m,mode=700", "tmpfs", str(self.disk)], check=True)
        self.addCleanup(subprocess.run, ["umount", "-l", str(self.disk)], check=True)
        # Templates are off, because one would not fit on the tmpfs.
        self.config = {"cache_dir": str(self.disk / "cache"), "templates": False, "health_interval_s": 0.3}
        super().setUp()

    def fill(self) -> Path:
        path = self.disk / "fill"
        try:
            with open(str(path), "wb") as file:
                while True:
                    file.write(bytes(1 << 16))
        except OSError:
            pass
        return path

    def test_start_on_a_full_disk_is_a_clear_error_and_works_when_there_is_room(self) -> None:
        fill = self.fill()
        vm = self.manager.get_vm(self.create())
        self.assertFalse(vm.start())
        self.assertIn("No space left", str(vm.last_error))
        self.assertEqual(vm.last_error.__cause__.errno, errno.ENOSPC)
        self.assertEqual(vm.get_state().value, "error")
        self.assertEqual(list((self.disk / "cache" / "disks").glob("*")), [])
        fill.unlink()
        self.assertTrue(vm.start(), vm.last_error)

    def test_guest_whose_disk_finds_no_room_is_told_and_so_is_the_owner(self) -> None:
        seen: List[Dict[str, Any]] = []
        self.manager.on_event(seen.append)
        vm = self.running()
        fill = self.fill()
        write = shell("dd if=/dev/urandom of=/data/f bs=1M count=16 conv=fsync 2>&1", timeout=60)
        failed = self.result(vm, "exec", write)
        self.assertNotEqual(failed["exit_code"], 0)
        self.assertIn("Input/output error", failed["stdout"])
        told = lambda: [event for event in seen if event.get("what") == "host_disk"]
        self.assertTrue(eventually(told, 20.0), seen)
        # The guest's kernel counts the errors, too; with some VMMs it is the only source. A program cannot forge the count.
        count = lambda: self.result(vm, "health")["disk_write_errors"]
        self.assertGreater(count(), 0)
        self.assertEqual((self.result(vm, "ping"), vm.get_state().value), ("pong", "running"))
        # With the filler removed, both this VM and another one can write.
        fill.unlink()
        self.assertEqual(self.result(vm, "exec", write)["exit_code"], 0)
        before = count()
        self.result(vm, "exec", shell("echo '<3>I/O error, dev vda, sector 0 op 0x1:(WRITE)' >/dev/kmsg"))
        self.assertEqual(count(), before)


@unittest.skipUnless(os.geteuid() == 0, "needs root to mount a file system in memory")
class RuntimeInMemory(VMTestCase):
    """The runtime folder where most hosts have it, on a tmpfs: what is written there is the VMM's own memory."""

    def setUp(self) -> None:
        folder = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, str(folder))
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m,mode=700", "tmpfs", str(folder)], check=True)
        self.addCleanup(subprocess.run, ["umount", "-l", str(folder)], check=True)
        self.config = {"runtime_dir": str(folder / "run")}
        super().setUp()

    def test_guest_may_fill_a_disk_that_is_larger_than_its_vmms_memory(self) -> None:
        vm = self.running(resource_limits=limits(disk_size_mb=1024))
        write = shell("dd if=/dev/zero of=/data/f bs=1M count=600 conv=fsync 2>&1", timeout=120)
        self.assertEqual(vm.send_command("exec", write, timeout=130)["result"]["exit_code"], 0, vm.last_error)
        self.assertEqual(self.result(vm, "ping"), "pong")


class Folders(VMTestCase):
    def setUp(self) -> None:
        folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, folder, True)
        self.runtime = Path(folder) / "run"
        self.config = {"runtime_dir": str(self.runtime)}
        super().setUp()

    def test_runtime_folder_deleted_under_a_running_vm(self) -> None:
        vm = self.running()
        shutil.rmtree(str(self.runtime))
        self.assertEqual(self.result(vm, "ping"), "pong")
        self.assertTrue(vm.stop(), vm.last_error)
        self.assertTrue(vm.start(), vm.last_error)
        self.assertEqual(self.result(vm, "ping"), "pong")
        self.assertTrue(self.manager.destroy_vm(vm.vm_id))
        self.assertEqual(list(self.runtime.glob("[!.]*")), [])

    @unittest.skipUnless(os.geteuid() == 0, "needs root to mount")
    def test_read_only_runtime_folder_is_a_clear_error(self) -> None:
        self.runtime.mkdir(mode=0o700)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,mode=700", "tmpfs", str(self.runtime)], check=True)
        self.addCleanup(subprocess.run, ["umount", "-l", str(self.runtime)], check=True)
        vm = self.manager.get_vm(self.create())
        self.assertFalse(vm.start())
        message = str(vm.last_error)
        self.assertTrue("Read-only" in message and str(self.runtime) in message, message)

    def test_vmm_replaced_on_disk_while_vms_run(self) -> None:
        qemu = find_tool("qemu-system-x86_64")
        if qemu is None:
            self.skipTest("needs qemu-system-x86_64")
        prefix = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, str(prefix))
        folder = prefix / "bin"
        folder.mkdir()
        # Its modules and firmware are found beside it.
        (prefix / "lib").symlink_to("/usr/lib")
        (prefix / "share").symlink_to("/usr/share")
        binary = folder / "qemu-system-x86_64"
        shutil.copy(qemu, str(binary))
        self.manager.stop()
        self.config = {"runtime_dir": str(self.runtime), "qemu_binary": str(binary)}
        super().setUp()
        vm = self.running()
        # As a package manager does it: a new file takes the name.
        fresh = folder / "new"
        shutil.copy(qemu, str(fresh))
        with open(str(fresh), "ab") as upgraded:
            upgraded.write(b"\0upgraded")
        fresh.rename(binary)
        self.assertEqual(self.result(vm, "ping"), "pong")
        self.assertTrue(vm.stop(), vm.last_error)
        self.assertTrue(vm.start(), vm.last_error)
        self.assertEqual(self.result(vm, "ping"), "pong")
        binary.unlink()
        self.assertEqual(self.result(vm, "ping"), "pong")
        self.assertTrue(vm.stop(), vm.last_error)
        self.assertFalse(vm.start())
        self.assertIn(str(binary), str(vm.last_error))


class Shortages(unittest.TestCase):
    def script(self, code: str) -> str:
        done = run_python(HEAD + code)
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        return done.stdout

    def test_descriptor_limit_is_a_clear_error_and_vms_that_run_go_on(self) -> None:
        code = (
            "import resource\nmanager = MicroVMIsolationManager(config)\nmanager.start()\n"
            "first = manager.get_vm(manager.create_vm('plugin'))\nassert first.start(), first.last_error\n"
            "used = len(os.listdir('/proc/self/fd'))\n"
            "hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n"
            "resource.setrlimit(resource.RLIMIT_NOFILE, (used + 4, hard))\n"
            "second = manager.get_vm(manager.create_vm('plugin'))\nstarted = second.start()\n"
            "print(started, second.get_state().value, 'Too many open files' in str(second.last_error), second.last_error)\n"
            "print(first.send_command('ping')['result'])\n"
            "resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))\n"
            "print(second.start(), second.last_error if second.get_state().value != 'running' else '')\n"
        )
        lines = self.script(code).splitlines()
        self.assertTrue(lines[0].startswith("False error True"), lines)
        self.assertEqual((lines[1], lines[2].split()[0]), ("pong", "True"), lines)

    def test_host_memory_that_is_short_refuses_a_vm(self) -> None:
        code = (
            "manager = MicroVMIsolationManager(dict(config, max_memory_mb=1 << 22))\n"
            "total = int(open('/proc/meminfo').read().split()[1]) >> 10\n"
            "print(manager.create_vm('plugin', VMResourceLimits(memory_mb=total)), manager.last_error.code)\n"
        )
        self.assertEqual(self.script(code).split(), ["None", "quota_exceeded"])

    def test_address_space_limit_is_an_error_and_not_a_crash(self) -> None:
        code = (
            "import resource\nmanager = MicroVMIsolationManager(config)\nmanager.start()\n"
            "vm = manager.get_vm(manager.create_vm('plugin'))\nassert vm.start(), vm.last_error\n"
            "used = int(open('/proc/self/statm').read().split()[0]) * 4096\n"
            "resource.setrlimit(resource.RLIMIT_AS, (used + (8 << 20), -1))\n"
            "answer = vm.send_command('read_file', {'path': '/dev/zero', 'max_bytes': 8 << 20})\n"
            "print('alive', type(answer).__name__)\n"
        )
        done = run_python(HEAD + code)
        # Python itself may raise MemoryError; a core that aborts would end by a signal.
        self.assertIn(done.returncode, (0, 1), done.stderr)


# VMs from their start to their end, each kind of start among them; tells how they were jailed. The process joins groups of
# its user's own: an ordinary user may divide no others.
LIFE = """
import json
uid, umask, folder, groups = {uid}, {umask}, {folder!r}, {groups!r}
for group in groups:
    with open(group + "/cgroup.procs", "w") as procs:
        procs.write("0")
if uid:
    os.setgroups([]); os.setresgid(uid, uid, uid); os.setresuid(uid, uid, uid)
os.umask(umask)
config.update(runtime_dir=folder + "/run", cache_dir=folder + "/cache", start_timeout_s=60, raise_on_error=True)
jails = []

def check(vm, origin, text):
    info = vm.get_info()
    assert info["start"]["origin"] == origin, info["start"]
    # Why a layer is missing names the VM.
    jails.append({{name: layer["given"] and layer["how"] for name, layer in info["jail"].items() if name != "mode"}})
    found = vm.send_command("exec", {{"program": "/bin/cat", "args": ["/data/file"]}})["result"]
    assert found["stdout"] == text, found
    vm.send_command("write_file", {{"path": "/data/file", "data": origin}})

def start(manager, origin, text, **options):
    vm = manager.get_vm(manager.create_vm("plugin", **options))
    vm.start()
    check(vm, origin, text)
    return vm

with MicroVMIsolationManager(dict(config, templates=False)) as manager:
    manager.destroy_vm(start(manager, "boot", "").vm_id)
with MicroVMIsolationManager(config) as manager:
    vm = start(manager, "clone", "")
    vm.snapshot("mine")
    other = start(manager, "clone", "clone", template="mine")
    vm.suspend()
    manager.export_disk(vm.vm_id, folder + "/exported")
    vm.resume()
    check(vm, "resume", "clone")
    manager.destroy_vm(vm.vm_id)
    manager.destroy_vm(other.vm_id)
    manager.delete_template("mine")
print(json.dumps(jails))
"""


class Umask(unittest.TestCase):
    """The umask is the caller's: it takes nothing from a VM, and gives nothing to others."""

    def groups(self, uid: int) -> List[str]:
        """A control group of this user's own for each controller of cgroup v1, below this process's."""
        made = []
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            above = Path("/sys/fs/cgroup", controllers, path.lstrip("/"))
            if controllers in ("cpu", "memory", "pids") and above.is_dir():
                made.append(tempfile.mkdtemp(prefix="umask-", dir=str(above)))
                self.addCleanup(self.remove_group, made[-1])
                os.chown(made[-1], uid, uid)
        return made

    def remove_group(self, group: str) -> None:
        # The janitor goes a moment after its process.
        self.assertTrue(eventually(lambda: not Path(group, "cgroup.procs").read_text()))
        os.rmdir(group)

    def live(self, uid: int, umask: int) -> Tuple[str, Dict[str, str]]:
        """How the VMs were jailed, and the modes of all that is left in their folders."""
        folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, folder)
        os.chown(folder, uid, uid)
        code = HEAD + LIFE.format(uid=uid, umask=umask, folder=folder, groups=self.groups(uid) if uid else [])
        done = run_python(code)
        self.assertEqual(done.returncode, 0, done.stderr)
        paths = (os.path.join(above, name) for above, folders, files in os.walk(folder) for name in folders + files)
        modes = {os.path.relpath(path, folder): oct(os.lstat(path).st_mode) for path in paths}
        # A VM's uid is drawn by lot.
        return re.sub(r"\b2\d{9}\b", "UID", done.stdout), modes

    def check_as(self, uid: int) -> None:
        usual = self.live(uid, 0o022)
        for umask in (0o000, 0o077, 0o777):
            with self.subTest(umask=oct(umask)):
                for found, expected in zip(self.live(uid, umask), usual):
                    self.assertEqual(found, expected)

    def test_life_of_a_vm_under_any_umask_is_the_same(self) -> None:
        self.check_as(os.geteuid())

    @unittest.skipUnless(os.geteuid() == 0, "needs root to become another user")
    def test_life_of_an_ordinary_users_vm_under_any_umask_is_the_same(self) -> None:
        self.check_as(61234)


class Clocks(VMTestCase):
    config = {"health_interval_s": 0.3, "policies": {"session": {"deadline_s": 5}}}

    def test_deadlines_and_heartbeats_do_not_use_the_clock_that_jumps(self) -> None:
        # The wall clock is this machine's and not ours to set; tests/conformance/test_conformance_clock.py does that to one
        # of its own. Here: a deadline is met by the monotonic clock.
        vm = self.running(isolation_type="session")
        begun = time.monotonic()
        self.assertTrue(eventually(lambda: self.manager.get_vm(vm.vm_id) is None, 15.0))
        self.assertTrue(4.0 < time.monotonic() - begun < 10.0)


@unittest.skipUnless(os.geteuid() == 0, "needs root to take a descriptor of a VMM")
class HostileVmm(VMTestCase):
    """A VMM in an attacker's power says what it likes: here the test says it, in place of a VMM that stands still."""

    config = {"health_interval_s": None}

    def hostile(self) -> Tuple[Any, socket.socket]:
        """A VM, and its VMM's end of QMP."""
        vm = self.running()
        pid = vm.get_info()["pid"]
        os.kill(pid, signal.SIGSTOP)
        qmp = socket.socket(fileno=borrow(pid, QMP_FD))
        self.addCleanup(qmp.close)
        qmp.settimeout(20)
        return vm, qmp

    def test_line_without_an_end_ends_the_vm_and_takes_no_memory(self) -> None:
        vm, qmp = self.hostile()
        resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20
        before, block = resident(), b"x" * (1 << 20)

        def flood() -> None:
            with contextlib.suppress(OSError):
                for _ in range(300):
                    qmp.sendall(block)

        thread = threading.Thread(target=flood)
        thread.start()
        self.addCleanup(thread.join)
        self.addCleanup(lambda: qmp.shutdown(socket.SHUT_RDWR))
        self.assertTrue(eventually(lambda: vm.get_health_metrics() and vm.get_state().value == "error", 30.0))
        self.assertLess(resident() - before, 64)
        self.assertEqual(vm.last_error.code, "vm_died")

    def test_words_reach_logs_errors_and_events_escaped_and_cut(self) -> None:
        seen: List[Dict[str, Any]] = []
        self.manager.on_event(seen.append)
        vm, qmp = self.hostile()

        def answer() -> None:
            asked = json.loads(qmp.makefile().readline())
            words = "\x1b[2Jno\nERROR forged\u202e" + "x" * 100000
            qmp.sendall(json.dumps({"error": {"class": "GenericError", "desc": words}, "id": asked["id"]}).encode() + b"\n")

        thread = threading.Thread(target=answer)
        thread.start()
        self.addCleanup(thread.join)
        with self.assertLogs(level="DEBUG") as logs:
            self.assertFalse(vm.pause())
        error = str(vm.last_error)
        self.assertIn(r"\u{1b}[2Jno\nERROR forged\u{202e}xxx", error)
        for text in [error, *(record.getMessage() for record in logs.records), *(event["detail"] for event in seen)]:
            self.assertLess(len(text), 10000)
            self.assertTrue(text.isprintable(), ascii(text))
