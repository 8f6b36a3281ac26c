"""The manager of microVMs."""

import logging
import weakref
from types import TracebackType
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple, Type, Union

from .. import _native
from .._enums import IsolationType, VMBackend, VMState
from .._errors import MicroVMError, make_error
from .._manager import HostPort, MicroVMIsolationManager, published
from .._models import VMNetworkConfig, VMResourceLimits
from .._types import (
    CommandAnswer,
    ExportedDisk,
    HealthReport,
    ResourceUsage,
    SuspendedVM,
    TemplateInfo,
    VMEvent,
    VMInfo,
)
from ._attach import AsyncAttachedVM, attach
from ._events import AsyncEventStream, AsyncEventSubscription, wrap
from ._instance import AsyncMicroVMInstance
from ._operations import Opening, Path, go_on, result
from ._vm import AsyncVM


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
        await result(self._operations.start)

    async def stop(self) -> None:
        """Destroys every VM and ends what ``start`` started; suspended VMs stay on disk.

        Does not block the loop. Goes on when cancelled. May be called twice.
        """
        await result(self._operations.stop)

    async def create_vm(
        self,
        isolation_type: Union[IsolationType, str],
        resource_limits: Optional[VMResourceLimits] = None,
        backend: Union[VMBackend, str, None] = None,
        network_config: Optional[VMNetworkConfig] = None,
        vm_id: Optional[str] = None,
        kernel_path: Optional[Path] = None,
        rootfs_path: Optional[Path] = None,
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
            rootfs_path: An ext4 or EROFS image as the root file system.
            template: The name of a snapshot to clone.
            labels: Strings by strings.

        Returns:
            The id of the VM.
        """
        made: str = await result(
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

    def run_vm(
        self,
        isolation_type: Union[IsolationType, str] = IsolationType.SESSION,
        resource_limits: Optional[VMResourceLimits] = None,
        backend: Union[VMBackend, str, None] = None,
        network_config: Optional[VMNetworkConfig] = None,
        vm_id: Optional[str] = None,
        kernel_path: Optional[Path] = None,
        rootfs_path: Optional[Path] = None,
        template: Optional[str] = None,
        labels: Optional[Mapping[str, str]] = None,
        ports: Optional[Mapping[int, HostPort]] = None,
    ) -> Opening[AsyncVM]:
        """Creates and starts a VM, which the end of its ``async with`` block destroys, or ``AsyncVM.destroy``.

        Does not block the loop. Leaves nothing when the start fails or is cancelled. ``await`` returns the VM, too.
        ``MicroVMIsolationManager.run_vm`` has the errors.

        Args:
            isolation_type: What the VM is for.
            resource_limits: As of ``MicroVMIsolationManager.create_vm``, like every argument.
            backend: The VMM.
            network_config: The VM's network; none where left out.
            vm_id: The id; a new one where left out.
            kernel_path: A Linux kernel in place of the package's.
            rootfs_path: An ext4 or EROFS image as the root file system.
            template: The name of a snapshot to clone.
            labels: Strings by strings.
            ports: What is published as soon as the VM runs: the host's port, or its address and port, by the guest's port. As of
                ``AsyncVM.publish``, 0 is a port that is free, and 127.0.0.1 the address where none is given.
        """
        arguments = {name: value for name, value in locals().items() if name != "self"}
        return Opening(self._run_vm(arguments))

    async def _run_vm(self, arguments: Dict[str, Any]) -> AsyncVM:
        mappings = published(arguments.pop("ports"))
        vm = AsyncVM(self, self.get_vm(await self.create_vm(**arguments)))
        try:
            await vm.instance.start()
            for port, place in mappings:
                await vm.publish(port, *place)
        except BaseException as error:
            await vm.__aexit__(type(error), error, None)
            raise
        return vm

    def attach(self, vm_id: str, timeout: float = 5.0) -> Opening[AsyncAttachedVM]:
        """Reaches a VM of any process of this user, with the ``runtime_dir`` of this manager, by ``await`` or ``async with``.

        Does not block the loop. Waits until the VM's owner answers, at most for ``timeout``. The owner keeps the VM; this
        manager neither counts nor lists it.

        Args:
            vm_id: The id of a VM that runs, or is paused.
            timeout: Seconds that the owner may take to answer, 0 to 86400.
        """
        return attach(vm_id, self.config.get("runtime_dir"), timeout)

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
        return bool(await result(self._operations.resume_vm, vm_id))

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
        return bool(await result(self._operations.destroy_vm, vm_id))

    async def destroy_all_vms(self) -> None:
        """Destroys every VM of this manager, all at the same time; suspended VMs stay on disk.

        Does not block the loop. Goes on when cancelled.
        """
        await result(self._operations.destroy_all_vms)

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
        suspended: List[SuspendedVM] = await result(self._operations.list_suspended)
        return suspended

    async def export_disk(self, vm_id: str, path: Path) -> ExportedDisk:
        """Copies the disk of a suspended VM to a new file: a raw ext4 file system, its holes kept.

        Does not block the loop. Goes on when cancelled. ``MicroVMIsolationManager.export_disk`` has the errors.

        Args:
            vm_id: The id of a VM of ``list_suspended()``.
            path: A path at which there is no file yet; the new file has mode 0600.
        """
        exported: ExportedDisk = await result(self._operations.export_disk, vm_id, path)
        return exported

    async def list_templates(self) -> List[TemplateInfo]:
        """Lists the templates that ``snapshot`` made for this user in ``cache_dir``.

        Does not block the loop.
        """
        templates: List[TemplateInfo] = await result(self._operations.list_templates)
        return templates

    async def delete_template(self, name: str) -> bool:
        """Deletes a template that ``snapshot`` made; its clones run on.

        Does not block the loop. Goes on when cancelled.

        Args:
            name: The name of the template.
        """
        return bool(await result(self._operations.delete_template, name))

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
        infos: Dict[str, VMInfo] = await result(self._operations.get_all_vms_info)
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
        usage: ResourceUsage = await result(self._operations.get_resource_usage)
        return usage

    async def get_health_status(self) -> HealthReport:
        """Measures the health of every VM now, and counts the healthy and the unhealthy ones.

        Does not block the loop; all VMs are asked at the same time.
        """
        report: HealthReport = await result(self._operations.get_health_status)
        return report

    async def prepare(
        self,
        resource_limits: Optional[VMResourceLimits] = None,
        kernel_path: Optional[Path] = None,
        rootfs_path: Optional[Path] = None,
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
            stage: Optional[Tuple[str, float]] = await result(making.next)
            if stage is None:
                return True
            if progress is not None:
                progress(*stage)

    def events(self, timeout: Optional[float] = None, capacity: int = 1024) -> AsyncEventStream:
        """Returns an asynchronous iterator of what happens to the VMs from now on; it ends with the manager.

        Does not block; the iterator does not block the loop.

        Args:
            timeout: Seconds that the iterator waits for each event before it ends, 0 to 86400; no limit where left out.
            capacity: Number of events that may wait to be taken, 1 to 1048576; when more come, the oldest are dropped
                (``AsyncEventStream.dropped``).
        """
        return wrap(self._blocking.events(timeout, capacity))

    def on_event(self, callback: Callable[[VMEvent], Any], capacity: int = 1024) -> AsyncEventSubscription:
        """Calls ``callback`` with each event from now on, in a task of the running loop, until it is closed.

        Does not block. An exception of the callback is logged and the next event is delivered.

        Args:
            callback: A function or a coroutine function of one argument, the event: a dict.
            capacity: Number of events that may wait to be delivered, 1 to 1048576; when more come, the oldest are dropped
                (``AsyncEventSubscription.dropped``).
        """
        if not callable(callback):
            raise make_error("invalid_type", "callback must be callable with one event, a dict, not {!r}".format(callback))
        return AsyncEventSubscription(self.events(capacity=capacity), callback)

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
        if kind is GeneratorExit:
            go_on(self._operations.stop)
        else:
            await self.stop()

    def __repr__(self) -> str:
        return "<Async{}".format(repr(self._blocking)[1:])
