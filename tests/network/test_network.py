"""VMs on a network: what they get, what they reach, and what is left when they are gone."""

import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import unittest
from pathlib import Path
from typing import Any, Dict

from thirstys_waterfall.security.microvm_isolation import (
    CommunicationChannel,
    IsolationType,
    MicroVMIsolationManager,
    VMInfo,
    VMState,
    doctor,
)

from ..support import IMPORT, ROOT, eventually, limits, make_rootfs, misfits, run_python
from . import lab
from .case import NetworkTestCase, connected, taps
from .lab import HOST_ADDRESS, UPLINK, run, state

DESCRIPTION: Dict[str, Any] = {
    "tap_device": "tap0",
    "ip_address": "192.168.100.10",
    "mac_address": "52:54:00:12:34:56",
    "gateway": "192.168.100.1",
    "dns_servers": ["8.8.8.8", "8.8.4.4"],
}


def load_tests(loader: Any, tests: unittest.TestSuite, pattern: Any) -> unittest.TestSuite:
    return lab.load(__name__, tests)


class Connected(NetworkTestCase):
    def test_vm_with_nothing_but_the_wish_has_all_it_needs(self) -> None:
        vm = self.connected()
        info = vm.get_info()
        self.assertEqual(misfits(info, VMInfo, "info"), [])
        network = info["network_config"]
        self.assertEqual((network["isolated"], network["prefix_length"]), (False, 30))
        self.assertTrue(network["ip_address"].startswith("10.173."))
        self.assertIn(network["mac_address"], self.sh(vm, "ip link show eth0"))
        self.assertIn("inet {}/30".format(network["ip_address"]), self.sh(vm, "ip address show eth0"))
        self.assertIn("default via {} dev eth0".format(network["gateway"]), self.sh(vm, "ip route"))
        self.assertEqual(self.sh(vm, "cat /etc/resolv.conf"), "nameserver {}\n".format(network["gateway"]))
        self.sh(vm, "ping -c 2 -W 5 {}".format(network["gateway"]))
        page = self.get(vm, "http://web.test/hello")
        self.assertEqual((page["status"], page["body"]), (200, "hello from 198.51.100.1/hello"))
        self.assertEqual(self.lab.order("log")["clients"], [HOST_ADDRESS])
        self.assertTrue(self.result(vm, "system_info")["network"])

    def test_descriptions_network_is_honoured_field_by_field(self) -> None:
        vm = self.connected(DESCRIPTION)
        network = vm.get_info()["network_config"]
        self.assertEqual({field: network[field] for field in DESCRIPTION}, DESCRIPTION)
        self.assertIn("tap0", taps())
        self.assertIn("192.168.100.1/32", run("ip address show dev tap0"))
        self.assertIn("link/ether 52:54:00:12:34:56", self.sh(vm, "ip link show eth0"))
        self.assertIn("inet 192.168.100.10/24", self.sh(vm, "ip address show eth0"))
        self.assertEqual(self.sh(vm, "cat /etc/resolv.conf"), "nameserver 8.8.8.8\nnameserver 8.8.4.4\n")
        self.assertEqual(self.get(vm, "http://web.test/")["status"], 200)
        self.assertIn("web.test 1", self.lab.order("log")["names"])
        self.assertIn("198.51.100.1", self.sh(vm, "nslookup -type=a web.test 8.8.4.4"))

    def test_gateways_may_be_the_same_addresses_not(self) -> None:
        self.connected(DESCRIPTION)
        other = self.connected({"ip_address": "192.168.100.11", "gateway": "192.168.100.1"})
        self.assertEqual(self.get(other, "http://web.test/")["status"], 200)
        self.refused("192.168.100.10", ip_address="192.168.100.10", gateway="192.168.100.1")
        third = self.connected({"gateway": "192.168.100.1"})
        address = third.get_info()["network_config"]["ip_address"]
        self.assertRegex(address, r"^192\.168\.100\.\d+$")
        self.assertNotIn(address, ("192.168.100.1", "192.168.100.10", "192.168.100.11"))

    def test_image_with_a_root_of_its_own_resolves_by_the_given_servers(self) -> None:
        with tempfile.TemporaryDirectory() as name:
            vm = self.connected(DESCRIPTION, rootfs_path=str(make_rootfs(Path(name) / "root.ext4")))
            self.assertEqual(self.sh(vm, "cat /etc/made-by /etc/resolv.conf").splitlines()[:2], ["tests", "nameserver 8.8.8.8"])
            self.assertEqual(self.get(vm, "http://web.test/")["status"], 200)

    def test_counters_are_what_the_vm_moved(self) -> None:
        vm = self.connected()
        before = vm.get_health_metrics()
        self.sh(vm, "dd if=/dev/zero bs=64k count=16 | nc 198.51.100.1 5001; nc 198.51.100.1 5002 </dev/null | head -c 2097152 >/dev/null")
        after = vm.get_health_metrics()
        self.assertIn(after.network_tx_bytes - before.network_tx_bytes, range(1 << 20, 3 << 19))
        self.assertGreater(after.network_rx_bytes - before.network_rx_bytes, 2 << 20)

    def test_clone_is_its_own_vm_on_the_network(self) -> None:
        vms = [self.connected(), self.connected()]
        self.assertEqual(vms[1].get_info()["start"]["origin"], "clone")
        for field in ("mac_address", "ip_address", "gateway", "tap_device"):
            self.assertEqual(len({vm.get_info()["network_config"][field] for vm in vms}), 2, field)
        links = [self.sh(vm, "cat /sys/class/net/eth0/address").strip() for vm in vms]
        self.assertEqual(links, [vm.get_info()["network_config"]["mac_address"] for vm in vms])
        self.assertEqual({self.get(vm, "http://web.test/")["status"] for vm in vms}, {200})

    def test_vm_that_boots_is_connected_like_a_clone(self) -> None:
        manager = MicroVMIsolationManager({"templates": False, "default_memory_mb": 128, "raise_on_error": True})
        self.addCleanup(manager.stop)
        vm_id = manager.create_vm("plugin", network_config=connected())
        manager.start_vm(vm_id)
        self.assertEqual(manager.get_vm_info(vm_id)["start"]["origin"], "boot")
        answer = manager.send_command_to_vm(vm_id, "process_request", {"url": "http://web.test/"})
        self.assertEqual(answer["result"]["status"], 200)

    def test_pause_and_a_second_start_keep_the_network(self) -> None:
        vm = self.connected(DESCRIPTION)
        self.assertTrue(vm.pause() and vm.resume())
        self.assertEqual(self.get(vm, "http://web.test/")["status"], 200)
        self.assertTrue(vm.stop())
        self.assertNotIn("tap0", taps())
        self.assertEqual(vm.get_info()["network_config"]["tap_device"], "tap0")
        self.assertTrue(vm.start(), vm.last_error)
        self.assertEqual(self.get(vm, "http://web.test/")["status"], 200)

    def test_vmm_alone_holds_the_tap_in_an_empty_network_namespace(self) -> None:
        vm = self.connected()
        pid = vm.get_info()["pid"]
        # The VMM sees no interface, only the tap's descriptor, and this process keeps no copy of that.
        self.assertEqual(len(Path("/proc/{}/net/dev".format(pid)).read_text().splitlines()), 3)
        self.assertNotEqual(os.readlink("/proc/{}/ns/net".format(pid)), os.readlink("/proc/self/ns/net"))
        held = [link for link in Path("/proc/self/fd").iterdir() if os.path.lexists(str(link)) and "tun" in os.readlink(str(link))]
        self.assertEqual(held, [])


class Fetching(NetworkTestCase):
    def test_process_request_tells_status_headers_body_and_where_it_ended(self) -> None:
        vm = self.connected()
        page = self.get(vm, "http://web.test/redirect")
        self.assertEqual((page["url"], page["status"]), ("http://web.test/page", 200))
        self.assertIn(["content-type", "text/html"], page["headers"])
        self.assertFalse(page["truncated"])
        self.assertEqual(self.get(vm, "http://web.test/missing")["status"], 404)
        posted = self.get(vm, "http://web.test/", method="POST", body="a=1", headers={"X-A": "b"})
        self.assertEqual(posted["body"], "got a=1")
        binary = self.get(vm, "http://web.test/binary", max_bytes=200)
        self.assertTrue(binary["truncated"])
        self.assertTrue(binary["body_base64"].startswith("AAECAwQF"))

    def test_process_request_says_why_it_failed(self) -> None:
        vm = self.connected()
        self.assertEqual(self.reason(vm, "http://no-such-name.test/"), "dns")
        self.assertEqual(self.reason(vm, "http://web.test:81/"), "refused")
        self.assertEqual(self.reason(vm, "http://web.test/slow", timeout=1), "timeout")
        self.assertEqual(self.reason(vm, "http://web.test:5003/", timeout=1), "timeout")
        self.assertEqual(self.reason(vm, "https://web.test/"), "tls")
        self.assertEqual(self.failure(vm, "process_request", {"url": "ftp://web.test/"}), "bad_params")
        self.assertEqual(self.result(vm, "ping"), "pong")

    def test_process_request_gives_eight_mebibytes_and_ends_no_small_vm(self) -> None:
        wanted = {"url": "http://web.test/zeros", "max_bytes": 8 << 20}
        whole = self.result(self.connected(resource_limits=limits(memory_mb=512)), "process_request", wanted)
        self.assertEqual((len(whole["body_base64"]), whole["truncated"]), (-(-(8 << 20) // 3) * 4, True))
        vm = self.connected(resource_limits=limits(memory_mb=64))
        for _ in range(3):
            answer = vm.send_command("process_request", wanted)
            self.assertIsNotNone(answer, vm.last_error)
            if answer["status"] == "error":
                self.assertEqual(answer["error"]["code"], "too_large", answer)
        self.assertEqual(self.get(vm, "http://web.test/")["status"], 200)

    def test_https_is_trusted_by_the_images_authorities(self) -> None:
        vm = self.connected()
        path = "/etc/ssl/certs/ca-certificates.crt"
        self.result(vm, "write_file", {"path": path, "data": self.lab.authority, "make_dirs": True})
        self.assertEqual(self.get(vm, "https://web.test/safe")["body"], "hello from 198.51.100.1/safe")
        # The certificate is web.test's alone.
        self.assertEqual(self.reason(vm, "https://198.51.100.1/"), "tls")

    def test_render_page_fetches_what_it_renders(self) -> None:
        vm = self.connected()
        page = self.result(vm, "render_page", {"url": "http://web.test/redirect"})
        self.assertEqual((page["url"], page["title"], page["text"]), ("http://web.test/page", "Far", "go"))
        self.assertEqual(page["links"], [{"href": "http://web.test/next", "text": "go"}])
        self.assertNotIn("evil", page["sanitized_html"])


class Taps(NetworkTestCase):
    def test_tap_that_was_there_is_used_and_left_as_it_was(self) -> None:
        run("ip tuntap add dev mine mode tap")
        self.addCleanup(run, "ip link delete mine")
        run("ip address add 192.168.100.1/24 dev mine")
        run("ip link set mine up")
        # A new network namespace inherits forwarding=1 from a host that forwards.
        Path("/proc/sys/net/ipv4/conf/mine/forwarding").write_text("0\n")
        before = state()
        vm = self.connected({"tap_device": "mine", "ip_address": "192.168.100.10", "gateway": "192.168.100.1"})
        self.assertEqual(self.get(vm, "http://web.test/")["status"], 200)
        self.refused("in use", tap_device="mine")
        self.manager.destroy_vm(vm.vm_id)
        # The kernel takes its time to say that nobody is at the other end any more.
        self.assertTrue(eventually(lambda: state() == before), "{}\n{}".format(before, state()))
        self.assertEqual(Path("/proc/sys/net/ipv4/conf/mine/forwarding").read_text(), "0\n")
        self.assertEqual(Path("/proc/sys/net/ipv6/conf/mine/disable_ipv6").read_text(), "0\n")

    def test_tap_that_had_the_gateways_address_keeps_it(self) -> None:
        run("ip tuntap add dev mine mode tap")
        self.addCleanup(run, "ip link delete mine")
        run("ip address add 192.168.100.1/32 dev mine")
        before = state()
        vm = self.connected({"tap_device": "mine", "ip_address": "192.168.100.10"})
        self.assertEqual(self.get(vm, "http://web.test/")["status"], 200)
        self.manager.destroy_vm(vm.vm_id)
        self.assertEqual(state(), before)

    def test_name_of_something_else_is_refused(self) -> None:
        before = state()
        self.refused("no tap", tap_device=UPLINK)
        self.refused("no tap", tap_device="lo")
        run("ip tuntap add dev mine mode tap")
        run("ip link add bridge0 type bridge")
        run("ip link set mine master bridge0")
        self.refused("bridge0", tap_device="mine")
        run("ip link delete bridge0")
        run("ip link delete mine")
        self.assertEqual(state(), before)

    def test_addresses_that_the_host_has_are_refused(self) -> None:
        before = state()
        self.assertIn(UPLINK, self.refused("203.0.113.0/24", ip_address="203.0.113.10"))
        self.refused("192.0.2.77", ip_address="192.0.2.77")
        self.assertEqual(state(), before)

    def test_address_that_has_a_route_already_is_refused(self) -> None:
        run("ip route add 192.168.100.10/32 dev {}".format(UPLINK))
        self.addCleanup(run, "ip route delete 192.168.100.10/32 dev {}".format(UPLINK))
        before = state()
        self.refused("a route to 192.168.100.10 already", ip_address="192.168.100.10")
        self.assertEqual(state(), before)

    def test_vm_is_connected_and_disconnected_without_the_program_ip(self) -> None:
        before = state()
        program = Path(str(shutil.which("ip", path="/usr/sbin:/sbin:/usr/bin:/bin"))).resolve()
        run("mount --bind /dev/null {}".format(program))
        try:
            vm = self.connected()
            page = self.get(vm, "http://web.test/")
            self.manager.destroy_vm(vm.vm_id)
        finally:
            run("umount {}".format(program))
        self.assertEqual((page["status"], state()), (200, before))

    def test_uplink_that_does_not_forward_is_named_with_the_way_out(self) -> None:
        before = state()
        self.lab.forwarding(False)
        self.addCleanup(self.lab.forwarding, True)
        self.assertIn("sysctl -w net.ipv4.conf.up0.forwarding=1", self.refused("up0 does not forward"))
        self.assertEqual(Path("/proc/sys/net/ipv4/conf/up0/forwarding").read_text(), "0\n")
        self.lab.forwarding(True)
        self.assertEqual(state(), before)

    def test_ipv6_is_refused_not_ignored(self) -> None:
        self.refused("IPv6", ipv6=True)

    def test_missing_tool_is_named_with_its_package(self) -> None:
        run("mount --bind /dev/null /usr/sbin/nft")
        self.addCleanup(run, "umount /usr/sbin/nft")
        self.refused("nftables")

    def test_process_without_the_capability_is_told_what_to_do(self) -> None:
        code = (
            "from {} import *\n"
            "manager = MicroVMIsolationManager({{'default_memory_mb': 128}})\nmanager.start()\n"
            "vm_id = manager.create_vm('plugin', network_config=VMNetworkConfig(isolated_network=False, mode='tap'))\n"
            "print(manager.start_vm(vm_id), manager.last_error.code, manager.last_error)\n"
        ).format(IMPORT)
        command = ["setpriv", "--bounding-set=-net_admin", sys.executable, "-c", code]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
        self.assertIn("False network_unavailable", done.stdout, done.stderr)
        self.assertIn("--cap-add NET_ADMIN", done.stdout)


    def test_ordinary_user_with_the_capability_is_connected(self) -> None:
        with tempfile.TemporaryDirectory() as name:
            os.chown(name, 65534, 65534)
            # Every user may usually open /dev/net/tun; this node, visible to this test only, can always be opened.
            device = Path(name) / "tun"
            os.mknod(str(device), 0o666 | stat.S_IFCHR, os.makedev(10, 200))
            os.chmod(str(device), 0o666)
            run("mount --bind {} /dev/net/tun".format(device))
            self.addCleanup(run, "umount /dev/net/tun")
            code = (
                "from {1} import *\n"
                "config = {{'default_memory_mb': 128, 'raise_on_error': True, 'runtime_dir': '{0}/run', 'cache_dir': '{0}/cache'}}\n"
                "with MicroVMIsolationManager(config) as manager:\n"
                "    vm_id = manager.create_vm('plugin', network_config=VMNetworkConfig(isolated_network=False))\n"
                "    manager.start_vm(vm_id)\n"
                "    print(manager.send_command_to_vm(vm_id, 'process_request', {{'url': 'http://web.test/'}}))\n"
            ).format(name, IMPORT)
            powers = "+net_admin,+net_raw"
            user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
            user += ["--inh-caps=" + powers, "--ambient-caps=" + powers]
            before = state()
            probe = subprocess.run(user + [sys.executable, "-c", "import {}".format(IMPORT)], stderr=subprocess.PIPE)
            if probe.returncode:
                self.skipTest("an ordinary user cannot run this interpreter")
            done = subprocess.run(
                user + [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True
            )
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertIn("hello from 198.51.100.1", done.stdout)
            self.assertEqual(state(), before)


class SmallRange(NetworkTestCase):
    config = dict(NetworkTestCase.config, network_range="10.77.0.0/29")

    def test_full_range_is_said_so(self) -> None:
        first, second = self.connected(), self.connected()
        addresses = {vm.get_info()["network_config"]["ip_address"] for vm in (first, second)}
        self.assertEqual(addresses, {"10.77.0.2", "10.77.0.6"})
        self.refused("no address is left in 10.77.0.0/29")
        self.manager.destroy_vm(first.vm_id)
        self.connected()


class Ends(NetworkTestCase):
    def test_ten_vms_that_come_and_go_leave_nothing(self) -> None:
        before = state()
        vms = [self.manager.get_vm(self.create(network_config=connected())) for _ in range(10)]
        threads = [threading.Thread(target=vm.start) for vm in vms]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual([vm.get_state() for vm in vms], [VMState.RUNNING] * 10, [vm.last_error for vm in vms])
        self.assertEqual({self.get(vm, "http://web.test/")["status"] for vm in vms}, {200})
        self.manager.destroy_all_vms()
        self.assertEqual(state(), before)

    def test_start_that_is_cancelled_leaves_nothing(self) -> None:
        before = state()
        vm_id = self.create(network_config=connected())
        thread = threading.Thread(target=self.manager.start_vm, args=(vm_id,))
        thread.start()
        self.assertTrue(eventually(lambda: "twm0" in taps()))
        self.assertTrue(self.manager.destroy_vm(vm_id))
        thread.join()
        self.assertTrue(eventually(lambda: state() == before), "{}\n{}".format(before, state()))

    def test_start_that_fails_leaves_nothing(self) -> None:
        before = state()
        manager = MicroVMIsolationManager({"start_timeout_s": 0.3, "default_memory_mb": 128, "templates": False})
        self.assertFalse(manager.start_vm(manager.create_vm("plugin", network_config=connected())))
        self.assertEqual(manager.last_error.code, "start_timeout")
        self.assertEqual(state(), before)

    def test_vmm_that_dies_takes_its_network_along(self) -> None:
        before = state()
        vm = self.connected()
        os.kill(vm.get_info()["pid"], signal.SIGKILL)
        self.assertTrue(eventually(lambda: vm.get_state() is VMState.ERROR, 2.0))
        self.assertTrue(eventually(lambda: state() == before), "{}\n{}".format(before, state()))

    def test_killed_manager_leaves_no_tap_and_the_next_one_removes_the_rest(self) -> None:
        before = state()
        code = (
            "import os\nfrom {} import *\n"
            "manager = MicroVMIsolationManager({{'default_memory_mb': 128, 'raise_on_error': True}})\nmanager.start()\n"
            "run = lambda **fields: manager.start_vm(manager.create_vm('plugin', network_config=VMNetworkConfig(isolated_network=False, **fields)))\n"
            "run()\nrun(tap_device='kept', ip_address='192.168.100.10')\nos.kill(os.getpid(), 9)\n"
        ).format(IMPORT)
        run("ip tuntap add dev kept mode tap")
        done = run_python(code)
        self.assertEqual(done.returncode, -signal.SIGKILL, done.stderr)
        self.assertTrue(eventually(lambda: "twm0" not in taps(), 2.0))
        self.assertIn("tw_microvm_", run("nft list ruleset"))
        self.manager.stop()
        self.manager.start()
        self.assertIn("group default", run("ip link show dev kept"))
        self.assertNotIn("192.168.100.1", run("ip address show dev kept"))
        run("ip link delete kept")
        self.assertEqual(state(), before)

    def test_sweep_spares_the_vms_of_others(self) -> None:
        vm = self.connected()
        before = state()
        code = "from {0} import *\nmanager = MicroVMIsolationManager()\nmanager.start()\nmanager.stop()\n".format(IMPORT)
        self.assertEqual(run_python(code).returncode, 0)
        self.assertEqual(state(), before)
        self.assertEqual(self.get(vm, "http://web.test/")["status"], 200)


class Examples(NetworkTestCase):
    def test_network_example_shows_what_is_allowed_and_what_is_not(self) -> None:
        command = [sys.executable, str(ROOT / "examples" / "network.py"), "http://web.test/"]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("hello from 198.51.100.1", done.stdout)
        self.assertIn("'reason': 'dns'", done.stdout)

    def test_command_line_connects_to_the_listed_place_alone_or_not_at_all(self) -> None:
        for options, url, code in (
            (["--egress", "web.test"], "http://web.test/", 0),
            (["--egress", "web.test"], "http://elsewhere.test/", 1),
            (["--net"], "http://web.test/", 0),
            ([], "http://web.test/", 1),
        ):
            with self.subTest(options=options, url=url):
                command = [sys.executable, "-m", IMPORT, "run", "-m", "128m", "--disk", "64m", *options, "wget", "-T", "5", "-qO-", url]
                done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
                self.assertEqual(done.returncode, code, done.stderr)
                self.assertEqual("hello from 198.51.100.1" in done.stdout, code == 0)

    def test_advanced_example_without_its_placeholders_runs_on_the_network(self) -> None:
        vm_id = self.manager.create_vm(
            isolation_type=IsolationType.EXTENSION,
            resource_limits=limits(network_bandwidth_mbps=100, max_file_handles=1024, max_processes=128),
            network_config=connected(**DESCRIPTION),
        )
        self.assertTrue(self.manager.start_vm(vm_id), self.manager.last_error)
        answer = self.manager.send_command_to_vm(vm_id, "process_request", {"url": "http://web.test/"})
        self.assertEqual(answer["result"]["status"], 200)

    def test_channel_of_the_description_gets_its_page(self) -> None:
        vm = self.connected()
        with CommunicationChannel(vm.vm_id) as channel:
            channel.send_message(
                {"type": "command", "action": "process_request", "data": {"url": "http://web.test/"}}
            )
            response = channel.receive_message(timeout=10.0)
        self.assertEqual(response["result"]["status"], 200)

    def test_doctor_says_whether_vms_can_be_connected(self) -> None:
        self.assertEqual(doctor()["network"]["uplinks"], [UPLINK])
        self.assertEqual((doctor()["network"]["connected_vms"], doctor()["network"]["mode"]), (True, "tap"))
        before = taps()
        report = doctor(start=True)
        self.assertEqual([(start["connected"], start["error"]) for start in report["starts"]][:1], [(True, None)])
        self.assertIn("isolated and connected", report["verdict"]["text"])
        self.assertEqual(taps(), before)
        self.lab.forwarding(False)
        self.addCleanup(self.lab.forwarding, True)
        report = doctor()
        self.assertEqual((report["network"]["connected_vms"], report["network"]["mode"]), (True, "user"))
        self.assertIn("sysctl", report["network"]["remedy"])
        self.assertTrue([hint for hint in report["hints"] if "connected in user mode" in hint["what"]])


if __name__ == "__main__":
    unittest.main()
