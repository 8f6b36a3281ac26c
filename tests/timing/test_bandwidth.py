"""Rates of networks, held within a tenth in both directions."""

import os
import sys
import time
import unittest
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, Tuple

from ..network import lab
from ..network.case import NetworkTestCase, connected, sent_by
from ..support import limits

WEB = "198.51.100.1"


def load_tests(loader: Any, tests: unittest.TestSuite, pattern: Any) -> unittest.TestSuite:
    return lab.load(__name__, tests)


class Bandwidth(NetworkTestCase):
    """Frames by the second, at the border: what the internet received, and what the host sent to the tap."""

    WARM_S, WINDOW_S = 2.0, 6.0

    def start(self, vm: Any, script: str) -> None:
        self.sh(vm, "setsid {} >/dev/null 2>&1 &".format(script))

    def rate(self, count: Callable[[], Tuple[int, float]]) -> float:
        """Mbit/s, from bytes and the time at which they were counted."""
        time.sleep(self.WARM_S)
        begun = count()
        time.sleep(self.WINDOW_S)
        ended = count()
        return (ended[0] - begun[0]) * 8 / (ended[1] - begun[1]) / 1e6

    def received(self) -> Tuple[int, float]:
        total, when = self.lab.order("received")
        # 1448 of a full frame's 1514 bytes are the program's.
        return int(total * 1514 / 1448), when

    def rate_from(self, vm: Any) -> float:
        # dd itself has the connection as its output: nc's own buffer is small.
        self.start(vm, "nc {} 5001 -e dd if=/dev/zero bs=64k".format(WEB))
        rate = self.rate(self.received)
        self.sh(vm, "killall dd; true")
        return rate

    def rate_to(self, vm: Any) -> float:
        tap = vm.get_info()["network_config"]["tap_device"]
        self.start(vm, "nc {} 5002 -e dd of=/dev/null bs=64k".format(WEB))
        rate = self.rate(lambda: (sent_by(tap), time.monotonic()))
        self.sh(vm, "killall dd; true")
        return rate

    def test_rate_is_held_in_both_directions(self) -> None:
        # The most that this machine can move; MICROVM_TEST_MBPS lowers it for an emulated one, as in tests/nested.
        for rate in (4, int(os.environ.get("MICROVM_TEST_MBPS", "40"))):
            vm = self.running(network_config=connected(), resource_limits=limits(network_bandwidth_mbps=rate))
            rates = self.rate_from(vm), self.rate_to(vm)
            print("    {} Mbit/s: {:.1f} from the VM, {:.1f} to it".format(rate, *rates), file=sys.stderr)
            with self.subTest(rate=rate):
                self.assertAlmostEqual(rates[0], rate, delta=rate * 0.1)
                self.assertAlmostEqual(rates[1], rate, delta=rate * 0.1)
            self.manager.destroy_vm(vm.vm_id)

    def test_vms_do_not_share_their_rates(self) -> None:
        small = limits(network_bandwidth_mbps=8)
        vms = [self.running(network_config=connected(), resource_limits=small) for _ in range(3)]
        with ThreadPoolExecutor(len(vms)) as pool:
            for rate in pool.map(self.rate_to, vms):
                self.assertAlmostEqual(rate, 8, delta=0.8)
