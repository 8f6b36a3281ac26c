"""The quota: what runs is reserved, whatever happens at the same time, and nothing runs that no manager knows."""

import random
import tempfile
import threading
import time
import unittest
from pathlib import Path
from typing import Any, Dict, List

from thirstys_waterfall.security.microvm_isolation import MicroVMIsolationManager, VMState

from ..support import VMTestCase, eventually, limits

MEMORY = 128
COMMON = {"default_backend": "QEMU", "default_memory_mb": MEMORY, "default_disk_size_mb": 64, "health_interval_s": None}


class Reservations(VMTestCase):
    config = {"max_memory_mb": 3 * MEMORY, "health_interval_s": None}

    def allocated(self) -> int:
        return int(self.manager.get_resource_usage()["memory_allocated_mb"])

    def test_suspended_vm_that_is_stopped_and_started_needs_room_again(self) -> None:
        first, _, _ = self.running(), self.running(), self.running()
        self.assertTrue(first.suspend(), first.last_error)
        other = self.running()
        self.assertTrue(first.stop())
        self.assertFalse(first.start())
        self.assertEqual((first.last_error.code, first.get_state()), ("quota_exceeded", VMState.STOPPED))
        self.assertEqual((self.allocated(), len(self.manager.list_vms(state="running"))), (3 * MEMORY, 3))
        self.manager.destroy_vm(other.vm_id)
        self.assertTrue(first.start(), first.last_error)
        self.assertEqual(self.allocated(), 3 * MEMORY)

    def test_vm_whose_state_on_disk_is_gone_needs_room_to_start_anew(self) -> None:
        vm = self.running()
        self.assertTrue(vm.suspend(), vm.last_error)
        with MicroVMIsolationManager(COMMON) as other:
            self.assertTrue(other.destroy_vm(vm.vm_id), other.last_error)
        self.assertFalse(vm.resume())
        self.assertEqual((vm.get_state(), self.allocated()), (VMState.ERROR, 0))
        self.assertTrue(vm.start(), vm.last_error)
        self.assertEqual(self.allocated(), MEMORY)

    def test_any_mixture_of_operations_on_many_threads_keeps_the_sum(self) -> None:
        wrong: List[BaseException] = []

        def storm(seed: int) -> None:
            chance = random.Random(seed)
            try:
                for _ in range(25):
                    known = self.manager.list_vms()
                    if not known or (len(known) < 5 and chance.random() < 0.4):
                        self.manager.create_vm("plugin", limits())
                        continue
                    vm = self.manager.get_vm(chance.choice(known))
                    if vm is None:
                        continue
                    names = ["start", "start", "resume", "suspend", "stop", "destroy"]
                    name = chance.choice(names)
                    if name == "destroy":
                        self.manager.destroy_vm(vm.vm_id)
                    else:
                        getattr(vm, name)()
            except BaseException as error:
                wrong.append(error)

        threads = [threading.Thread(target=storm, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(wrong, [])
        # A stopped VM may hold a reservation or not. After start() it holds one, unless start() was refused.
        for vm_id in self.manager.list_vms(state="stopped"):
            self.manager.start_vm(vm_id)
        counted = [
            info for info in self.manager.get_all_vms_info().values() if not info["suspended"] and info["state"] != "stopped"
        ]
        self.assertEqual(self.allocated(), MEMORY * len(counted))
        self.assertLessEqual(len(self.manager.list_vms(state="running")), 3)
        self.manager.destroy_all_vms()
        for entry in self.manager.list_suspended():
            self.manager.destroy_vm(entry["vm_id"])
        self.assertEqual((self.allocated(), self.manager.list_vms()), (0, []))


class Pools(VMTestCase):
    config = {
        "max_memory_mb": 2 * MEMORY,
        "pool": [{"size": 2, "form": "ready"}],
        "default_memory_mb": MEMORY,
        "health_interval_s": None,
    }

    def used(self) -> int:
        usage = self.manager.get_resource_usage()
        return int(usage["memory_allocated_mb"]) + MEMORY * sum(each["ready"] for each in usage["pool"])

    def test_vm_in_the_making_gives_way_to_one_that_is_created(self) -> None:
        self.assertTrue(self.manager.prepare(limits()), self.manager.last_error)
        for turn in range(6):
            # Each turn hits another moment of the pool VM's start.
            time.sleep(0.05 * turn)
            ids = [self.create(), self.create()]
            end = time.monotonic() + 0.5
            while time.monotonic() < end:
                self.assertEqual(self.used(), 2 * MEMORY)
                time.sleep(0.01)
            for vm_id in ids:
                self.manager.destroy_vm(vm_id)
        ready = lambda: self.manager.get_resource_usage()["pool"][0]["ready"] == 2
        self.assertTrue(eventually(ready, 30.0))


class Resumes(unittest.TestCase):
    def test_two_at_once_leave_no_vm_that_runs_unknown(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        config: Dict[str, Any] = dict(COMMON, runtime_dir=folder.name + "/run", max_memory_mb=MEMORY)
        for turn in range(6):
            name = "twice-{}".format(turn)
            with MicroVMIsolationManager(config) as first:
                vm = first.get_vm(first.create_vm("plugin", limits(), vm_id=name))
                self.assertTrue(vm.start() and vm.suspend(), vm.last_error)
            with MicroVMIsolationManager(config) as manager:
                # The filler takes the quota, so a resume before its removal fails and one after it succeeds.
                filler = manager.create_vm("plugin", limits())
                done: List[bool] = []
                threads = [threading.Thread(target=lambda: done.append(manager.resume_vm(name))) for _ in range(2)]
                threads.append(threading.Thread(target=manager.destroy_vm, args=(filler,)))
                random.Random(turn).shuffle(threads)
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                found = manager.get_vm(name)
                runs = found is not None and found.get_state() is VMState.RUNNING
                is_there = Path(folder.name, "run", name).exists()
                self.assertEqual((runs, is_there), (any(done), any(done)))
                usage = manager.get_resource_usage()
                self.assertEqual(usage["memory_allocated_mb"], MEMORY if runs else 0)
                self.assertTrue(manager.destroy_vm(name), manager.last_error)

