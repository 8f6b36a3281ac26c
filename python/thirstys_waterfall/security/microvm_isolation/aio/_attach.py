"""VMs of other processes of this user."""

from types import TracebackType
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Type, Union

from .. import _native
from .._enums import VMState
from .._models import VMHealthMetrics
from .._types import CommandAnswer, Transferred, VMInfo, VMSummary
from ._operations import Bytes, Opening, Path, result
from ._stream import AsyncProcessStream, open_stream
from ._transfer import DownloadProgress, Reads, UploadProgress, Writes, download, upload
from ._vm import AsyncPrograms


class AsyncAttachedVM(AsyncPrograms):
    """A VM that another process of this user has, reached through that process: the twin of ``AttachedVM``.

    Made by ``attach``. The process that made the VM keeps it: leaving the ``async with`` block ends this process's own
    programs in the VM and nothing else. When the process that has the VM ends, what is under way raises ``ChannelError`` at
    once. ``AttachedVM`` has the errors. Properties do not block.
    """

    _blocking: _native.AttachedVM
    _operations: _native.AttachedOperations

    @property
    def instance(self) -> "AsyncAttachedVM":  # type: ignore[override]
        """The handle itself, as ``AsyncVM`` has one."""
        return self

    async def send_command(
        self, command: str, params: Optional[Mapping[str, Any]] = None, timeout: Optional[float] = None
    ) -> CommandAnswer:
        """Sends a command to the agent in the guest and returns its answer.

        Does not block the loop. Cancelling ends the command in the guest.

        Args:
            command: The name of the command; docs/commands.md lists them with their parameters and results.
            params: The parameters of the command: plain JSON types.
            timeout: Seconds to wait for the answer, 0 to 86400. Where left out, the owner's ``command_timeout_s``, or
                longer if the command's own ``timeout`` in ``params`` is.
        """
        answer: CommandAnswer = await result(self._operations.send_command, command, params, timeout)
        return answer

    def stream(
        self,
        program: str,
        args: Optional[Sequence[str]] = None,
        env: Optional[Mapping[str, str]] = None,
        cwd: Optional[str] = None,
        stdin: Optional[Bytes] = None,
        pty: bool = False,
        uid: Optional[int] = None,
        timeout: Optional[float] = None,
        rows: Optional[int] = None,
        columns: Optional[int] = None,
        on_output: Optional[Callable[[str, bytes], Any]] = None,
    ) -> Opening[AsyncProcessStream]:
        """Starts a program in the guest and returns a handle to its input and output, by ``await`` or ``async with``.

        Does not block the loop. Cancelling kills the program, which ends with this process, too, and with the owner.

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
        arguments: Dict[str, Any] = {name: value for name, value in locals().items() if name != "self"}
        return Opening(open_stream(self._operations.stream, arguments))

    async def upload(
        self,
        source: Union[Path, Reads],
        guest_path: str,
        offset: Optional[int] = None,
        mode: Optional[int] = None,
        progress: Optional[UploadProgress] = None,
        timeout: Optional[float] = None,
    ) -> Transferred:
        """Writes a file of the guest from a path or an object with ``read``.

        Does not block the loop, except in ``read``, which may be a coroutine function. Cancelling undoes it: without ``offset``
        the old file stays.

        Args:
            source: A path on the host, or an object whose ``read(size)`` returns at most that many bytes.
            guest_path: The path in the guest.
            offset: Position in bytes, 0 to 2**62, from which ``source`` is read and the file is written in place; where left
                out, the whole file is replaced.
            mode: Permission bits of the file, 0 to 0o7777 (chmod(2)).
            progress: A function that is called on the loop's thread with the bytes sent so far, and with the size in bytes,
                or ``None`` where that is not known.
            timeout: Seconds that the guest may take nothing, 0 to 86400; the owner's ``command_timeout_s`` where left out.
        """
        arguments = {name: value for name, value in locals().items() if name != "self"}
        return await upload(self._operations.upload, arguments)

    async def download(
        self,
        guest_path: str,
        destination: Union[Path, Writes],
        offset: Optional[int] = None,
        progress: Optional[DownloadProgress] = None,
        max_bytes: Optional[int] = None,
        timeout: Optional[float] = None,
    ) -> Transferred:
        """Reads a file of the guest into a path or an object with ``write``.

        Does not block the loop, except in ``write``, which may be a coroutine function. Cancelling undoes it: without
        ``offset`` the old file stays.

        Args:
            guest_path: The path in the guest.
            destination: A path on the host, or an object with ``write(data)``.
            offset: Position in bytes, 0 to 2**62, from which the guest's file is read and the other is written in place;
                where left out, the whole file is replaced.
            progress: A function that is called on the loop's thread with the bytes received so far and the size in bytes.
            max_bytes: The most bytes that are taken, 0 to 2**62; where left out, what the VM's disk, memory and image can
                hold.
            timeout: Seconds that the guest may send nothing, 0 to 86400; the owner's ``command_timeout_s`` where left out.
        """
        arguments = {name: value for name, value in locals().items() if name != "self"}
        return await download(self._operations.download, arguments)

    async def get_health_metrics(self) -> VMHealthMetrics:
        """Measures the VM's health now.

        Does not block the loop; takes at most 2 s if the guest does not answer.
        """
        metrics: VMHealthMetrics = await result(self._operations.get_health_metrics)
        return metrics

    async def get_info(self) -> VMInfo:
        """Returns everything there is to know about the VM, as its owner knows it.

        Does not block the loop; takes at most 2 s if the guest does not answer.
        """
        info: VMInfo = await result(self._operations.get_info)
        return info

    async def get_state(self) -> VMState:
        """Returns the VM's state.

        Does not block the loop. Waits until the owner answers.
        """
        state: VMState = await result(self._operations.get_state)
        return state

    async def pause(self) -> None:
        """Stops the vCPUs; memory and disk stay.

        Does not block the loop. Goes on when cancelled, as all that the owner does.
        """
        await result(self._operations.pause)

    async def resume(self) -> None:
        """Resumes a paused VM and sets its clock.

        Does not block the loop. Goes on when cancelled.
        """
        await result(self._operations.resume)

    async def snapshot(self, name: str) -> None:
        """Makes a template of the VM as it is now, below the owner's ``cache_dir``.

        Does not block the loop. Goes on when cancelled.

        Args:
            name: 1 to 64 of the letters, digits, ``.``, ``_`` and ``-``, beginning with a letter, digit or ``_``.
        """
        await result(self._operations.snapshot, name)

    async def suspend(self) -> None:
        """Has the owner write the VM's state to disk and end its process; this handle is of no use then.

        Does not block the loop. Goes on when cancelled.
        """
        await result(self._operations.suspend)

    async def stop(self) -> None:
        """Has the owner shut the VM down, within 10 s; this handle is of no use then.

        Does not block the loop. Goes on when cancelled.
        """
        await result(self._operations.stop)

    async def kill(self) -> None:
        """Has the owner end the VM without asking the guest, within 7 s; this handle is of no use then.

        Does not block the loop. Goes on when cancelled.
        """
        await result(self._operations.kill)

    async def destroy(self) -> None:
        """Has the owner destroy the VM, with its files; its manager knows it no more.

        Does not block the loop. Goes on when cancelled.
        """
        await result(self._operations.destroy)

    async def wait(self, timeout: Optional[float] = None) -> bool:
        """Waits until the VM is no more to be used: it was stopped or destroyed, or its owner has ended.

        Does not block the loop.

        Args:
            timeout: Seconds to wait, 0 to 86400; without end where left out.

        Returns:
            ``True`` when it has ended, ``False`` when the time was over.
        """
        return bool(await result(self._operations.wait, timeout))

    def close(self) -> None:
        """Ends what this handle has under way in the VM; the VM goes on.

        Does not block. May be called twice.
        """
        self._blocking.close()

    @property
    def vm_id(self) -> str:
        """The VM's name."""
        return self._blocking.vm_id

    @property
    def owner_pid(self) -> Optional[int]:
        """The process that has the VM; ``None`` where this process cannot see it, as from another PID namespace."""
        return self._blocking.owner_pid

    async def __aenter__(self) -> "AsyncAttachedVM":
        return self

    async def __aexit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], traceback: Optional[TracebackType]
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return "<Async{}".format(repr(self._blocking)[1:])


def attach(vm_id: str, runtime_dir: Optional[Path] = None, timeout: float = 5.0) -> Opening[AsyncAttachedVM]:
    """Reaches a VM that another process of this user has, by ``await`` or ``async with``.

    Does not block the loop. Waits until the VM's owner answers, at most for ``timeout``.

    Args:
        vm_id: The id of a VM that runs, or is paused.
        runtime_dir: The owner's ``runtime_dir``; the default one where left out.
        timeout: Seconds that the owner may take to answer, 0 to 86400.

    Raises:
        VmNotFoundError: No VM of this id runs (`vm_not_found`).
        ChannelError: The owner does not answer (`channel_timeout`), or another user listens at the socket
            (`foreign_socket`).
    """
    return Opening(_attach(vm_id, runtime_dir, timeout))


async def _attach(vm_id: str, runtime_dir: Optional[Path], timeout: float) -> AsyncAttachedVM:
    vm = AsyncAttachedVM.__new__(AsyncAttachedVM)
    vm._blocking = await result(
        _native.begin_attach, vm_id, runtime_dir, timeout, undo=lambda queue, attached: attached.close()
    )
    vm._operations = _native.AttachedOperations(vm._blocking)
    return vm


async def running_vms(runtime_dir: Optional[Path] = None, timeout: Optional[float] = 2.0) -> List[VMSummary]:
    """Returns the VMs of every process of this user, as their owners describe them.

    Does not block the loop. Waits for as long as the owners take to answer, at most for ``timeout``.

    Args:
        runtime_dir: The owners' ``runtime_dir``; the default ones where left out.
        timeout: Seconds that an owner may take to answer, 0 to 86400.
    """
    listed: List[VMSummary] = await result(_native.begin_running_vms, runtime_dir, timeout)
    return listed
