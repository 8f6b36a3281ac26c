"""Hosts on which a connected VM reaches nothing: what doctor, the start and the VM's info say, and that the remedy is one."""

import shlex
import unittest
from pathlib import Path
from typing import Any, Dict, List

from thirstys_waterfall.security.microvm_isolation import doctor

from ..support import eventually
from . import lab
from .case import NetworkTestCase
from .lab import UPLINK, run

ESTABLISHED = "ct state established,related"


def load_tests(loader: Any, tests: unittest.TestSuite, pattern: Any) -> unittest.TestSuite:
    return lab.load(__name__, tests)


def nft(text: str) -> None:
    for line in filter(None, map(str.strip, text.splitlines())):
        lab.run_words(["nft", line])


class Hosts(NetworkTestCase):
    def table(self, text: str) -> None:
        """A table of somebody else's, for the time of a test; its first line makes it."""
        family, name = text.split()[2:4]
        self.addCleanup(lab.run_words, ["nft", "delete table {} {}".format(family, name)])
        nft(text)

    def cured(self, remedy: str) -> None:
        """Does what a remedy says."""
        for command in remedy.partition(": ")[2].partition("; or ")[0].partition(" (or ")[0].split("; "):
            lab.run_words(shlex.split(command))

    def told(self) -> List[Dict[str, Any]]:
        """What doctor has to say about networks."""
        report = doctor()
        return [told for told in report["problems"] + report["hints"] if "onnected" in told["what"]]

    def refused_as_told(self, word: str) -> str:
        """The remedy for what doctor and a start agree about."""
        report = doctor()["network"]
        self.assertEqual(report["mode"], "user")
        self.assertIn(word, report["reason"])
        self.assertIn(report["remedy"], self.refused(word))
        self.assertEqual([problem["remedy"] for problem in self.told()], [report["remedy"]])
        return str(report["remedy"])

    def problems(self, vm: Any, count: int) -> List[Dict[str, str]]:
        """What a VM's info says, once it says so much; a look at the rules is used for a while."""
        found = lambda: vm.get_info()["network_config"]["problems"]
        self.assertTrue(eventually(lambda: len(found()) == count), found())
        return list(found())

    def test_host_without_a_firewall_is_fit(self) -> None:
        self.assertEqual(self.told(), [])
        vm = self.connected()
        self.assertEqual(self.problems(vm, 0), [])
        self.assertEqual(self.get(vm, "http://web.test/")["status"], 200)

    def test_forward_policy_of_drop_is_refused_until_the_remedy_is_taken(self) -> None:
        self.table("""
            add table ip filter
            add chain ip filter FORWARD { type filter hook forward priority 0 ; policy drop ; }
            add rule ip filter FORWARD oifname docker0 accept
        """)
        remedy = self.refused_as_told("chain FORWARD of nftables' table ip filter")
        self.cured(remedy)
        self.assertEqual(self.told(), [])
        vm = self.connected()
        self.assertEqual(self.get(vm, "http://web.test/")["status"], 200)
        # A firewall that comes later is told of, too.
        nft("flush chain ip filter FORWARD")
        [problem] = self.problems(vm, 1)
        self.assertIn("packets of VMs are dropped by chain FORWARD", problem["what"])
        self.assertEqual(self.reason(vm, "http://198.51.100.1/", timeout=2), "timeout")

    def test_answers_that_are_dropped_are_refused_too(self) -> None:
        self.table("""
            add table inet strict
            add chain inet strict forward { type filter hook forward priority 10 ; policy drop ; }
            add rule inet strict forward iifname "twm*" accept
        """)
        self.cured(self.refused_as_told("chain forward of nftables' table inet strict"))
        self.assertEqual(self.get(self.connected(), "http://web.test/")["status"], 200)

    def test_docker_is_told_by_its_own_chain(self) -> None:
        self.table("""
            add table ip filter
            add chain ip filter FORWARD { type filter hook forward priority 0 ; policy drop ; }
            add chain ip filter DOCKER-USER
            add rule ip filter FORWARD jump DOCKER-USER
            add rule ip filter FORWARD oifname docker0 ct state established,related accept
            add rule ip filter FORWARD iifname docker0 oifname != docker0 accept
        """)
        remedy = self.refused_as_told("FORWARD")
        self.assertIn("iptables -I DOCKER-USER -i twm+ -j ACCEPT; iptables -I DOCKER-USER -o twm+ -m conntrack", remedy)
        # The same remedy as nft commands.
        nft('insert rule ip filter DOCKER-USER iifname "twm*" accept')
        nft('insert rule ip filter DOCKER-USER oifname "twm*" {} accept'.format(ESTABLISHED))
        self.assertEqual(self.told(), [])

    def test_firewalld_is_told_by_its_own_tool(self) -> None:
        self.table("""
            add table inet firewalld
            add chain inet firewalld filter_FORWARD { type filter hook forward priority 10 ; policy accept ; }
            add chain inet firewalld filter_FORWARD_POLICIES
            add rule inet firewalld filter_FORWARD ct state { established, related } accept
            add rule inet firewalld filter_FORWARD ct status dnat accept
            add rule inet firewalld filter_FORWARD iifname lo accept
            add rule inet firewalld filter_FORWARD jump filter_FORWARD_POLICIES
            add rule inet firewalld filter_FORWARD reject with icmpx admin-prohibited
        """)
        self.assertIn("firewall-cmd --zone=trusted --add-interface=twm+", self.refused_as_told("filter_FORWARD"))
        nft('add rule inet firewalld filter_FORWARD_POLICIES iifname "twm*" accept')
        self.assertEqual(self.told(), [])

    def test_firewall_that_may_let_vms_pass_is_a_warning(self) -> None:
        self.table("""
            add table ip filter
            add chain ip filter FORWARD { type filter hook forward priority 0 ; policy drop ; }
            add rule ip filter FORWARD ct state established,related accept
            add rule ip filter FORWARD ip saddr 10.173.0.0/16 accept
        """)
        [problem] = self.told()
        self.assertIn("may reach nothing", problem["what"])
        self.assertEqual(doctor()["network"]["mode"], "tap")
        vm = self.connected()
        self.assertEqual(self.get(vm, "http://web.test/")["status"], 200)
        self.problems(vm, 1)

    def test_input_policy_of_drop_keeps_names_from_being_resolved(self) -> None:
        self.table("""
            add table ip filter
            add chain ip filter INPUT { type filter hook input priority 0 ; policy drop ; }
            add rule ip filter INPUT iifname { lo, up0 } accept
        """)
        [problem] = self.told()
        self.assertIn("no names are resolved", problem["what"])
        vm, asks_itself = self.connected(), self.connected({"dns_servers": ["8.8.8.8"]})
        self.assertEqual(self.get(asks_itself, "http://web.test/")["status"], 200)
        self.assertEqual(self.problems(asks_itself, 0), [])
        self.assertEqual(self.get(vm, "http://198.51.100.1/")["status"], 200)
        [problem] = self.problems(vm, 1)
        self.cured(problem["remedy"])
        self.assertEqual(self.problems(vm, 0), [])
        self.assertEqual(self.get(vm, "http://web.test/")["status"], 200)

    def vpn(self, name: str) -> None:
        run("ip link add {} type veth peer name far7".format(name))
        run("ip link set far7 up")
        self.addCleanup(run, "ip link delete {}".format(name))
        Path("/proc/sys/net/ipv4/conf/{}/forwarding".format(name)).write_text("0")
        run("ip address add 10.8.0.2/24 dev {}".format(name))
        run("ip link set {} up".format(name))

    def test_half_routes_of_a_vpn_lead_elsewhere_than_the_default_route(self) -> None:
        self.vpn("tun7")
        run("ip route add 0.0.0.0/1 dev tun7")
        run("ip route add 128.0.0.0/1 dev tun7")
        self.assertEqual(doctor()["network"]["uplinks"], ["tun7"])
        self.cured(self.refused_as_told("tun7 does not forward packets"))
        self.assertEqual(self.told(), [])
        self.connected()

    def test_rules_of_wg_quick_lead_elsewhere_than_the_default_route(self) -> None:
        self.vpn("wg7")
        run("ip route add default dev wg7 table 51820")
        for rule in ("not fwmark 51820 table 51820", "table main suppress_prefixlength 0"):
            run("ip rule add {}".format(rule))
            self.addCleanup(run, "ip rule delete {}".format(rule))
        self.assertEqual(doctor()["network"]["uplinks"], ["wg7"])
        self.cured(self.refused_as_told("wg7 does not forward packets"))
        self.assertEqual(self.told(), [])
        self.connected()

    def test_one_half_that_does_not_forward_is_a_warning(self) -> None:
        self.vpn("tun7")
        run("ip route add 128.0.0.0/1 dev tun7")
        self.assertEqual(doctor()["network"]["uplinks"], [UPLINK, "tun7"])
        [problem] = self.told()
        self.assertIn("tun7 does not forward packets", problem["what"])
        self.assertEqual(self.problems(self.connected(), 1)[0]["remedy"], problem["remedy"])

    def test_host_without_a_way_out_is_told_of(self) -> None:
        run("ip route delete default")
        self.addCleanup(run, "ip route add default via 203.0.113.1")
        self.assertEqual(doctor()["network"]["uplinks"], [])
        [problem] = self.told()
        self.assertIn("no way to the internet", problem["what"])
        vm = self.connected()
        self.assertIn("default route", self.problems(vm, 1)[0]["remedy"])
        self.sh(vm, "ping -c 1 -W 5 {}".format(vm.get_info()["network_config"]["gateway"]))

    def test_isolated_vms_have_no_such_problems(self) -> None:
        run("ip route delete default")
        self.addCleanup(run, "ip route add default via 203.0.113.1")
        self.assertEqual(self.running().get_info()["network_config"]["problems"], [])


if __name__ == "__main__":
    unittest.main()
