"""What managers do with VMs by themselves."""

import os
import signal
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, List

from thirstys_waterfall.security.microvm_isolation import MicroVMIsolationManager

from ..support import VMTestCase, eventually, limits, make_rootfs, shell

# Each way in which a guest ends itself. By name the tools ask PID 1 to do it, with -f they call reboot(2), which halts a
# kernel that cannot switch the power off. The last ask as systemd's do: SIGRTMIN+3, +4 and +5.
WAYS = ["poweroff", "halt", "reboot", "poweroff -f", "halt -f", "reboot -f", "kill -37 1", "kill -38 1", "kill -39 1"]
SHUT_DOWN = "the guest shut itself down"


class PolicyTestCase(VMTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.seen: List[Dict[str, Any]] = []
        self.manager.on_event(self.seen.append)

    def actions(self) -> List[str]:
        return [event["action"] for event in self.seen if event["kind"] == "policy"]

    def end_from_within(self, vm: Any, line: str) -> None:
        """Has a program of the guest end it, and waits until the VM is stopped; the program's answer may be lost."""
        answer = vm.send_command("exec", shell(line, timeout=60))
        if answer is None:
            self.assertIn(SHUT_DOWN, str(vm.last_error))
        else:
            self.assertEqual((answer["status"], answer["result"]["exit_code"]), ("ok", 0), answer)
        self.assertTrue(eventually(lambda: vm.get_state().value == "stopped", 30.0), self.seen)

    def assert_no_failure(self) -> None:
        self.assertEqual(self.actions(), [])
        self.assertNotIn("error", [event["to"] for event in self.seen if event["kind"] == "state"])

    def kill(self, vm: Any) -> int:
        pid = int(vm.get_info()["pid"])
        os.kill(pid, signal.SIGKILL)
        return pid


class Failures(PolicyTestCase):
    config = {
        "policies": {"session": {"on_failure": "restart"}, "plugin": {"on_failure": "replace"}},
        "health_interval_s": 0.2,
        "health_misses": 1,
        "cleanup_interval_s": 1,
    }

    def test_restart_brings_the_same_vm_back(self) -> None:
        vm = self.running(isolation_type="session")
        pid = self.kill(vm)
        self.assertTrue(eventually(lambda: vm.get_info()["pid"] not in (None, pid), 20.0), self.seen)
        self.assertTrue(eventually(lambda: vm.get_state().value == "running"))
        self.assertEqual(self.result(vm, "ping"), "pong")
        self.assertEqual(self.actions(), ["restart"])

    def test_restart_takes_a_vm_that_hangs(self) -> None:
        vm = self.running(isolation_type="session")
        pid = int(vm.get_info()["pid"])
        os.kill(pid, signal.SIGSTOP)
        self.assertTrue(eventually(lambda: self.actions() == ["restart"], 20.0), self.seen)
        self.assertTrue(eventually(lambda: vm.get_state().value == "running", 20.0))
        self.assertNotEqual(vm.get_info()["pid"], pid)
        self.assertEqual(self.result(vm, "ping"), "pong")

    def test_replace_puts_another_vm_in_its_place(self) -> None:
        vm = self.running(isolation_type="plugin", resource_limits=limits(memory_mb=160))
        self.kill(vm)
        self.assertTrue(eventually(lambda: self.actions() == ["replace"], 20.0), self.seen)
        name = [event["replacement"] for event in self.seen if event["kind"] == "policy"][0]
        self.assertIsNone(self.manager.get_vm(vm.vm_id))
        other = self.manager.get_vm(name)
        self.assertTrue(eventually(lambda: other.get_state().value == "running", 20.0), other.last_error)
        self.assertEqual(other.resource_limits.memory_mb, 160)
        self.assertEqual(self.manager.list_vms(), [name])
        self.assertEqual(self.manager.get_resource_usage()["memory_allocated_mb"], 160)

    def policy_events(self, count: int) -> List[Dict[str, Any]]:
        """The first events of the policy."""
        found = lambda: [event for event in self.seen if event["kind"] == "policy"]
        self.assertTrue(eventually(lambda: len(found()) >= count, 30.0), self.seen)
        return found()

    def test_replacement_that_fails_is_replaced_later_and_counts_with_the_first(self) -> None:
        self.kill(self.running(isolation_type="plugin"))
        first = self.policy_events(1)[0]
        self.assertIn("replaced by {}: running -> error: ".format(first["replacement"]), first["detail"])
        other = self.manager.get_vm(first["replacement"])
        self.assertTrue(eventually(lambda: other.get_state().value == "running", 20.0), other.last_error)
        begun = time.monotonic()
        self.kill(other)
        second = self.policy_events(2)[1]
        # The first wait is a second.
        self.assertGreater(time.monotonic() - begun, 0.9)
        self.assertEqual((second["action"], second["vm_id"]), ("replace", other.vm_id))

    def test_replacement_that_cannot_be_made_is_an_event(self) -> None:
        self.running(isolation_type="browser_tab", vm_id="pattern").snapshot("policy-pattern")
        vm = self.running(isolation_type="plugin", template="policy-pattern")
        self.assertTrue(self.manager.delete_template("policy-pattern"))
        self.kill(vm)
        event = self.policy_events(1)[0]
        self.assertEqual((event["action"], event["vm_id"]), ("give_up", vm.vm_id))
        self.assertIn("could not be replaced: there is no template", event["detail"])
        self.assertEqual(self.manager.list_vms(), ["pattern"])

    def test_nothing_is_started_after_the_manager_was_stopped(self) -> None:
        for turn in range(6):
            with MicroVMIsolationManager(self.manager.config) as manager:
                vm = manager.get_vm(manager.create_vm("plugin", limits()))
                self.assertTrue(vm.start(), vm.last_error)
                self.kill(vm)
                time.sleep(0.03 * turn)
                manager.stop()
                self.assertEqual(manager.list_vms(), [])
                time.sleep(0.3)
                usage = manager.get_resource_usage()
                self.assertEqual((manager.list_vms(), usage["memory_allocated_mb"]), ([], 0))

    def test_guest_that_ends_itself_is_stopped_which_is_no_failure(self) -> None:
        vm = self.running(isolation_type="session")
        vm.send_command("shutdown")
        self.assertTrue(eventually(lambda: vm.get_state().value == "stopped", 30.0), self.seen)
        for line in WAYS:
            with self.subTest(line):
                self.assertTrue(vm.start(), vm.last_error)
                self.assertEqual(vm.get_info()["start"]["origin"], "clone")
                self.end_from_within(vm, line)
        self.assert_no_failure()

    def test_leave_is_the_default_and_the_dead_are_removed(self) -> None:
        vm = self.running(isolation_type="browser_tab")
        self.kill(vm)
        self.assertTrue(eventually(lambda: self.manager.list_vms() == [], 10.0))
        self.assertEqual(self.actions(), [])

    def test_destroyed_by_its_owner_is_no_failure(self) -> None:
        vm = self.running(isolation_type="session")
        self.manager.destroy_vm(vm.vm_id)
        time.sleep(1.0)
        self.assertEqual((self.actions(), self.manager.list_vms()), ([], []))


class EndsFromWithin(PolicyTestCase):
    config = {"policies": {"session": {"on_failure": "restart"}}, "templates": False, "health_interval_s": None}

    def test_booted_guest_that_ends_itself_is_stopped_without_a_heartbeat(self) -> None:
        vm = self.manager.get_vm(self.create(isolation_type="session"))
        for line in WAYS[:6]:
            with self.subTest(line):
                self.assertTrue(vm.start(), vm.last_error)
                self.end_from_within(vm, line)
        self.assert_no_failure()

    def test_guest_with_an_image_of_its_own_is_stopped_by_the_images_poweroff(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            vm = self.running(isolation_type="session", rootfs_path=str(make_rootfs(Path(folder) / "image")))
            self.end_from_within(vm, "/bin/busybox poweroff")
        self.assert_no_failure()

    def test_poweroff_gives_programs_a_second_to_end(self) -> None:
        vm = self.running(isolation_type="session")
        script = "exec 2>/dev/null; trap 'echo saved; exit 0' TERM; poweroff & while :; do sleep 0.1; done"
        stream = vm.stream("/bin/sh", ["-c", script])
        self.assertEqual(next(iter(stream))[1], b"saved\n")
        self.assertTrue(eventually(lambda: vm.get_state().value == "stopped", 30.0), self.seen)

    def test_line_of_a_halt_that_a_program_writes_stops_nothing(self) -> None:
        vm = self.running(isolation_type="session")
        for _ in range(3):
            self.result(vm, "exec", shell("echo '<0>reboot: System halted' > /dev/kmsg"))
            time.sleep(1.0)
            self.assertEqual(self.result(vm, "ping"), "pong")
        self.end_from_within(vm, "halt -f")
        self.assert_no_failure()


class Limits(PolicyTestCase):
    config = {"policies": {"session": {"deadline_s": 2}, "plugin": {"idle_limit_s": 1.5}}, "health_interval_s": 0.2}

    def test_deadline_destroys_even_a_busy_vm(self) -> None:
        vm = self.running(isolation_type="session")
        begun = time.monotonic()
        while self.manager.get_vm(vm.vm_id) is not None and time.monotonic() < begun + 20:
            vm.send_command("ping")
        self.assertTrue(1.5 < time.monotonic() - begun < 5, time.monotonic() - begun)
        self.assertEqual(self.actions(), ["deadline"])
        self.assertEqual(self.manager.get_resource_usage()["vcpus_allocated"], 0)

    def test_idle_vm_is_destroyed_and_one_in_use_is_not(self) -> None:
        idle, busy = self.running(isolation_type="plugin"), self.running(isolation_type="plugin")
        stream = busy.stream("/bin/sleep", ["6"])
        self.assertTrue(eventually(lambda: self.manager.get_vm(idle.vm_id) is None, 20.0))
        self.assertEqual(self.actions(), ["idle_limit"])
        # The stream lasts longer than the limit: a stream counts as use, a heartbeat does not.
        self.assertEqual(stream.wait(timeout=30), 0)
        self.assertEqual(busy.get_state().value, "running")
        self.assertTrue(eventually(lambda: self.manager.get_vm(busy.vm_id) is None, 20.0))
