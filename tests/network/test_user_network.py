"""VMs on a network of an ordinary user without any capability: the gateway in user mode."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import unittest
from pathlib import Path
from typing import Any, Dict, List, Optional

from ..support import IMPORT, alive, eventually, shell
from . import lab
from .case import NetworkTestCase, sent_by
from .internet import DNS, OTHER_WEB, PRIVATE, SINK_PORT, WEB
from .lab import HOST_ADDRESS, HOST_OTHER_ADDRESS, UPLINK, Lab, state

UID = 65534
USER = ["setpriv", "--reuid=%d" % UID, "--regid=%d" % UID, "--clear-groups", "--inh-caps=-all", "--ambient-caps=-all"]
USER += ["--bounding-set=-all", "--no-new-privs"]
METADATA = ("169.254.169.254", "100.100.100.200", "168.63.129.16")


def load_tests(loader: Any, tests: unittest.TestSuite, pattern: Any) -> unittest.TestSuite:
    return lab.load(__name__, tests)


class User:
    """The ordinary user's manager."""

    def __init__(self, folder: str) -> None:
        command = USER + [sys.executable, "-m", "tests.network.as_user", folder]
        self.process = subprocess.Popen(
            command, cwd=str(lab.ROOT), stdin=subprocess.PIPE, stdout=subprocess.PIPE, universal_newlines=True
        )

    def answer(self, do: str, *arguments: Any, **named: Any) -> Dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps({"do": do, "arguments": arguments, "named": named}) + "\n")
        self.process.stdin.flush()
        return dict(json.loads(self.process.stdout.readline()))

    def __call__(self, do: str, *arguments: Any, **named: Any) -> Any:
        answer = self.answer(do, *arguments, **named)
        if "error" in answer:
            raise AssertionError(answer["trace"])
        return answer["result"]

    def close(self) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


class Listener:
    """A service of the host on all its addresses, which no VM may reach."""

    def __init__(self) -> None:
        self.socket = socket.socket()
        self.socket.bind(("0.0.0.0", 0))
        self.socket.listen(16)
        self.port = int(self.socket.getsockname()[1])
        self.peers: List[str] = []
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        while True:
            try:
                connection, peer = self.socket.accept()
            except OSError:
                return
            self.peers.append(peer[0])
            connection.close()


def found_gateways() -> List[int]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            is_one = entry.name.isdigit() and (entry / "cmdline").read_bytes() == b"/vmm/usernet\0"
        except OSError:
            continue
        if is_one:
            found.append(int(entry.name))
    return found


class UserNetwork(unittest.TestCase):
    lab: Lab
    user: User
    maxDiff = None

    @classmethod
    def setUpClass(cls) -> None:
        probe = subprocess.run(USER + [sys.executable, "-c", "import " + IMPORT], stderr=subprocess.PIPE, cwd=str(lab.ROOT))
        if probe.returncode:
            raise unittest.SkipTest("an ordinary user cannot run this interpreter")
        cls.lab = Lab()
        # Nothing of the host is fit for taps, and nothing has to be.
        cls.lab.forwarding(False)
        cls.folder = tempfile.TemporaryDirectory()
        os.chown(cls.folder.name, UID, UID)
        cls.user = User(cls.folder.name)
        # The first VM makes the template of all.
        cls.user("destroy", cls.user("start", {}, {}))

    @classmethod
    def tearDownClass(cls) -> None:
        cls.user.close()
        cls.folder.cleanup()
        cls.lab.close()

    def setUp(self) -> None:
        self.lab.order("reset")

    def start(self, limits: Optional[Dict[str, Any]] = None, **network: Any) -> str:
        vm_id = str(self.user("start", network, limits or {}))
        self.addCleanup(self.user, "destroy", vm_id)
        return vm_id

    def network(self, vm_id: str) -> Dict[str, Any]:
        return dict(self.user("info", vm_id)["network_config"])

    def result(self, vm_id: str, name: str, params: Dict[str, Any]) -> Any:
        answer = self.user("command", vm_id, name, params)
        self.assertEqual(answer["status"], "ok", answer)
        return answer["result"]

    def sh(self, vm_id: str, script: str, timeout: float = 30.0) -> str:
        done = self.result(vm_id, "exec", shell(script, timeout=timeout))
        self.assertEqual(done["exit_code"], 0, done)
        return str(done["stdout"])

    def fails(self, vm_id: str, script: str, timeout: float = 20.0) -> str:
        done = self.result(vm_id, "exec", shell(script, timeout=timeout))
        self.assertNotEqual(done["exit_code"], 0, done)
        return str(done["stdout"]) + str(done["stderr"])

    def get(self, vm_id: str, url: str) -> Dict[str, Any]:
        return dict(self.result(vm_id, "process_request", {"url": url}))

    def reason(self, vm_id: str, url: str, **params: Any) -> str:
        answer = self.user("command", vm_id, "process_request", dict(params, url=url))
        self.assertEqual(answer["status"], "error", answer)
        return str(answer["error"].get("reason") or answer["error"])

    def gateways(self) -> List[int]:
        return found_gateways()

    def test_vm_has_names_pages_and_nothing_changes_on_the_host(self) -> None:
        before = state()
        vm = self.start()
        network = self.network(vm)
        self.assertEqual((network["mode"], network["tap_device"], network["problems"]), ("user", None, []))
        self.assertIn("CAP_NET_ADMIN", network["mode_reason"])
        self.assertEqual(network["dns_servers"], [network["gateway"]])
        page = self.get(vm, "http://web.test/")
        self.assertEqual((page["status"], page["body"]), (200, "hello from {}/".format(WEB)))
        self.assertEqual(self.get(vm, "http://www.web.test/redirect")["status"], 200)
        self.assertEqual(self.reason(vm, "http://nowhere.test/"), "dns")
        # The network's other end sees the host's own address.
        seen = self.lab.order("seen")
        self.assertEqual(set(seen["clients"]), {HOST_ADDRESS})
        self.assertEqual(state(), before)
        metrics = self.user("info", vm)["health_metrics"]
        self.assertTrue(eventually(lambda: self.user("info", vm)["health_metrics"]["network_rx_bytes"] > 0), metrics)

    def test_much_goes_both_ways(self) -> None:
        vm = self.start()
        self.assertEqual(self.sh(vm, "wget -q -O - http://{}/zeros | wc -c".format(WEB), timeout=60).strip(), str(9 << 20))
        self.sh(vm, "head -c 4000000 /dev/zero | nc {} {}".format(WEB, SINK_PORT), timeout=60)
        self.assertTrue(eventually(lambda: self.lab.order("received")[0] == 4_000_000))
        # Some at once.
        script = "for n in 1 2 3 4 5 6 7 8; do wget -q -O - http://{}/page | wc -c & done; wait".format(WEB)
        self.assertEqual(len(set(self.sh(vm, script, timeout=60).split())), 1)

    def test_ports_without_a_listener_and_networks_without_a_way_are_told_at_once(self) -> None:
        vm = self.start()
        self.assertEqual(self.reason(vm, "http://{}:81/".format(WEB)), "refused")
        lab.run("ip route add unreachable 192.0.2.128/25")
        self.addCleanup(lab.run, "ip route delete unreachable 192.0.2.128/25")
        self.assertEqual(self.reason(vm, "http://192.0.2.200/"), "unreachable")

    def test_echo_of_the_gateway_and_where_the_host_lets_users_ping_of_others(self) -> None:
        vm = self.start()
        gateway = self.network(vm)["gateway"]
        self.sh(vm, "ping -c 2 -W 5 {}".format(gateway))
        setting = Path("/proc/sys/net/ipv4/ping_group_range")
        before = setting.read_text()
        self.addCleanup(setting.write_text, before)
        setting.write_text("1 0")
        self.fails(vm, "ping -c 1 -W 2 {}".format(WEB))
        setting.write_text("0 2147483647")
        self.sh(vm, "ping -c 2 -W 5 {}".format(WEB))

    def test_vm_reaches_neither_host_nor_metadata(self) -> None:
        listener = Listener()
        self.addCleanup(listener.socket.close)
        for address in ("127.0.0.1", HOST_ADDRESS, HOST_OTHER_ADDRESS):
            with socket.create_connection((address, listener.port), timeout=5):
                pass
        self.assertTrue(eventually(lambda: len(listener.peers) == 3))
        for address in METADATA[:2]:
            with socket.create_connection((address, 80), timeout=5):
                pass
        vm = self.start()
        gateway = self.network(vm)["gateway"]
        self.lab.order("reset")
        before = sent_by(UPLINK)
        for address in (HOST_ADDRESS, HOST_OTHER_ADDRESS, "127.0.0.1", "127.9.9.9", "0.0.0.0", gateway):
            with self.subTest(address):
                # Loopback stays in the guest unless a route of its own sends it out.
                script = "ip route replace {0}/32 via {1} dev eth0; ".format(address, gateway) if address.startswith("1") else ""
                self.fails(vm, script + "nc -w 3 {} {} </dev/null".format(address, listener.port))
        for address in METADATA + ("224.0.0.1", "255.255.255.255", "240.0.0.1"):
            with self.subTest(address):
                self.fails(vm, "nc -w 3 {} 80 </dev/null".format(address))
        self.assertEqual(len(listener.peers), 3, listener.peers)
        self.assertEqual(self.lab.order("seen")["clients"], [])
        self.assertEqual(sent_by(UPLINK), before)
        # What is refused is not what is broken.
        self.assertEqual(self.get(vm, "http://{}/".format(WEB))["status"], 200)

    def test_vms_do_not_reach_each_other(self) -> None:
        first, second = self.start(), self.start()
        self.sh(first, "nc -l -p 7000 -e /bin/true >/dev/null 2>&1 &")
        address = self.network(first)["ip_address"]
        before = sent_by(UPLINK)
        self.fails(second, "nc -w 2 {} 7000 </dev/null".format(address))
        # The host sends what it has no route for to its own gateway, which knows nothing of it.
        self.assertLess(sent_by(UPLINK) - before, 1000)

    def test_allow_list_holds_by_name_address_and_port(self) -> None:
        vm = self.start(egress=["web.test:80", "{}:443".format(OTHER_WEB), "private.test"])
        self.assertEqual(self.reason(vm, "http://{}/".format(WEB)), "unreachable")
        self.assertEqual(self.get(vm, "http://web.test/")["status"], 200)
        # The answer let the address pass, at its port alone.
        self.assertEqual(self.get(vm, "http://{}/".format(WEB))["status"], 200)
        self.fails(vm, "nc -w 3 {} {} </dev/null".format(WEB, SINK_PORT))
        self.assertEqual(self.reason(vm, "http://other.test/"), "dns")
        self.assertEqual(self.reason(vm, "http://{}/".format(OTHER_WEB)), "unreachable")
        # A name opens no private address.
        self.assertEqual(self.reason(vm, "http://private.test/"), "dns")
        self.fails(vm, "nc -w 3 {} 80 </dev/null".format(PRIVATE))
        self.fails(vm, "nslookup web.test {}".format(DNS))
        names = {name.split()[0] for name in self.lab.order("seen")["names"]}
        self.assertEqual(names, {"web.test", "private.test"})

    def test_servers_that_are_given_are_asked_by_the_vm_itself(self) -> None:
        vm = self.start(dns_servers=["8.8.8.8"])
        self.assertEqual(self.network(vm)["dns_servers"], ["8.8.8.8"])
        self.assertEqual(self.get(vm, "http://web.test/")["status"], 200)
        self.fails(vm, "nslookup web.test {}".format(self.network(vm)["gateway"]), timeout=40)

    def test_answers_that_were_cut_are_asked_for_by_tcp(self) -> None:
        vm = self.start()
        self.assertEqual(self.get(vm, "http://long.test/")["status"], 200)

    def test_second_vm_is_a_clone_and_a_suspended_one_comes_back(self) -> None:
        self.start()
        vm = self.start()
        self.assertEqual(self.user("info", vm)["start"]["origin"], "clone")
        self.assertEqual(self.get(vm, "http://web.test/")["status"], 200)
        self.user("call", vm, "pause")
        self.user("call", vm, "resume")
        self.assertEqual(self.get(vm, "http://web.test/")["status"], 200)
        self.user("call", vm, "suspend")
        self.user("call", vm, "resume")
        self.assertEqual(self.network(vm)["mode"], "user")
        self.assertEqual(self.get(vm, "http://web.test/")["status"], 200)

    def test_gateway_is_in_a_jail_and_ends_with_its_vm(self) -> None:
        before = set(self.gateways())
        vm_id = str(self.user("start", {}, {}))
        (pid,) = set(self.gateways()) - before
        status = dict(line.split(":\t", 1) for line in Path("/proc/%d/status" % pid).read_text().splitlines() if ":\t" in line)
        self.assertEqual((status["NoNewPrivs"], status["Seccomp"], int(status["CapEff"], 16)), ("1", "2", 0))
        self.assertEqual(int(status["CapBnd"], 16), 0)
        self.assertEqual(sorted(os.listdir("/proc/%d/root" % pid)), ["vmm"])
        self.assertEqual(os.listdir("/proc/%d/root/vmm" % pid), ["usernet"])
        self.assertEqual(os.readlink("/proc/%d/ns/net" % pid), os.readlink("/proc/self/ns/net"))
        for kind in ("user", "mnt", "pid", "ipc", "uts"):
            self.assertNotEqual(os.readlink("/proc/%d/ns/%s" % (pid, kind)), os.readlink("/proc/self/ns/" + kind), kind)
        self.user("destroy", vm_id)
        self.assertTrue(eventually(lambda: not alive(pid)))
        self.assertEqual(set(self.gateways()), before)

    def test_gateway_killed_the_vm_lives_and_says_so(self) -> None:
        before = set(self.gateways())
        vm = self.start()
        (pid,) = set(self.gateways()) - before
        self.assertEqual(self.get(vm, "http://web.test/")["status"], 200)
        os.kill(pid, signal.SIGKILL)
        self.assertTrue(eventually(lambda: self.network(vm)["problems"]))
        (problem,) = self.network(vm)["problems"]
        self.assertIn("user-mode network has ended (killed by SIGKILL)", problem["what"])
        self.assertTrue(eventually(lambda: self.user("info", vm)["health"]["reason"] == "network_lost"))
        self.assertEqual(self.sh(vm, "echo lives"), "lives\n")
        self.reason(vm, "http://{}/".format(WEB), timeout=3)
        self.user("call", vm, "stop")
        self.user("call", vm, "start")
        self.assertEqual(self.get(vm, "http://web.test/")["status"], 200)

    def test_manager_killed_takes_its_gateways_along(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            os.chown(folder, UID, UID)
            before = set(self.gateways())
            other = User(folder)
            other("start", {}, {})
            (pid,) = set(self.gateways()) - before
            other.process.kill()
            other.close()
            self.assertTrue(eventually(lambda: not alive(pid)))

    def test_rate_holds_in_both_directions(self) -> None:
        before = set(self.gateways())
        vm = self.start(limits={"network_bandwidth_mbps": 8})
        (pid,) = set(self.gateways()) - before
        script = "set -- $(cat /proc/uptime); a=$1; {}; set -- $(cat /proc/uptime); echo $a $1"
        down = "wget -q -O - http://{}/zeros | head -c 3000000 >/dev/null".format(WEB)
        up = "head -c 3000000 /dev/zero | nc {} {}".format(WEB, SINK_PORT)
        for what in (down, up):
            begun, ended = map(float, self.sh(vm, script.format(what), timeout=60).split())
            # 3 MB at 1 MB/s, but for what fits the buffers.
            self.assertGreater(ended - begun, 2.2, what)
            self.assertLess(ended - begun, 6.0, what)
        # Who waits for the rate sleeps meanwhile.
        fields = Path("/proc/%d/stat" % pid).read_text().rpartition(")")[2].split()
        self.assertLess((int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), 0.6)

    def test_tap_is_refused_to_this_user_and_doctor_knows_the_mode(self) -> None:
        answer = self.user.answer("start", {"mode": "tap"}, {})
        self.assertEqual(answer.get("code"), "network_unavailable", answer)
        report = self.user("doctor")
        self.assertEqual((report["network"]["connected_vms"], report["network"]["mode"]), (True, "user"))
        self.assertTrue([hint for hint in report["hints"] if "connected in user mode" in hint["what"]], report["hints"])
        self.assertIn("isolated and connected", report["verdict"]["text"])

    def test_vms_of_a_snapshot_have_networks_of_their_own(self) -> None:
        vm = self.start()
        self.sh(vm, "echo kept >/tmp/file")
        self.user("call", vm, "snapshot", "kept")
        self.addCleanup(self.user, "delete_template", "kept")
        copies = [str(self.user("start", {}, {}, template="kept")) for _ in range(2)]
        for copy in copies:
            self.addCleanup(self.user, "destroy", copy)
            self.assertEqual(self.sh(copy, "cat /tmp/file"), "kept\n")
            self.assertEqual(self.get(copy, "http://web.test/")["status"], 200)
        addresses = {self.network(each)["mac_address"] for each in [vm, *copies]}
        self.assertEqual(len(addresses), 3)
        self.assertEqual(self.get(vm, "http://web.test/")["status"], 200)

    def test_connections_come_and_go_without_a_trace(self) -> None:
        before = set(self.gateways())
        vm = self.start()
        (pid,) = set(self.gateways()) - before
        files = len(os.listdir("/proc/%d/fd" % pid))
        script = "for n in $(seq 100); do nc -w 5 {} 80 </dev/null & done; wait".format(WEB)
        for _ in range(5):
            self.sh(vm, script, timeout=60)
        self.assertTrue(eventually(lambda: len(os.listdir("/proc/%d/fd" % pid)) == files))
        resident = next(line for line in Path("/proc/%d/status" % pid).read_text().splitlines() if line.startswith("VmRSS"))
        self.assertLess(int(resident.split()[1]), 64 << 10)
        self.assertEqual(self.get(vm, "http://web.test/")["status"], 200)


class AsRoot(NetworkTestCase):
    """Root may choose user mode, too: the gateway has the VM's own uid then."""

    def test_gateway_of_root_is_the_vms_own_user(self) -> None:
        before = state()
        vm = self.connected({"mode": "user"})
        network = vm.get_info()["network_config"]
        self.assertEqual((network["mode"], network["mode_reason"]), ("user", 'mode="user" was asked for'))
        self.assertEqual(self.get(vm, "http://web.test/")["status"], 200)
        self.assertEqual(state(), before)
        (pid,) = [each for each in found_gateways() if alive(each)]
        uids = {os.stat("/proc/%d" % each).st_uid for each in (pid, vm.get_info()["pid"])}
        self.assertEqual(len(uids), 1)
        self.assertNotIn(0, uids)

    def test_host_that_is_not_fit_for_a_tap_is_no_hindrance(self) -> None:
        self.lab.forwarding(False)
        self.addCleanup(self.lab.forwarding, True)
        vm = self.connected()
        network = vm.get_info()["network_config"]
        self.assertEqual(network["mode"], "user")
        self.assertIn("up0 does not forward", network["mode_reason"])
        self.assertEqual(self.get(vm, "http://web.test/")["status"], 200)


if __name__ == "__main__":
    unittest.main()
