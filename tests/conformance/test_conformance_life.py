"""Boot, agent, every edge of a VM's life, and what is left afterwards."""

import os
import signal
import time
import unittest
from pathlib import Path
from typing import Any

from thirstys_waterfall.security.microvm_isolation import CommunicationChannel, MicroVMIsolationManager, VMState

from ..support import DATA, IMPORT, alive, eventually, limits, play, run_python, shell
from .case import BackendTestCase, for_each_backend, load_made, on_path, told_of

# A process with a running VM that is killed.
KILLED = """
import os, signal
from {module} import MicroVMIsolationManager, VMBackend, VMResourceLimits
manager = MicroVMIsolationManager(dict({config!r}, default_backend={backend!r}))
vm = manager.get_vm(manager.create_vm("plugin", VMResourceLimits(memory_mb=128, disk_size_mb=64)))
assert vm.start(), vm.last_error
info = vm.get_info()
print(info["pid"], info["socket_path"], flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


class Life(BackendTestCase):
    def test_basic_example_of_the_description(self) -> None:
        with on_path():
            space, printed = play(self.block("Basic Example"))
        self.assertIsNotNone(space["response"], space["vm"].last_error)
        self.assertEqual(space["response"]["status"], "ok")
        self.assertEqual(space["response"]["result"]["url"], "about:blank")
        self.assertEqual(space["info"]["backend"], self.backend.value)
        self.assertIn("VM State: running", printed)
        self.assertEqual(space["manager"].list_vms(), [])

    def test_killed_manager_leaves_no_vm(self) -> None:
        config = {key: value for key, value in self.config.items() if key != "default_backend"}
        done = run_python(KILLED.format(module=IMPORT, config=config, backend=self.backend.value))
        self.assertEqual(done.returncode, -signal.SIGKILL, done.stderr)
        pid, socket = done.stdout.split()
        self.assertTrue(eventually(lambda: not alive(int(pid))))
        self.assertTrue(eventually(lambda: not Path(socket).parent.exists()))

    def test_guest_that_is_too_slow_is_given_up(self) -> None:
        slow = dict(self.config, start_timeout_s=0.3, templates=False)
        with MicroVMIsolationManager(slow) as manager:
            vm = manager.get_vm(manager.create_vm("plugin", limits()))
            self.assertFalse(vm.start())
            self.assertEqual(vm.last_error.code, "start_timeout", vm.last_error)
            self.assertIs(vm.get_state(), VMState.ERROR)
        self.assertEqual(self.result(self.running(), "ping"), "pong")

    def test_whole_life_leaves_nothing(self) -> None:
        vm = self.manager.get_vm(self.create())
        self.assertFalse(vm.pause())
        self.assertEqual(vm.last_error.code, "invalid_state")
        self.assertTrue(vm.start() and vm.start(), vm.last_error)
        info = vm.get_info()
        folder = Path(info["socket_path"]).parent
        self.assertTrue(alive(info["pid"]))
        self.assertEqual(info["backend"], self.backend.value)
        # A config drive, where the backend uses one, is wiped once the session stands.
        for drive in folder.glob("config"):
            self.assertEqual(set(drive.read_bytes()), {0})
        self.assertEqual(self.result(vm, "ping"), "pong")
        self.assertTrue(vm.pause(), vm.last_error)
        self.assertIs(vm.get_state(), VMState.PAUSED)
        self.assertFalse(vm.pause())
        self.assertIsNone(vm.send_command("ping"))
        self.assertTrue(vm.resume(), vm.last_error)
        self.assertFalse(vm.resume())
        self.assertEqual(self.result(vm, "ping"), "pong")
        self.assertTrue(vm.stop() and vm.stop(), vm.last_error)
        self.assertFalse(alive(info["pid"]) or folder.exists())
        self.assertTrue(vm.start(), vm.last_error)
        self.assertEqual(self.result(vm, "ping"), "pong")
        self.assertTrue(self.manager.destroy_vm(vm.vm_id))
        self.assertIs(vm.get_state(), VMState.DESTROYED)
        self.assertFalse(vm.start() or folder.exists())

    def test_stop_by_the_guest_is_quick_and_clean(self) -> None:
        took = []
        for _ in range(3):
            vm = self.running()
            begun = time.monotonic()
            self.assertTrue(vm.stop(), vm.last_error)
            took.append(time.monotonic() - begun)
        # A guest that does not end by itself is given three seconds before its VMM is ended for it.
        self.assertLess(min(took), 2.5, took)

    def test_clock_is_the_hosts_after_a_pause(self) -> None:
        vm = self.running()
        self.assertTrue(vm.pause())
        time.sleep(2)
        self.assertTrue(vm.resume())
        told = self.result(vm, "exec", shell("date +%s"))["stdout"]
        self.assertLess(abs(int(told) - time.time()), 1.5)

    def test_doctor_tells_what_the_vm_gets(self) -> None:
        told, info = told_of(self.backend), self.running().get_info()
        self.assertRegex(told["version"], r"(QEMU|Firecracker|cloud-hypervisor).*\d+\.\d+")
        self.assertEqual(told["accelerator"], info["accelerator"])
        self.assertEqual(told["isolation_grade"], info["isolation_grade"])

    def test_killed_vmm_is_an_error_and_can_be_started_again(self) -> None:
        vm = self.running()
        pid = vm.get_info()["pid"]
        os.kill(pid, signal.SIGKILL)
        self.assertTrue(eventually(lambda: vm.get_state() is VMState.ERROR))
        self.assertEqual(vm.last_error.code, "vm_died")
        self.assertIn("SIGKILL", str(vm.last_error))
        self.assertTrue(eventually(lambda: not alive(pid)))

    def test_guest_that_reboots_has_ended(self) -> None:
        vm = self.running()
        vm.send_command("exec", shell("busybox reboot -f || reboot -f; sleep 20", timeout=10))
        self.assertTrue(eventually(lambda: vm.get_state() is VMState.STOPPED, 20), vm.get_state())
        self.assertTrue(vm.start(), vm.last_error)
        self.assertEqual(self.result(vm, "ping"), "pong")

    def test_health_is_of_this_vm(self) -> None:
        vm = self.running()
        self.result(vm, "exec", shell("dd if=/dev/zero of=/data/fill bs=1M count=4 conv=fsync 2>&1"))
        metrics = vm.get_health_metrics()
        self.assertEqual(metrics.health_status, "healthy")
        self.assertGreater(metrics.memory_usage_mb, 10)
        self.assertGreaterEqual(metrics.disk_io_bytes, 4 << 20)
        self.assertEqual(metrics.network_rx_bytes, 0)


class Guest(BackendTestCase):
    def shape(self, vm: Any) -> Any:
        return self.result(vm, "exec", shell("nproc; awk '/MemTotal/{print $2}' /proc/meminfo; df -m /data | tail -1"))["stdout"].split()

    def test_guest_has_the_shape_that_was_asked_for(self) -> None:
        vm = self.running(resource_limits=limits(vcpu_count=2, memory_mb=256, disk_size_mb=96))
        shape = self.shape(vm)
        self.assertEqual(shape[0], "2")
        self.assertTrue(200 << 10 < int(shape[1]) <= 256 << 10, shape)
        self.assertTrue(70 < int(shape[3]) <= 96, shape)

    def test_isolated_guest_has_loopback_alone(self) -> None:
        vm = self.running()
        self.assertEqual(self.result(vm, "exec", shell("ls /sys/class/net"))["stdout"].split(), ["lo"])

    def test_many_channels_and_large_messages(self) -> None:
        vm = self.running()
        data = "x" * (1 << 20)
        self.result(vm, "write_file", {"path": "/data/large", "data": data})
        self.assertEqual(self.result(vm, "read_file", {"path": "/data/large"})["data"], data)
        channels = [CommunicationChannel(vm.vm_id, vm.get_info()["socket_path"]) for _ in range(4)]
        for channel in channels:
            self.addCleanup(channel.close)
            self.assertTrue(channel.connect(), channel.last_error)
            self.assertTrue(channel.send_message({"type": "ping"}))
        self.assertEqual([channel.receive_message(5.0) for channel in channels], [{"type": "pong"}] * 4)

    def test_full_disk_is_the_guests_trouble_alone(self) -> None:
        vm = self.running()
        self.assertNotEqual(self.result(vm, "exec", shell("cat /dev/zero >/data/full 2>&1; sync; exit 3", timeout=60))["exit_code"], 0)
        self.assertEqual(self.result(vm, "exec", shell("rm /data/full && echo room >/data/small && cat /data/small"))["stdout"], "room\n")

    def test_custom_kernel_and_root_are_booted(self) -> None:
        vm = self.running(kernel_path=str(DATA / "vmlinux"), rootfs_path=str(self.rootfs()))
        self.assertEqual(self.result(vm, "exec", shell("cat /etc/made-by; touch /etc/new && echo writable"))["stdout"], "tests\nwritable\n")

    def test_kernel_that_is_none_is_refused_with_words(self) -> None:
        bad = self.folder() / "kernel"
        bad.write_bytes(b"\x7fELF" + bytes(4096))
        vm = self.manager.get_vm(self.create(kernel_path=str(bad)))
        self.assertFalse(vm.start())
        self.assertIn(vm.last_error.code, ("image_invalid", "start_failed"))
        self.assertTrue(str(vm.last_error))
        self.assertIs(vm.get_state(), VMState.ERROR)


MADE = for_each_backend(Life, Guest)


def load_tests(loader: unittest.TestLoader, _tests: unittest.TestSuite, _pattern: str) -> unittest.TestSuite:
    return load_made(loader, MADE)
