"""What a connected VM cannot do, tried by a guest with root and by a VMM in an attacker's power."""

import fcntl
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import unittest
from pathlib import Path
from typing import Any, Dict, List, Tuple

from ..support import eventually, shell
from . import lab
from .attacks import BETWEEN, ELSEWHERE, INTERNET, TOLD, WORKS_ON_A_BARE_WIRE, Attempt, End
from .case import NetworkTestCase, connected
from .frames import ARP, BROADCAST, IPV4, Eyes, Inbox, Sighting, arp, echo, ethernet, hand_of, settle, tcp, udp
from .lab import HOST_ADDRESS, HOST_OTHER_ADDRESS, UPLINK, run

ATTEMPTS = dict(BETWEEN, **ELSEWHERE)
# ICMP: destination unreachable, communication administratively prohibited.
UNREACHABLE, PROHIBITED = 3, 13


def load_tests(loader: Any, tests: unittest.TestSuite, pattern: Any) -> unittest.TestSuite:
    return lab.load(__name__, tests)


def new_mark() -> bytes:
    return os.urandom(32)


def is_refusal(seen: Sighting, me: End) -> bool:
    """Whether a frame tells a VM, and nobody else, that the host refused what the VM itself sent."""
    frame = seen.frame
    outer, inner = frame[14:34], frame[42:62]
    return (
        seen.interface == me.tap
        and frame[:14] == ethernet(me.mac, me.tap_mac, IPV4, b"")
        and (outer[9], frame[34], frame[35]) == (socket.IPPROTO_ICMP, UNREACHABLE, PROHIBITED)
        and outer[12:20] == socket.inet_aton(me.gateway) + socket.inet_aton(me.address)
        and inner[12:16] == socket.inet_aton(me.address)
    )


class Watched(NetworkTestCase):
    """A test that sees every frame which the host sends, and has services on every address of the host."""

    def setUp(self) -> None:
        super().setUp()
        self.refusals: List[Sighting] = []
        self.eyes, self.inbox = Eyes(), Inbox()
        self.addCleanup(self.eyes.close)
        self.addCleanup(self.inbox.close)

    def hand(self, vm: Any) -> int:
        """The VMM's end of the wire; what is written there comes from the guest, as far as the host can tell."""
        hand = hand_of(vm.get_info()["pid"], vm.get_info()["network_config"]["tap_device"])
        self.addCleanup(os.close, hand)
        return hand

    def reached(self, attempt: Attempt, hand: int, me: End, you: End) -> List[str]:
        """Where an attempt came through to."""
        mark = new_mark()
        before = len(self.eyes.seen)
        for frame in attempt(me, you, mark):
            os.write(hand, frame)
        settle()
        new = self.eyes.seen[before:]
        self.refusals = [seen for seen in new if is_refusal(seen, me)]
        where = ["{}: {}".format(seen.interface, seen.frame.hex()) for seen in new if mark in seen.frame and not is_refusal(seen, me)]
        # An answer to a SYN does not carry the mark.
        where += ["an answer: {}".format(seen.frame.hex()) for seen in new if seen.interface == me.tap and not is_refusal(seen, me)]
        return where + ["the host's service, from {}".format(peer) for peer in self.inbox.of(mark)]


class BareWire(Watched):
    """That the attempts are real: what they do to a tap that has an address, forwarding and nothing else."""

    def bare(self, name: str, number: int) -> Tuple[int, End]:
        hand = os.open("/dev/net/tun", os.O_RDWR)
        self.addCleanup(os.close, hand)
        fcntl.ioctl(hand, 0x400454CA, struct.pack("16sH22x", name.encode(), 0x1002))
        Path("/proc/sys/net/ipv4/conf/{}/forwarding".format(name)).write_text("1")
        Path("/proc/sys/net/ipv4/conf/{}/rp_filter".format(name)).write_text("0")
        Path("/proc/sys/net/ipv6/conf/{}/accept_dad".format(name)).write_text("0")
        address, gateway = "10.99.0.{}".format(number * 4 + 2), "10.99.0.{}".format(number * 4 + 1)
        mac = "02:00:00:00:00:{:02x}".format(number)
        run("ip address add {}/30 dev {}".format(gateway, name))
        run("ip link set {} up".format(name))
        run("ip neighbour replace {} lladdr {} dev {}".format(address, mac, name))
        link = json.loads(run("ip -json link show dev {}".format(name)))[0]
        return hand, End(name, link["address"], mac, address, gateway)

    def test_attempts_come_through_where_nothing_holds_them_off(self) -> None:
        (hand, me), (_, you) = self.bare("bare0", 0), self.bare("bare1", 1)
        settle()
        for name in WORKS_ON_A_BARE_WIRE:
            with self.subTest(name):
                self.assertTrue(self.reached(ATTEMPTS[name], hand, me, you))

    def test_ipv6_neighbours_and_arp_answer_where_nothing_holds_them_off(self) -> None:
        hand, me = self.bare("bare0", 0)
        os.write(hand, me.frame(arp(1, me.mac, me.address, BROADCAST, HOST_ADDRESS), ARP, to=BROADCAST))
        settle()
        self.assertTrue([seen for seen in self.eyes.seen if seen.frame[12:14] == struct.pack("!H", ARP)])


class Policy(Watched):
    def test_what_is_allowed_comes_through(self) -> None:
        vm = self.connected()
        hand, me = self.hand(vm), self.end(vm)
        mark = new_mark()
        os.write(hand, me.frame(udp(me.address, INTERNET, 9, mark)))
        os.write(hand, me.frame(echo(me.address, me.gateway, mark)))
        settle()
        self.assertEqual({seen.interface for seen in self.eyes.of(mark)}, {UPLINK, me.tap})

    def test_no_attempt_comes_through(self) -> None:
        vm, victim = self.connected(), self.connected()
        hand, me, you = self.hand(vm), self.end(vm), self.end(victim)
        for name, attempt in ATTEMPTS.items():
            with self.subTest(name):
                self.assertEqual(self.reached(attempt, hand, me, you), [])
                if name not in TOLD:
                    self.assertEqual(self.refusals, [])
        self.assertEqual(self.get(victim, "http://web.test/")["status"], 200)

    def test_sender_of_what_is_denied_is_told_at_once(self) -> None:
        vm, victim = self.connected(), self.connected()
        hand, me, you = self.hand(vm), self.end(vm), self.end(victim)
        for name in sorted(TOLD):
            with self.subTest(name):
                # The kernel has errors for one peer by the second, and a few more at once.
                self.assertTrue(eventually(lambda: self.reached(ATTEMPTS[name], hand, me, you) == [] and self.refusals, 10.0))

    def test_refusals_are_rationed(self) -> None:
        vm = self.connected()
        hand, me = self.hand(vm), self.end(vm)
        for port in range(2000):
            os.write(hand, me.frame(udp(me.address, "169.254.169.254", 1 + port, b"x")))
            os.write(hand, me.frame(tcp(me.address, HOST_ADDRESS, 1 + port, b"")))
        settle()
        self.assertIn(len([seen for seen in self.eyes.seen if is_refusal(seen, me)]), range(1, 100))

    def test_connections_to_what_is_denied_fail_at_once_in_the_guest(self) -> None:
        vm, victim = self.connected(), self.connected()
        for address in ("169.254.169.254", "100.100.100.200", HOST_ADDRESS, self.end(victim).address):
            with self.subTest(address):
                begun = time.monotonic()
                self.assertEqual(self.reason(vm, "http://{}/".format(address), timeout=20), "unreachable")
                self.assertLess(time.monotonic() - begun, 5)

    def test_no_attempt_comes_through_between_vms_of_two_managers(self) -> None:
        vm = self.connected()
        code = (
            "import sys, json\nfrom thirstys_waterfall.security.microvm_isolation import *\n"
            "manager = MicroVMIsolationManager({'default_memory_mb': 128, 'raise_on_error': True})\nmanager.start()\n"
            "vm_id = manager.create_vm('plugin', network_config=VMNetworkConfig(isolated_network=False))\n"
            "manager.start_vm(vm_id)\nprint(json.dumps(manager.get_vm_info(vm_id)), flush=True)\nsys.stdin.read()\n"
        )
        with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
            assert other.stdin and other.stdout
            info = json.loads(other.stdout.readline())
            network = info["network_config"]
            link = json.loads(run("ip -json link show dev {}".format(network["tap_device"])))[0]
            theirs = End(
                network["tap_device"], link["address"], network["mac_address"], network["ip_address"], network["gateway"]
            )
            hands = {True: self.hand(vm), False: hand_of(info["pid"], network["tap_device"])}
            self.addCleanup(os.close, hands[False])
            ours = self.end(vm)
            for name, attempt in BETWEEN.items():
                for mine in (True, False):
                    me, you = (ours, theirs) if mine else (theirs, ours)
                    with self.subTest(name, mine=mine):
                        self.assertEqual(self.reached(attempt, hands[mine], me, you), [])
            other.stdin.close()

    def test_ten_vms_reach_none_of_each_other_by_any_way(self) -> None:
        vms = [self.manager.get_vm(self.create(network_config=connected())) for _ in range(10)]
        threads = [threading.Thread(target=vm.start) for vm in vms]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        ends = [(self.hand(vm), self.end(vm)) for vm in vms]
        marks: Dict[bytes, str] = {}
        for hand, me in ends:
            for _, you in ends:
                for name, attempt in BETWEEN.items():
                    mark = new_mark()
                    marks[mark] = "{} to {}: {}".format(me.tap, you.tap, name)
                    for frame in attempt(me, you, mark) if me != you else []:
                        os.write(hand, frame)
        settle()
        settle()
        seen = list(self.eyes.seen)
        by_tap = {me.tap: me for _, me in ends}
        seen = [one for one in seen if one.interface not in by_tap or not is_refusal(one, by_tap[one.interface])]
        through = [what for mark, what in marks.items() if self.inbox.of(mark) or any(mark in one.frame for one in seen)]
        self.assertEqual(through, [])
        self.assertEqual({self.get(vm, "http://web.test/")["status"] for vm in vms}, {200})

    def test_arp_is_answered_for_the_gateway_alone(self) -> None:
        vm, victim = self.connected(), self.connected()
        hand, me, you = self.hand(vm), self.end(vm), self.end(victim)
        before = run("ip neigh")
        # ARP operation, sender MAC, sender address, target address.
        lies = [
            (1, me.mac, me.address, HOST_ADDRESS),
            (1, me.mac, me.address, HOST_OTHER_ADDRESS),
            (1, me.mac, me.address, you.address),
            (1, me.mac, me.address, you.gateway),
            (1, me.mac, you.address, me.gateway),
            (1, me.mac, "10.0.0.77", me.gateway),
            (1, me.mac, me.gateway, me.gateway),
            (1, you.mac, me.address, me.gateway),
            (1, me.mac, "0.0.0.0", me.gateway),
            (2, me.mac, me.gateway, me.gateway),
            (2, me.mac, you.address, me.gateway),
            (2, you.mac, me.address, me.gateway),
        ]
        count = len(self.eyes.seen)
        for operation, mac, sender, target in lies:
            for destination in (me.tap_mac, BROADCAST):
                os.write(hand, me.frame(arp(operation, mac, sender, me.tap_mac, target), ARP, to=destination))
        settle()
        self.assertEqual([seen for seen in self.eyes.seen[count:] if seen.interface != UPLINK], [])
        self.assertEqual(run("ip neigh"), before)
        os.write(hand, me.frame(arp(1, me.mac, me.address, BROADCAST, me.gateway), ARP, to=BROADCAST))
        settle()
        answers = [seen.frame for seen in self.eyes.seen[count:] if seen.interface == me.tap]
        self.assertEqual(len(answers), 1)
        self.assertIn(bytes.fromhex(me.tap_mac.replace(":", "")) + socket.inet_aton(me.gateway), answers[0])

    def test_nothing_reaches_a_vm_unasked(self) -> None:
        vm = self.connected()
        me = self.end(vm)
        self.result(vm, "exec", shell("nc -lk -p 7000 -e echo opened >/dev/null 2>&1 &"))
        mark = new_mark()
        ours = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.addCleanup(ours.close)
        with self.assertRaises(PermissionError):
            ours.sendto(mark, (me.address, 7000))
        stream = socket.socket()
        self.addCleanup(stream.close)
        stream.settimeout(1)
        with self.assertRaises(OSError):
            stream.connect((me.address, 7000))
        # A neighbour on the uplink that knows the route sends to the VM.
        self.lab.order("send", to=HOST_ADDRESS, datagram=[me.address, 7000, mark.hex()])
        settle()
        self.assertEqual([seen for seen in self.eyes.seen if seen.interface == me.tap], [])

    def test_port_that_the_host_leads_elsewhere_is_not_reached(self) -> None:
        # A container engine publishes a port like this: the packet was sent to the host and is forwarded.
        run("nft add table ip published")
        self.addCleanup(run, "nft delete table ip published")
        run("nft add chain ip published ports { type nat hook prerouting priority dstnat ; }")
        run("nft add rule ip published ports tcp dport 8081 dnat to 198.51.100.1:80")
        vm = self.connected()
        self.assertEqual(self.reason(vm, "http://{}:8081/".format(HOST_ADDRESS), timeout=5), "unreachable")
        self.assertEqual(self.get(vm, "http://198.51.100.2:8081/")["status"], 200)

    def test_guest_that_opens_many_connections_is_held_at_its_limit(self) -> None:
        vm = self.connected()
        hand, me = self.hand(vm), self.end(vm)
        mark = new_mark()
        for port in range(6000):
            os.write(hand, me.frame(udp(me.address, INTERNET, 10000 + port, mark)))
        settle()
        left = [seen for seen in self.eyes.of(mark) if seen.interface == UPLINK]
        self.assertIn(len(left), range(1500, 2049))


class GuestWithRoot(NetworkTestCase):
    def test_busybox_of_a_guest_finds_no_way(self) -> None:
        vm, victim = self.connected(), self.connected()
        me, you = self.end(vm), self.end(victim)
        inbox = Inbox()
        self.addCleanup(inbox.close)
        self.sh(victim, "mkdir -p /tmp/www; echo secret >/tmp/www/index.html; httpd -p 80 -h /tmp/www")
        self.assertIn("secret", self.sh(victim, "wget -q -O - http://127.0.0.1/"))
        self.sh(vm, "echo 0 >/proc/sys/net/ipv6/conf/all/disable_ipv6; sleep 2")
        for script in (
            "ping -c 1 -W 1 {you.address}",
            "wget -q -T 2 -O - http://{you.address}/",
            "ip route add {you.address} dev eth0; arp -s {you.address} {you.mac}; ping -c 1 -W 1 {you.address}",
            "arp -d {you.address}; arp -s {you.address} {me.tap_mac}; wget -q -T 2 -O - http://{you.address}/",
            "ping -c 1 -W 1 {you.gateway}",
            "ping -c 1 -W 1 {host}",
            "ping -c 1 -W 1 {other}",
            "echo x | nc -w 2 {host} 9999",
            "echo x | nc -w 2 {me.gateway} 9999",
            "wget -q -T 2 -O - http://169.254.169.254/",
            "wget -q -T 2 -O - http://100.100.100.200/",
            "ping -c 1 -W 1 -s 4000 198.51.100.1",
            "ping6 -c 1 -W 1 {me.tap_link_local}%eth0",
            "ping -c 1 -W 1 224.0.0.1",
            "arping -c 1 -w 1 -I eth0 {host}",
            "arping -c 1 -w 1 -I eth0 {you.address}",
            "ip address add {you.address}/32 dev eth0; ping -c 1 -W 1 -I {you.address} 198.51.100.1",
        ):
            with self.subTest(script):
                self.fails(vm, script.format(me=me, you=you, host=HOST_ADDRESS, other=HOST_OTHER_ADDRESS))
        self.sh(vm, "ip address del {}/32 dev eth0; ping -c 1 -W 5 198.51.100.1".format(you.address))
        self.fails(vm, "ip link set eth0 down; ip link set eth0 address 02:00:00:00:00:99; ip link set eth0 up; "
                   "ip route add default via {0} dev eth0; ping -c 1 -W 1 {0}".format(me.gateway))
        self.assertEqual(inbox.got, [])
        self.assertEqual(self.get(victim, "http://web.test/")["status"], 200)

    def test_wire_shows_only_what_is_allowed(self) -> None:
        vm = self.connected({"dns_servers": ["8.8.8.8"]})
        me = self.end(vm)
        self.lab.order("reset")
        self.sh(vm, "ping -c 1 -W 5 198.51.100.1")
        self.get(vm, "http://web.test/")
        for script in (
            "ping -c 1 -W 1 169.254.169.254", "ping -c 1 -W 1 203.0.113.2", "udhcpc -n -t 1 -T 1 -i eth0",
            "ping6 -c 1 -W 1 ff02::1%eth0", "arping -c 1 -w 1 -I eth0 203.0.113.1", "ping -c 1 -W 1 224.0.0.1",
            "ip address add 192.0.2.9/32 dev eth0; ping -c 1 -W 1 -I 192.0.2.9 198.51.100.1",
        ):
            self.fails(vm, script)
        allowed, sources = set(), set()
        for frame in self.lab.frames():
            kind = struct.unpack("!H", frame[12:14])[0]
            if kind == ARP:
                continue  # ARP between the host and its neighbour on the wire.
            self.assertEqual(kind, 0x0800, frame.hex())
            sources.add(socket.inet_ntoa(frame[26:30]))
            allowed.add((socket.inet_ntoa(frame[30:34]), frame[23]))
        self.assertEqual(sources, {HOST_ADDRESS})
        self.assertEqual(allowed, {("198.51.100.1", 1), ("198.51.100.1", 6), ("8.8.8.8", 17)}, me)


class ByOthers(Watched):
    def test_flushed_ruleset_is_put_back_and_the_vm_stays_where_it_was(self) -> None:
        vm, victim = self.connected(), self.connected({"egress": ["web.test:80"]})
        hand, me, you = self.hand(vm), self.end(vm), self.end(victim)
        self.assertEqual(self.get(victim, "http://web.test/")["status"], 200)
        run("nft flush ruleset")
        self.assertTrue(eventually(lambda: "tw_microvm_" in run("nft list tables"), 2.0))
        settle()
        for name in ("another VM, directly", "the host", "the metadata service", "as somebody else"):
            with self.subTest(name):
                self.assertEqual(self.reached(ATTEMPTS[name], hand, me, you), [])
        self.assertEqual(self.get(vm, "http://web.test/")["status"], 200)
        # What its names stand for was lost with the rest, and is learned again.
        self.assertEqual(self.get(victim, "http://web.test/")["status"], 200)
        self.manager.destroy_all_vms()
        self.assertEqual(run("nft list ruleset"), "")

    def test_removed_table_does_not_keep_a_vm_from_going(self) -> None:
        before = lab.state()
        vm = self.connected()
        table = run("nft list tables").split()[2]
        run("nft flush ruleset")
        self.assertTrue(eventually(lambda: table in run("nft list tables"), 2.0))
        run("nft delete chain inet {} departure".format(table))
        self.manager.destroy_vm(vm.vm_id)
        self.assertEqual(lab.state(), before)


if __name__ == "__main__":
    unittest.main()
