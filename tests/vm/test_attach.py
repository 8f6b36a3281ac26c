"""A VM that another process has: programs, files and its life through that process, and clients that mean harm."""

import contextlib
import hashlib
import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import unittest
from pathlib import Path
from typing import Any, Iterator, List

from thirstys_waterfall.security.microvm_isolation import (
    AttachedVM,
    ChannelError,
    CommandError,
    ForkedProcessError,
    HostError,
    InvalidValueError,
    VmNotFoundError,
    VMState,
    VmStateError,
    attach,
    running_vms,
)

from ..support import IMPORT, ROOT, VMTestCase, eventually, limits, play, run_python, shell

MIB = 1 << 20
# An end is told at once; the margin is for a busy host.
SOON_S = 5.0
OWNER = """
import sys
from {package} import MicroVMIsolationManager, VMResourceLimits
with MicroVMIsolationManager({{"raise_on_error": True}}) as manager:
    with manager.run_vm(resource_limits=VMResourceLimits(memory_mb=128, disk_size_mb=64)) as vm:
        print(vm.vm_id, flush=True)
        sys.stdin.read()
""".format(package=IMPORT)
REQUEST, CREDIT = 1, 6


@contextlib.contextmanager
def owner() -> Iterator[Any]:
    """A process that has a VM, and the VM's id."""
    process = subprocess.Popen([sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, universal_newlines=True)
    assert process.stdin is not None and process.stdout is not None
    try:
        yield process, process.stdout.readline().strip()
    finally:
        process.stdin.close()
        process.wait(60)
        process.stdout.close()


def stands_still(pid: int) -> bool:
    """Whether each thread of a process has stopped."""
    states = [stat.read_text().rpartition(")")[2].split()[0] for stat in Path("/proc/{}/task".format(pid)).glob("*/stat")]
    return set(states) == {"T"}


def message(body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + body


def frame(kind: int, call: int, payload: bytes, last: bool = False) -> bytes:
    body = struct.pack(">BBI", kind, last, call) + payload
    return struct.pack(">H", len(body)) + body


class Case(VMTestCase):
    config = {"raise_on_error": True}

    def setUp(self) -> None:
        super().setUp()
        self.vm = self.manager.run_vm(resource_limits=limits())

    def attach(self) -> AttachedVM:
        attached = self.manager.attach(self.vm.vm_id)
        self.addCleanup(attached.close)
        return attached

    def programs(self, name: str) -> List[str]:
        """The programs of this name that run in the guest."""
        return [line for line in self.vm.run(["ps", "-o", "args"]).stdout.splitlines() if line.startswith(name)]

    def client(self) -> socket.socket:
        """A client that does by hand what it likes."""
        client = socket.socket(socket.AF_UNIX)
        self.addCleanup(client.close)
        client.settimeout(SOON_S)
        client.connect(self.vm.instance.get_info()["socket_path"])
        return client

    def attached_client(self) -> socket.socket:
        client = self.client()
        client.sendall(message(b'{"type":"attach","version":1}'))
        length = struct.unpack(">I", client.recv(4, socket.MSG_WAITALL))[0]
        self.assertEqual(json.loads(client.recv(length, socket.MSG_WAITALL)), {"type": "attached", "version": 1})
        return client

    def assert_cut_off(self, client: socket.socket) -> None:
        with contextlib.suppress(ConnectionError):
            while client.recv(65536):
                pass


class Programs(Case):
    def test_another_process_runs_programs_and_moves_files(self) -> None:
        done = run_python(
            """
from {package} import MicroVMIsolationManager, attach
with attach({vm_id!r}) as vm:
    print(vm.run(["tr", "a-z", "A-Z"], input="hello").stdout, vm.run("exit 3", shell=True).returncode)
    vm.write_text("/tmp/from-there", "text")
    print(vm.send_command("ping")["result"], vm.owner_pid)
""".format(package=IMPORT, vm_id=self.vm.vm_id)
        )
        self.assertEqual((done.returncode, done.stdout), (0, "HELLO 3\npong {}\n".format(os.getpid())), done.stderr)
        self.assertEqual(self.vm.read_text("/tmp/from-there"), "text")

    def test_large_files_arrive_whole_both_ways(self) -> None:
        content, back = os.urandom(16 * MIB), io.BytesIO()
        attached = self.attach()
        attached.upload(io.BytesIO(content), "/data/large")
        attached.download("/data/large", back)
        self.assertEqual(hashlib.sha256(back.getvalue()).digest(), hashlib.sha256(content).digest())

    def test_terminal_has_its_size_follows_it_and_takes_signals(self) -> None:
        script = "trap 'stty size; exit 7' WINCH; stty size; while :; do sleep 0.1; done"
        with self.attach().popen(script, shell=True, pty=True, rows=30, columns=90) as program:
            self.assertEqual(next(program), ("stdout", b"30 90\r\n"))
            program.resize(40, 100)
            self.assertEqual((list(program), program.exit_code), ([("stdout", b"40 100\r\n")], 7))

    def test_output_that_nobody_takes_stops_its_program_and_no_other(self) -> None:
        attached = self.attach()
        with attached.popen(["yes"]) as program:
            next(program)
            self.assertEqual(attached.run(["echo", "still", "here"]).stdout, "still here\n")
            self.assertEqual(self.vm.run(["echo", "here"]).stdout, "here\n")
            program.kill()
        self.assertTrue(eventually(lambda: not self.programs("yes"), SOON_S))

    def test_many_handles_run_programs_at_once(self) -> None:
        def work(number: int, said: List[str]) -> None:
            with self.manager.attach(self.vm.vm_id) as attached:
                said.append(attached.run("sleep 0.5; echo {}".format(number), shell=True).stdout)

        said: List[str] = []
        threads = [threading.Thread(target=work, args=(number, said)) for number in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(sorted(said, key=int), ["{}\n".format(number) for number in range(20)])

    def test_failures_have_the_codes_that_the_owner_sees(self) -> None:
        attached = self.attach()
        with self.assertRaises(CommandError) as missing:
            attached.run(["no-such-program"])
        self.assertEqual(missing.exception.code, "program_not_found")
        with self.assertRaises(CommandError) as absent:
            attached.read_bytes("/no-such-file")
        self.assertEqual(absent.exception.code, "file_not_found")
        answer = attached.send_command("freeze")
        self.assertEqual(answer["status"] == "error" and answer["error"]["code"], "reserved_action")

    def test_closed_handle_ends_its_programs_and_nothing_else(self) -> None:
        attached, other = self.attach(), self.attach()
        attached.popen(["sleep", "1234"])
        kept = other.popen(["sleep", "4321"])
        attached.close()
        attached.close()
        self.assertTrue(eventually(lambda: not self.programs("sleep 1234"), SOON_S))
        self.assertEqual((len(self.programs("sleep 4321")), kept.exit_code), (1, None))
        with self.assertRaises(ChannelError) as closed:
            attached.get_info()
        self.assertIn("the handle was closed", str(closed.exception))

    def test_forked_child_attaches_to_its_parents_vm_and_closes_nothing_of_its_parents(self) -> None:
        attached = self.attach()
        child = os.fork()
        if child == 0:
            code = 1
            with contextlib.suppress(BaseException):
                with self.assertRaises(ForkedProcessError):
                    attached.get_state()
                attached.close()
                with attach(self.vm.vm_id) as own:
                    code = own.run("exit 42", shell=True).returncode
            os._exit(code)
        self.assertEqual(os.WEXITSTATUS(os.waitpid(child, 0)[1]), 42)
        self.assertEqual(attached.get_state(), VMState.RUNNING)

    def test_client_that_is_killed_ends_its_programs(self) -> None:
        code = "from {} import attach; vm = attach({!r}); p = vm.popen(['sleep', '2345']); print(p.pid, flush=True); list(p)"
        command = [sys.executable, "-c", code.format(IMPORT, self.vm.vm_id)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, universal_newlines=True) as client:
            assert client.stdout is not None
            client.stdout.readline()
            self.assertEqual(len(self.programs("sleep 2345")), 1)
            client.kill()
        self.assertTrue(eventually(lambda: not self.programs("sleep 2345"), SOON_S))


class Life(Case):
    def test_pause_resume_health_and_info(self) -> None:
        attached = self.attach()
        attached.pause()
        self.assertEqual((attached.get_state(), self.vm.instance.get_state()), (VMState.PAUSED, VMState.PAUSED))
        with self.assertRaises(VmStateError) as twice:
            attached.pause()
        self.assertEqual(twice.exception.details, {"operation": "pause", "state": "paused"})
        attached.resume()
        self.assertEqual(attached.get_health_metrics().health_status, "healthy")
        self.assertEqual(set(attached.get_info()), set(self.vm.instance.get_info()))

    def test_snapshot_is_a_template_of_the_owner(self) -> None:
        name = "attached-{}".format(os.getpid())
        self.addCleanup(self.manager.delete_template, name)
        attached = self.attach()
        attached.write_text("/tmp/kept", "kept")
        with attached.popen(["cat"]) as program:
            attached.snapshot(name)
            program.write(b"goes on")
            program.close_stdin()
            self.assertEqual(list(program), [("stdout", b"goes on")])
        with self.manager.run_vm(template=name) as clone:
            self.assertEqual(clone.read_text("/tmp/kept"), "kept")

    def test_stop_kill_suspend_and_destroy_are_answered_and_then_the_vm_is_not_found(self) -> None:
        ends = {"stop": VMState.STOPPED, "kill": VMState.STOPPED, "suspend": VMState.PAUSED, "destroy": VMState.DESTROYED}
        for end, state in ends.items():
            with self.subTest(end=end), self.manager.run_vm(resource_limits=limits()) as vm:
                attached = attach(vm.vm_id)
                getattr(attached, end)()
                self.assertEqual(vm.instance.get_state(), state)
                self.assertEqual(vm.vm_id in self.manager.list_vms(), end != "destroy")
                with self.assertRaises(ChannelError):
                    attached.run(["true"])
                with self.assertRaises(VmNotFoundError):
                    attach(vm.vm_id)

    def test_example_of_the_page_runs_as_it_stands(self) -> None:
        (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "attach.md").read_text(), re.S)
        _, printed = play(code, vm_id=self.vm.vm_id)
        self.assertIn("{} running {}\n".format(self.vm.vm_id, os.getpid()), printed)
        self.assertTrue(printed.endswith("Linux\n\nb'hello'\n"), printed)

    def test_wait_ends_with_the_vm(self) -> None:
        attached = self.attach()
        self.assertFalse(attached.wait(0.1))
        ended: List[bool] = []
        waiting = threading.Thread(target=lambda: ended.append(attached.wait()))
        waiting.start()
        self.vm.destroy()
        waiting.join(SOON_S)
        self.assertEqual(ended, [True])

    def test_running_vms_names_every_vm_of_the_user_and_what_is_known(self) -> None:
        with owner() as (process, vm_id):
            found = {vm["vm_id"]: vm for vm in running_vms()}
            self.assertEqual((found[vm_id]["owner_pid"], found[self.vm.vm_id]["owner_pid"]), (process.pid, os.getpid()))
            self.assertEqual((found[vm_id]["state"], found[vm_id]["memory_mb"], found[vm_id]["error"]), ("running", 128, None))
        self.assertNotIn(vm_id, [vm["vm_id"] for vm in running_vms()])

    def test_running_vms_follows_nothing_that_no_vm_made(self) -> None:
        runtime = Path(self.vm.instance.get_info()["socket_path"]).parent.parent
        (runtime / "without-a-lock").mkdir()
        (runtime / "a-link").symlink_to(runtime / self.vm.vm_id)
        self.addCleanup((runtime / "without-a-lock").rmdir)
        self.addCleanup((runtime / "a-link").unlink)
        self.assertEqual([vm["vm_id"] for vm in running_vms(str(runtime))], [self.vm.vm_id])
        with self.assertRaises(HostError) as refused:
            running_vms("/tmp")
        self.assertEqual(refused.exception.code, "folder_refused")

    def test_attach_to_what_is_not_there_or_malformed_says_so(self) -> None:
        with self.assertRaises(VmNotFoundError) as missing:
            attach("no-such-vm")
        self.assertIn("no-such-vm", str(missing.exception))
        with self.assertRaises(InvalidValueError):
            attach("../up")

    def test_owner_that_stands_still_is_a_timeout(self) -> None:
        with owner() as (process, vm_id):
            process.send_signal(signal.SIGSTOP)
            try:
                self.assertTrue(eventually(lambda: stands_still(process.pid)))
                with self.assertRaises(ChannelError) as silent:
                    attach(vm_id, timeout=0.5)
                self.assertEqual(silent.exception.code, "channel_timeout")
                said = [vm for vm in running_vms(timeout=0.5) if vm["vm_id"] == vm_id]
                self.assertEqual(said[0]["error"]["code"], "channel_timeout")
            finally:
                process.send_signal(signal.SIGCONT)


class Ends(unittest.TestCase):
    def test_owner_that_is_killed_ends_all_that_is_under_way(self) -> None:
        with owner() as (process, vm_id):
            attached = [attach(vm_id) for _ in range(10)]
            streams = [one.popen(["sleep", "1000"]) for one in attached]
            failed: List[Any] = []

            def wait(work: Any) -> None:
                try:
                    work()
                except ChannelError as error:
                    failed.append((error.code, time.monotonic()))

            works = [stream.wait for stream in streams]
            works += [lambda one=one: one.send_command("exec", shell("sleep 1000", timeout=1000)) for one in attached]
            threads = [threading.Thread(target=wait, args=(work,)) for work in works]
            for thread in threads:
                thread.start()
            time.sleep(0.2)
            killed = time.monotonic()
            process.kill()
            for thread in threads:
                thread.join(SOON_S)
        self.assertEqual([code for code, _ in failed], ["channel_closed"] * 20)
        self.assertLess(max(at for _, at in failed) - killed, SOON_S)
        with self.assertRaises(VmNotFoundError):
            attach(vm_id)


class Attacks(Case):
    def test_garbage_ends_its_client_and_no_other(self) -> None:
        attached = self.attach()
        noise = hashlib.sha256(b"noise").digest() * 4096
        rows = {
            "noise": noise,
            "an empty record": b"\0\0",
            "a frame without its header": b"\0\1x",
            "an unknown kind": frame(99, 1, b""),
            "what only a guest sends": frame(2, 1, b"{}", last=True),
            "a call of number 0": frame(REQUEST, 0, b"{}", last=True),
            "a control that is none": frame(REQUEST, 1, b'{"action":"stream"}', last=True) + frame(7, 1, b"nonsense"),
            "credit beyond the window": frame(REQUEST, 1, b"{}") + frame(CREDIT, 1, b"\1\xff\xff\xff\xff"),
            "too many calls": b"".join(frame(REQUEST, number, b"{") for number in range(1, 200)),
        }
        for name, attack in rows.items():
            with self.subTest(name):
                client = self.attached_client()
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    client.sendall(attack)
                self.assert_cut_off(client)
        self.assertEqual(attached.run(["echo", "well"]).stdout, "well\n")

    def test_requests_that_are_none_are_refused_by_name(self) -> None:
        client = self.attached_client()
        for number, (body, expected) in enumerate(((b"{", b"EOF"), (b"[]", b"Request"), (b'{"operation":"explode"}', b"explode")), 1):
            client.sendall(frame(REQUEST, number, body, last=True))
            length = struct.unpack(">H", client.recv(2, socket.MSG_WAITALL))[0]
            answer = client.recv(length, socket.MSG_WAITALL)
            self.assertEqual(json.loads(answer[6:])["status"], "refused")
            self.assertIn(expected, answer)

    def test_later_version_is_refused_and_the_client_can_go_on(self) -> None:
        client = self.client()
        client.sendall(message(b'{"type":"attach","version":2}') + message(b'{"type":"ping"}'))
        said = b""
        while b"pong" not in said:
            said += client.recv(65536)
        self.assertIn(b"not_supported", said)

    def test_client_that_never_reads_costs_a_window(self) -> None:
        def resident() -> int:
            return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

        request = b'{"action":"stream","params":{"program":"yes"},"stream":true}'
        before = resident()
        clients = [self.attached_client() for _ in range(8)]
        for client in clients:
            client.sendall(frame(REQUEST, 1, request, last=True))
        self.assertTrue(eventually(lambda: len(self.programs("yes")) == 8, SOON_S))
        time.sleep(1)
        self.assertLess(resident() - before, 64 * MIB)
        self.assertEqual(self.attach().run(["echo", "well"]).stdout, "well\n")
        for client in clients:
            client.close()
        self.assertTrue(eventually(lambda: not self.programs("yes"), SOON_S))

    def test_client_that_holds_all_it_may_leaves_places_for_the_owner(self) -> None:
        sleeps = json.dumps({"action": "exec", "params": {"program": "sleep", "args": ["1000"], "timeout": 2000}}).encode()
        clients = [self.attached_client() for _ in range(4)]
        for client in clients:
            client.sendall(b"".join(frame(REQUEST, number, sleeps, last=True) for number in range(1, 129)))
        self.assertTrue(eventually(lambda: len(self.programs("sleep 1000")) == 96, 60))
        self.assertEqual(self.vm.run(["echo", "well"]).stdout, "well\n")
        self.assertEqual(self.attach().get_state(), VMState.RUNNING)
        for client in clients:
            client.close()
        self.assertTrue(eventually(lambda: not self.programs("sleep 1000"), 30))
        streams = json.dumps({"action": "stream", "params": {"program": "sleep", "args": ["1001"]}, "stream": True}).encode()
        clients = [self.attached_client() for _ in range(3)]
        for client in clients:
            client.sendall(b"".join(frame(REQUEST, number, streams, last=True) for number in range(1, 129)))
        self.assertTrue(eventually(lambda: len(self.programs("sleep 1001")) == 48, 60))
        self.assertEqual(self.vm.run(["echo", "well"]).stdout, "well\n")
        for client in clients:
            client.close()
        self.assertTrue(eventually(lambda: not self.programs("sleep 1001"), 30))
        self.assertEqual(self.attach().run(["echo", "well"]).stdout, "well\n")

    @unittest.skipUnless(os.geteuid() == 0, "needs root to be another user")
    def test_other_user_is_not_served_even_where_the_socket_lets_it_connect(self) -> None:
        path = self.vm.instance.get_info()["socket_path"]
        os.chmod(path, 0o666)
        code = """
import os, socket, sys
opened = os.open(sys.argv[1], os.O_PATH)
os.setegid(65534); os.seteuid(65534)
client = socket.socket(socket.AF_UNIX); client.settimeout(20)
client.connect("/proc/self/fd/{}".format(opened))
try:
    client.sendall(bytes.fromhex(sys.argv[2])); print(client.recv(100))
except ConnectionError:
    print(b"")
"""
        wish = message(b'{"type":"attach","version":1}').hex()
        done = subprocess.run([sys.executable, "-c", code, path, wish], stdout=subprocess.PIPE, universal_newlines=True)
        self.assertEqual(done.stdout, "b''\n")
