"""The MCP server of ``microvm mcp``: VMs for a model, within bounds that whoever starts the server sets.

Imported by that command alone: it needs the official SDK, which the extra ``[mcp]`` brings. The model reaches the VMs that it made
here and no others, and no file of the host.
"""

import base64
import binascii
import functools
import io
import secrets
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, AsyncIterator, Awaitable, Callable, Dict, List, Optional, TypeVar

from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ToolError

from ._errors import ChannelError, CommandError, InvalidValueError, MicroVMError
from ._models import VMNetworkConfig, VMResourceLimits
from ._text import TextDecoder
from ._vm import Args, command
from .aio import AsyncMicroVMIsolationManager, AsyncVM

NAME = "microvm"
INSTRUCTIONS = """Runs programs in virtual machines of their own. start_vm first; run_shell and run_program run in it, write_file and \
read_file carry files; destroy_vm when it is no longer needed. A VM is a small Linux with busybox and, where the tools below do not say \
otherwise, no network. Files and programs stay between calls. fork_vm makes a second VM with the same files and running programs."""
# How often what a program prints is told while it runs, and how much of it.
TELL_S = 0.2
TELL_BYTES = 4096
Tool = TypeVar("Tool", bound=Callable[..., Awaitable[Any]])


@dataclass(frozen=True)
class Bounds:
    """What the model may have, whatever it asks for."""

    limits: Optional[VMResourceLimits]
    network: Optional[VMNetworkConfig]
    backend: Optional[str]
    template: Optional[str]
    max_vms: int
    max_snapshots: int
    timeout_s: float
    output_bytes: int
    file_bytes: int
    policies: Dict[str, Any]


@dataclass
class Made:
    """A VM that runs now."""

    vm_id: str


@dataclass
class Ended:
    """How a program ended. ``exit_code`` is negative after a signal, and null when the time was over and it was killed."""

    exit_code: Optional[int]
    stdout: str
    stderr: str
    omitted_bytes: int
    timed_out: bool


@dataclass
class Content:
    """A file: as text, or, where it is not UTF-8, as base64."""

    content: str
    encoding: str


class End:
    """The first and the last bytes of a stream."""

    def __init__(self, limit: int) -> None:
        self._half = limit // 2
        self._first, self._last = bytearray(), bytearray()
        self.omitted = 0

    def take(self, data: bytes) -> None:
        room = max(0, self._half - len(self._first))
        self._first += data[:room]
        self._last += data[room:]
        over = max(0, len(self._last) - self._half)
        self.omitted += over
        del self._last[:over]

    def text(self) -> str:
        between = "\n[{} bytes are left out here]\n".format(self.omitted).encode() if self.omitted else b""
        return (bytes(self._first) + between + bytes(self._last)).decode("utf-8", "replace")


class Teller:
    """Tells the client what a program prints while it runs, when it wants to know."""

    def __init__(self, context: "Context[Any, Any]") -> None:
        self._context = context
        self._decoder = TextDecoder()
        self._text = ""
        self._bytes = 0
        self._next = time.monotonic() + TELL_S

    async def take(self, channel: str, data: bytes) -> None:
        self._bytes += len(data)
        self._text = (self._text + self._decoder.decode(channel, data))[-TELL_BYTES:]
        if time.monotonic() >= self._next:
            await self._context.report_progress(self._bytes, None, self._text)
            self._text = ""
            self._next = time.monotonic() + TELL_S


class Session:
    """The VMs and snapshots of one client."""

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        cpus, memory_mb = (bounds.limits.vcpu_count, bounds.limits.memory_mb) if bounds.limits else (1 << 10, 1 << 20)
        config = {"policies": bounds.policies, "max_vcpus": cpus * bounds.max_vms, "max_memory_mb": memory_mb * bounds.max_vms}
        self._manager = AsyncMicroVMIsolationManager(config)
        self._vms: Dict[str, AsyncVM] = {}
        # The name that the model gave, and the one in the cache, which other sessions share.
        self._snapshots: Dict[str, str] = {}
        self._under_way = 0

    async def __aenter__(self) -> "Session":
        await self._manager.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        for name in self._snapshots.values():
            await self._manager.delete_template(name)
        await self._manager.stop()

    async def start(self, snapshot: Optional[str]) -> Made:
        if snapshot is None:
            return await self._run_vm(self._bounds.template)
        if snapshot not in self._snapshots:
            raise InvalidValueError("there is no snapshot {!r}; there are {}".format(snapshot, sorted(self._snapshots)), "invalid_value")
        return await self._run_vm(self._snapshots[snapshot])

    async def fork(self, vm_id: str) -> Made:
        vm = self.vm(vm_id)
        self._check_room()
        name = "mcp-{}".format(secrets.token_hex(16))
        await vm.instance.snapshot(name)
        try:
            return await self._run_vm(name)
        finally:
            await self._manager.delete_template(name)

    async def snapshot(self, vm_id: str, name: str) -> None:
        vm = self.vm(vm_id)
        if name in self._snapshots:
            raise InvalidValueError("there is a snapshot {!r} already".format(name), "invalid_value")
        if len(self._snapshots) >= self._bounds.max_snapshots:
            raise InvalidValueError("there are {} snapshots, and no more are allowed".format(len(self._snapshots)), "invalid_value")
        self._snapshots[name] = "mcp-{}".format(secrets.token_hex(16))
        try:
            await vm.instance.snapshot(self._snapshots[name])
        except BaseException:
            del self._snapshots[name]
            raise

    async def destroy(self, vm_id: str) -> None:
        await self.vm(vm_id).destroy()
        del self._vms[vm_id]

    def running(self) -> List[str]:
        known = set(self._manager.list_vms())
        for vm_id in set(self._vms) - known:
            # A policy destroyed it, or it died.
            del self._vms[vm_id]
        return sorted(self._vms)

    def vm(self, vm_id: str) -> AsyncVM:
        if vm_id not in self.running():
            raise InvalidValueError("there is no VM {!r}; start_vm makes one, and there are {}".format(vm_id, self.running()), "invalid_value")
        return self._vms[vm_id]

    async def run(self, context: "Context[Any, Any]", vm_id: str, args: Args, shell: bool, stdin: str, timeout: Optional[float]) -> Ended:
        seconds = self._bounds.timeout_s if timeout is None else min(timeout, self._bounds.timeout_s)
        ends = {"stdout": End(self._bounds.output_bytes), "stderr": End(self._bounds.output_bytes)}
        teller = Teller(context)
        exit_code: Optional[int] = None
        timed_out = False
        # A cancelled task leaves the block, and that ends the program.
        async with self.vm(vm_id).instance.stream(**_program(args, shell), stdin=stdin.encode(), timeout=seconds) as program:
            try:
                async for channel, data in program:
                    ends[channel].take(data)
                    await teller.take(channel, data)
                exit_code = await program.wait()
            except (ChannelError, CommandError) as error:
                if error.code != "timeout":
                    raise
                timed_out = True
        omitted = sum(end.omitted for end in ends.values())
        return Ended(exit_code, ends["stdout"].text(), ends["stderr"].text(), omitted, timed_out)

    async def write(self, vm_id: str, path: str, content: str, encoding: str) -> None:
        if encoding not in ("utf-8", "base64"):
            raise InvalidValueError("encoding {!r} is neither 'utf-8' nor 'base64'".format(encoding), "invalid_value")
        try:
            data = content.encode() if encoding == "utf-8" else base64.b64decode(content, validate=True)
        except binascii.Error as error:
            raise InvalidValueError("the content is no base64: {}".format(error), "invalid_value") from None
        if len(data) > self._bounds.file_bytes:
            raise InvalidValueError("{} bytes are more than the {} that are allowed".format(len(data), self._bounds.file_bytes), "invalid_value")
        await self.vm(vm_id).write_bytes(path, data)

    async def read(self, vm_id: str, path: str) -> Content:
        content = io.BytesIO()
        await self.vm(vm_id).instance.download(path, content, max_bytes=self._bounds.file_bytes)
        try:
            return Content(content.getvalue().decode(), "utf-8")
        except UnicodeDecodeError:
            return Content(base64.b64encode(content.getvalue()).decode(), "base64")

    async def _run_vm(self, template: Optional[str]) -> Made:
        self._check_room()
        self._under_way += 1
        try:
            bounds = self._bounds
            limits = bounds.limits if template is None else None
            vm = await self._manager.run_vm(
                resource_limits=limits, backend=bounds.backend, network_config=bounds.network, template=template
            )
        finally:
            self._under_way -= 1
        self._vms[vm.vm_id] = vm
        return Made(vm.vm_id)

    def _check_room(self) -> None:
        if len(self.running()) + self._under_way >= self._bounds.max_vms:
            raise InvalidValueError("there are {} VMs, and no more are allowed: destroy_vm one".format(self._bounds.max_vms), "quota_exceeded")


def make_server(bounds: Bounds, version: str) -> "MCPServer[Session]":
    """The server with its tools; the docstrings of the tools are what the model reads."""

    @asynccontextmanager
    async def lifespan(_: "MCPServer[Session]") -> AsyncIterator[Session]:
        async with Session(bounds) as session:
            yield session

    server: MCPServer[Session] = MCPServer(NAME, version=version, instructions=INSTRUCTIONS, lifespan=lifespan, log_level="WARNING")

    def of(context: "Context[Any, Any]") -> Session:
        session: Session = context.request_context.lifespan_context
        return session

    @server.tool()
    @_told
    async def start_vm(context: Context, snapshot: Optional[str] = None) -> Made:
        """Start a virtual machine, or one from a snapshot that `snapshot` made. Its id is what the other tools want."""
        return await of(context).start(snapshot)

    @server.tool()
    @_told
    async def list_vms(context: Context) -> List[str]:
        """List the ids of the VMs that run."""
        return of(context).running()

    @server.tool()
    @_told
    async def run_shell(context: Context, vm_id: str, script: str, stdin: str = "", timeout_seconds: Optional[float] = None) -> Ended:
        """Run a script with /bin/sh as root in a VM, and wait for its end. Long output is cut in its middle."""
        return await of(context).run(context, vm_id, script, True, stdin, timeout_seconds)

    @server.tool()
    @_told
    async def run_program(context: Context, vm_id: str, args: List[str], stdin: str = "", timeout_seconds: Optional[float] = None) -> Ended:
        """Run a program with its arguments, without a shell, as root in a VM, and wait for its end. Long output is cut in its middle."""
        return await of(context).run(context, vm_id, args, False, stdin, timeout_seconds)

    @server.tool()
    @_told
    async def write_file(context: Context, vm_id: str, path: str, content: str, encoding: str = "utf-8") -> str:
        """Write a file in a VM, in place of what was there; its folder must exist. `encoding` is "utf-8" or, for bytes, "base64"."""
        await of(context).write(vm_id, path, content, encoding)
        return "written"

    @server.tool()
    @_told
    async def read_file(context: Context, vm_id: str, path: str) -> Content:
        """Read a file of a VM."""
        return await of(context).read(vm_id, path)

    @server.tool()
    @_told
    async def snapshot(context: Context, vm_id: str, name: str) -> str:
        """Keep the state of a VM, with its files and running programs, under a name for `start_vm`. The VM goes on."""
        await of(context).snapshot(vm_id, name)
        return name

    @server.tool()
    @_told
    async def fork_vm(context: Context, vm_id: str) -> Made:
        """Make a second VM with the files and running programs of one; both go on, each for itself."""
        return await of(context).fork(vm_id)

    @server.tool()
    @_told
    async def destroy_vm(context: Context, vm_id: str) -> str:
        """End a VM and delete its files."""
        await of(context).destroy(vm_id)
        return "destroyed"

    return server


def _told(tool: Tool) -> Tool:
    """Has the model read the sentence of an error: the SDK keeps those that it does not know from the client."""

    @functools.wraps(tool)
    async def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return await tool(*args, **kwargs)
        except MicroVMError as error:
            remedy = error.details.get("remedy")
            raise ToolError("{}; {}".format(error, remedy) if remedy and remedy not in str(error) else str(error)) from None

    return call  # type: ignore[return-value]


def _program(args: Args, shell: bool) -> Dict[str, Any]:
    program, rest = command(args, shell)
    return {"program": program, "args": rest}
