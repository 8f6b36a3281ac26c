"""Clones of a template, from the pool and on demand; and what a backend says when a VM that runs is to be copied."""

import time
import unittest
from typing import Any, List

from thirstys_waterfall.security.microvm_isolation import MicroVMIsolationManager, VMBackend, VMState

from ..support import eventually, limits, shell
from .case import BackendTestCase, for_each_backend, load_made

WHO = "hostname; cat /etc/machine-id /proc/sys/kernel/random/boot_id /proc/sys/kernel/random/uuid; head -c 16 /dev/urandom | od -An -tx1"


class Clones(BackendTestCase):
    def who(self, vm: Any) -> List[str]:
        """What tells this guest from any other; its clock is looked at on the way."""
        self.assertLess(abs(self.result(vm, "system_info")["time_unix"] - time.time()), 1.5)
        lines = self.result(vm, "exec", shell(WHO))["stdout"].splitlines()
        self.assertEqual((len(lines), lines[0]), (5, vm.vm_id.replace("_", "-")))
        return list(lines)

    def test_clones_share_nothing_that_tells_vms_apart(self) -> None:
        vms = [self.running() for _ in range(3)]
        self.assertEqual([vm.get_info()["start"]["origin"] for vm in vms], ["clone"] * 3)
        told = [line for vm in vms for line in self.who(vm)]
        self.assertEqual(len(set(told)), len(told), told)

    def test_clones_have_disks_and_memory_of_their_own(self) -> None:
        vms = [self.running() for _ in range(2)]
        for index, vm in enumerate(vms):
            self.result(vm, "exec", shell("echo {0} >/data/mine; echo {0} >/tmp/mine; sync".format(index)))
        look = shell("cat /data/mine /tmp/mine; ls /data /tmp")
        told = [self.result(vm, "exec", look)["stdout"].split() for vm in vms]
        self.assertEqual([lines[:2] for lines in told], [["0", "0"], ["1", "1"]])
        fresh = self.result(self.running(), "exec", shell("ls /data /tmp"))["stdout"]
        self.assertNotIn("mine", fresh)

    def test_clone_has_its_own_limits_and_survives_a_pause(self) -> None:
        vm = self.running(resource_limits=limits(disk_bytes_per_s=64 << 20))
        self.assertEqual(vm.get_info()["start"]["origin"], "clone")
        self.assertTrue(vm.pause() and vm.resume(), vm.last_error)
        self.assertEqual(self.result(vm, "ping"), "pong")
        slow = self.running(resource_limits=limits(disk_bytes_per_s=2 << 20))
        begun = time.monotonic()
        self.result(slow, "exec", shell("dd if=/dev/zero of=/data/fill bs=1M count=8 oflag=direct 2>/dev/null", timeout=60))
        self.assertGreater(time.monotonic() - begun, 2)

    def test_warm_vm_becomes_a_vm_of_its_own_at_the_right_time(self) -> None:
        for form in ("restored", "ready"):
            pool = {"memory_mb": 128, "disk_size_mb": 64, "size": 2, "form": form}
            with self.subTest(form=form), MicroVMIsolationManager(dict(self.config, pool=pool)) as manager:
                self.assertTrue(eventually(lambda: manager.get_resource_usage()["pool"][0]["ready"] == 2, 60))
                time.sleep(2)
                told = []
                for _ in range(2):
                    vm = manager.get_vm(manager.create_vm("session", limits()))
                    self.assertTrue(vm.start(), vm.last_error)
                    self.assertEqual(vm.get_info()["start"]["origin"], "pool")
                    told += self.who(vm)
                self.assertEqual(len(set(told)), len(told), told)

    def test_running_vm_is_copied_or_refused_with_words(self) -> None:
        vm = self.running()
        if self.backend is VMBackend.QEMU:
            self.assertTrue(vm.suspend(), vm.last_error)
            self.assertTrue(vm.resume(), vm.last_error)
        else:
            self.assertFalse(vm.suspend())
            self.assertIn("cannot be copied while it runs", str(vm.last_error))
            self.assertIn('backend="qemu"', str(vm.last_error))
            self.assertIs(vm.get_state(), VMState.RUNNING)
        self.assertEqual(self.result(vm, "ping"), "pong")


MADE = for_each_backend(Clones)


def load_tests(loader: unittest.TestLoader, _tests: unittest.TestSuite, _pattern: str) -> unittest.TestSuite:
    return load_made(loader, MADE)
