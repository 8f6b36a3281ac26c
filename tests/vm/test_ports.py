"""Ports of a VM without a network: connections from this host to servers in the guest."""

import asyncio
import contextlib
import hashlib
import http.client
import os
import re
import signal
import socket
import threading
import time
import unittest
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, List, Tuple

from thirstys_waterfall.security.microvm_isolation import (
    ChannelError,
    CommandError,
    ForkedProcessError,
    HostError,
    InvalidTypeError,
    InvalidValueError,
    MicroVMIsolationManager,
    PortInfo,
    PortRefusedError,
    PublishedPort,
    VmNotFoundError,
    VMState,
    VmStateError,
    attach,
)
from thirstys_waterfall.security.microvm_isolation.aio import AsyncMicroVMIsolationManager

from ..support import ROOT, VMTestCase, eventually, limits, misfits, open_files, play, run_python, shell

MIB = 1 << 20
# What is told at once; the margin is for a busy host.
SOON_S = 10.0
# The most connections of a VM at once (src/vm/ports.rs).
MAX_CONNECTIONS = 48
REQUEST = b"GET / HTTP/1.0\r\n\r\n"


def rss_kib(pid: Any) -> int:
    status = Path("/proc/{}/status".format(pid)).read_text()
    return int(status.partition("VmRSS:")[2].split()[0])


def read_all(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(1 << 16), b""))


def ends(connection: socket.socket) -> bool:
    """Whether a connection ends soon, in whatever way; what still comes is dropped."""
    connection.settimeout(SOON_S)
    try:
        read_all(connection)
    except ConnectionError:
        pass
    except socket.timeout:
        return False
    return True


class Case(VMTestCase):
    config = {"raise_on_error": True}

    def serve(self, vm: Any, port: int, *program: str) -> Any:
        """Has a program of the guest serve each connection to the port by its stdin and stdout."""
        stream = vm.stream("tcpsvd", ["-c", "200", "-b", "200", "0.0.0.0", str(port), *program])
        self.addCleanup(stream.kill)
        self.connect(vm, port).close()
        return stream

    def connect(self, vm: Any, port: int, *address: str) -> socket.socket:
        """A connection to a server that may just be starting."""

        def try_it() -> Any:
            try:
                return vm.connect(port, *address)
            except ConnectionRefusedError:
                return None

        connection = eventually(try_it, SOON_S)
        self.assertIsNotNone(connection, "nothing listens at port {}".format(port))
        self.addCleanup(connection.close)
        connection.settimeout(30.0)
        return connection  # type: ignore[no-any-return]

    def dial(self, published: PublishedPort) -> socket.socket:
        connection = socket.create_connection((published.address, published.host_port), 30.0)
        self.addCleanup(connection.close)
        return connection


class Connections(Case):
    def test_each_direction_ends_by_itself(self) -> None:
        vm = self.running()
        self.serve(vm, 7000, "cat")
        for connection in (self.connect(vm, 7000), self.dial(vm.publish(7000))):
            connection.sendall(b"first")
            self.assertEqual(connection.recv(100), b"first")
            connection.sendall(b"last")
            connection.shutdown(socket.SHUT_WR)
            self.assertEqual(read_all(connection), b"last")
        # nc ends its direction with its input, and goes on reading.
        for number, published in enumerate((None, vm.publish(7001))):
            script = "printf all | nc -l -p 7001 > /tmp/heard{}".format(number)
            with vm.stream("sh", ["-c", script]) as server:
                connection = self.connect(vm, 7001) if published is None else self.dial_until_served(vm, published)
                self.assertEqual(read_all(connection), b"all")
                connection.sendall(b"more")
                connection.close()
                self.assertEqual(server.wait(SOON_S), 0)
            self.assertEqual(self.result(vm, "read_file", {"path": "/tmp/heard{}".format(number)})["size"], 4)

    def dial_until_served(self, vm: Any, published: PublishedPort) -> socket.socket:
        self.assertTrue(eventually(lambda: self.result(vm, "exec", shell("grep -c ':1B59 .* 0A ' /proc/net/tcp*"))["exit_code"] == 0, SOON_S))
        return self.dial(published)

    def test_bytes_arrive_as_they_were_sent_in_both_directions_at_once(self) -> None:
        vm = self.running()
        self.serve(vm, 7000, "cat")
        sent = os.urandom(4 * MIB)
        for connection in (self.connect(vm, 7000), self.dial(vm.publish(7000))):

            def send(connection: socket.socket = connection) -> None:
                connection.sendall(sent)
                connection.shutdown(socket.SHUT_WR)

            sender = threading.Thread(target=send)
            sender.start()
            heard = read_all(connection)
            sender.join()
            self.assertEqual(hashlib.sha256(heard).digest(), hashlib.sha256(sent).digest())

    def test_a_long_conversation_goes_message_by_message(self) -> None:
        vm = self.running()
        self.serve(vm, 7000, "cat")
        quiet, lively = self.connect(vm, 7000), self.dial(vm.publish(7000))
        for number in range(200):
            message = b"%d" % number
            lively.sendall(message)
            self.assertEqual(lively.recv(100), message)
        quiet.sendall(b"still here")
        self.assertEqual(quiet.recv(100), b"still here")

    def test_the_socket_serves_http_and_asyncio(self) -> None:
        vm = self.running()
        vm.upload(Path(__file__), "/tmp/page.txt")
        self.result(vm, "exec", {"program": "httpd", "args": ["-p", "8000", "-h", "/tmp"]})
        client = http.client.HTTPConnection("vm")
        client.sock = vm.connect(8000)
        self.addCleanup(client.close)
        client.request("GET", "/page.txt")
        answer = client.getresponse()
        self.assertEqual((answer.status, answer.read()), (200, Path(__file__).read_bytes()))

        async def talk() -> bytes:
            reader, writer = await asyncio.open_connection(sock=vm.connect(8000))
            writer.write(b"GET /page.txt HTTP/1.0\r\n\r\n")
            heard = await reader.read()
            writer.close()
            return heard

        self.assertTrue(asyncio.run(talk()).endswith(Path(__file__).read_bytes()))

    def test_asyncio_connects_and_publishes(self) -> None:
        async def talk() -> None:
            async with AsyncMicroVMIsolationManager({"default_backend": "QEMU"}) as manager:
                async with manager.run_vm(resource_limits=limits(), ports={8000: 0}) as vm:
                    await vm.run(["httpd", "-p", "8000", "-h", "/etc"], check=True)
                    reader, writer = await asyncio.open_connection(sock=await vm.connect(8000))
                    writer.write(REQUEST)
                    self.assertIn(b"HTTP/1.", await reader.read())
                    writer.close()
                    with await vm.publish(8000) as published:
                        reader, writer = await asyncio.open_connection(published.address, published.host_port)
                        writer.write(REQUEST)
                        self.assertIn(b"HTTP/1.", await reader.read())
                        writer.close()
                        self.assertEqual(len(await vm.ports()), 2)
                    self.assertEqual([port["guest_port"] for port in await vm.instance.ports()], [8000])
                    with self.assertRaises(PortRefusedError):
                        await vm.connect(8001)
                    # A server that takes no connection: cancelling ends the wait.
                    waiting = asyncio.ensure_future(vm.connect(8000, "192.0.2.1", 60.0))
                    await asyncio.sleep(0.05)
                    waiting.cancel()
                    with self.assertRaises((asyncio.CancelledError, CommandError)):
                        await waiting

        asyncio.run(talk())

    def test_a_port_where_nothing_listens_refuses(self) -> None:
        vm = self.running()
        with self.assertRaises(ConnectionRefusedError) as caught:
            vm.connect(7000)
        error = caught.exception
        assert isinstance(error, PortRefusedError)
        self.assertIsInstance(error, CommandError)
        self.assertEqual((error.code, error.errno), ("connection_refused", 111))
        for word in (vm.vm_id, "7000", "127.0.0.1", "::1", "no program listens"):
            self.assertIn(word, str(error))
        # What is published tells it as a server that broke the connection off.
        connection = self.dial(vm.publish(7000))
        with self.assertRaises(ConnectionResetError):
            connection.recv(1)

    def test_the_loopback_of_ipv6_and_other_addresses_of_the_guest_are_reached(self) -> None:
        vm = self.running()
        self.result(vm, "exec", {"program": "httpd", "args": ["-p", "[::1]:8006", "-h", "/etc"]})
        self.result(vm, "exec", {"program": "httpd", "args": ["-p", "127.0.0.2:8002", "-h", "/etc"]})
        with self.assertRaises(PortRefusedError):
            vm.connect(8006, "127.0.0.1")
        with self.assertRaises(PortRefusedError):
            vm.connect(8002)
        published = vm.publish(8002, guest_address="127.0.0.2")
        reached = [vm.connect(8006), vm.connect(8006, "::1"), vm.connect(8002, "127.0.0.2"), self.dial(published)]
        for connection in reached:
            self.addCleanup(connection.close)
            connection.sendall(REQUEST)
            self.assertTrue(read_all(connection).startswith(b"HTTP/1."))

    def test_a_server_that_is_killed_ends_its_connections(self) -> None:
        vm = self.running()
        self.serve(vm, 7000, "yes")
        connections = [self.connect(vm, 7000), self.dial(vm.publish(7000))]
        for connection in connections:
            self.assertTrue(connection.recv(1000))
        self.result(vm, "exec", shell("killall -9 tcpsvd yes"))
        self.assertEqual([ends(connection) for connection in connections], [True, True])
        with self.assertRaises(PortRefusedError):
            vm.connect(7000)

    def test_a_client_that_breaks_off_breaks_the_servers_connection(self) -> None:
        vm = self.running()
        script = "echo hello; cat > /dev/null; echo $? > /tmp/code"
        self.serve(vm, 7000, "sh", "-c", script)
        published = vm.publish(7000)
        # cat tells an end by 0, and a reset by 1.
        for linger, code in ((b"\0\0\0\0\0\0\0\0", "0\n"), (b"\1\0\0\0\0\0\0\0", "1\n")):
            # The one by which `serve` saw that it listens has ended.
            self.assertTrue(eventually(lambda: self.result(vm, "exec", shell("cat /tmp/code 2>/dev/null"))["stdout"], SOON_S))
            self.result(vm, "exec", shell("rm /tmp/code"))
            connection = self.dial(published)
            self.assertEqual(connection.recv(100), b"hello\n")
            connection.sendall(b"part of it")
            # With this linger close() sends RST in the place of FIN (socket(7)).
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            connection.close()
            said = eventually(lambda: self.result(vm, "exec", shell("cat /tmp/code 2>/dev/null"))["stdout"], SOON_S)
            self.assertEqual(said, code)
        self.assertTrue(eventually(lambda: vm.ports()[0]["connections"] == 0, SOON_S))


class Floods(Case):
    def test_a_slow_reader_holds_a_window_and_delays_no_other(self) -> None:
        vm = self.running()
        self.serve(vm, 7000, "yes")
        self.serve(vm, 7001, "cat")
        published = vm.publish(7000)
        here, there = rss_kib("self"), self.agent_rss_kib(vm)
        slow = [self.dial(published) for _ in range(8)] + [self.connect(vm, 7000) for _ in range(8)]
        # By now all that is taken before the reader reads is on its way.
        time.sleep(1.0)
        lively = self.connect(vm, 7001)
        begun = time.monotonic()
        lively.sendall(b"hello")
        self.assertEqual(lively.recv(100), b"hello")
        self.assertLess(time.monotonic() - begun, SOON_S)
        # Each of them has one window of 256 KiB and the kernel's buffers; what is allocated beside is the margin.
        self.assertLess(rss_kib("self") - here, 16 * 1024)
        self.assertLess(self.agent_rss_kib(vm) - there, 16 * 1024)
        for connection in slow:
            self.assertTrue(connection.recv(100_000).startswith(b"y\n"))
            connection.close()

    def agent_rss_kib(self, vm: Any) -> int:
        script = "sed -n 's/VmRSS:[^0-9]*\\([0-9]*\\) kB/\\1/p' /proc/1/status"
        return int(self.result(vm, "exec", shell(script))["stdout"])

    def test_a_server_that_reads_nothing_makes_its_client_wait(self) -> None:
        vm = self.running()
        self.serve(vm, 7000, "sleep", "600")
        connection = self.connect(vm, 7000)
        connection.settimeout(1.0)
        sent = 0
        with self.assertRaises(socket.timeout):
            while sent < 64 * MIB:
                sent += connection.send(bytes(1 << 16))
        self.assertLess(sent, 16 * MIB)

    def test_five_hundred_requests_with_a_hundred_at_once_are_answered(self) -> None:
        vm = self.running()
        vm.upload(Path(__file__), "/tmp/page.txt")
        self.result(vm, "exec", {"program": "httpd", "args": ["-p", "8000", "-h", "/tmp"]})
        published, page = vm.publish(8000), Path(__file__).read_bytes()

        def ask(_: int) -> Tuple[int, bool]:
            client = http.client.HTTPConnection(published.address, published.host_port, timeout=60.0)
            with contextlib.closing(client):
                client.request("GET", "/page.txt")
                answer = client.getresponse()
                return answer.status, answer.read() == page

        with ThreadPoolExecutor(100) as pool:
            self.assertEqual(set(pool.map(ask, range(500))), {(200, True)})
        self.assertTrue(eventually(lambda: vm.ports()[0]["connections"] == 0, SOON_S))

    def test_connections_beyond_the_limit_wait_and_leave_room_for_programs(self) -> None:
        vm = self.running()
        self.serve(vm, 7000, "cat")
        held = [vm.connect(7000) for _ in range(MAX_CONNECTIONS)]
        try:
            with self.assertRaises(ChannelError) as caught:
                vm.connect(7000, timeout=0.2)
            self.assertEqual((caught.exception.code, caught.exception.details["sent"]), ("channel_timeout", False))
            self.assertIn("{} connections are open".format(MAX_CONNECTIONS), str(caught.exception))
            self.assertEqual(vm.stream("true").wait(), 0)
            late = self.dial(vm.publish(7000))
            late.sendall(b"late")
            late.settimeout(0.2)
            with self.assertRaises(socket.timeout):
                late.recv(100)
            held.pop().close()
            late.settimeout(SOON_S)
            self.assertEqual(late.recv(100), b"late")
        finally:
            for connection in held:
                connection.close()

    def test_twenty_ports_lead_each_to_its_own_server(self) -> None:
        vm = self.running()
        script = "for port in $(seq 7000 7019); do tcpsvd 127.0.0.1 $port echo I am $port > /dev/null 2>&1 & done"
        self.result(vm, "exec", shell(script))
        self.connect(vm, 7019).close()
        ports = [vm.publish(port) for port in range(7000, 7020)]
        told = {port["guest_port"]: port["host_port"] for port in vm.ports()}
        self.assertEqual(told, {port.guest_port: port.host_port for port in ports})
        for port in ports:
            self.assertEqual(read_all(self.dial(port)), b"I am %d\n" % port.guest_port)


class Lives(Case):
    def test_destroy_breaks_what_is_open_and_leaves_nothing(self) -> None:
        # The first one leaves what others share.
        self.manager.destroy_vm(self.running().vm_id)
        files = open_files()
        vm = self.running()
        self.serve(vm, 7000, "cat")
        published = vm.publish(7000)
        connections = [self.connect(vm, 7000), self.dial(published)]
        for connection in connections:
            connection.sendall(b"hello")
            self.assertEqual(connection.recv(100), b"hello")
        self.manager.destroy_vm(vm.vm_id)
        self.assertEqual(connections[0].recv(100), b"")
        with self.assertRaises(ConnectionResetError):
            connections[1].recv(100)
        with self.assertRaises(ConnectionRefusedError):
            socket.create_connection((published.address, published.host_port))
        with self.assertRaises(VmStateError):
            vm.connect(7000)
        with self.assertRaises(VmNotFoundError):
            vm.publish(7000)
        published.close()
        for connection in connections:
            connection.close()
        self.assertTrue(eventually(lambda: open_files() <= files, SOON_S), (open_files(), files))

    def test_a_vmm_that_is_killed_ends_its_connections(self) -> None:
        vm = self.running()
        self.serve(vm, 7000, "cat")
        connections = [self.connect(vm, 7000), self.dial(vm.publish(7000))]
        os.kill(vm.get_info()["pid"], signal.SIGKILL)
        self.assertEqual([ends(connection) for connection in connections], [True, True])

    def test_a_pause_holds_connections_and_refuses_new_ones(self) -> None:
        vm = self.running()
        self.serve(vm, 7000, "cat")
        published = vm.publish(7000)
        connection = self.dial(published)
        vm.pause()
        connection.sendall(b"meanwhile")
        with self.assertRaises(ConnectionResetError):
            self.dial(published).recv(1)
        with self.assertRaises(VmStateError):
            vm.connect(7000)
        vm.resume()
        self.assertEqual(connection.recv(100), b"meanwhile")

    def test_suspending_breaks_connections_and_the_port_works_again_afterwards(self) -> None:
        vm = self.running()
        self.serve_in_background(vm)
        published = vm.publish(7000)
        connection = self.dial(published)
        connection.sendall(b"hello")
        self.assertEqual(connection.recv(100), b"hello")
        vm.suspend()
        self.assertTrue(ends(connection))
        with self.assertRaises(ConnectionResetError):
            self.dial(published).recv(1)
        vm.resume()
        connection = self.dial(published)
        connection.sendall(b"again")
        self.assertEqual(connection.recv(100), b"again")

    def serve_in_background(self, vm: Any) -> None:
        """A server that no stream waits for, as clones and suspended VMs keep it."""
        self.result(vm, "exec", shell("tcpsvd -c 200 127.0.0.1 7000 cat > /dev/null 2>&1 &"))
        self.connect(vm, 7000).close()

    def test_a_snapshot_leaves_connections_and_a_clone_has_none_of_them(self) -> None:
        vm = self.running()
        self.serve_in_background(vm)
        connection = self.dial(vm.publish(7000))
        connection.sendall(b"before")
        self.assertEqual(connection.recv(100), b"before")
        name = "ports-{}".format(os.getpid())
        vm.snapshot(name)
        self.addCleanup(self.manager.delete_template, name)
        clone = self.running(template=name, resource_limits=None)
        self.assertEqual(clone.ports(), [])
        for number, one in enumerate((connection, self.dial(clone.publish(7000)), self.connect(clone, 7000))):
            one.sendall(b"%d" % number)
            self.assertEqual(one.recv(100), b"%d" % number)
        # The clone's end of the connection is gone, and its program with it.
        count = shell("grep -c ' 01 ' /proc/net/tcp")
        self.assertTrue(eventually(lambda: self.result(clone, "exec", count)["stdout"] == "4\n", SOON_S))

    def test_a_port_outlives_a_stop_and_a_start(self) -> None:
        vm = self.running()
        published = vm.publish(8000)
        vm.stop()
        with self.assertRaises(ConnectionResetError):
            self.dial(published).recv(1)
        self.assertEqual(vm.get_state(), VMState.STOPPED)
        vm.start()
        self.result(vm, "exec", {"program": "httpd", "args": ["-p", "8000", "-h", "/etc"]})
        connection = self.dial(published)
        connection.sendall(REQUEST)
        self.assertTrue(read_all(connection).startswith(b"HTTP/1."))

    def test_closing_a_port_breaks_its_connections_alone(self) -> None:
        vm = self.running()
        self.serve(vm, 7000, "cat")
        kept = self.dial(vm.publish(7000))
        with vm.publish(7000) as published:
            connection = self.dial(published)
            connection.sendall(b"hello")
            self.assertEqual(connection.recv(100), b"hello")
            self.assertEqual([port["connections"] for port in vm.ports() if port["host_port"] == published.host_port], [1])
        self.assertTrue(ends(connection))
        with self.assertRaises(ConnectionRefusedError):
            socket.create_connection((published.address, published.host_port))
        kept.sendall(b"kept")
        self.assertEqual(kept.recv(100), b"kept")
        # Another program may have it at once.
        with socket.socket() as other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            other.bind((published.address, published.host_port))
            other.listen(1)

    def test_a_forked_child_holds_neither_port_nor_connection(self) -> None:
        vm = self.running()
        self.serve(vm, 7000, "cat")
        published, connection = vm.publish(7000), self.connect(vm, 7000)
        held = self.dial(published)
        held.sendall(b"hello")
        self.assertEqual(held.recv(100), b"hello")
        ours, its = os.pipe()
        child = os.fork()
        if child == 0:
            code = 1
            with contextlib.suppress(ForkedProcessError):
                with published:
                    pass
                code = 2
                published.close()
            os.close(its)
            os.read(ours, 1)
            os._exit(code)
        os.close(ours)
        try:
            published.close()
            self.assertTrue(ends(held))
            self.manager.destroy_vm(vm.vm_id)
            self.assertTrue(ends(connection))
            with socket.socket() as other:
                other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                other.bind((published.address, published.host_port))
                other.listen(1)
        finally:
            os.close(its)
            _, status = os.waitpid(child, 0)
        self.assertEqual(os.WEXITSTATUS(status), 2)


class Published(Case):
    def test_what_is_published_is_told(self) -> None:
        vm = self.manager.run_vm(resource_limits=limits(), ports={8000: 0, 8001: ("127.0.0.2", 0)})
        with vm, vm.publish(8002, address="::1") as third:
            told = vm.ports()
            self.assertEqual(misfits(told, List[PortInfo], "it"), [])
            self.assertEqual([(port["address"], port["guest_port"]) for port in told], [("127.0.0.1", 8000), ("127.0.0.2", 8001), ("::1", 8002)])
            self.assertEqual(told[2]["host_port"], third.host_port)
            self.assertEqual(repr(third), "<PublishedPort [::1]:{} to port 8002 of the guest>".format(third.host_port))
        self.assertEqual(vm.instance.ports(), [])

    def test_a_port_that_is_taken_is_named_with_the_way_out(self) -> None:
        vm = self.manager.get_vm(self.create())
        with socket.socket() as other:
            other.bind(("127.0.0.1", 0))
            other.listen(1)
            taken = other.getsockname()[1]
            with self.assertRaises(HostError) as caught:
                vm.publish(8000, taken)
        error = caught.exception
        self.assertEqual((error.code, error.details["host_port"], error.details["address"]), ("port_unavailable", taken, "127.0.0.1"))
        self.assertIsInstance(error.__cause__, OSError)
        for word in ("127.0.0.1:{}".format(taken), "another program listens there", "host_port"):
            self.assertIn(word, str(error))
        with self.assertRaisesRegex(HostError, "no interface of this host has that address"):
            vm.publish(8000, address="192.0.2.1")
        # A VM that is not started after all leaves nothing.
        with self.assertRaises(HostError):
            self.manager.run_vm(resource_limits=limits(), ports={8000: ("192.0.2.1", 0)})
        self.assertEqual(self.manager.list_vms(), [vm.vm_id])

    def test_values_that_are_none_are_refused(self) -> None:
        vm = self.manager.get_vm(self.create())
        bad: List[Any] = [
            (InvalidValueError, {"port": 0}, "port"), (InvalidValueError, {"port": 65536}, "65535"), (InvalidTypeError, {"port": "80"}, "port"),
            (InvalidTypeError, {"port": True}, "port"), (InvalidValueError, {"port": 1, "host_port": -1}, "host_port"),
            (InvalidValueError, {"port": 1, "address": "localhost"}, "127.0.0.1"), (InvalidTypeError, {"port": 1, "address": 1}, "address"),
            (InvalidValueError, {"port": 1, "protocol": "udp"}, "tcp"), (InvalidValueError, {"port": 1, "guest_address": "[::1]"}, "guest_address"),
        ]
        for kind, arguments, word in bad:
            with self.subTest(arguments), self.assertRaisesRegex(kind, word):
                vm.publish(**arguments)
        for kind, arguments, word in bad[:4] + [(InvalidValueError, {"port": 1, "address": "a.test"}, "address"), (InvalidValueError, {"port": 1, "timeout": -1}, "timeout")]:
            with self.subTest(arguments), self.assertRaisesRegex(kind, word):
                vm.connect(**arguments)
        with self.assertRaises(VmStateError):
            vm.connect(80)
        for ports, invalid in ([80], InvalidTypeError), ({80: "x"}, InvalidTypeError), ({0: 0}, InvalidValueError):
            with self.subTest(ports), self.assertRaises(invalid):
                self.manager.run_vm(resource_limits=limits(), ports=ports)
        self.assertEqual(self.manager.list_vms(), [vm.vm_id])

    def test_a_privileged_port_is_refused_with_the_way_out(self) -> None:
        if os.geteuid() != 0:
            raise unittest.SkipTest("needs root to become a user without privileges")
        if int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text()) < 81:
            raise unittest.SkipTest("needs a host where port 80 is privileged")
        code = (
            "import os\nfrom thirstys_waterfall.security.microvm_isolation import *\nos.setgroups([])\nos.setgid(65534)\nos.setuid(65534)\n"
            "vm = MicroVMInstance('one', 'qemu', 'plugin', VMResourceLimits())\n"
            "try:\n    vm.publish(8000, 80)\nexcept HostError as error:\n    print(error)\n"
        )
        done = run_python(code)
        self.assertIn("127.0.0.1:80", done.stdout, done.stderr)
        self.assertIn("CAP_NET_BIND_SERVICE", done.stdout)


class Pages(unittest.TestCase):
    def test_examples_of_the_page_run_as_they_stand(self) -> None:
        first, second = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "ports.md").read_text(), re.S)
        self.assertEqual(play(first)[1], "b'hello'\n")
        with MicroVMIsolationManager() as manager, manager.run_vm(resource_limits=limits()) as vm:
            self.assertEqual(play(second, vm=vm)[1], "200\n")


class Attached(Case):
    def test_a_vm_of_another_owner_is_connected_to_and_published(self) -> None:
        vm = self.running()
        self.serve(vm, 7000, "cat")
        own = vm.publish(7000)
        with attach(vm.vm_id) as attached:
            self.assertEqual(attached.ports(), vm.ports())
            self.assertEqual(attached.ports()[0]["host_port"], own.host_port)
            published = attached.publish(7000)
            connections = [attached.connect(7000), self.dial(published)]
            for connection in connections:
                self.addCleanup(connection.close)
                connection.settimeout(SOON_S)
                connection.sendall(b"hello")
                self.assertEqual(connection.recv(100), b"hello")
            connections[0].shutdown(socket.SHUT_WR)
            self.assertEqual(read_all(connections[0]), b"")
            with self.assertRaises(PortRefusedError):
                attached.connect(7001)
            with vm.stream("sh", ["-c", "printf all | nc -l -p 7001 > /tmp/heard"]) as server:
                heard = self.connect(attached, 7001)
                self.assertEqual(read_all(heard), b"all")
                heard.close()
                self.assertEqual(server.wait(SOON_S), 0)
        self.assertTrue(ends(connections[1]))
        with self.assertRaises(ConnectionRefusedError):
            socket.create_connection((published.address, published.host_port))
        self.assertEqual(len(vm.ports()), 1)
