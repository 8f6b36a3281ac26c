"""What the watch over VMs sees and says: a real hang, a real stop, a real shortage each."""

import ctypes
import os
import signal
import subprocess
import time
import unittest
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional

from ..support import VMTestCase, eventually, limits, shell

Event = Dict[str, Any]
# linux/ptrace.h
SEIZE, INTERRUPT, DETACH = 0x4206, 0x4207, 17


class HealthTestCase(VMTestCase):
    config = {"health_interval_s": 0.2, "health_misses": 1}

    def setUp(self) -> None:
        super().setUp()
        self.seen: List[Event] = []
        self.subscription = self.manager.on_event(self.seen.append)

    def verdicts(self, vm: Any) -> List[str]:
        """The reasons of the changes of a VM's health so far."""
        return [event["reason"] for event in self.seen if event["vm_id"] == vm.vm_id and event["kind"] == "health"]

    def event(self, vm: Any, seconds: float = 15.0, **wanted: Any) -> Optional[Event]:
        """The first event of a VM that has these values."""

        def find() -> Optional[Event]:
            for event in list(self.seen):
                if event["vm_id"] == vm.vm_id and all(event.get(key) == value for key, value in wanted.items()):
                    return event
            return None

        found = eventually(find, seconds)
        self.assertIsNotNone(found, (wanted, self.seen))
        return found

    def watched(self, **options: Any) -> Any:
        """A VM that runs and was found healthy."""
        vm = self.running(**options)
        self.event(vm, kind="health", to="healthy")
        return vm

    def pid(self, vm: Any) -> int:
        return int(vm.get_info()["pid"])


class Verdicts(HealthTestCase):
    def test_running_vm_is_healthy_and_tells_figures_of_guest_and_host(self) -> None:
        vm = self.watched()
        health = vm.get_info()["health"]
        self.assertEqual((health["status"], health["reason"], health["heartbeats_missed"]), ("healthy", "ok", 0))
        guest = health["guest"]
        self.assertGreater(guest["memory_total_bytes"], guest["memory_available_bytes"])
        self.assertGreater(guest["memory_available_bytes"], 16 << 20)
        self.assertGreater(guest["disk_total_bytes"], 32 << 20)
        self.assertLess(abs(health["clock_offset_seconds"]), 2.0)
        self.assertGreater(health["host"]["resident_memory_mb"], 10)
        self.assertGreater(health["round_trip_seconds"], 0.0)
        self.assertEqual(health["history"][0]["status"], "healthy")
        self.assertLessEqual(health["since"], time.time())

    def test_stopped_vmm_is_unhealthy_and_well_again_when_it_goes_on(self) -> None:
        vm = self.watched()
        pid = self.pid(vm)
        os.kill(pid, signal.SIGSTOP)
        self.addCleanup(self.go_on, pid)
        self.event(vm, kind="health", to="unhealthy", reason="vmm_stopped")
        self.go_on(pid)
        self.event(vm, kind="health", **{"from": "unhealthy", "to": "healthy"})
        self.assertEqual(self.result(vm, "ping"), "pong")

    def go_on(self, pid: int) -> None:
        try:
            os.kill(pid, signal.SIGCONT)
        except ProcessLookupError:
            pass

    def test_paused_vm_is_not_called_hung(self) -> None:
        vm = self.watched()
        self.assertTrue(vm.pause(), vm.last_error)
        time.sleep(2.0)
        health = vm.get_info()["health"]
        self.assertEqual((health["status"], health["reason"]), ("healthy", "paused"))
        self.assertTrue(vm.resume(), vm.last_error)
        time.sleep(1.0)
        self.assertNotIn("agent_silent", self.verdicts(vm))
        self.assertEqual(vm.get_health_metrics().health_status, "healthy")

    @unittest.skipUnless(os.geteuid() == 0, "needs root to hold a vCPU's thread still")
    def test_hung_guest_is_unhealthy_after_the_misses_that_are_allowed(self) -> None:
        vm = self.watched()
        thaw = self.freeze_threads(self.pid(vm))
        self.addCleanup(thaw)
        self.event(vm, kind="health", to="unhealthy", reason="agent_silent")
        self.assertEqual(vm.get_health_metrics().health_status, "unhealthy")
        thaw()
        self.event(vm, kind="health", **{"from": "unhealthy", "to": "healthy"})

    def freeze_threads(self, pid: int) -> Callable[[], None]:
        """Holds all threads of a process but its first, as a vCPU that hangs: the process itself is not stopped."""
        libc = ctypes.CDLL(None, use_errno=True)
        held: List[int] = []
        for task in Path("/proc/{}/task".format(pid)).iterdir():
            if int(task.name) != pid:
                for request in (SEIZE, INTERRUPT):
                    self.assertEqual(libc.ptrace(request, int(task.name), 0, 0), 0, os.strerror(ctypes.get_errno()))
                os.waitpid(int(task.name), 0x40000000)  # __WALL
                held.append(int(task.name))

        def thaw() -> None:
            while held:
                libc.ptrace(DETACH, held.pop(), 0, 0)

        return thaw

    @unittest.skipUnless(os.geteuid() == 0, "needs root to squeeze a VM's control group")
    def test_host_without_cpu_to_give_is_told_from_a_hung_guest(self) -> None:
        vm = self.watched()
        record = Path(vm.get_info()["socket_path"]).parent / "cgroups"
        quotas = [Path(line) / "cpu.cfs_quota_us" for line in record.read_text().split()]
        quotas = [quota for quota in quotas if quota.exists()]
        if not quotas:
            self.skipTest("needs the cpu controller of cgroup v1")
        # A hundredth of a CPU is enough for a VM that has it to itself.
        with self.crowd(quotas[0].parent, 32), self.squeezed(quotas[0]):
            slow = eventually(lambda: "host_slow" in [look["reason"] for look in self.history(vm)], 20.0)
            self.assertTrue(slow, self.history(vm))
            self.assertNotIn("agent_silent", self.verdicts(vm))
        self.assertTrue(eventually(lambda: self.history(vm)[-1]["reason"] == "ok", 15.0), self.history(vm))

    @contextmanager
    def squeezed(self, quota: Path) -> Iterator[None]:
        """A hundredth of a CPU for a control group, with which its processes could not even end soon."""
        before = quota.read_text()
        quota.write_text("1000")
        try:
            yield
        finally:
            quota.write_text(before)

    @contextmanager
    def crowd(self, group: Path, size: int) -> Iterator[None]:
        """So many processes in a control group, all of which want a CPU all the time."""
        busy = 'echo $$ > "$0"; while :; do :; done'
        crowd = [subprocess.Popen(["sh", "-c", busy, str(group / "tasks")]) for _ in range(size)]
        try:
            yield
        finally:
            for process in crowd:
                process.kill()
                process.wait()

    def history(self, vm: Any) -> List[Dict[str, Any]]:
        return list(vm.get_info()["health"]["history"])

    def test_wrong_clock_is_told_and_set(self) -> None:
        vm = self.watched()
        self.result(vm, "exec", shell("date -s '2001-01-01 00:00:00'"))
        self.event(vm, kind="health", to="unhealthy", reason="clock_off")
        self.event(vm, kind="health", **{"from": "unhealthy", "to": "healthy"})
        self.assertLess(abs(self.result(vm, "system_info")["time_unix"] - time.time()), 2.0)

    def test_full_disk_of_the_guest_is_told_and_room_again_is_healthy(self) -> None:
        vm = self.watched()
        self.result(vm, "exec", shell("dd if=/dev/zero of=/data/fill bs=1M 2>/dev/null; true"))
        event = self.event(vm, kind="health", to="unhealthy", reason="disk_low")
        assert event is not None
        self.assertIn("MiB disk", event["detail"])
        self.result(vm, "exec", shell("rm /data/fill"))
        self.event(vm, kind="health", **{"from": "unhealthy", "to": "healthy"})

    def test_out_of_memory_in_the_guest_is_an_event(self) -> None:
        vm = self.watched()
        killed = self.result(vm, "exec", shell("exec tail /dev/zero", timeout=60))
        self.assertEqual(killed.get("signal"), 9, killed)
        event = self.event(vm, kind="oom", place="guest")
        assert event is not None
        self.assertGreaterEqual(event["kills"], 1)

    def test_process_limit_of_the_guest_is_an_event(self) -> None:
        vm = self.watched(resource_limits=limits(max_processes=8))
        vm.send_command("exec", shell("for i in 1 2 3 4 5 6 7 8 9 10; do sleep 3 & done; wait", timeout=10))
        self.event(vm, kind="limit", what="processes")

    def test_dead_vmm_is_dead(self) -> None:
        vm = self.watched()
        os.kill(self.pid(vm), signal.SIGKILL)
        self.event(vm, kind="state", **{"from": "running", "to": "error"})
        self.assertEqual(vm.get_health_metrics().health_status, "dead")

    def test_vm_that_died_can_be_started_again_at_once(self) -> None:
        vm = self.watched()
        for _ in range(3):
            os.kill(self.pid(vm), signal.SIGKILL)
            self.assertTrue(eventually(lambda: vm.get_state().value == "error"))
            self.assertTrue(vm.start(), vm.last_error)
        self.assertEqual(self.result(vm, "ping"), "pong")


class Unwatched(HealthTestCase):
    config = {"health_interval_s": None}

    def test_without_an_interval_a_vm_is_looked_at_only_when_asked(self) -> None:
        vm = self.running()
        time.sleep(1.0)
        health = vm.get_info()["health"]
        self.assertEqual((health["status"], health["history"]), ("healthy", []))
        self.assertEqual(self.verdicts(vm), [])
