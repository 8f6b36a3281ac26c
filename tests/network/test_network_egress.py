"""Allow-lists, the names on them, and the relay that asks for those."""

import json
import os
import shutil
import struct
import tempfile
import threading
import time
import unittest
from pathlib import Path
from typing import Any, List

from ..support import eventually
from . import lab
from .case import NetworkTestCase
from .frames import hand_of, settle, udp
from .lab import run

WEB, OTHER = "198.51.100.1", "198.51.100.2"


def load_tests(loader: Any, tests: unittest.TestSuite, pattern: Any) -> unittest.TestSuite:
    return lab.load(__name__, tests)


class AllowLists(NetworkTestCase):
    def test_names_are_pinned_to_what_the_vm_was_answered(self) -> None:
        vm = self.connected({"egress": ["web.test"]})
        # The address is closed until the VM has resolved the name.
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
        # The name server lies in an allowed network, so the VM may also ask it directly.
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
        self.assertEqual(self.reason(vm, "http://metadata.test/", timeout=5), "unreachable")
        self.assertEqual(self.reason(vm, "http://169.254.169.254/", timeout=5), "unreachable")

    def test_names_outside_of_the_list_are_asked_of_nobody(self) -> None:
        vm = self.connected({"egress": ["web.test"], "dns_servers": ["8.8.8.8"]})
        self.assertEqual(self.reason(vm, "http://stolen-secret.web.test/"), "dns")
        self.fails(vm, "nslookup -type=txt stolen-secret.evil.test")
        # The configured server cannot be asked directly either, only through the relay.
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


def question(labels: List[bytes], kind: int = 1, more: bytes = b"") -> bytes:
    """A message of DNS; ``more`` are its additional records, one of them."""
    name = b"".join(bytes([len(label)]) + label for label in labels) + b"\0"
    return struct.pack("!HHHHHH", 0x5EC7, 0x0130, 1, 0, 0, bool(more)) + name + struct.pack("!HH", kind, 1) + more


class Questions(NetworkTestCase):
    """What a guest may make of its questions, each a datagram to the gateway, by hand."""

    def ask(self, vm: Any, *messages: bytes) -> None:
        me = self.end(vm)
        hand = hand_of(vm.get_info()["pid"], me.tap)
        try:
            for message in messages:
                os.write(hand, me.frame(udp(me.address, me.gateway, 53, message)))
        finally:
            os.close(hand)

    def test_question_goes_upstream_as_its_name_and_type_alone(self) -> None:
        vm = self.connected({"egress": ["web.test", "*.wild.test"]})
        secret = struct.pack("!HH", 65001, 200) + b"s" * 200
        option = b"\0" + struct.pack("!HHIH", 41, 4096, 0x8000, len(secret)) + secret
        # A label that holds a dot, then a name in a spelling of its own with an option and a trailer.
        self.ask(vm, question([b"secret-data.wild", b"test"]), question([b"wEb", b"TeSt"], more=option) + b"trailer")
        self.assertTrue(eventually(lambda: self.lab.order("log")["questions"]))
        settle()
        asked = [bytes.fromhex(text) for text in self.lab.order("log")["questions"]]
        own_option = b"\0" + struct.pack("!HHIH", 41, 1232, 0, 0)
        self.assertEqual([message[12:] for message in asked], [question([b"web", b"test"], more=own_option)[12:]])
        self.assertEqual(asked[0][2:12].hex(), "01000001000000000001")

    def test_names_that_stand_for_private_addresses_lead_nowhere(self) -> None:
        vm = self.connected({"egress": ["private.test", "rebound.test"]})
        self.assertEqual(self.reason(vm, "http://private.test/"), "dns")
        self.assertEqual(self.get(vm, "http://rebound.test/hello")["body"], "hello from {}/hello".format(WEB))
        self.assertEqual(self.reason(vm, "http://10.11.12.13/", timeout=5), "unreachable")

    def test_private_address_on_the_list_may_have_a_name(self) -> None:
        vm = self.connected({"egress": ["private.test", "10.11.12.0/24:80"]})
        self.assertEqual(self.get(vm, "http://private.test/hello")["body"], "hello from 10.11.12.13/hello")
        # The name opens only the port that the address's own entry allows.
        self.assertEqual(self.reason(vm, "http://private.test:5003/", timeout=5), "unreachable")

    def test_flood_of_names_fills_neither_the_log_nor_the_host_with_processes(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        runs, path = Path(folder.name) / "runs", os.environ["PATH"]
        counting = Path(folder.name) / "nft"
        counting.write_text("#!/bin/sh\necho >>{}\nexec {} \"$@\"\n".format(runs, shutil.which("nft", path=path + ":/usr/sbin:/sbin")))
        counting.chmod(0o755)
        os.environ["PATH"] = "{}:{}".format(folder.name, path)
        self.addCleanup(os.environ.update, PATH=path)
        vm = self.connected({"egress": ["*.flood.test"]})
        begun, before = time.monotonic(), len(runs.read_bytes())
        with self.assertLogs(level="WARNING") as logs:
            full = lambda: [line for line in logs.output if "the most that may be" in line]
            names = iter(range(1, 100000))
            while not full() and time.monotonic() - begun < 30:
                self.ask(vm, *(question([str(next(names)).encode(), b"flood", b"test"]) for _ in range(50)))
                time.sleep(0.05)
            self.assertTrue(full(), logs.output)
            for _ in range(20):
                self.ask(vm, *(question([str(next(names)).encode(), b"flood", b"test"]) for _ in range(50)))
            settle()
        self.assertLess(len([line for line in logs.output if "flood" in line]), 3, logs.output)
        changes = len(runs.read_bytes()) - before
        self.assertLessEqual(changes, 16 + 5 * (time.monotonic() - begun) + 1)
        listed = json.loads(run("nft --json list ruleset"))["nftables"]
        pinned = next(item["set"]["elem"] for item in listed if item.get("set", {}).get("name", "").startswith("names_"))
        self.assertIn(len(pinned), range(1900, 2049))


if __name__ == "__main__":
    unittest.main()
