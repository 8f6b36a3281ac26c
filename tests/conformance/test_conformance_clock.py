"""The host's clock jumps. Only where it is ours to set: in the guest of ``tests/nested``."""

import os
import threading
import time
import unittest
from typing import Any, List

from thirstys_waterfall.security.microvm_isolation import VMState

from ..support import eventually, shell
from .case import BackendTestCase, for_each_backend, load_made

HOUR_S = 3600.0


class Clock(BackendTestCase):
    config = {"health_interval_s": 1.0, "policies": {"session": {"deadline_s": 300, "idle_limit_s": 240}}}

    @classmethod
    def setUpClass(cls) -> None:
        if os.environ.get("MICROVM_OWN_CLOCK") != "1":
            raise unittest.SkipTest("it sets the host's clock: make test-nested")
        super().setUpClass()

    def jump(self, seconds: float) -> None:
        time.clock_settime(time.CLOCK_REALTIME, time.time() + seconds)

    def offset(self, vm: Any) -> float:
        """How far the guest's clock is from the host's, in seconds."""
        before = time.time()
        told = self.result(vm, "system_info")["time_unix"]
        return float(max(before - told, told - time.time(), 0.0))

    def test_jump_of_the_hosts_clock_is_followed_and_ends_nothing(self) -> None:
        vm = self.running(isolation_type="session")
        for seconds in (HOUR_S, -2 * HOUR_S, HOUR_S):
            answers: List[Any] = []
            asked = threading.Thread(target=lambda: answers.append(vm.send_command("exec", shell("sleep 2; echo done"))))
            asked.start()
            time.sleep(0.5)
            begun = time.monotonic()
            self.jump(seconds)
            asked.join(30)
            self.assertEqual(answers[0]["result"]["stdout"], "done\n", answers)
            self.assertLess(time.monotonic() - begun, 10.0)
            self.assertTrue(eventually(lambda: self.offset(vm) < 2.0, 15.0), (seconds, self.offset(vm)))
            self.assertTrue(eventually(lambda: vm.get_info()["health"]["status"] == "healthy", 15.0))
        self.assertIs(vm.get_state(), VMState.RUNNING)

    def test_clone_after_a_jump_has_the_new_time(self) -> None:
        self.running()
        self.jump(HOUR_S)
        self.addCleanup(self.jump, -HOUR_S)
        self.assertLess(self.offset(self.running()), 1.0)


MADE = for_each_backend(Clock)


def load_tests(loader: unittest.TestLoader, _tests: unittest.TestSuite, _pattern: str) -> unittest.TestSuite:
    return load_made(loader, MADE)
