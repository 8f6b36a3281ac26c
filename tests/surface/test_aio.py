"""The asyncio face: twins of the blocking one, cancellation, several loops, and ends in the middle of operations."""

import asyncio
import contextlib
import doctest
import gc
import importlib
import importlib.util
import inspect
import io
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import zlib
from pathlib import Path
from typing import Any, Awaitable, Callable, Dict, Iterator, List, Optional, Tuple, Type

from thirstys_waterfall.security import microvm_isolation as package
from thirstys_waterfall.security.microvm_isolation import aio
from thirstys_waterfall.security.microvm_isolation.aio import AsyncMicroVMInstance, AsyncMicroVMIsolationManager, _operations

from ..support import IMPORT, ROOT, eventually, limits, play, run_python, shell
from .test_documentation import BLOCKS, described, parameters

CONFIG = {"default_backend": "QEMU", "default_memory_mb": 128, "default_disk_size_mb": 64, "max_vcpus": 64}
# Of the blocking face alone, and why.
BLOCKING_ONLY = {
    "CommunicationChannel": "a client of plain messages for other programs; attach() is what can do more, and has a twin",
    "doctor": "it is asked once, before a program has VMs; asyncio.to_thread runs it beside a loop",
}
HEAD = """
import asyncio, threading, time
from {} import *
from {}.aio import *
config = {!r}
async def running(manager):
    vm = manager.get_vm(await manager.create_vm("plugin"))
    await vm.start()
    return vm
SLEEP = ("exec", {{"program": "sleep", "args": ["300"], "timeout": 400}})
""".format(IMPORT, IMPORT, CONFIG)

# Interpreters that exit at a random moment.
EXITS = int(os.environ.get("MICROVM_EXITS", "4"))
# uvloop's loops in place of asyncio's own.
UVLOOP = """
import asyncio, uvloop
asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
"""


async def start_vm(manager: AsyncMicroVMIsolationManager, **options: Any) -> AsyncMicroVMInstance:
    vm = manager.get_vm(await manager.create_vm("plugin", limits(), **options))
    await vm.start()
    return vm


async def output_of(vm: AsyncMicroVMInstance, script: str) -> str:
    answer: Dict[str, Any] = dict(await vm.send_command("exec", shell(script)))
    return str(answer["result"]["stdout"])


async def sleepers(vm: AsyncMicroVMInstance) -> int:
    """How many programs of the guest have `sleep 4321` in their arguments."""
    # The brackets keep grep from finding itself.
    return int(await output_of(vm, "grep -l 'sleep.[4]321' /proc/[0-9]*/cmdline 2>/dev/null | wc -l"))


async def comes(condition: Callable[[], Awaitable[bool]], seconds: float = 20.0) -> bool:
    """Whether the condition holds within the time."""
    end = time.monotonic() + seconds
    while not await condition():
        if time.monotonic() > end:
            return False
        await asyncio.sleep(0.05)
    return True


def with_manager(test: Callable[[AsyncMicroVMIsolationManager], Awaitable[Any]], **config: Any) -> Any:
    """What the test returns, which runs in a loop of its own."""

    async def run() -> Any:
        async with AsyncMicroVMIsolationManager(dict(CONFIG, **config)) as manager:
            return await test(manager)

    return asyncio.run(run())


def members() -> List[Tuple[str, Any]]:
    """The public methods and properties of the classes of ``aio``, by dotted name."""
    classes = [(name, value) for name, _, value in twins() if inspect.isclass(value)]
    return [("{}.{}".format(name, member), inspect.getattr_static(value, member))
            for name, value in classes for member in dir(value) if not member.startswith("_")]


def twins() -> Iterator[Tuple[str, Any, Any]]:
    """Each public name of ``aio``, what it is the twin of, and itself."""
    for name in aio.__all__:
        yield name, getattr(package, re.sub("^Async", "", name)), getattr(aio, name)


class Surface(unittest.TestCase):
    def test_every_twin_has_the_names_and_arguments_of_the_blocking_class(self) -> None:
        for name, blocking, twin in twins():
            if not inspect.isclass(twin):
                self.assertEqual(parameters(twin), parameters(blocking), name)
                continue
            names = {member for member in dir(blocking) if not member.startswith("_")}
            self.assertEqual(names - set(dir(twin)), set(), name)
            for member in names:
                with self.subTest(name=name, member=member):
                    if inspect.isroutine(getattr(blocking, member)):
                        self.assertEqual(parameters(getattr(twin, member)), parameters(getattr(blocking, member)))
                    else:
                        self.assertIsInstance(inspect.getattr_static(twin, member), property)

    def test_every_class_that_waits_has_a_twin(self) -> None:
        known = {value for _, value, _ in twins()}
        for name in package.__all__:
            value = getattr(package, name)
            if BLOCKS.search(inspect.getdoc(value) or "") or any(
                re.search("^Blocks", inspect.getdoc(member) or "", re.MULTILINE) for member in vars(value).values()
            ):
                with self.subTest(name):
                    self.assertEqual(value in known, name not in BLOCKING_ONLY)

    def test_every_docstring_says_whether_the_call_blocks_and_what_its_arguments_are(self) -> None:
        calls = [(name, value) for name, value in members() if inspect.isroutine(value)]
        self.assertGreater(len(calls), 30)
        self.assertEqual([name for name, value in calls if not BLOCKS.search(inspect.getdoc(value) or "")], [])
        self.assertEqual([name for name, value in members() if not inspect.getdoc(value)], [])
        for name, value in [*calls, *((name, getattr(aio, name)) for name in aio.__all__)]:
            with self.subTest(name):
                self.assertEqual(list(described(value)), parameters(value))

    def test_every_example_says_what_happens(self) -> None:
        names = dict(vars(aio), asyncio=asyncio)
        test = doctest.DocTestParser().get_doctest(aio.__doc__ or "", names, "aio", None, 0)
        said: List[str] = []
        self.assertEqual(doctest.DocTestRunner(verbose=False).run(test, out=said.append).failed, 0, "".join(said))


class Operations(unittest.TestCase):
    def test_life_of_a_vm_is_the_blocking_ones(self) -> None:
        async def life(manager: AsyncMicroVMIsolationManager) -> None:
            vm = await start_vm(manager, vm_id="aio-life", labels={"team": "web"})
            self.assertIs(manager.get_vm("aio-life"), vm)
            self.assertEqual(await vm.send_command("ping"), {"status": "ok", "result": "pong"})
            self.assertEqual((await vm.get_info())["labels"], {"team": "web"})
            self.assertEqual((await vm.get_health_metrics()).health_status, "healthy")
            self.assertEqual((await manager.get_health_status())["healthy_vms"], 1)
            self.assertEqual(list(await manager.get_all_vms_info()), ["aio-life"])
            self.assertTrue(await vm.pause())
            self.assertEqual(vm.get_state().name, "PAUSED")
            self.assertTrue(await vm.resume())
            await vm.snapshot("aio-life")
            self.assertIn("aio-life", [template["name"] for template in await manager.list_templates()])
            self.assertTrue(await manager.delete_template("aio-life"))
            self.assertTrue(await vm.suspend())
            self.assertIn("aio-life", [suspended["vm_id"] for suspended in await manager.list_suspended()])
            with tempfile.TemporaryDirectory() as folder:
                disk = Path(folder, "disk")
                self.assertEqual(await manager.export_disk("aio-life", disk), {"bytes": disk.stat().st_size, "verified": True})
                with self.assertRaises(ValueError):
                    await manager.export_disk("aio-life", disk)
            self.assertTrue(await manager.resume_vm("aio-life"))
            self.assertEqual(manager.list_vms(state="running", labels={"team": "web"}), ["aio-life"])
            self.assertTrue(await vm.stop())
            self.assertTrue(await manager.destroy_vm("aio-life"))
            self.assertEqual((await manager.get_resource_usage())["total_vms"], 0)

        with_manager(life)

    def test_failures_are_raised_whatever_raise_on_error_says(self) -> None:
        async def fail(manager: AsyncMicroVMIsolationManager) -> None:
            vm = manager.get_vm(await manager.create_vm("plugin", limits(), vm_id="aio-fails"))
            with self.assertRaises(package.VmStateError) as caught:
                await vm.pause()
            self.assertEqual(getattr(vm.last_error, "code", None), caught.exception.code)
            with self.assertRaises(package.VmIdTakenError):
                await manager.create_vm("plugin", limits(), vm_id="aio-fails")
            self.assertEqual(getattr(manager.last_error, "code", None), "vm_id_taken")
            with self.assertRaises(package.VmNotFoundError):
                await manager.start_vm("no-such-vm")
            with self.assertRaises(ValueError):
                await vm.send_command("ping", timeout=-1)
            with self.assertRaises(TypeError):
                await manager.create_vm("plugin", "large")  # type: ignore[arg-type]

        with_manager(fail, raise_on_error=False)

    def test_prepare_tells_its_stages_on_the_thread_of_the_loop(self) -> None:
        told: List[Tuple[str, float, threading.Thread]] = []

        async def prepare(manager: AsyncMicroVMIsolationManager) -> None:
            tell = lambda stage, fraction: told.append((stage, fraction, threading.current_thread()))
            self.assertTrue(await manager.prepare(limits(), progress=tell))
            self.assertEqual((told[0][:2], told[-1][:2], len(told)), (("template", 0.0), ("done", 1.0), 8))
            self.assertEqual({thread for _, _, thread in told}, {threading.current_thread()})
            self.assertTrue(await manager.prepare(limits(), progress=tell))
            self.assertEqual(told[8:], [("done", 1.0, threading.current_thread())])
            with self.assertRaises(package.InvalidTypeError):
                await manager.prepare(limits(), progress="loud")  # type: ignore[arg-type]

        with tempfile.TemporaryDirectory() as folder:
            with_manager(prepare, cache_dir=folder + "/cache")

    def test_twenty_vms_start_at_once_and_their_commands_take_no_threads(self) -> None:
        async def start(manager: AsyncMicroVMIsolationManager) -> None:
            vms = await asyncio.gather(*(start_vm(manager) for _ in range(20)))
            calls = [asyncio.ensure_future(vm.send_command("exec", shell("sleep 1"))) for vm in vms * 5]
            before = len(os.listdir("/proc/self/task"))
            await asyncio.sleep(0.5)
            self.assertFalse(any(call.done() for call in calls))
            self.assertLessEqual(len(os.listdir("/proc/self/task")), before)
            self.assertEqual([answer["status"] for answer in await asyncio.gather(*calls)], ["ok"] * 100)

        with_manager(start)


class Cancellation(unittest.TestCase):
    def test_cancelled_exec_ends_the_program_and_its_descendants_and_not_the_vm(self) -> None:
        async def cancel(manager: AsyncMicroVMIsolationManager) -> None:
            vm = await start_vm(manager)
            task = asyncio.ensure_future(vm.send_command("exec", shell("sleep 4321 & sleep 4321", timeout=600)))

            async def both_run() -> bool:
                return await sleepers(vm) >= 2

            async def none_runs() -> bool:
                return await sleepers(vm) == 0

            self.assertTrue(await comes(both_run), await output_of(vm, "ps"))
            task.cancel()
            with self.assertRaises(asyncio.CancelledError):
                await task
            self.assertTrue(await comes(none_runs, 20.0), await output_of(vm, "ps"))

        with_manager(cancel)

    def test_wait_for_raises_in_time_and_the_vm_answers_afterwards(self) -> None:
        async def wait(manager: AsyncMicroVMIsolationManager) -> None:
            vm = await start_vm(manager)
            begun = time.monotonic()
            with self.assertRaises(asyncio.TimeoutError):
                await asyncio.wait_for(vm.send_command("exec", shell("sleep 60", timeout=100)), 0.5)
            self.assertLess(time.monotonic() - begun, 10.0)
            self.assertEqual((await vm.send_command("ping"))["status"], "ok")

        with_manager(wait)

    def test_cancelled_start_is_undone_and_may_be_tried_again(self) -> None:
        async def cancel(manager: AsyncMicroVMIsolationManager) -> None:
            vm = manager.get_vm(await manager.create_vm("plugin", limits()))
            task = asyncio.ensure_future(vm.start())
            await asyncio.sleep(0.1)
            task.cancel()
            with self.assertRaises(asyncio.CancelledError):
                await task
            self.assertTrue(await vm.start())
            self.assertEqual(await output_of(vm, "echo here"), "here\n")

        with_manager(cancel, templates=False)

    def test_cancelled_create_keeps_no_quota(self) -> None:
        async def cancel(manager: AsyncMicroVMIsolationManager) -> None:
            for _ in range(50):
                task = asyncio.ensure_future(manager.create_vm("plugin", limits()))
                await asyncio.sleep(0)
                task.cancel()
                with self.assertRaises(asyncio.CancelledError):
                    await task

            async def is_free() -> bool:
                return (await manager.get_resource_usage())["vcpus_allocated"] == 0

            self.assertTrue(await comes(is_free))

        with_manager(cancel)

    def test_create_that_ended_before_its_task_was_cancelled_keeps_no_quota(self) -> None:
        async def cancel(manager: AsyncMicroVMIsolationManager) -> None:
            task = asyncio.ensure_future(manager.create_vm("plugin", limits()))
            await asyncio.sleep(0)
            # The loop stands still until the VM is there; then its future has the id, which the task has not taken yet.
            self.assertTrue(eventually(manager.list_vms))
            time.sleep(0.2)
            _operations.queue_of(asyncio.get_running_loop())._drain()
            task.cancel()
            with self.assertRaises(asyncio.CancelledError):
                await task

            async def is_free() -> bool:
                return (await manager.get_resource_usage())["vcpus_allocated"] == 0

            self.assertTrue(await comes(is_free))

        with_manager(cancel)

    def test_cancelled_stop_goes_on(self) -> None:
        async def cancel(manager: AsyncMicroVMIsolationManager) -> None:
            vm = await start_vm(manager)
            task = asyncio.ensure_future(vm.stop())
            await asyncio.sleep(0)
            task.cancel()
            with self.assertRaises(asyncio.CancelledError):
                await task

            async def is_stopped() -> bool:
                return vm.get_state().name == "STOPPED"

            self.assertTrue(await comes(is_stopped, 15.0))

        with_manager(cancel)


class Streams(unittest.TestCase):
    def test_program_is_read_written_signalled_and_waited_for(self) -> None:
        async def use(manager: AsyncMicroVMIsolationManager) -> None:
            vm = await start_vm(manager)
            async with vm.stream("cat") as program:
                self.assertTrue(await program.write(b"hello"))
                program.close_stdin()
                self.assertEqual([piece async for piece in program], [("stdout", b"hello")])
                self.assertEqual((program.exit_code, await program.wait()), (0, 0))
            program = await vm.stream("/bin/sh", ["-c", "echo out; echo err >&2; sleep 4321"], uid=1000)
            self.assertEqual({await program.__anext__(), await program.__anext__()}, {("stdout", b"out\n"), ("stderr", b"err\n")})
            program.signal(15)
            self.assertEqual(await program.wait(10), -15)
            self.assertEqual((await vm.stream("cat", stdin=b"given")).pid > 1, True)
            program = await vm.stream("/bin/sh", ["-c", "read line; stty size; exit 5"], pty=True, rows=40, columns=100)
            program.resize(50, 120)
            await program.write(b"\n")
            output = b"".join([data async for _, data in program])
            self.assertIn(b"50 120", output)
            self.assertEqual(program.exit_code, 5)
            self.assertIn("exit code 5", repr(program))

        with_manager(use)

    def test_wait_calls_back_and_keeps_its_time_while_output_flows(self) -> None:
        async def wait(manager: AsyncMicroVMIsolationManager) -> None:
            vm = await start_vm(manager)
            heard: List[Tuple[str, bytes]] = []
            program = await vm.stream("/bin/sh", ["-c", "echo x; exit 3"], on_output=lambda *piece: heard.append(piece))
            self.assertEqual((await program.wait(), heard), (3, [("stdout", b"x\n")]))
            for on_output in (None, lambda channel, data: None):
                async with vm.stream("yes", on_output=on_output) as program:
                    begun = time.monotonic()
                    with self.assertRaises(package.ChannelError) as caught:
                        await program.wait(0.3)
                    self.assertEqual((caught.exception.code, time.monotonic() - begun < 3), ("channel_timeout", True))

        with_manager(wait)

    def test_communicate_and_text_are_those_of_the_blocking_stream(self) -> None:
        async def use(manager: AsyncMicroVMIsolationManager) -> None:
            vm = await start_vm(manager)
            async with vm.stream("/bin/sh", ["-c", "cat; echo err >&2"]) as program:
                self.assertEqual(await program.communicate("caf\u00e9", text=True), ("caf\u00e9", "err\n"))
            async with vm.stream("/bin/sh", ["-c", "echo first; sleep 1; echo second"]) as program:
                with self.assertRaises(package.ChannelError):
                    await program.communicate(timeout=0.3)
                self.assertEqual(await program.communicate(), (b"first\nsecond\n", b""))
            async with vm.stream("/bin/sh", ["-c", r"printf '\303'; sleep 0.2; printf '\251\377'"]) as program:
                self.assertEqual("".join([text async for _, text in program.text()]), "\u00e9\ufffd")

        with_manager(use)

    def test_slow_reader_stops_its_program_and_not_the_loop(self) -> None:
        async def read(manager: AsyncMicroVMIsolationManager) -> None:
            vm = await start_vm(manager)
            async with vm.stream("yes") as program:
                await program.__anext__()
                self.assertEqual(await output_of(vm, "echo here"), "here\n")
                self.assertTrue(all([len((await program.__anext__())[1]) for _ in range(100)]))

        with_manager(read)

    def test_cancelled_readers_lose_no_output(self) -> None:
        async def read(manager: AsyncMicroVMIsolationManager) -> None:
            vm = await start_vm(manager)
            lines = "i=0; while [ $i -lt 3000 ]; do echo $i; i=$((i+1)); done"
            heard, given_up = b"", 0
            async with vm.stream("/bin/sh", ["-c", lines]) as program:
                while program.exit_code is None:
                    task = asyncio.ensure_future(program.__anext__())
                    # From at once to after the piece has come: before it is begun, under way, ended, and ended but not taken.
                    for _ in range(given_up % 4):
                        await asyncio.sleep(0)
                    if given_up % 8 == 7:
                        await asyncio.sleep(0.001)
                    task.cancel()
                    given_up += 1
                    try:
                        heard += (await task)[1]
                    except StopAsyncIteration:
                        break
                    except asyncio.CancelledError:
                        pass
            self.assertEqual(heard, b"".join(b"%d\n" % number for number in range(3000)))
            self.assertGreater(given_up, 20)

        with_manager(read)

    def test_cancelled_beginning_and_end_of_a_block_kill_the_program(self) -> None:
        async def cancel(manager: AsyncMicroVMIsolationManager) -> None:
            vm = await start_vm(manager)

            async def run() -> None:
                async with vm.stream("sleep", ["4321"]) as program:
                    await program.wait()

            for turns in range(40):
                task = asyncio.ensure_future(run())
                await asyncio.sleep(turns / 400)
                task.cancel()
                with self.assertRaises(asyncio.CancelledError):
                    await task

            async def none_runs() -> bool:
                return await sleepers(vm) == 0

            self.assertTrue(await comes(none_runs), await output_of(vm, "ps"))

        with_manager(cancel)

    def test_failures_are_those_of_the_blocking_stream(self) -> None:
        async def fail(manager: AsyncMicroVMIsolationManager) -> None:
            vm = await start_vm(manager)
            with self.assertRaises(package.CommandError) as caught:
                await vm.stream("no-such-program")
            self.assertEqual(caught.exception.code, "program_not_found")
            with self.assertRaises(ValueError):
                await vm.stream("cat", timeout=0)
            with self.assertRaises(TypeError):
                await vm.stream("cat", args="x", stdin="text")  # type: ignore[arg-type]
            program = await vm.stream("sleep", ["4321"], timeout=0.3)
            with self.assertRaises(package.CommandError) as caught:
                await program.wait()
            self.assertEqual((caught.exception.code, await program.wait()), ("timeout", -9))

        with_manager(fail)


class Transfers(unittest.TestCase):
    def test_files_and_objects_go_both_ways_as_by_the_blocking_calls(self) -> None:
        content = os.urandom(700_000)

        class Pieces:
            """Read and written by coroutine functions, as asyncio's streams."""

            def __init__(self, content: bytes = b"") -> None:
                self.file = io.BytesIO(content)

            async def read(self, size: int) -> bytes:
                await asyncio.sleep(0)
                return self.file.read(size)

            async def write(self, data: bytes) -> int:
                await asyncio.sleep(0)
                # As a raw stream, which may take less.
                return self.file.write(data[:50_000])

        async def transfer(manager: AsyncMicroVMIsolationManager, folder: Path) -> None:
            vm = await start_vm(manager)
            path, back = folder / "there", folder / "back"
            path.write_bytes(content)
            path.chmod(0o640)
            told: List[Tuple[int, Optional[int], threading.Thread]] = []

            def progress(done: int, total: Optional[int]) -> None:
                told.append((done, total, threading.current_thread()))

            moved = {"bytes": len(content), "crc32": zlib.crc32(content)}
            self.assertEqual(await vm.upload(path, "/tmp/one"), moved)
            self.assertEqual(await vm.upload(io.BytesIO(content), "/tmp/two", mode=0o600, progress=progress), moved)
            self.assertEqual(await vm.upload(Pieces(content), "/tmp/three"), moved)
            self.assertEqual(await vm.upload(str(path), "/tmp/four", progress=progress), moved)
            self.assertEqual(await output_of(vm, "cd /tmp; cat one two three four | cksum; stat -c %a one two"),
                             subprocess.run("cat {0} {0} {0} {0} | cksum; echo 640; echo 600".format(path), shell=True,
                                            stdout=subprocess.PIPE, check=True).stdout.decode())
            self.assertEqual(await vm.download("/tmp/one", back), moved)
            self.assertEqual((back.read_bytes() == content, back.stat().st_mode & 0o777), (True, 0o640))
            for name in ("file", "object"):
                received = io.BytesIO()
                destination: Any = back if name == "file" else received
                self.assertEqual(await vm.download("/tmp/two", destination, progress=progress), moved)
                self.assertEqual(back.read_bytes() if name == "file" else received.getvalue(), content)
            pieces = Pieces()
            self.assertEqual(await vm.download("/tmp/three", pieces), moved)
            self.assertEqual(pieces.file.getvalue(), content)
            # An end in place, from a file that knows where it stands.
            self.assertEqual((await vm.upload(path, "/tmp/one", offset=600_000))["bytes"], 100_000)
            self.assertEqual((await vm.download("/tmp/one", back, offset=600_000))["bytes"], 100_000)
            self.assertEqual(back.read_bytes(), content)
            self.assertEqual((await vm.upload(io.BytesIO(), "/tmp/empty"), await vm.download("/tmp/empty", io.BytesIO())),
                             ({"bytes": 0, "crc32": 0},) * 2)
            self.assertEqual({thread for _, _, thread in told}, {threading.current_thread()})
            self.assertEqual([total for done, total, _ in told if done == len(content)], [None] + [len(content)] * 3)
            self.assertGreaterEqual(len(told), 12)

        with tempfile.TemporaryDirectory() as name:
            with_manager(lambda manager: transfer(manager, Path(name)))

    def test_failures_are_raised_and_undo_the_transfer(self) -> None:
        async def fail(manager: AsyncMicroVMIsolationManager, folder: Path) -> None:
            vm = await start_vm(manager)
            path = folder / "file"
            path.write_text("old")
            with self.assertRaises(package.HostError) as caught:
                await vm.upload(folder / "none", "/tmp/there")
            self.assertIsInstance(caught.exception.__cause__, FileNotFoundError)
            with self.assertRaises(package.HostError):
                await vm.download("/etc/hostname", folder)
            with self.assertRaises(package.CommandError):
                await vm.upload(path, "/no/such/folder")
            with self.assertRaises(package.CommandError) as refused:
                await vm.download("/dev/zero", path, max_bytes=100)
            self.assertEqual(path.read_text(), "old", refused.exception)
            bad: List[Tuple[Type[Exception], Callable[[], Awaitable[Any]]]] = [
                (TypeError, lambda: vm.upload(3, "/tmp/there")),  # type: ignore[arg-type]
                (TypeError, lambda: vm.upload(path, "/tmp/there", progress=3)),  # type: ignore[arg-type]
                (TypeError, lambda: vm.upload(io.StringIO("text"), "/tmp/there")),  # type: ignore[arg-type]
                (ValueError, lambda: vm.upload(path, "/tmp/there", mode=0o10000)),
                (ValueError, lambda: vm.download("/etc/hostname", path, offset=-1)),
                (ZeroDivisionError, lambda: vm.upload(path, "/tmp/there", progress=lambda done, total: 1 // 0)),
                (ZeroDivisionError, lambda: vm.download("/bin/busybox", path, progress=lambda done, total: 1 // 0)),
            ]
            for kind, call in bad:
                with self.subTest(kind=kind), self.assertRaises(kind):
                    await call()
            self.assertEqual((path.read_text(), os.listdir(str(folder))), ("old", ["file"]))

            async def is_undone() -> bool:
                return await output_of(vm, "ls -A /tmp") == ""

            self.assertTrue(await comes(is_undone), await output_of(vm, "ls -A /tmp"))

        with tempfile.TemporaryDirectory() as name:
            with_manager(lambda manager: fail(manager, Path(name)))

    def test_cancelled_transfers_are_undone_at_any_moment(self) -> None:
        async def cancel(manager: AsyncMicroVMIsolationManager, folder: Path) -> None:
            vm = await start_vm(manager)
            source, path = folder / "source", folder / "file"
            source.write_bytes(os.urandom(8 << 20))
            path.write_text("old")
            await vm.upload(source, "/root/big")
            for turn in range(24):
                calls = [vm.upload(source, "/tmp/there"), vm.download("/root/big", path),
                         vm.upload(io.BytesIO(source.read_bytes()), "/tmp/there"), vm.download("/root/big", io.BytesIO())]
                task = asyncio.ensure_future(calls.pop(turn % 4))
                for call in calls:
                    call.close()
                await asyncio.sleep(turn // 4 * 0.004)
                task.cancel()
                begun = time.monotonic()
                try:
                    await task
                except asyncio.CancelledError:
                    self.assertLess(time.monotonic() - begun, 10.0)
                else:
                    self.fail("8 MiB were faster than their cancellation, turn {}".format(turn))

            async def is_undone() -> bool:
                return await output_of(vm, "ls -A /tmp") == "" and sorted(os.listdir(str(folder))) == ["file", "source"]

            self.assertTrue(await comes(is_undone), (await output_of(vm, "ls -A /tmp"), os.listdir(str(folder))))
            self.assertEqual(path.read_text(), "old")

        with tempfile.TemporaryDirectory() as name:
            with_manager(lambda manager: cancel(manager, Path(name)))

    def test_many_transfers_and_fifos_take_few_threads(self) -> None:
        async def transfer(manager: AsyncMicroVMIsolationManager, folder: Path) -> None:
            vm = await start_vm(manager)
            (folder / "file").write_bytes(os.urandom(1 << 20))
            await vm.upload(folder / "file", "/tmp/file")
            before = len(os.listdir("/proc/self/task"))
            fifos = [folder / str(number) for number in range(6)]
            for fifo in fifos:
                os.mkfifo(str(fifo))
            waiting = [asyncio.ensure_future(vm.upload(fifo, "/tmp/{}".format(fifo.name))) for fifo in fifos[:3]]
            waiting += [asyncio.ensure_future(vm.download("/etc/hostname", fifo)) for fifo in fifos[3:]]
            moving = [asyncio.ensure_future(vm.download("/tmp/file", folder / "to-{}".format(number))) for number in range(30)]
            most = 0
            while not all(task.done() for task in moving):
                most = max(most, len(os.listdir("/proc/self/task")))
                await asyncio.sleep(0.005)
            self.assertEqual({task.result()["bytes"] for task in moving}, {1 << 20})
            # Four read or write at a time; a thread that has just ended its turn is not idle yet for the next one.
            self.assertLessEqual(most - before, 12)
            self.assertFalse(any(task.done() for task in waiting))
            for fifo in fifos[:3]:
                fifo.write_text("through")
            read = [os.open(str(fifo), os.O_RDONLY | os.O_NONBLOCK) for fifo in fifos[3:]]
            done = await asyncio.gather(*waiting)
            self.assertEqual([one["bytes"] for one in done[:3]], [7] * 3)
            for fd in read:
                self.assertEqual(len(os.read(fd, 100)), done[3]["bytes"])
                os.close(fd)

        with tempfile.TemporaryDirectory() as name:
            with_manager(lambda manager: transfer(manager, Path(name)))


class Machines(unittest.TestCase):
    def test_vm_runs_programs_and_has_files_until_its_block_ends(self) -> None:
        async def use(manager: AsyncMicroVMIsolationManager) -> None:
            async with manager.run_vm("plugin", limits(), vm_id="aio-vm", labels={"team": "web"}) as vm:
                self.assertEqual((vm.vm_id, vm.instance), ("aio-vm", manager.get_vm("aio-vm")))
                self.assertEqual(repr(vm), "<AsyncVM aio-vm running>")
                done = await vm.run(["tr", "a-z", "A-Z"], input="caf\u00e9", check=True)
                self.assertEqual(done, package.CompletedProgram(["tr", "a-z", "A-Z"], 0, "CAF\u00e9", ""))
                self.assertEqual((await vm.run("echo out; echo err >&2; exit 3", shell=True, text=False)),
                                 package.CompletedProgram("echo out; echo err >&2; exit 3", 3, b"out\n", b"err\n"))
                with self.assertRaises(subprocess.CalledProcessError):
                    await vm.run(["false"], check=True)
                begun = time.monotonic()
                with self.assertRaises(subprocess.TimeoutExpired) as caught:
                    await vm.run("echo begun; sleep 4321", shell=True, timeout=0.5)
                self.assertEqual((caught.exception.output, time.monotonic() - begun < 5), ("begun\n", True))
                with self.assertRaises(ValueError):
                    await vm.run("ls -la")
                with self.assertRaises(package.CommandError):
                    await vm.run(["no-such-program"])
                await vm.write_text("/tmp/note", "caf\u00e9", mode=0o600)
                self.assertEqual((await vm.read_text("/tmp/note"), await vm.read_bytes("/tmp/note")), ("caf\u00e9", b"caf\xc3\xa9"))
                with self.assertRaises(TypeError):
                    await vm.write_bytes("/tmp/note", "text")  # type: ignore[arg-type]
                async with vm.popen("stat -c %a /tmp/note; id -u; pwd", shell=True, user=1000, cwd="/tmp") as program:
                    self.assertEqual(b"".join([data async for _, data in program]), b"600\n1000\n/tmp\n")
                program = await vm.exec("echo", "hello")
                self.assertEqual((await program.communicate(text=True), program.exit_code), (("hello\n", ""), 0))
                printed = io.StringIO()
                with contextlib.redirect_stdout(printed):
                    await vm.run(["echo", "passed on"], capture_output=False)
                self.assertEqual(printed.getvalue(), "passed on\n")
                # It ends only when somebody has heard it.
                heard = asyncio.Event()
                script = "printf 'caf\\303\\251'; while [ ! -e /tmp/heard ]; do sleep 0.1; done"
                running = asyncio.ensure_future(vm.run(script, shell=True, on_output=lambda channel, text: heard.set()))
                await asyncio.wait_for(heard.wait(), 30.0)
                await vm.write_text("/tmp/heard", "")
                self.assertEqual((await running).stdout, "caf\u00e9")
            self.assertEqual(manager.list_vms(), [])
            await vm.destroy()
            machine = await manager.run_vm(resource_limits=limits())
            await asyncio.gather(machine.destroy(), machine.destroy())
            self.assertEqual((await manager.get_resource_usage())["vcpus_allocated"], 0)

        with_manager(use)

    def test_cancelled_run_kills_its_program_and_not_the_vm(self) -> None:
        async def cancel(manager: AsyncMicroVMIsolationManager) -> None:
            async with manager.run_vm() as vm:
                task = asyncio.ensure_future(vm.run("sleep 4321 & sleep 4321", shell=True))

                async def run() -> bool:
                    return await sleepers(vm.instance) >= 2

                async def is_gone() -> bool:
                    return await sleepers(vm.instance) == 0

                self.assertTrue(await comes(run))
                task.cancel()
                with self.assertRaises(asyncio.CancelledError):
                    await task
                self.assertTrue(await comes(is_gone, 20.0), await output_of(vm.instance, "ps"))

        with_manager(cancel)

    def test_start_that_fails_or_is_cancelled_leaves_nothing(self) -> None:
        async def fail(manager: AsyncMicroVMIsolationManager) -> None:
            with self.assertRaises(package.ImageError):
                await manager.run_vm(kernel_path="/nowhere/vmlinux")
            with self.assertRaises(package.ImageError):
                async with manager.run_vm(rootfs_path="/nowhere/rootfs"):
                    self.fail("there is no such image")
            with self.assertRaises(package.QuotaExceededError):
                await manager.run_vm(resource_limits=limits(vcpu_count=32))
            self.assertEqual(manager.list_vms(), [])
            for turn in range(20):
                task = asyncio.ensure_future(manager.run_vm(resource_limits=limits()))
                await asyncio.sleep(turn * 0.02)
                task.cancel()
                begun = time.monotonic()
                try:
                    await (await task).destroy()
                except asyncio.CancelledError:
                    self.assertLess(time.monotonic() - begun, 10.0)

            async def is_free() -> bool:
                return (await manager.get_resource_usage())["vcpus_allocated"] == 0

            self.assertTrue(await comes(is_free))
            self.assertEqual(manager.list_vms(), [])

        with_manager(fail, max_vcpus=16)

    def test_block_of_a_closed_loop_destroys_its_vm_without_a_word(self) -> None:
        done = run_python(HEAD + """
import gc, sys
async def use(manager):
    async with manager.run_vm() as vm:
        await vm.run(["sleep", "300"])
async def main():
    global manager, task
    manager = AsyncMicroVMIsolationManager(config)
    task = asyncio.ensure_future(use(manager))
    while not manager.list_vms(state="running"):
        await asyncio.sleep(0.05)
    await asyncio.sleep(0.5)
loop = asyncio.new_event_loop()
loop.set_exception_handler(lambda loop, context: None)
loop.run_until_complete(main())
loop.close()
del task
gc.collect()
end = time.monotonic() + 10
while manager.list_vms() and time.monotonic() < end:
    time.sleep(0.05)
print(manager.list_vms())
""")
        self.assertEqual((done.returncode, done.stdout, done.stderr), (0, "[]\n", ""))


class Attached(unittest.TestCase):
    OWNER = HEAD + """
async def main():
    async with AsyncMicroVMIsolationManager(config) as manager:
        async with manager.run_vm(vm_id="aio-attached", labels={"team": "web"}) as vm:
            print("ready", flush=True)
            await asyncio.get_running_loop().run_in_executor(None, input)
asyncio.run(main())
"""

    def test_vm_of_another_process_is_used_and_its_end_is_told_at_once(self) -> None:
        owner = subprocess.Popen([sys.executable, "-c", self.OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.addCleanup(owner.communicate)
        self.addCleanup(owner.kill)
        assert owner.stdout is not None
        self.assertEqual(owner.stdout.readline(), b"ready\n")

        async def use() -> None:
            self.assertIn(("aio-attached", owner.pid), [(vm["vm_id"], vm.get("owner_pid")) for vm in await aio.running_vms()])
            async with aio.attach("aio-attached") as vm:
                self.assertEqual((vm.vm_id, vm.owner_pid, await vm.get_state()), ("aio-attached", owner.pid, package.VMState.RUNNING))
                self.assertEqual((await vm.run(["echo", "hello"])).stdout, "hello\n")
                self.assertEqual((await vm.send_command("ping"))["result"], "pong")
                self.assertEqual((await vm.get_info())["labels"], {"team": "web"})
                self.assertEqual((await vm.get_health_metrics()).health_status, "healthy")
                await vm.write_text("/tmp/note", "here")
                self.assertEqual(await vm.read_text("/tmp/note"), "here")
                await vm.pause()
                with self.assertRaises(package.VmStateError):
                    await vm.pause()
                await vm.resume()
                self.assertFalse(await vm.wait(timeout=0.1))
                async with vm.popen("read line; stty size", shell=True, pty=True, rows=40, columns=100) as program:
                    program.resize(50, 120)
                    await program.write(b"\n")
                    self.assertIn(b"50 120", b"".join([data async for _, data in program]))
                task = asyncio.ensure_future(vm.run(["sleep", "4321"]))

                async def runs() -> bool:
                    return (await vm.run("grep -l 'sleep.[4]321' /proc/[0-9]*/cmdline", shell=True)).stdout != ""

                async def is_gone() -> bool:
                    return not await runs()

                self.assertTrue(await comes(runs))
                task.cancel()
                with self.assertRaises(asyncio.CancelledError):
                    await task
                self.assertTrue(await comes(is_gone, 20.0))
                again = await AsyncMicroVMIsolationManager(CONFIG).attach("aio-attached")
                again.close()
                with self.assertRaises(package.ChannelError):
                    await again.run(["true"])
                sleeping = [asyncio.ensure_future(vm.run(["sleep", "300"])) for _ in range(20)]
                ending = asyncio.ensure_future(vm.wait())
                await asyncio.sleep(0.5)
                owner.kill()
                begun = time.monotonic()
                ended = await asyncio.gather(*sleeping, return_exceptions=True)
                self.assertEqual({getattr(error, "code", None) for error in ended}, {"channel_closed"})
                self.assertTrue(await ending)
                self.assertLess(time.monotonic() - begun, 10.0)
            # The kernel may not have closed the dead owner's socket yet.
            with self.assertRaises((package.VmNotFoundError, package.ChannelError)):
                await aio.attach("aio-attached")

        asyncio.run(use())

    def test_cancelled_attach_leaves_no_connection(self) -> None:
        async def attach(manager: AsyncMicroVMIsolationManager) -> None:
            async with manager.run_vm(resource_limits=limits()) as vm:
                await (await manager.attach(vm.vm_id)).run(["true"])
                gc.collect()
                before = len(os.listdir("/proc/self/fd"))
                for turn in range(40):
                    task = asyncio.ensure_future(manager.attach(vm.vm_id))
                    for _ in range(turn % 8):
                        await asyncio.sleep(0.001)
                    task.cancel()
                    try:
                        (await task).close()
                    except asyncio.CancelledError:
                        pass

                async def are_closed() -> bool:
                    gc.collect()
                    return len(os.listdir("/proc/self/fd")) <= before

                self.assertTrue(await comes(are_closed), (before, os.listdir("/proc/self/fd")))

        with_manager(attach)


class Events(unittest.TestCase):
    def test_stream_tells_what_the_blocking_one_tells_and_ends_with_the_manager(self) -> None:
        async def listen(manager: AsyncMicroVMIsolationManager) -> None:
            blocking, stream = manager._blocking.events(), manager.events()
            ended = [asyncio.ensure_future(manager.events().get()) for _ in range(3)]
            both = manager.events()
            ended += [asyncio.ensure_future(both.get()) for _ in range(3)]
            vm = await start_vm(manager)
            await vm.pause()
            self.assertEqual({event["kind"] for event in await asyncio.gather(*ended[:3]) if event is not None}, {"created"})
            await manager.stop()
            told = [event async for event in stream]
            self.assertEqual(told, list(blocking))
            self.assertEqual([event["to"] for event in told if event["kind"] == "state"],
                             ["starting", "running", "paused", "destroyed"])
            self.assertIsNone(await stream.get())
            self.assertTrue(all(event is not None for event in await asyncio.wait_for(asyncio.gather(*ended[3:]), 5)))
            late = [asyncio.ensure_future(both.get()) for _ in range(100)]
            self.assertIn(None, await asyncio.wait_for(asyncio.gather(*late), 5))

        with_manager(listen)

    def test_timeout_capacity_and_close_are_those_of_the_blocking_stream(self) -> None:
        async def listen(manager: AsyncMicroVMIsolationManager) -> None:
            stream = manager.events(timeout=0.2)
            begun = time.monotonic()
            self.assertEqual([event async for event in stream], [])
            self.assertGreater(time.monotonic() - begun, 0.19)
            self.assertIsNone(await stream.get(timeout=0))
            async with manager.events(capacity=3) as few:
                waiting = [asyncio.ensure_future(manager.events().get()) for _ in range(2)]
                made = [await manager.create_vm("plugin", limits()) for _ in range(5)]
                self.assertEqual(few.dropped, 2)
                await asyncio.gather(*waiting)
            self.assertEqual([event["vm_id"] async for event in few], made[2:])
            with self.assertRaises(ValueError):
                manager.events(capacity=0)
            with self.assertRaises(TypeError):
                await stream.get(timeout="soon")  # type: ignore[arg-type]
            self.assertIn("AsyncEventStream", repr(stream))

        with_manager(listen)

    def test_cancelled_readers_lose_no_event(self) -> None:
        async def listen(manager: AsyncMicroVMIsolationManager) -> None:
            stream, numbers, turn = manager.events(), [], 0
            reference = manager.events()
            making = asyncio.ensure_future(churn(manager))
            while not making.done():
                task = asyncio.ensure_future(stream.get(timeout=0.001 * (turn % 3)))
                for _ in range(turn % 4):
                    await asyncio.sleep(0)
                if turn % 8 == 7:
                    await asyncio.sleep(0.001)
                task.cancel()
                turn += 1
                try:
                    event = await task
                except asyncio.CancelledError:
                    continue
                numbers += [event["sequence"]] if event is not None else []
            stream.close()
            reference.close()
            numbers += [event["sequence"] async for event in stream]
            self.assertEqual(numbers, [event["sequence"] async for event in reference])
            self.assertGreater(len(numbers), 100)
            self.assertGreater(turn, 100)

        async def churn(manager: AsyncMicroVMIsolationManager) -> None:
            for _ in range(50):
                await manager.destroy_vm(await manager.create_vm("plugin", limits()))

        with_manager(listen)

    def test_callbacks_run_in_the_loop_until_they_are_closed(self) -> None:
        async def listen(manager: AsyncMicroVMIsolationManager) -> None:
            heard: List[Tuple[str, Any]] = []
            threads = len(os.listdir("/proc/self/task"))

            def plain(event: Any) -> None:
                heard.append(("plain", event["sequence"]))
                self.assertIs(threading.current_thread(), threading.main_thread())
                raise ValueError("of the callback")

            async def slow(event: Any) -> None:
                await asyncio.sleep(0.01)
                heard.append(("slow", event["sequence"]))

            async def first(event: Any) -> None:
                heard.append(("first", event["sequence"]))
                await once.close()

            with self.assertLogs(package._logging.LOGGER_NAME, "ERROR") as logged:
                async with manager.on_event(plain), manager.on_event(slow) as subscription:
                    once = manager.on_event(first)
                    for _ in range(3):
                        await manager.create_vm("plugin", limits())
                    self.assertTrue(subscription.active)
                self.assertFalse(subscription.active)
            self.assertEqual(len([line for line in logged.output if "of the callback" in line]), 3)
            for name in ("plain", "slow"):
                self.assertEqual([number for who, number in heard if who == name], [1, 2, 3])
            self.assertIn(("first", 1), heard)
            self.assertEqual((once.active, subscription.dropped), (False, 0))
            self.assertLessEqual(len(os.listdir("/proc/self/task")), threads + 2)
            with self.assertRaises(TypeError):
                manager.on_event("no function")  # type: ignore[arg-type]
            ending = manager.on_event(lambda event: None)
            await manager.stop()
            await asyncio.wait_for(asyncio.shield(ending._task), 5)
            self.assertFalse(ending.active)

        with_manager(listen)


class Loops(unittest.TestCase):
    def test_two_loops_in_two_threads_use_one_vm(self) -> None:
        async def use(manager: AsyncMicroVMIsolationManager) -> None:
            vm = await start_vm(manager)

            async def ask() -> List[str]:
                return list(await asyncio.gather(*(output_of(vm, "echo {}".format(number)) for number in range(10))))

            heard: List[List[str]] = []
            threads = [threading.Thread(target=lambda: heard.append(asyncio.run(ask()))) for _ in range(2)]
            for thread in threads:
                thread.start()
            heard.append(await ask())
            while any(thread.is_alive() for thread in threads):
                await asyncio.sleep(0.05)
            self.assertEqual(heard, [["{}\n".format(number) for number in range(10)]] * 3)

        with_manager(use)

    def test_loop_closed_with_operations_under_way_ends_them_quietly(self) -> None:
        first, second = asyncio.new_event_loop(), asyncio.new_event_loop()
        self.addCleanup(second.close)
        # The task of a closed loop is said to be destroyed; that is asyncio's own message.
        first.set_exception_handler(lambda loop, context: None)
        manager = AsyncMicroVMIsolationManager(CONFIG)
        vm = first.run_until_complete(start_vm(manager))
        self.addCleanup(lambda: second.run_until_complete(manager.stop()))

        async def begin() -> "asyncio.Task[Any]":
            task = asyncio.ensure_future(vm.send_command("exec", shell("sleep 4321", timeout=600)))

            async def runs() -> bool:
                return await sleepers(vm) > 0

            self.assertTrue(await comes(runs))
            return task

        task = first.run_until_complete(begin())
        first.close()
        del task
        gc.collect()

        async def is_gone() -> bool:
            return await sleepers(vm) == 0

        self.assertTrue(second.run_until_complete(comes(is_gone)))

    def test_loops_that_have_ended_leave_no_queue(self) -> None:
        async def one() -> None:
            manager = AsyncMicroVMIsolationManager(CONFIG)
            await manager.get_resource_usage()

        for _ in range(5):
            asyncio.run(one())
        gc.collect()
        self.assertEqual([queue for queue in _operations._queues.values() if queue() is not None], [])

    def test_forked_child_is_told_that_the_manager_is_its_parents(self) -> None:
        done = run_python(HEAD + """
import os
manager = AsyncMicroVMIsolationManager(config)
asyncio.run(manager.start())
child = os.fork()
if child == 0:
    try:
        asyncio.run(manager.create_vm("plugin"))
    except ForkedProcessError as error:
        print(error.code, flush=True)
    os._exit(0)
os.waitpid(child, 0)
""")
        self.assertEqual((done.returncode, done.stdout), (0, "forked_process\n"), done.stderr)


@unittest.skipUnless(importlib.util.find_spec("uvloop"), "uvloop is not installed: pip install uvloop")
class Uvloop(unittest.TestCase):
    """The tests of a class under uvloop's loops."""

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        cls.addClassCleanup(asyncio.set_event_loop_policy, None)
        asyncio.set_event_loop_policy(importlib.import_module("uvloop").EventLoopPolicy())

    def setUp(self) -> None:
        super().setUp()
        loop = asyncio.new_event_loop()
        self.addCleanup(loop.close)
        self.assertEqual(type(loop).__module__, "uvloop")


class OperationsUnderUvloop(Uvloop, Operations):
    pass


class CancellationUnderUvloop(Uvloop, Cancellation):
    pass


class StreamsUnderUvloop(Uvloop, Streams):
    pass


class TransfersUnderUvloop(Uvloop, Transfers):
    pass


class MachinesUnderUvloop(Uvloop, Machines):
    pass


class AttachedUnderUvloop(Uvloop, Attached):
    pass


class EventsUnderUvloop(Uvloop, Events):
    pass


class LoopsUnderUvloop(Uvloop, Loops):
    pass


class Page(unittest.TestCase):
    def test_every_example_of_the_page_runs(self) -> None:
        blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "asyncio.md").read_text(), re.DOTALL)
        self.assertGreater(len(blocks), 2)
        for block in blocks:
            with self.subTest(block):
                play(block)


class Exits(unittest.TestCase):
    HEAD = HEAD
    # A loop of the main thread that ends with operations under way, one of a daemon thread, and one that nobody ends.
    ENDS = {
        "run": """
async def main():
    manager = AsyncMicroVMIsolationManager(config)
    vm = await running(manager)
    global task
    task = asyncio.ensure_future(vm.send_command(*SLEEP))
    await asyncio.sleep(0.05)
asyncio.run(main())
""",
        "daemon thread": """
ready = threading.Event()
async def main():
    manager = AsyncMicroVMIsolationManager(config)
    vm = await running(manager)
    asyncio.get_running_loop().call_later(0.05, ready.set)
    await asyncio.gather(*(vm.send_command(*SLEEP) for _ in range(5)))
threading.Thread(target=asyncio.run, args=(main(),), daemon=True).start()
assert ready.wait(60)
""",
    }

    ENDS["readers of events"] = """
async def main():
    manager = AsyncMicroVMIsolationManager(config)
    await manager.start()
    manager.on_event(print)
    global task
    task = asyncio.ensure_future(manager.events().get())
    await asyncio.sleep(0.05)
asyncio.run(main())
"""

    MANY = """
import io, os, random
seed = SEED
chance = random.Random(seed)
begun = threading.Event()
async def attached(manager, vm_id):
    async with manager.attach(vm_id) as vm:
        await vm.run(["sleep", "300"])
async def output(vm):
    async for _ in await vm.popen(["yes"]):
        pass
async def main():
    manager = AsyncMicroVMIsolationManager(config)
    vm = await manager.run_vm()
    manager.on_event(lambda event: None)
    calls = [vm.run(["sleep", "300"]), output(vm), attached(manager, vm.vm_id), manager.run_vm(), manager.prepare(),
             vm.instance.upload(io.BytesIO(bytes(1 << 24)), "/tmp/there"), vm.instance.download("/bin/busybox", os.devnull),
             manager.events().get(), vm.instance.get_info(), running_vms()]
    chance.shuffle(calls)
    tasks = [asyncio.ensure_future(call) for call in calls]
    for task in tasks:
        # One that ends with an error before its time would be told.
        task.add_done_callback(lambda task: task.cancelled() or task.exception())
    await asyncio.sleep(chance.random() * 0.3)
    begun.set()
    if DAEMON:
        await asyncio.sleep(300)
if DAEMON:
    threading.Thread(target=asyncio.run, args=(main(),), daemon=True).start()
    assert begun.wait(60)
else:
    asyncio.run(main())
"""

    def test_interpreter_exits_in_the_middle_of_operations_without_a_word(self) -> None:
        for name, code in self.ENDS.items():
            with self.subTest(name):
                done = run_python(self.HEAD + code, timeout=60.0)
                self.assertEqual((done.returncode, done.stdout, done.stderr), (0, "", ""))

    def test_interpreter_exits_at_a_random_moment_of_all_kinds_of_operations_without_a_word(self) -> None:
        for seed in range(EXITS):
            with self.subTest(seed=seed):
                code = self.MANY.replace("SEED", str(seed)).replace("DAEMON", str(seed % 2 == 0))
                done = run_python(self.HEAD + code, timeout=60.0)
                self.assertEqual((done.returncode, done.stdout, done.stderr), (0, "", ""))


class ExitsUnderUvloop(Uvloop, Exits):
    HEAD = HEAD + UVLOOP
