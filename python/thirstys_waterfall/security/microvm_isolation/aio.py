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
import weakref
from types import TracebackType
from typing import Any, Callable, Dict, List, Mapping, Optional, Type, Union

from . import _native
from ._enums import IsolationType, VMBackend, VMState
from ._errors import MicroVMError, make_error
from ._manager import MicroVMIsolationManager
from ._models import VMHealthMetrics, VMNetworkConfig, VMResourceLimits
from ._types import (
    CommandAnswer,
    HealthReport,
    ResourceUsage,
    SuspendedVM,
    TemplateInfo,
    VMInfo,
)

__all__ = ["AsyncMicroVMInstance", "AsyncMicroVMIsolationManager"]

_Path = Union[str, "os.PathLike[str]"]


class _Queue:
    """The operations that one event loop waits for. The loop's reader owns it, so that it goes with the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.operations = _native.OperationQueue()
        self.waiting: Dict[int, "asyncio.Future[Any]"] = {}
        self.undo: Dict[int, Callable[..., int]] = {}
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


async def _result(begin: Callable[..., int], *args: Any, undo: Optional[Callable[..., int]] = None) -> Any:
    """Begins an operation and waits for its result; cancels it when the task is cancelled.

    ``undo`` begins what undoes a result that came, but that a cancelled task has not taken.
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
    ) -> bool:
        """Makes the template of a kind of VM ahead of time, so that the first VM, too, starts as a clone.

        Does not block the loop. Cancelling undoes it.

        Args:
            resource_limits: The limits of such VMs; the ``default_*`` settings where left out.
            kernel_path: Their kernel, as in ``create_vm``.
            rootfs_path: Their image, as in ``create_vm``.
        """
        return bool(await _result(self._operations.prepare, resource_limits, kernel_path, rootfs_path))

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
