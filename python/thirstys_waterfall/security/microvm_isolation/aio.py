"""The package for asyncio: the classes of the same names with ``Async`` before them, and the same arguments and results.

Every failure is raised, whatever ``raise_on_error`` says: nothing answers ``None`` or ``False``. Cancelling a task
cancels its operation here and in the guest: a program that ``send_command("exec", ...)`` runs is killed, the VM goes on,
and a start is undone. What is worse by half (stop, pause, resume, suspend, snapshot, destroy) goes on without the task.

No call takes a thread. Any event loop with ``add_reader`` will do (uvloop's, too), as many as there are threads; a loop may be closed
while operations are under way, and their results are dropped.

Example:
    >>> async def hello():
    ...     async with AsyncMicroVMIsolationManager() as manager:
    ...         vm = manager.get_vm(await manager.create_vm("session", VMResourceLimits(memory_mb=128)))
    ...         await vm.start()
    ...         return await vm.send_command("ping")
    >>> asyncio.run(hello())["result"]
    'pong'
"""

import asyncio
import logging
import os
import time
import weakref
from types import TracebackType
from typing import (
    TYPE_CHECKING,
    Any,
    AsyncContextManager,
    AsyncIterator,
    Callable,
    Coroutine,
    Dict,
    Generator,
    List,
    Mapping,
    Optional,
    Sequence,
    Tuple,
    Type,
    TypeVar,
    Union,
    overload,
)

from . import _native
from ._enums import IsolationType, VMBackend, VMState
from ._errors import MicroVMError, make_error
from ._manager import MicroVMIsolationManager
from ._models import VMHealthMetrics, VMNetworkConfig, VMResourceLimits
from ._text import TextDecoder
from ._types import (
    CommandAnswer,
    HealthReport,
    ResourceUsage,
    SuspendedVM,
    TemplateInfo,
    VMInfo,
)

if TYPE_CHECKING:
    from typing_extensions import Literal

__all__ = ["AsyncMicroVMInstance", "AsyncMicroVMIsolationManager", "AsyncProcessStream"]

_Path = Union[str, "os.PathLike[str]"]
_Bytes = Union[bytes, bytearray, memoryview]
_Opened = TypeVar("_Opened", bound=AsyncContextManager[Any])


class _Queue:
    """The operations that one event loop waits for. The loop's reader owns it, so that it goes with the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.operations = _native.OperationQueue()
        self.waiting: Dict[int, "asyncio.Future[Any]"] = {}
        self.undo: Dict[int, Callable[..., Any]] = {}
        loop.add_reader(self.operations.fileno(), self._drain)

    def _drain(self) -> None:
        for number, value, error in self.operations.drain():
            future = self.waiting.pop(number, None)
            if future is None:
                continue
            if future.done():
                # Its task was cancelled, and has not run since.
                undo = self.undo.pop(number, None)
                if undo is not None and error is None:
                    undo(self.operations, value)
                continue
            if error is None:
                future.set_result(value)
            else:
                future.set_exception(error)


_queues: "weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, weakref.ref[_Queue]]" = weakref.WeakKeyDictionary()


def _queue_of(loop: asyncio.AbstractEventLoop) -> _Queue:
    known = _queues.get(loop)
    queue = None if known is None else known()
    if queue is None:
        queue = _Queue(loop)
        _queues[loop] = weakref.ref(queue)
    return queue


async def _result(begin: Callable[..., int], *args: Any, undo: Optional[Callable[..., Any]] = None) -> Any:
    """Begins an operation and waits for its result; cancels it when the task is cancelled.

    ``undo`` undoes a result that came, but that a cancelled task has not taken.
    """
    loop = asyncio.get_running_loop()
    queue = _queue_of(loop)
    future = loop.create_future()
    number = begin(queue.operations, *args)
    queue.waiting[number] = future
    if undo is not None:
        queue.undo[number] = undo
    try:
        return await future
    except BaseException:
        # An operation that has ended is unknown already. GeneratorExit: the loop was closed meanwhile.
        queue.operations.cancel(number)
        queue.waiting.pop(number, None)
        if undo is not None and future.done() and not future.cancelled() and future.exception() is None:
            undo(queue.operations, future.result())
        raise
    finally:
        queue.undo.pop(number, None)


class _Opening(Coroutine[Any, Any, _Opened]):
    """A coroutine whose result ``async with`` enters, too: ``async with vm.stream("cat") as program``."""

    def __init__(self, coroutine: Coroutine[Any, Any, _Opened]) -> None:
        self._coroutine = coroutine

    def __await__(self) -> Generator[Any, Any, _Opened]:
        return self._coroutine.__await__()

    def send(self, value: Any) -> Any:
        return self._coroutine.send(value)

    def throw(self, *error: Any) -> Any:
        return self._coroutine.throw(*error)

    def close(self) -> None:
        self._coroutine.close()

    async def __aenter__(self) -> _Opened:
        self._opened = await self._coroutine
        await self._opened.__aenter__()
        return self._opened

    async def __aexit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], traceback: Optional[TracebackType]
    ) -> None:
        await self._opened.__aexit__(kind, error, traceback)


class AsyncProcessStream:
    """A program that runs in a guest, an asynchronous iterator of output: the twin of ``ProcessStream``.

    Made by ``AsyncMicroVMInstance.stream``. ``async for channel, data in program`` ends with the output. Leaving the
    ``async with`` block, or dropping the object, kills the program with all its descendants; a task that is cancelled
    in a method leaves it running, and loses no output. Properties do not block. Every error is raised.
    """

    _blocking: _native.ProcessStream
    _operations: _native.StreamOperations
    _on_output: Optional[Callable[[str, bytes], Any]]
    _decoder: TextDecoder

    def __aiter__(self) -> "AsyncProcessStream":
        return self

    async def __anext__(self) -> Tuple[str, bytes]:
        piece = await self._next()
        if piece is None:
            raise StopAsyncIteration
        return piece

    async def _next(self, timeout: Optional[float] = None, waited: float = 0.0) -> Optional[Tuple[str, bytes]]:
        piece: Optional[Tuple[str, bytes]]
        piece = await _result(self._operations.next, timeout, waited, undo=self._operations.put_back)
        return piece

    async def write(self, data: _Bytes) -> bool:
        """Writes to the program's input.

        Does not block the loop. Waits while the program does not read: another task may take its output meanwhile. What
        was written before the task was cancelled stays written.

        Args:
            data: The bytes to write.

        Returns:
            ``True`` when everything was written; ``False`` when the program reads no more.
        """
        return bool(await _result(self._operations.write, data))

    def close_stdin(self) -> None:
        """Ends the program's input.

        Does not block.
        """
        self._blocking.close_stdin()

    def signal(self, number: int) -> None:
        """Sends a signal to the program's process group; SIGKILL ends all its descendants.

        Does not block.

        Args:
            number: The number of the signal, 1 to 64 (signal(7)).
        """
        self._blocking.signal(number)

    def resize(self, rows: int, columns: int) -> None:
        """Sets the size of the program's terminal (TIOCSWINSZ, ioctl_tty(2)).

        Does not block.

        Args:
            rows: The height in characters, 1 to 65535.
            columns: The width in characters, 1 to 65535.
        """
        self._blocking.resize(rows, columns)

    async def wait(self, timeout: Optional[float] = None) -> Optional[int]:
        """Waits for the program's end; output that was not taken goes to ``on_output``, or is dropped.

        Does not block the loop. Cancelling leaves the program running. ``ProcessStream.wait`` has the errors.

        Args:
            timeout: Seconds to wait, 0 to 86400; no limit where left out.

        Returns:
            The exit code; `-n` after signal `n`, -9 after ``kill``.
        """
        if self._on_output is not None:
            begun = time.monotonic()
            piece = await self._next(timeout)
            while piece is not None:
                self._on_output(*piece)
                piece = await self._next(timeout, time.monotonic() - begun)
        code: Optional[int] = await _result(self._operations.wait, timeout)
        return code

    @overload
    async def communicate(
        self, input: Union[_Bytes, str, None] = ..., timeout: Optional[float] = ..., text: "Literal[False]" = ...
    ) -> Tuple[bytes, bytes]: ...

    @overload
    async def communicate(
        self, input: Union[_Bytes, str, None] = ..., timeout: Optional[float] = ..., *, text: "Literal[True]"
    ) -> Tuple[str, str]: ...

    async def communicate(
        self, input: Union[_Bytes, str, None] = None, timeout: Optional[float] = None, text: bool = False
    ) -> Union[Tuple[bytes, bytes], Tuple[str, str]]:
        """Gives the program its whole input, takes all its output, and waits for its end.

        Does not block the loop. Cancelling leaves the program running; another call, without ``input``, returns this
        output, too. ``ProcessStream.communicate`` has the errors.

        Args:
            input: Its input: bytes, or a string, which is sent as UTF-8. Where left out, its input ends.
            timeout: Seconds to wait, 0 to 86400; no limit where left out.
            text: Whether the output is decoded as UTF-8, with U+FFFD for what is not; else it is bytes.

        Returns:
            Stdout and stderr, without what was taken before.
        """
        output: Union[Tuple[bytes, bytes], Tuple[str, str]]
        output = await _result(self._operations.communicate, input, timeout, text)
        return output

    async def text(self) -> AsyncIterator[Tuple[str, str]]:
        """Returns an asynchronous iterator of the output as text: ``("stdout" or "stderr", str)``.

        Does not block the loop. A character whose bytes come in two pieces is one character; what is not UTF-8 becomes
        U+FFFD.
        """
        async for channel, data in self:
            text = self._decoder.decode(channel, data)
            if text:
                yield channel, text
        for piece in self._decoder.end():
            yield piece

    def kill(self) -> None:
        """Kills the program and all its descendants; ``wait`` then returns -9.

        Does not block. Does nothing when the program has ended.
        """
        self._blocking.kill()

    @property
    def exit_code(self) -> Optional[int]:
        """The exit code, or the negative number of the signal that ended the program; ``None`` until its output was
        taken to the end."""
        return self._blocking.exit_code

    @property
    def pid(self) -> int:
        """The program's process id in the guest."""
        return self._blocking.pid

    async def __aenter__(self) -> "AsyncProcessStream":
        return self

    async def __aexit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], traceback: Optional[TracebackType]
    ) -> None:
        self._blocking.__exit__(kind, error, traceback)

    def __repr__(self) -> str:
        return "<Async{}".format(repr(self._blocking)[1:])


class AsyncMicroVMInstance:
    """One microVM: the twin of ``MicroVMInstance``.

    Made by ``AsyncMicroVMIsolationManager.get_vm``, or on its own without a manager. ``async with`` starts the VM and
    stops it at the end. Every failure is raised, with the classes that ``MicroVMInstance`` names under "Errors", and
    kept as ``last_error``. Properties do not block.

    Args:
        vm_id: As of ``MicroVMInstance``, like every argument.
        backend: The VMM.
        isolation_type: What the VM is for.
        resource_limits: What the VM may have.
        network_config: The VM's network; none where left out.
        kernel_path: A Linux kernel in place of the package's.
        rootfs_path: An ext4 image as the root file system.
        template: The name of a snapshot to clone.
        labels: Strings by strings.
    """

    _blocking: _native.MicroVMInstance
    _operations: _native.VmOperations

    def __init__(
        self,
        vm_id: str,
        backend: Union[VMBackend, str],
        isolation_type: Union[IsolationType, str],
        resource_limits: VMResourceLimits,
        network_config: Optional[VMNetworkConfig] = None,
        kernel_path: Optional[_Path] = None,
        rootfs_path: Optional[_Path] = None,
        template: Optional[str] = None,
        labels: Optional[Mapping[str, str]] = None,
    ) -> None:
        self._attach(
            _native.MicroVMInstance(
                vm_id,
                backend,
                isolation_type,
                resource_limits,
                network_config=network_config,
                kernel_path=kernel_path,
                rootfs_path=rootfs_path,
                template=template,
                labels=labels,
            )
        )

    def _attach(self, blocking: _native.MicroVMInstance) -> "AsyncMicroVMInstance":
        self._blocking = blocking
        self._operations = _native.VmOperations(blocking)
        return self

    async def start(self) -> bool:
        """Starts the VM, as a clone of a template where there is one, and waits for its agent.

        Does not block the loop. Cancelling undoes the start. ``MicroVMInstance.start`` has the details and the errors.

        Returns:
            ``True``: the VM runs.
        """
        return bool(await _result(self._operations.start))

    async def stop(self) -> bool:
        """Shuts the VM down, within 10 s; what is on its disk is lost.

        Does not block the loop. Goes on when cancelled. ``MicroVMInstance.stop`` has the details and the errors.

        Returns:
            ``True``: the VM is stopped.
        """
        return bool(await _result(self._operations.stop))

    async def pause(self) -> bool:
        """Stops the vCPUs; memory and disk stay.

        Does not block the loop. Goes on when cancelled. ``MicroVMInstance.pause`` has the errors.

        Returns:
            ``True``: the VM is paused.
        """
        return bool(await _result(self._operations.pause))

    async def resume(self) -> bool:
        """Resumes a paused VM and sets its clock, or brings a suspended one back from disk.

        Does not block the loop. Goes on when cancelled. ``MicroVMInstance.resume`` has the errors.

        Returns:
            ``True``: the VM runs.
        """
        return bool(await _result(self._operations.resume))

    async def suspend(self) -> bool:
        """Writes the VM's state to disk, below ``cache_dir``, and ends its process.

        Does not block the loop. Goes on when cancelled. ``MicroVMInstance.suspend`` has the details and the errors.

        Returns:
            ``True``: the VM is suspended.
        """
        return bool(await _result(self._operations.suspend))

    async def snapshot(self, name: str) -> None:
        """Makes a template of the VM as it is now: memory, running programs and disk.

        Does not block the loop. Goes on when cancelled. ``MicroVMInstance.snapshot`` has the details and the errors.

        Args:
            name: 1 to 64 of the letters, digits, ``.``, ``_`` and ``-``, beginning with a letter, digit or ``_``.
        """
        await _result(self._operations.snapshot, name)

    async def send_command(
        self, command: str, params: Optional[Mapping[str, Any]] = None, timeout: Optional[float] = None
    ) -> CommandAnswer:
        """Sends a command to the agent in the guest and returns its answer.

        Does not block the loop. Cancelling ends the command in the guest: a program and its descendants are killed.
        ``MicroVMInstance.send_command`` has the errors.

        Args:
            command: The name of the command, such as ``ping``, ``exec`` or ``read_file``; docs/commands.md lists them.
            params: The parameters of the command: plain JSON types.
            timeout: Seconds to wait for the answer, 0 to 86400. Where left out, ``command_timeout_s``, or longer if
                the command's own ``timeout`` in ``params`` is.

        Returns:
            What the guest says: ``{"status": "ok", "result": ...}``, or
            ``{"status": "error", "error": {"code": ..., "message": ...}}``.
        """
        answer: CommandAnswer = await _result(self._operations.send_command, command, params, timeout)
        return answer

    def stream(
        self,
        program: str,
        args: Optional[Sequence[str]] = None,
        env: Optional[Mapping[str, str]] = None,
        cwd: Optional[str] = None,
        stdin: Optional[_Bytes] = None,
        pty: bool = False,
        uid: Optional[int] = None,
        timeout: Optional[float] = None,
        rows: Optional[int] = None,
        columns: Optional[int] = None,
        on_output: Optional[Callable[[str, bytes], Any]] = None,
    ) -> _Opening[AsyncProcessStream]:
        """Starts a program in the guest and returns a handle to its input and output, by ``await`` or ``async with``.

        Does not block the loop. Cancelling kills the program. ``MicroVMInstance.stream`` has the errors.

        Args:
            program: The path of the program in the guest, or a name that is looked up on its `PATH`.
            args: Its arguments.
            env: Environment variables, beside the usual ones and in their place (docs/guest.md).
            cwd: Its working directory; `/` where left out.
            stdin: Its whole input; where left out, ``AsyncProcessStream.write`` gives it.
            pty: Whether it runs on a terminal (pty(7)); stderr comes with stdout then.
            uid: The user that it runs as, 0 to 4294967294 (setuid(2)); 0, which is root, where left out.
            timeout: Seconds that it may run, more than 0 and at most 86400; no limit where left out.
            rows: The terminal's height in characters, 1 to 65535; 24 where left out.
            columns: The terminal's width in characters, 1 to 65535; 80 where left out.
            on_output: A function that ``AsyncProcessStream.wait`` calls on the loop's thread with `"stdout"` or
                `"stderr"` and bytes.
        """
        arguments = {name: value for name, value in locals().items() if name != "self"}
        return _Opening(self._stream(arguments, on_output))

    async def _stream(
        self, arguments: Dict[str, Any], on_output: Optional[Callable[[str, bytes], Any]]
    ) -> AsyncProcessStream:
        stream = AsyncProcessStream.__new__(AsyncProcessStream)
        stream._blocking = await _result(
            self._operations.stream, arguments, undo=lambda queue, blocking: blocking.kill()
        )
        stream._operations = _native.StreamOperations(stream._blocking)
        stream._on_output, stream._decoder = on_output, TextDecoder()
        return stream

    async def get_health_metrics(self) -> VMHealthMetrics:
        """Measures the VM's health now: its process, its drives and its agent.

        Does not block the loop; takes at most 2 s if the guest does not answer.
        """
        metrics: VMHealthMetrics = await _result(self._operations.get_health_metrics)
        return metrics

    async def get_info(self) -> VMInfo:
        """Returns everything there is to know about the VM, as plain JSON types.

        Does not block the loop; takes at most 2 s if the guest does not answer.
        """
        info: VMInfo = await _result(self._operations.get_info)
        return info

    def get_state(self) -> VMState:
        """Returns the VM's state.

        Does not block.
        """
        return self._blocking.get_state()

    @property
    def vm_id(self) -> str:
        """The VM's name."""
        return self._blocking.vm_id

    @property
    def backend(self) -> VMBackend:
        """The VMM that was asked for; QEMU where the best one was."""
        return self._blocking.backend

    @property
    def isolation_type(self) -> IsolationType:
        """What the VM is for."""
        return self._blocking.isolation_type

    @property
    def resource_limits(self) -> VMResourceLimits:
        """What the VM may have: a copy, so that changing it changes nothing."""
        return self._blocking.resource_limits

    @property
    def network_config(self) -> VMNetworkConfig:
        """The network that was asked for: a copy."""
        return self._blocking.network_config

    @property
    def kernel_path(self) -> Optional[str]:
        """The kernel that the VM was given; ``None`` for the kernel of this package."""
        return self._blocking.kernel_path

    @property
    def rootfs_path(self) -> Optional[str]:
        """The image that the VM was given; ``None`` for the guest of this package."""
        return self._blocking.rootfs_path

    @property
    def logger(self) -> logging.Logger:
        """The logger of the package; the package adds no handler that prints."""
        return self._blocking.logger

    @property
    def last_error(self) -> Optional[MicroVMError]:
        """The error of the last failure; ``None`` before the first. A success does not clear it."""
        return self._blocking.last_error

    async def __aenter__(self) -> "AsyncMicroVMInstance":
        await self.start()
        return self

    async def __aexit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], traceback: Optional[TracebackType]
    ) -> None:
        await self.stop()

    def __repr__(self) -> str:
        return "<Async{}".format(repr(self._blocking)[1:])


class AsyncMicroVMIsolationManager:
    """Creates, finds and destroys microVMs within one quota: the twin of ``MicroVMIsolationManager``.

    ``async with`` starts the manager, and destroys its VMs at the end. Every failure is raised, with the classes that
    ``MicroVMIsolationManager`` names under "Errors". Properties do not block, and neither does the constructor.

    Args:
        config: Settings by name; docs/configuration.md has their units, ranges and defaults.
    """

    def __init__(self, config: Optional[Mapping[str, Any]] = None) -> None:
        self._blocking = MicroVMIsolationManager(None if config is None else dict(config))
        self._operations = _native.ManagerOperations(self._blocking)
        self._twins: "weakref.WeakValueDictionary[str, AsyncMicroVMInstance]" = weakref.WeakValueDictionary()

    async def start(self) -> None:
        """Starts the clean-up of dead VMs, the ``policies`` and the ``pool``, and removes what dead processes left.

        Does not block the loop. Goes on when cancelled. May be called twice.
        """
        await _result(self._operations.start)

    async def stop(self) -> None:
        """Destroys every VM and ends what ``start`` started; suspended VMs stay on disk.

        Does not block the loop. Goes on when cancelled. May be called twice.
        """
        await _result(self._operations.stop)

    async def create_vm(
        self,
        isolation_type: Union[IsolationType, str],
        resource_limits: Optional[VMResourceLimits] = None,
        backend: Union[VMBackend, str, None] = None,
        network_config: Optional[VMNetworkConfig] = None,
        vm_id: Optional[str] = None,
        kernel_path: Optional[_Path] = None,
        rootfs_path: Optional[_Path] = None,
        template: Optional[str] = None,
        labels: Optional[Mapping[str, str]] = None,
    ) -> str:
        """Reserves quota for a VM and names it; starts no process and works before ``start``.

        Does not block the loop. Cancelling gives the quota back.

        Args:
            isolation_type: What the VM is for; generated ids contain its value.
            resource_limits: As of ``MicroVMIsolationManager.create_vm``, like every argument.
            backend: The VMM.
            network_config: The VM's network; none where left out.
            vm_id: The id; a new one where left out.
            kernel_path: A Linux kernel in place of the package's.
            rootfs_path: An ext4 image as the root file system.
            template: The name of a snapshot to clone.
            labels: Strings by strings.

        Returns:
            The id of the VM.
        """
        made: str = await _result(
            self._operations.create_vm,
            isolation_type,
            resource_limits,
            backend,
            network_config,
            vm_id,
            kernel_path,
            rootfs_path,
            template,
            labels,
            undo=self._operations.destroy_vm,
        )
        return made

    def get_vm(self, vm_id: str) -> AsyncMicroVMInstance:
        """Returns the VM of this id, the same object while it is in use.

        Does not block.

        Args:
            vm_id: The id of a VM of this manager.

        Raises:
            VmNotFoundError: The manager has no such VM (`vm_not_found`).
        """
        blocking = self._blocking.get_vm(vm_id)
        if blocking is None:
            raise make_error("vm_not_found", "there is no VM {}".format(vm_id))
        twin = self._twins.get(vm_id)
        if twin is None or twin._blocking is not blocking:
            twin = AsyncMicroVMInstance.__new__(AsyncMicroVMInstance)._attach(blocking)
            self._twins[vm_id] = twin
        return twin

    async def start_vm(self, vm_id: str) -> bool:
        """Starts a VM: ``AsyncMicroVMInstance.start`` by id.

        Does not block the loop. Cancelling undoes the start.

        Args:
            vm_id: The id of a VM of this manager.
        """
        return await self.get_vm(vm_id).start()

    async def stop_vm(self, vm_id: str) -> bool:
        """Stops a VM: ``AsyncMicroVMInstance.stop`` by id.

        Does not block the loop. Goes on when cancelled.

        Args:
            vm_id: The id of a VM of this manager.
        """
        return await self.get_vm(vm_id).stop()

    async def pause_vm(self, vm_id: str) -> bool:
        """Pauses a VM: ``AsyncMicroVMInstance.pause`` by id.

        Does not block the loop. Goes on when cancelled.

        Args:
            vm_id: The id of a VM of this manager.
        """
        return await self.get_vm(vm_id).pause()

    async def resume_vm(self, vm_id: str) -> bool:
        """Resumes a paused VM, or a suspended one, also one that another manager or process suspended.

        Does not block the loop. Goes on when cancelled.

        Args:
            vm_id: The id of a VM of this manager, or one of ``list_suspended()``.
        """
        return bool(await _result(self._operations.resume_vm, vm_id))

    async def suspend_vm(self, vm_id: str) -> bool:
        """Suspends a VM to disk: ``AsyncMicroVMInstance.suspend`` by id.

        Does not block the loop. Goes on when cancelled.

        Args:
            vm_id: The id of a VM of this manager.
        """
        return await self.get_vm(vm_id).suspend()

    async def destroy_vm(self, vm_id: str) -> bool:
        """Destroys a VM in any state, with its files and its suspended state, and gives its quota back.

        Does not block the loop. Goes on when cancelled. Cancels a start that is under way.

        Args:
            vm_id: The id of a VM of this manager, or one of ``list_suspended()``.
        """
        return bool(await _result(self._operations.destroy_vm, vm_id))

    async def destroy_all_vms(self) -> None:
        """Destroys every VM of this manager, all at the same time; suspended VMs stay on disk.

        Does not block the loop. Goes on when cancelled.
        """
        await _result(self._operations.destroy_all_vms)

    def list_vms(
        self,
        isolation_type: Union[IsolationType, str, None] = None,
        state: Union[VMState, str, None] = None,
        labels: Optional[Mapping[str, str]] = None,
    ) -> List[str]:
        """Lists the ids of the VMs, in the order in which they were created.

        Does not block.

        Args:
            isolation_type: Only VMs of this type; VMs of every type where left out.
            state: Only VMs in this state; VMs in every state where left out.
            labels: Only VMs that have all of these labels; VMs with any labels where left out.
        """
        filters: Dict[str, Any] = {"isolation_type": isolation_type, "state": state, "labels": labels}
        return self._blocking.list_vms(**{name: value for name, value in filters.items() if value is not None})

    async def list_suspended(self) -> List[SuspendedVM]:
        """Lists the suspended VMs of this user in ``cache_dir``, also those that other processes suspended.

        Does not block the loop.
        """
        suspended: List[SuspendedVM] = await _result(self._operations.list_suspended)
        return suspended

    async def list_templates(self) -> List[TemplateInfo]:
        """Lists the templates that ``snapshot`` made for this user in ``cache_dir``.

        Does not block the loop.
        """
        templates: List[TemplateInfo] = await _result(self._operations.list_templates)
        return templates

    async def delete_template(self, name: str) -> bool:
        """Deletes a template that ``snapshot`` made; its clones run on.

        Does not block the loop. Goes on when cancelled.

        Args:
            name: The name of the template.
        """
        return bool(await _result(self._operations.delete_template, name))

    async def get_vm_info(self, vm_id: str) -> VMInfo:
        """Returns everything there is to know about a VM: ``AsyncMicroVMInstance.get_info`` by id.

        Does not block the loop.

        Args:
            vm_id: The id of a VM of this manager.
        """
        return await self.get_vm(vm_id).get_info()

    async def get_all_vms_info(self) -> Dict[str, VMInfo]:
        """Returns ``AsyncMicroVMInstance.get_info`` of every VM, by id.

        Does not block the loop; all VMs are asked at the same time.
        """
        infos: Dict[str, VMInfo] = await _result(self._operations.get_all_vms_info)
        return infos

    async def send_command_to_vm(
        self,
        vm_id: str,
        command: str,
        params: Optional[Mapping[str, Any]] = None,
        timeout: Optional[float] = None,
    ) -> CommandAnswer:
        """Sends a command to the agent in a VM: ``AsyncMicroVMInstance.send_command`` by id.

        Does not block the loop. Cancelling ends the command in the guest.

        Args:
            vm_id: The id of a VM of this manager.
            command: The name of the command; docs/commands.md lists them.
            params: The parameters of the command.
            timeout: Seconds to wait for the answer, 0 to 86400; as in ``AsyncMicroVMInstance.send_command`` where left
                out.
        """
        return await self.get_vm(vm_id).send_command(command, params, timeout)

    async def get_resource_usage(self) -> ResourceUsage:
        """Returns what the quota has, what is reserved of it, and what lies in the cache folder.

        Does not block the loop.
        """
        usage: ResourceUsage = await _result(self._operations.get_resource_usage)
        return usage

    async def get_health_status(self) -> HealthReport:
        """Measures the health of every VM now, and counts the healthy and the unhealthy ones.

        Does not block the loop; all VMs are asked at the same time.
        """
        report: HealthReport = await _result(self._operations.get_health_status)
        return report

    async def prepare(
        self,
        resource_limits: Optional[VMResourceLimits] = None,
        kernel_path: Optional[_Path] = None,
        rootfs_path: Optional[_Path] = None,
        progress: Optional[Callable[[str, float], Any]] = None,
    ) -> bool:
        """Makes the template of a kind of VM ahead of time, so that the first VM, too, starts as a clone.

        Does not block the loop. Cancelling undoes it.

        Args:
            resource_limits: The limits of such VMs; the ``default_*`` settings where left out.
            kernel_path: Their kernel, as in ``create_vm``.
            rootfs_path: Their image, as in ``create_vm``.
            progress: A function that the loop's thread calls with each stage and its fraction, as in
                ``MicroVMIsolationManager.prepare``.
        """
        making = self._operations.prepare(resource_limits, kernel_path, rootfs_path, progress)
        while True:
            stage: Optional[Tuple[str, float]] = await _result(making.next)
            if stage is None:
                return True
            if progress is not None:
                progress(*stage)

    def metrics(self) -> str:
        """Returns the metrics of the manager and its VMs as OpenMetrics text, for Prometheus.

        Does not block.
        """
        return self._blocking.metrics()

    @property
    def config(self) -> Dict[str, Any]:
        """The configuration as it was given, copied."""
        return self._blocking.config

    @property
    def logger(self) -> logging.Logger:
        """The logger of the package; the package adds no handler that prints."""
        return self._blocking.logger

    @property
    def last_error(self) -> Optional[MicroVMError]:
        """The error of the last failure of the manager's own; a VM keeps its own. ``None`` before the first."""
        return self._blocking.last_error

    async def __aenter__(self) -> "AsyncMicroVMIsolationManager":
        await self.start()
        return self

    async def __aexit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], traceback: Optional[TracebackType]
    ) -> None:
        await self.stop()

    def __repr__(self) -> str:
        return "<Async{}".format(repr(self._blocking)[1:])
