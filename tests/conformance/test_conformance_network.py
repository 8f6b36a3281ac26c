"""Connected VMs: the same network whatever runs underneath, and nothing of it afterwards."""

import subprocess
import unittest
from pathlib import Path

from thirstys_waterfall.security.microvm_isolation import VMNetworkConfig, doctor

from ..support import eventually, find_tool, limits, play, shell
from .case import BackendTestCase, for_each_backend, load_made

# Read by tests/runner.py, which runs this module by itself.
ALONE = "its VMs are connected in the host's own network namespace"


class Connected(BackendTestCase):
    def setUp(self) -> None:
        told = doctor()["network"]
        # User mode is QEMU's alone: tests/network/test_user_network.py.
        if told["mode"] != "tap":
            self.skipTest("the host's own network carries no VM: {}: {}".format(told["reason"], told["remedy"]))
        super().setUp()

    def test_guest_reaches_its_gateway_and_no_more(self) -> None:
        vm = self.running(network_config=VMNetworkConfig(isolated_network=False))
        got = vm.get_info()["network_config"]
        asked = shell("cat /sys/class/net/eth0/address; ping -c 3 -W 5 {} >/dev/null && echo answered".format(got["gateway"]), timeout=30)
        told = self.result(vm, "exec", asked)["stdout"].split()
        self.assertEqual(told, [got["mac_address"], "answered"])
        metrics = vm.get_health_metrics()
        self.assertGreater(metrics.network_rx_bytes, 0)
        self.assertGreater(metrics.network_tx_bytes, 0)
        tap = Path("/sys/class/net") / got["tap_device"]
        self.assertTrue(tap.exists())
        self.assertTrue(vm.stop(), vm.last_error)
        self.assertTrue(eventually(lambda: not tap.exists()))

    def test_bandwidth_is_what_was_asked_for(self) -> None:
        vm = self.running(
            network_config=VMNetworkConfig(isolated_network=False),
            resource_limits=limits(network_bandwidth_mbps=8),
        )
        tap = vm.get_info()["network_config"]["tap_device"]
        shown = subprocess.check_output([find_tool("tc") or "tc", "qdisc", "show", "dev", tap], universal_newlines=True)
        self.assertIn("rate 8Mbit", shown)

    def test_advanced_example_of_the_description(self) -> None:
        code = self.block("Advanced Example").replace("/path/to/custom/rootfs.ext4", str(self.rootfs()))
        space, _ = play(code, manager=self.manager)
        vm = self.manager.get_vm(space["vm_id"])
        self.assertEqual(vm.get_info()["backend"], self.backend.value)
        self.assertTrue(vm.start(), vm.last_error)
        told = self.result(vm, "exec", shell("cat /etc/made-by; ulimit -n"))["stdout"].split()
        self.assertEqual(told, ["tests", "1024"])


MADE = for_each_backend(Connected)


def load_tests(loader: unittest.TestLoader, _tests: unittest.TestSuite, _pattern: str) -> unittest.TestSuite:
    return load_made(loader, MADE)
