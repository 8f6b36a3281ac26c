"""``microvm mcp``, as a client of the official SDK uses it."""

import asyncio
import base64
import contextlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import unittest
from typing import Any, AsyncIterator, Awaitable, Callable, List, Optional

from thirstys_waterfall.security.microvm_isolation import MicroVMIsolationManager, attach, running_vms

from ..support import IMPORT, eventually, limits

SERVER = [sys.executable, "-m", IMPORT, "mcp", "-m", "128m", "--disk", "64m"]
TIMEOUT_S = 120.0
MIB = 1 << 20
INSTALLED = importlib.util.find_spec("mcp") is not None


def of_server(label: str) -> List[str]:
    """The VMs below a server that was started with a label in its environment."""
    found = []
    for vm in running_vms():
        pid = vm.get("owner_pid")
        with contextlib.suppress(OSError):
            if pid is not None and label.encode() in open("/proc/{}/environ".format(pid), "rb").read():
                found.append(vm["vm_id"])
    return found


@unittest.skipUnless(INSTALLED, "mcp is not installed: pip install mcp, with CPython 3.10 or later")
class Server(unittest.TestCase):
    def setUp(self) -> None:
        self.label = "MICROVM_TEST_MCP=" + self.id()
        self.before = MicroVMIsolationManager().list_templates()
        self.complaints = tempfile.TemporaryFile("w+")
        self.addCleanup(self.complaints.close)

    @contextlib.asynccontextmanager
    async def session(self, *options: str) -> AsyncIterator[Any]:
        from mcp import ClientSession, StdioServerParameters
        from mcp.client.stdio import stdio_client

        name, _, value = self.label.partition("=")
        parameters = StdioServerParameters(command=SERVER[0], args=[*SERVER[1:], *options], env=dict(os.environ, **{name: value}))
        async with stdio_client(parameters, errlog=self.complaints) as (reads, writes), ClientSession(reads, writes) as session:
            await session.initialize()
            yield session

    def with_session(self, test: Callable[[Any], Awaitable[None]], *options: str) -> None:
        """Runs a test with a client; afterwards nothing of its server is left."""

        async def run() -> None:
            async with self.session(*options) as session:
                await test(session)

        asyncio.run(asyncio.wait_for(run(), TIMEOUT_S))
        self.assertTrue(eventually(lambda: not of_server(self.label), 20.0))
        self.assertEqual(MicroVMIsolationManager().list_templates(), self.before)
        self.complaints.seek(0)
        # A loaded host may have a start warned of.
        self.assertNotIn("Traceback", self.complaints.read())

    async def call(self, session: Any, tool: str, **arguments: Any) -> Any:
        """What a tool answers."""
        answer = await session.call_tool(tool, arguments)
        self.assertFalse(answer.is_error, answer.content)
        told = answer.structured_content
        return told["result"] if set(told) == {"result"} else told

    async def fails(self, session: Any, tool: str, **arguments: Any) -> str:
        """The sentence of a tool that fails."""
        answer = await session.call_tool(tool, arguments)
        self.assertTrue(answer.is_error, answer)
        text: str = answer.content[0].text
        self.assertNotIn("Traceback", text)
        return text

    async def made(self, session: Any, **arguments: Any) -> str:
        vm_id: str = (await self.call(session, "start_vm", **arguments))["vm_id"]
        return vm_id

    def test_programs_files_snapshots_and_forks(self) -> None:
        async def test(session: Any) -> None:
            vm_id = await self.made(session)
            self.assertEqual(await self.call(session, "list_vms"), [vm_id])
            said = await self.call(session, "run_shell", vm_id=vm_id, script="cat; echo err >&2; exit 3", stdin="in")
            self.assertEqual(said, {"exit_code": 3, "stdout": "in", "stderr": "err\n", "omitted_bytes": 0, "timed_out": False})
            said = await self.call(session, "run_program", vm_id=vm_id, args=["echo", "$HOME; ls"])
            self.assertEqual(said["stdout"], "$HOME; ls\n")
            await self.call(session, "write_file", vm_id=vm_id, path="/tmp/note", content="caf\u00e9")
            self.assertEqual(await self.call(session, "read_file", vm_id=vm_id, path="/tmp/note"), {"content": "caf\u00e9", "encoding": "utf-8"})
            data = base64.b64encode(b"\xff\x00").decode()
            await self.call(session, "write_file", vm_id=vm_id, path="/tmp/bytes", content=data, encoding="base64")
            self.assertEqual(await self.call(session, "read_file", vm_id=vm_id, path="/tmp/bytes"), {"content": data, "encoding": "base64"})
            await self.call(session, "snapshot", vm_id=vm_id, name="before")
            await self.call(session, "run_shell", vm_id=vm_id, script="rm /tmp/note")
            forked = (await self.call(session, "fork_vm", vm_id=vm_id))["vm_id"]
            said = await self.call(session, "run_shell", vm_id=forked, script="ls /tmp/note /tmp/bytes 2>/dev/null")
            self.assertEqual(said["stdout"], "/tmp/bytes\n")
            cloned = await self.made(session, snapshot="before")
            self.assertEqual((await self.call(session, "read_file", vm_id=cloned, path="/tmp/note"))["content"], "caf\u00e9")
            for one in (vm_id, forked):
                await self.call(session, "destroy_vm", vm_id=one)
            self.assertEqual(await self.call(session, "list_vms"), [cloned])

        self.with_session(test)

    def test_what_fails_is_an_error_of_the_tool_with_a_way_out(self) -> None:
        async def test(session: Any) -> None:
            vm_id = await self.made(session)
            for tool, arguments, words in [
                ("run_shell", {"vm_id": "no-such-vm", "script": "ls"}, "start_vm"),
                ("run_program", {"vm_id": vm_id, "args": ["no-such-program"]}, "no-such-program"),
                ("run_program", {"vm_id": vm_id, "args": []}, "the program"),
                ("run_shell", {"vm_id": vm_id, "script": "ls", "timeout_seconds": -1}, "timeout"),
                ("read_file", {"vm_id": vm_id, "path": "/no/such/file"}, "/no/such/file"),
                ("write_file", {"vm_id": vm_id, "path": "/tmp/a", "content": "a", "encoding": "latin"}, "base64"),
                ("write_file", {"vm_id": vm_id, "path": "/tmp/a", "content": "%", "encoding": "base64"}, ""),
                ("start_vm", {"snapshot": "no-such"}, "no-such"),
                ("destroy_vm", {"vm_id": "no-such-vm"}, "no-such-vm"),
            ]:
                with self.subTest(tool=tool, arguments=arguments):
                    self.assertIn(words, await self.fails(session, tool, **arguments))
            self.assertEqual((await self.call(session, "run_shell", vm_id=vm_id, script="echo still"))["stdout"], "still\n")

        self.with_session(test)

    def test_bounds_hold_whatever_the_model_asks_for(self) -> None:
        async def test(session: Any) -> None:
            vm_id = await self.made(session)
            self.assertIn("destroy_vm one", await self.fails(session, "start_vm"))
            self.assertIn("destroy_vm one", await self.fails(session, "fork_vm", vm_id=vm_id))
            said = await self.call(session, "run_shell", vm_id=vm_id, script="echo begun; sleep 60", timeout_seconds=600)
            self.assertEqual((said["exit_code"], said["stdout"], said["timed_out"]), (None, "begun\n", True))
            said = await self.call(session, "run_shell", vm_id=vm_id, script="echo first; yes | head -c 1000000; echo last")
            self.assertRegex(said["stdout"], r"(?s)\Afirst\n.*\[\d+ bytes are left out here\].*last\n\Z")
            self.assertLess(len(said["stdout"]), 1200)
            self.assertEqual(said["omitted_bytes"], 1_000_011 - 1024)
            await self.call(session, "run_shell", vm_id=vm_id, script="head -c 1048577 /dev/zero > /tmp/large")
            self.assertIn("1048576", await self.fails(session, "read_file", vm_id=vm_id, path="/tmp/large"))
            self.assertIn("1048576", await self.fails(session, "write_file", vm_id=vm_id, path="/tmp/a", content="a" * (MIB + 1)))
            await self.call(session, "snapshot", vm_id=vm_id, name="one")
            self.assertIn("already", await self.fails(session, "snapshot", vm_id=vm_id, name="one"))
            self.assertIn("no more", await self.fails(session, "snapshot", vm_id=vm_id, name="two"))

        self.with_session(test, "--max-vms", "1", "--timeout", "3", "--max-output", "1", "--max-snapshots", "1")

    def test_bounds_hold_for_starts_at_once(self) -> None:
        async def test(session: Any) -> None:
            answers = await asyncio.gather(*(session.call_tool("start_vm", {}) for _ in range(4)))
            self.assertEqual(sorted(answer.is_error for answer in answers), [False, False, True, True])

        self.with_session(test, "--max-vms", "2")

    def test_vm_that_nobody_uses_goes_and_another_takes_its_place(self) -> None:
        async def test(session: Any) -> None:
            vm_id = await self.made(session)
            for _ in range(200):
                if not await self.call(session, "list_vms"):
                    break
                await asyncio.sleep(0.1)
            self.assertIn(vm_id, await self.fails(session, "run_shell", vm_id=vm_id, script="ls"))
            await self.made(session)

        self.with_session(test, "--idle", "1", "--max-vms", "1")

    def test_output_is_told_while_the_program_runs(self) -> None:
        async def test(session: Any) -> None:
            vm_id = await self.made(session)
            told: List[Optional[str]] = []
            first = asyncio.Event()

            async def hear(progress: float, total: Optional[float], message: Optional[str]) -> None:
                told.append(message)
                first.set()

            script = "while [ ! -e /tmp/go ]; do echo waiting; sleep 0.1; done"
            running = asyncio.ensure_future(
                session.call_tool("run_shell", {"vm_id": vm_id, "script": script}, progress_callback=hear)
            )
            await first.wait()
            self.assertFalse(running.done())
            await self.call(session, "run_shell", vm_id=vm_id, script="touch /tmp/go")
            self.assertFalse((await running).is_error)
            self.assertIn("waiting\n", told[0] or "")

        self.with_session(test)

    def test_cancelled_request_ends_its_program_and_not_the_vm(self) -> None:
        async def test(session: Any) -> None:
            vm_id = await self.made(session)
            running = asyncio.ensure_future(session.call_tool("run_shell", {"vm_id": vm_id, "script": "sleep 61 & sleep 61"}))

            async def sleeping() -> int:
                said = await self.call(session, "run_shell", vm_id=vm_id, script="ps -o args | grep -c '[s]leep 61'")
                return int(said["stdout"])

            while await sleeping() < 2:
                await asyncio.sleep(0.1)
            await self.cancel(session, running)
            for _ in range(100):
                if not await sleeping():
                    break
                await asyncio.sleep(0.1)
            self.assertEqual(await sleeping(), 0)

        self.with_session(test)

    async def cancel(self, session: Any, running: "asyncio.Future[Any]") -> None:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running

    def test_vms_of_others_are_out_of_reach(self) -> None:
        with MicroVMIsolationManager({"raise_on_error": True}) as manager, manager.run_vm(resource_limits=limits()) as vm:

            async def test(session: Any) -> None:
                self.assertEqual(await self.call(session, "list_vms"), [])
                for tool, rest in (("run_shell", {"script": "ls"}), ("destroy_vm", {}), ("fork_vm", {}), ("snapshot", {"name": "a"})):
                    self.assertIn("there is no VM", await self.fails(session, tool, vm_id=vm.vm_id, **rest))

            self.with_session(test)
            self.assertEqual(vm.run(["echo", "here"]).stdout, "here\n")

    def test_server_that_is_killed_leaves_no_vm(self) -> None:
        async def test() -> None:
            with contextlib.suppress(Exception):
                async with self.session() as session:
                    vm_id = await self.made(session)
                    with attach(vm_id) as vm:
                        assert vm.owner_pid is not None
                        os.kill(vm.owner_pid, 9)
                    # It has no answer to give.
                    await asyncio.wait_for(session.call_tool("list_vms", {}), 5.0)

        asyncio.run(asyncio.wait_for(test(), TIMEOUT_S))
        self.assertTrue(eventually(lambda: not of_server(self.label), 20.0))


class Command(unittest.TestCase):
    def test_without_the_sdk_it_says_what_brings_it(self) -> None:
        code = "import sys; sys.modules['mcp'] = None; from {}._cli import main; sys.exit(main(['mcp']))".format(IMPORT)
        done = subprocess.run([sys.executable, "-c", code], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
        self.assertEqual((done.returncode, done.stdout), (1, ""))
        self.assertRegex(done.stderr, r"\Amicrovm: [^\n]*\[mcp\][^\n]*3\.10[^\n]*\n\Z")

    def test_bounds_that_are_none_are_refused(self) -> None:
        for options in (["--max-vms", "0"], ["--timeout", "0"], ["--max-output", "x"], ["-m", "1q"]):
            done = subprocess.run([*SERVER, *options], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            self.assertEqual((done.returncode, done.stdout), (2, b""), options)


if __name__ == "__main__":
    unittest.main()
