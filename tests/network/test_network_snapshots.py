"""Copies of connected VMs, and connected VMs that are suspended."""

import shutil
import tempfile
import unittest
from typing import Any, List

from thirstys_waterfall.security.microvm_isolation import IsolationType, MicroVMIsolationManager

from . import lab
from .case import NetworkTestCase, connected, taps


def load_tests(loader: Any, tests: unittest.TestSuite, pattern: Any) -> unittest.TestSuite:
    return lab.load(__name__, tests)


class Copies(NetworkTestCase):
    def setUp(self) -> None:
        super().setUp()
        cache = tempfile.mkdtemp(prefix="network-snapshots-")
        self.addCleanup(shutil.rmtree, cache)
        self.manager = MicroVMIsolationManager(
            {"default_memory_mb": 128, "default_disk_size_mb": 64, "cache_dir": cache, "raise_on_error": True}
        )
        self.addCleanup(self.manager.stop)

    def started(self, **options: Any) -> Any:
        vm_id = self.manager.create_vm(IsolationType.BROWSER_TAB, **options)
        assert vm_id is not None
        self.manager.start_vm(vm_id)
        return self.manager.get_vm(vm_id)

    def check(self, vm: Any) -> List[str]:
        """Everything of its network is its own and works; returns what is."""
        network = vm.get_info()["network_config"]
        self.assertIn(network["tap_device"], taps())
        self.assertEqual(self.sh(vm, "cat /sys/class/net/eth0/address").strip(), network["mac_address"])
        addresses = [line for line in self.sh(vm, "ip address show eth0").splitlines() if "inet " in line]
        self.assertEqual(len(addresses), 1)
        self.assertIn("inet {}/{}".format(network["ip_address"], network["prefix_length"]), addresses[0])
        self.assertEqual(self.sh(vm, "ip route | grep -c default").strip(), "1")
        self.assertIn("default via {} dev eth0".format(network["gateway"]), self.sh(vm, "ip route"))
        self.assertEqual(self.sh(vm, "cat /etc/resolv.conf"), "nameserver {}\n".format(network["gateway"]))
        page = self.get(vm, "http://web.test/hello")
        self.assertEqual(page["status"], 200)
        return [network[field] for field in ("tap_device", "mac_address", "ip_address", "gateway")]

    def test_clones_are_on_networks_of_their_own_and_the_vm_stays_on_its(self) -> None:
        vm = self.started(network_config=connected())
        before = self.check(vm)
        vm.snapshot("on-a-network")
        clones = [self.started(template="on-a-network") for _ in range(2)]
        seen = [self.check(each) for each in [vm] + clones]
        self.assertEqual(seen[0], before)
        for field in zip(*seen):
            self.assertEqual(len(set(field)), 3, field)

    def test_where_a_clone_may_go_is_what_the_vm_might(self) -> None:
        vm = self.started(network_config=connected(egress=["web.test:80"]))
        self.check(vm)
        vm.snapshot("narrow")
        clone = self.started(template="narrow")
        self.check(clone)
        answer = clone.send_command("process_request", {"url": "http://other.test/", "timeout": 5})
        self.assertEqual(answer["status"], "error")
        self.assertEqual(clone.network_config.egress, ["web.test:80"])

    def test_a_suspended_vm_is_on_no_network_and_on_one_again(self) -> None:
        vm = self.started(network_config=connected())
        tap = self.check(vm)[0]
        self.assertTrue(vm.suspend())
        self.assertNotIn(tap, taps())
        self.assertTrue(vm.resume())
        self.check(vm)
