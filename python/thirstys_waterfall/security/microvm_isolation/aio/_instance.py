"""One microVM."""

import logging
from types import TracebackType
from typing import Any, Callable, Dict, Mapping, Optional, Sequence, Type, Union

from .. import _native
from .._enums import IsolationType, VMBackend, VMState
from .._errors import MicroVMError
from .._models import VMHealthMetrics, VMNetworkConfig, VMResourceLimits
from .._types import CommandAnswer, Transferred, VMInfo
from ._operations import Bytes, Opening, Path, go_on, result
from ._ports import Ports
from ._stream import AsyncProcessStream, open_stream
from ._transfer import DownloadProgress, Reads, UploadProgress, Writes, download, upload


class AsyncMicroVMInstance(Ports):
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
        rootfs_path: An ext4 or EROFS image as the root file system.
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
        kernel_path: Optional[Path] = None,
        rootfs_path: Optional[Path] = None,
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
        return bool(await result(self._operations.start))

    async def stop(self) -> bool:
        """Shuts the VM down, within 10 s; what is on its disk is lost.

        Does not block the loop. Goes on when cancelled. ``MicroVMInstance.stop`` has the details and the errors.

        Returns:
            ``True``: the VM is stopped.
        """
        return bool(await result(self._operations.stop))

    async def pause(self) -> bool:
        """Stops the vCPUs; memory and disk stay.

        Does not block the loop. Goes on when cancelled. ``MicroVMInstance.pause`` has the errors.

        Returns:
            ``True``: the VM is paused.
        """
        return bool(await result(self._operations.pause))

    async def resume(self) -> bool:
        """Resumes a paused VM and sets its clock, or brings a suspended one back from disk.

        Does not block the loop. Goes on when cancelled. ``MicroVMInstance.resume`` has the errors.

        Returns:
            ``True``: the VM runs.
        """
        return bool(await result(self._operations.resume))

    async def suspend(self) -> bool:
        """Writes the VM's state to disk, below ``cache_dir``, and ends its process.

        Does not block the loop. Goes on when cancelled. ``MicroVMInstance.suspend`` has the details and the errors.

        Returns:
            ``True``: the VM is suspended.
        """
        return bool(await result(self._operations.suspend))

    async def snapshot(self, name: str) -> None:
        """Makes a template of the VM as it is now: memory, running programs and disk.

        Does not block the loop. Goes on when cancelled. ``MicroVMInstance.snapshot`` has the details and the errors.

        Args:
            name: 1 to 64 of the letters, digits, ``.``, ``_`` and ``-``, beginning with a letter, digit or ``_``.
        """
        await result(self._operations.snapshot, name)

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
        the old file stays. ``MicroVMInstance.upload`` has the details and the errors.

        Args:
            source: A path on the host, or an object whose ``read(size)`` returns at most that many bytes.
            guest_path: The path in the guest.
            offset: Position in bytes, 0 to 2**62, from which ``source`` is read and the file is written in place; where left
                out, the whole file is replaced.
            mode: Permission bits of the file, 0 to 0o7777 (chmod(2)).
            progress: A function that is called on the loop's thread with the bytes sent so far, and with the size in bytes,
                or ``None`` where that is not known.
            timeout: Seconds that the guest may take nothing, 0 to 86400; ``command_timeout_s`` where left out.
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
        ``offset`` the old file stays. ``MicroVMInstance.download`` has the details and the errors.

        Args:
            guest_path: The path in the guest.
            destination: A path on the host, or an object with ``write(data)``.
            offset: Position in bytes, 0 to 2**62, from which the guest's file is read and the other is written in place;
                where left out, the whole file is replaced.
            progress: A function that is called on the loop's thread with the bytes received so far and the size in bytes.
            max_bytes: The most bytes that are taken, 0 to 2**62; where left out, what the VM's disk, memory and image can
                hold.
            timeout: Seconds that the guest may send nothing, 0 to 86400; ``command_timeout_s`` where left out.
        """
        arguments = {name: value for name, value in locals().items() if name != "self"}
        return await download(self._operations.download, arguments)

    async def get_health_metrics(self) -> VMHealthMetrics:
        """Measures the VM's health now: its process, its drives and its agent.

        Does not block the loop; takes at most 2 s if the guest does not answer.
        """
        metrics: VMHealthMetrics = await result(self._operations.get_health_metrics)
        return metrics

    async def get_info(self) -> VMInfo:
        """Returns everything there is to know about the VM, as plain JSON types.

        Does not block the loop; takes at most 2 s if the guest does not answer.
        """
        info: VMInfo = await result(self._operations.get_info)
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
        if kind is GeneratorExit:
            go_on(self._operations.stop)
        else:
            await self.stop()

    def __repr__(self) -> str:
        return "<Async{}".format(repr(self._blocking)[1:])
