import logging
import os
import socket
from types import TracebackType
from typing import (
    Any,
    Callable,
    Dict,
    Iterator,
    List,
    Mapping,
    Optional,
    Protocol,
    Sequence,
    Tuple,
    Type,
    Union,
    overload,
    type_check_only,
)

from typing_extensions import Literal, Self, disjoint_base, final

from ._enums import IsolationType, VMBackend, VMState
from ._errors import MicroVMError
from ._events import EventSubscription
from ._models import VMHealthMetrics, VMNetworkConfig, VMResourceLimits
from ._types import (
    CommandAnswer,
    DoctorReport,
    ExportedDisk,
    HealthReport,
    PortInfo,
    ResourceUsage,
    SuspendedVM,
    TemplateInfo,
    Transferred,
    VMEvent,
    VMInfo,
    VMSummary,
)

__all__ = [
    "AttachedOperations",
    "AttachedVM",
    "CommunicationChannel",
    "DownloadOperations",
    "EventOperations",
    "EventStream",
    "ManagerOperations",
    "MicroVMInstance",
    "MicroVMIsolationManager",
    "OperationQueue",
    "PrepareOperation",
    "ProcessStream",
    "PublishedPort",
    "StreamOperations",
    "TakenEvent",
    "UploadOperations",
    "VmOperations",
    "begin_attach",
    "begin_running_vms",
    "check_network_config",
    "check_resource_limits",
    "check_vm_id",
    "close_events",
    "close_log",
    "doctor",
    "is_exiting",
    "next_log_records",
    "running_vms",
    "shutdown",
]

_Bytes = Union[bytes, bytearray, memoryview]
_Path = Union[str, "os.PathLike[str]"]
_Channel = Literal["stdout", "stderr"]

@type_check_only
class _Reads(Protocol):
    def read(self, size: int, /) -> _Bytes: ...

@type_check_only
class _Writes(Protocol):
    def write(self, data: bytes, /) -> Any: ...

@disjoint_base
class MicroVMIsolationManager:
    """Creates, finds and destroys microVMs within one quota.

    Every method may be called from any thread; one that blocks releases the GIL and sees Ctrl-C within
    50 ms. Properties do not block, and neither does the constructor, which reads the configuration only.

    Errors under "Errors" are logged once and kept as `last_error`, and the method returns `False` or
    `None`; with `config={"raise_on_error": True}` they are raised instead. Errors under "Raises" are
    always raised, and so is `ForkedProcessError` in a forked child of the process that made the manager.

    No privilege is needed, except CAP_NET_ADMIN for VMs on a tap (capabilities(7)), and read and
    write access to `/dev/kvm` for hardware virtualization. Root gets more layers of the jail:
    docs/security.md.

    Args:
        config: Settings by name; docs/configuration.md has their units, ranges and defaults.

    Raises:
        InvalidTypeError: A value has the wrong type.
        InvalidValueError: A key is unknown or a value is not allowed; the message names both.

    Example:
        >>> with MicroVMIsolationManager({"raise_on_error": True}) as manager:
        ...     vm_id = manager.create_vm("browser_tab", VMResourceLimits(memory_mb=128))
        ...     manager.start_vm(vm_id)
        ...     manager.send_command_to_vm(vm_id, "ping")
        True
        {'result': 'pong', 'status': 'ok'}
    """

    @property
    def config(self) -> Dict[str, Any]:
        """The configuration as it was given, copied."""
    @property
    def logger(self) -> logging.Logger:
        """The logger of the package, `thirstys_waterfall.security.microvm_isolation`; the package adds no
        handler that prints.
        """
    @property
    def last_error(self) -> Optional[MicroVMError]:
        """The error of the last failure, with a stable `code`; `None` before the first. A success does not
        clear it.
        """
    @property
    def _max_vcpus(self) -> int: ...
    @property
    def _max_memory_mb(self) -> int: ...
    @property
    def _cleanup_active(self) -> bool: ...
    def __new__(cls, config: Optional[Mapping[str, Any]] = None) -> Self: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        exc_type: Optional[Type[BaseException]],
        exc_value: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> bool: ...
    def start(self) -> None:
        """Starts the clean-up of dead VMs, the `policies` and the `pool`, and removes what dead processes left.

        Blocks for milliseconds, longer where dead processes left much. May be called twice. What cannot be
        removed is logged.

        Errors:
            HostError: `runtime_dir` or `cache_dir` is refused (`folder_refused`); nothing is started then, and
                a `with` block raises this instead of being entered.

        Example:
            >>> manager.start()
        """
    def stop(self) -> None:
        """Destroys every VM and ends what `start` started; suspended VMs stay on disk and event streams end.

        Blocks until nothing is left, up to some seconds. May be called twice. Does nothing in a forked
        child of the process that made the manager.
        """
    def create_vm(
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
    ) -> Optional[str]:
        """Reserves quota for a VM and names it; starts no process and works before `start`.

        Does not block, except to read the description of a `template` from disk.

        Args:
            isolation_type: What the VM is for; generated ids contain its value.
            resource_limits: What the VM may have; the `default_*` settings where left out.
            backend: The VMM; the best one that this host can run where left out (docs/backends.md).
            network_config: The VM's network; none where left out.
            vm_id: 1 to 64 of the letters, digits, `.`, `_` and `-`, beginning with a letter or digit.
            kernel_path: A Linux kernel for the VM: an uncompressed ELF image with a PVH entry point
                (CONFIG_PVH). The kernel of this package where left out.
            rootfs_path: An ext4 or EROFS image as the root file system; it is never written to. The guest of
                this package where left out.
            template: A name that was given to `MicroVMInstance.snapshot`: the VM starts as a clone of that
                VM, with its programs running and its disk. Arguments that are left out are the template's.
                vCPUs, memory, disk size, backend, kernel, image and whether there is a network cannot
                differ from it.
            labels: At most 64 strings by strings, for `list_vms`, `get_info()` and events: keys of 1 to 63 of
                the letters, digits, `.`, `_`, `/` and `-`, beginning with a letter or digit; values of at most 256
                characters. They come back with a suspended VM; a clone has only its own.

        Returns:
            The id of the VM, or `None`.

        Raises:
            InvalidTypeError: An argument has the wrong type.
            InvalidValueError: An argument is out of range or malformed; the message names it.

        Errors:
            QuotaExceededError: The quota or the host's memory has no room (`quota_exceeded`).
            VmIdTakenError: Another VM has the id (`vm_id_taken`).
            TemplateError: The template is missing (`template_not_found`), damaged (`state_damaged`) or
                differs from the arguments (`state_mismatch`, naming each difference).

        Example:
            >>> made = manager.create_vm(IsolationType.PLUGIN, VMResourceLimits(memory_mb=128))
            >>> made.startswith("plugin-"), manager.destroy_vm(made)
            (True, True)
        """
    def start_vm(self, vm_id: str) -> bool:
        """Starts a VM: `MicroVMInstance.start` by id.

        Blocks as `MicroVMInstance.start` does.

        Args:
            vm_id: The id of a VM of this manager.

        Returns:
            `True` when the VM runs, else `False`.

        Errors:
            VmNotFoundError: The manager has no such VM (`vm_not_found`).
            MicroVMError: Every error of `MicroVMInstance.start`.
        """
    def stop_vm(self, vm_id: str) -> bool:
        """Stops a VM: `MicroVMInstance.stop` by id.

        Blocks for at most 10 s.

        Args:
            vm_id: The id of a VM of this manager.

        Returns:
            `True` when the VM is stopped, else `False`.

        Errors:
            VmNotFoundError: The manager has no such VM (`vm_not_found`).
            MicroVMError: Every error of `MicroVMInstance.stop`.
        """
    def pause_vm(self, vm_id: str) -> bool:
        """Pauses a VM: `MicroVMInstance.pause` by id.

        Blocks for milliseconds.

        Args:
            vm_id: The id of a VM of this manager.

        Returns:
            `True` when the VM is paused, else `False`.

        Errors:
            VmNotFoundError: The manager has no such VM (`vm_not_found`).
            MicroVMError: Every error of `MicroVMInstance.pause`.
        """
    def resume_vm(self, vm_id: str) -> bool:
        """Resumes a paused VM, or a suspended one, also one that another manager or process suspended.

        Blocks for milliseconds for a paused VM, for the time of a start for a suspended one. A suspended VM
        comes back once, under its id, with its disk, its programs where they were, the right time and new
        session keys; its state on disk is removed then. If the resume fails, that state stays as it was.

        Args:
            vm_id: The id of a VM of this manager, or one of `list_suspended()`.

        Returns:
            `True` when the VM runs, else `False`.

        Errors:
            VmNotFoundError: There is no such VM (`vm_not_found`).
            VmIdTakenError: Another caller resumes the same VM (`vm_id_taken`).
            VmStateError: The VM is neither paused nor suspended (`invalid_state`).
            QuotaExceededError: The quota, which is reserved anew, has no room (`quota_exceeded`).
            TemplateError: The state on disk is damaged (`state_damaged`) or does not fit this host
                (`state_mismatch`).
        """
    def suspend_vm(self, vm_id: str) -> bool:
        """Suspends a VM to disk: `MicroVMInstance.suspend` by id.

        Blocks as `MicroVMInstance.suspend` does.

        Args:
            vm_id: The id of a VM of this manager.

        Returns:
            `True` when the VM is suspended, else `False`.

        Errors:
            VmNotFoundError: The manager has no such VM (`vm_not_found`).
            MicroVMError: Every error of `MicroVMInstance.suspend`.
        """
    def list_suspended(self) -> List[SuspendedVM]:
        """Lists the suspended VMs of this user in `cache_dir`, also those that other processes suspended.

        Blocks while it reads the cache folder, and each image that has changed since its VM was suspended.

        Returns:
            A dict for each VM, with `disk_bytes` in bytes and `created` in Unix seconds. `usable` says
            whether the VM can be resumed on this host as it is now; `differences` names what has changed,
            the old and the new.
        """
    def export_disk(self, vm_id: str, path: _Path) -> Optional[ExportedDisk]:
        """Copies the disk of a suspended VM to a new file: a raw ext4 file system, its holes kept.

        Blocks for the time of the copy. Works also for a VM that cannot be resumed any more because its VMM
        or its image was replaced.

        Args:
            vm_id: The id of a VM of `list_suspended()`.
            path: A path at which there is no file yet; the new file has mode 0600.

        Returns:
            `bytes`, the size in bytes, and `verified`: whether the copy has the digest that was noted when
            the VM was suspended. `None` after an error.

        Raises:
            InvalidValueError: There is a file at `path`.

        Errors:
            VmNotFoundError: There is no such suspended VM (`vm_not_found`), for example because it runs.
            HostError: The copy cannot be read or written (`host_error`).
        """
    def list_templates(self) -> List[TemplateInfo]:
        """Lists the templates that `MicroVMInstance.snapshot` made for this user in `cache_dir`.

        Blocks while it reads the cache folder, and each image that has changed since its template was made.

        Returns:
            A dict for each template, with `disk_bytes` in bytes and `created` in Unix seconds; `usable` and
            `differences` as in `list_suspended`.
        """
    def delete_template(self, name: str) -> bool:
        """Deletes a template that `MicroVMInstance.snapshot` made; its clones run on.

        Blocks for milliseconds.

        Args:
            name: The name of the template.

        Returns:
            `True` when the template is deleted, else `False`.

        Raises:
            InvalidValueError: The name is malformed.

        Errors:
            TemplateError: There is no such template (`template_not_found`).
        """
    def destroy_vm(self, vm_id: str) -> bool:
        """Destroys a VM in any state, with its files and its suspended state, and gives its quota back.

        Blocks for about 100 ms. Cancels a start that is under way.

        Args:
            vm_id: The id of a VM of this manager, or one of `list_suspended()`.

        Returns:
            `True` when the VM is gone, else `False`.

        Errors:
            VmNotFoundError: There is no such VM (`vm_not_found`).
            VmIdTakenError: Another caller resumes the suspended VM at this moment (`vm_id_taken`).
        """
    def destroy_all_vms(self) -> None:
        """Destroys every VM of this manager, all at the same time; suspended VMs stay on disk.

        Blocks until all are gone, up to some seconds.
        """
    def get_vm(self, vm_id: str) -> Optional[MicroVMInstance]:
        """Returns the VM of this id, the same object each time, or `None` when there is none.

        Does not block.

        Args:
            vm_id: The id of a VM of this manager.

        Raises:
            InvalidTypeError: The id is not a string.

        Example:
            >>> manager.get_vm(vm_id) is manager.get_vm(vm_id)
            True
        """
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

        Raises:
            InvalidValueError: There is no such type or state, or a label is malformed.

        Example:
            >>> vm_id in manager.list_vms(state=VMState.RUNNING)
            True
        """
    def get_vm_info(self, vm_id: str) -> Optional[VMInfo]:
        """Returns everything there is to know about a VM: `MicroVMInstance.get_info` by id.

        Blocks for at most 2 s if the guest does not answer.

        Args:
            vm_id: The id of a VM of this manager.

        Returns:
            A dict of plain JSON types; `None` when there is no such VM.
        """
    def get_all_vms_info(self) -> Dict[str, VMInfo]:
        """Returns `MicroVMInstance.get_info` of every VM, by id.

        Blocks for at most 2 s if a guest does not answer; all VMs are asked at the same time.
        """
    def send_command_to_vm(
        self,
        vm_id: str,
        command: str,
        params: Optional[Mapping[str, Any]] = None,
        timeout: Optional[float] = None,
    ) -> Optional[CommandAnswer]:
        """Sends a command to the agent in a VM: `MicroVMInstance.send_command` by id.

        Blocks until the agent answers.

        Args:
            vm_id: The id of a VM of this manager.
            command: The name of the command; docs/commands.md lists them.
            params: The parameters of the command.
            timeout: Seconds to wait for the answer, 0 to 86400; as in `MicroVMInstance.send_command` where
                left out.

        Returns:
            The answer of the guest, or `None`.

        Raises:
            InvalidTypeError: An argument has the wrong type.
            InvalidValueError: An argument is out of range.

        Errors:
            VmNotFoundError: The manager has no such VM (`vm_not_found`).
            MicroVMError: Every error of `MicroVMInstance.send_command`.

        Example:
            >>> manager.send_command_to_vm(vm_id, "ping")["result"]
            'pong'
        """
    def prepare(
        self,
        resource_limits: Optional[VMResourceLimits] = None,
        kernel_path: Optional[_Path] = None,
        rootfs_path: Optional[_Path] = None,
        progress: Optional[Callable[[str, float], Any]] = None,
    ) -> bool:
        """Makes the template of a kind of VM ahead of time, so that the first VM, too, starts as a clone.

        Blocks for the time of a boot, which is seconds without hardware virtualization; returns at once when
        the template is there. Reserves no quota.

        Args:
            resource_limits: The limits of such VMs; the `default_*` settings where left out.
            kernel_path: Their kernel, as in `create_vm`.
            rootfs_path: Their image, as in `create_vm`.
            progress: A function that is called, here, with the stage that begins and with the fraction of
                the time that has gone by there, 0.0 to 1.0, as the events of kind `template` have them. The
                last call is `("done", 1.0)`, and the only one when the template is there already or another
                VM's start makes it. What it raises is raised here; a template that has begun to boot is
                finished all the same.

        Returns:
            `True` when the template is there, else `False`.

        Raises:
            InvalidTypeError: `progress` is not callable, or another argument has the wrong type.

        Errors:
            MicroVMError: Every error of `MicroVMInstance.start`.

        Example:
            >>> manager.prepare(progress=lambda stage, fraction: print(f"{fraction:4.0%} {stage}"))
            100% done
            True
        """
    def get_resource_usage(self) -> ResourceUsage:
        """Returns what the quota has, what is reserved of it, and what lies in the cache folder.

        Blocks for milliseconds while it looks at the cache folder. Sizes called `mb` are MiB, `disk_bytes`
        are bytes. Suspended VMs reserve nothing.

        Returns:
            `total_vms`; of the quota `vcpus_allocated`, `vcpus_available`, `memory_allocated_mb` and
            `memory_available_mb`; counts `vms_by_type` and `vms_by_state`; for each entry of the `pool` how
            many VMs are `ready` of those `wanted`; `count` and `disk_bytes` of `templates` (of the library),
            `own_templates` (by `MicroVMInstance.snapshot`) and `suspended` VMs.

        Example:
            >>> manager.get_resource_usage()["vms_by_state"]
            {'running': 1}
        """
    def get_health_status(self) -> HealthReport:
        """Measures the health of every VM now, and counts the healthy and the unhealthy ones.

        Blocks for at most 2 s if a guest does not answer; all VMs are asked at the same time.

        Returns:
            `total_vms`, `healthy_vms`, `unhealthy_vms` (dead ones included) and `resource_usage`, as
            `get_resource_usage` returns it.

        Example:
            >>> manager.get_health_status()["healthy_vms"]
            1
        """
    def events(self, timeout: Optional[float] = None, capacity: int = 1024) -> EventStream:
        """Returns an iterator of what happens to the VMs from now on; it ends with the manager.

        Does not block; the iterator does (see `EventStream`).

        Args:
            timeout: Seconds that the iterator waits for each event before it ends, 0 to 86400; no limit
                where left out.
            capacity: Number of events that may wait to be taken, 1 to 1048576; when more come, the oldest
                are dropped (`EventStream.dropped`).

        Raises:
            InvalidTypeError: An argument has the wrong type.
            InvalidValueError: An argument is out of range.

        Example:
            >>> with manager.events(timeout=5) as events:
            ...     made = manager.create_vm("plugin", VMResourceLimits(memory_mb=128))
            ...     next(events)["kind"], manager.destroy_vm(made)
            ('created', True)
        """
    def on_event(self, callback: Callable[[VMEvent], Any], capacity: int = 1024) -> EventSubscription:
        """Calls `callback` with each event from now on, on a thread of its own, until it is closed.

        Does not block. An exception of the callback is logged and the next event is delivered.

        Args:
            callback: A function of one argument, the event: a dict.
            capacity: Number of events that may wait to be delivered, 1 to 1048576; when more come, the
                oldest are dropped (`EventSubscription.dropped`).

        Raises:
            InvalidTypeError: `callback` is not callable.
            InvalidValueError: `capacity` is out of range.

        Example:
            >>> subscription = manager.on_event(print)
            >>> subscription.close()
        """
    def metrics(self) -> str:
        """Returns the metrics of the manager and its VMs as OpenMetrics text, for Prometheus.

        Does not block: it asks no VM, and its figures are those of the last measurement of each VM. The
        format is that of the OpenMetrics 1.0 specification; each metric has a line of help.

        Example:
            >>> manager.metrics().endswith("# EOF\\n")
            True
        """

@disjoint_base
class MicroVMInstance:
    """One microVM: its life, its commands, its files and its health.

    Made by `MicroVMIsolationManager.get_vm`, or on its own without a manager. Every method may be called
    from any thread; one that blocks releases the GIL and sees Ctrl-C within 50 ms. Properties do not
    block, and neither does the constructor, which starts no process.

    Errors under "Errors" are logged once and kept as `last_error`, and the method returns `False` or
    `None`; they are raised instead where the manager has `raise_on_error`. Errors under "Raises" are
    always raised, and so is `ForkedProcessError` in a forked child of the process that made the VM.

    No privilege is needed, except CAP_NET_ADMIN for a VM on a tap (capabilities(7)), and read and
    write access to `/dev/kvm` for hardware virtualization.

    Args:
        vm_id: 1 to 64 of the letters, digits, `.`, `_` and `-`, beginning with a letter or digit.
        backend: The VMM.
        isolation_type: What the VM is for.
        resource_limits: What the VM may have.
        network_config: The VM's network; none where left out.
        kernel_path: A kernel for the VM, as in `MicroVMIsolationManager.create_vm`.
        rootfs_path: An image for the VM, as in `MicroVMIsolationManager.create_vm`.
        template: The name of a template, as in `MicroVMIsolationManager.create_vm`.
        labels: Strings by strings, as in `MicroVMIsolationManager.create_vm`.

    Raises:
        InvalidTypeError: An argument has the wrong type.
        InvalidValueError: An argument is out of range or malformed; the message names it.

    Example:
        >>> limits = VMResourceLimits(memory_mb=128, disk_size_mb=64)
        >>> single = MicroVMInstance("single", "qemu", "plugin", limits)
        >>> single.start(), single.get_state(), single.stop()
        (True, <VMState.RUNNING: 'running'>, True)
    """

    @property
    def vm_id(self) -> str:
        """The VM's name."""
    @property
    def backend(self) -> VMBackend:
        """The VMM that was asked for; QEMU where the best one was. `get_info()["backend"]` says which one runs."""
    @property
    def isolation_type(self) -> IsolationType:
        """What the VM is for."""
    @property
    def resource_limits(self) -> VMResourceLimits:
        """What the VM may have: a copy, so that changing it changes nothing."""
    @property
    def network_config(self) -> VMNetworkConfig:
        """The network that was asked for: a copy. `get_info()["network_config"]` says what a running VM got."""
    @property
    def kernel_path(self) -> Optional[str]:
        """The kernel that the VM was given; `None` for the kernel of this package."""
    @property
    def rootfs_path(self) -> Optional[str]:
        """The image that the VM was given; `None` for the guest of this package."""
    @property
    def logger(self) -> logging.Logger:
        """The logger of the package, `thirstys_waterfall.security.microvm_isolation`; the package adds no
        handler that prints.
        """
    @property
    def last_error(self) -> Optional[MicroVMError]:
        """The error of the last failure, with a stable `code`; `None` before the first. A success does not
        clear it.
        """
    def __new__(
        cls,
        vm_id: str,
        backend: Union[VMBackend, str],
        isolation_type: Union[IsolationType, str],
        resource_limits: VMResourceLimits,
        network_config: Optional[VMNetworkConfig] = None,
        kernel_path: Optional[_Path] = None,
        rootfs_path: Optional[_Path] = None,
        template: Optional[str] = None,
        labels: Optional[Mapping[str, str]] = None,
    ) -> Self: ...
    def start(self) -> bool:
        """Starts the VM, as a clone of a template where there is one, and waits for its agent.

        Blocks for 30 to 300 ms for a clone, for seconds where the template must be made first, and at most
        for `start_timeout_s`; returns at once when the VM runs. Ctrl-C undoes the start. A stopped or failed
        VM that is started gets a new disk. A VM on a tap needs CAP_NET_ADMIN (capabilities(7)).

        Returns:
            `True` when the VM runs. `False` after `VmStateError` or `QuotaExceededError`, and nothing has
            changed; `False` after any other error, and the VM is in ERROR with nothing running.

        Errors:
            VmStateError: The state does not allow it (`invalid_state`).
            QuotaExceededError: The quota is exhausted (`quota_exceeded`).
            StartError: The VM did not come up; `details` has the stage and the tails of the guest's console
                and of the VMM's stderr (`start_failed`, `start_timeout`).
            BackendUnavailableError: The VMM cannot run on this host (`backend_unavailable`).
            IsolationUnavailableError: The host does not give what `min_isolation` or `jail="strict"` ask for
                (`isolation_unavailable`).
            NetworkUnavailableError: The VM cannot be connected (`network_unavailable`).
            ImageError: The kernel or the image cannot be used (`image_unreadable`, `image_invalid`).
            TemplateError: The VM's template cannot be used (`template_not_found`, `state_damaged`,
                `state_mismatch`).
            HostError: A system call failed, or a limit of this process leaves too little (`host_error`,
                `limit_too_low`).

        Example:
            >>> vm.start(), vm.get_state().name
            (True, 'RUNNING')
        """
    def stop(self) -> bool:
        """Shuts the VM down: the guest is asked, then the VMM is told, then its process is killed.

        Blocks for at most 10 s; returns at once when the VM is stopped. What is on the VM's disk is lost, and
        so is the state of a suspended VM. The VM's quota stays reserved, except that of a suspended VM.

        Returns:
            `True` when the VM is stopped, else `False`.

        Errors:
            VmStateError: The VM was never started or is destroyed (`invalid_state`).
        """
    def pause(self) -> bool:
        """Stops the vCPUs; memory and disk stay.

        Blocks for milliseconds.

        Returns:
            `True` when the VM is paused, else `False`.

        Errors:
            VmStateError: The VM does not run (`invalid_state`).

        Example:
            >>> vm.pause(), vm.resume()
            (True, True)
        """
    def resume(self) -> bool:
        """Resumes a paused VM and sets its clock, or brings a suspended one back from disk.

        Blocks for milliseconds for a paused VM, for the time of a start for a suspended one;
        `MicroVMIsolationManager.resume_vm` has the details.

        Returns:
            `True` when the VM runs, else `False`.

        Errors:
            VmStateError: The VM is neither paused nor suspended (`invalid_state`).
            MicroVMError: Every other error of `MicroVMIsolationManager.resume_vm`.
        """
    def snapshot(self, name: str) -> None:
        """Makes a template of the VM as it is now: memory, running programs and disk.

        Blocks for the time that it takes to write the memory that is in use, and at most 10 s for the guest
        to get ready. The VM goes on afterwards: it stands still for some milliseconds, and for as long as the
        copy of its disk takes where the file system cannot share it (FICLONE, ioctl_ficlone(2)). Commands and
        streams that are under way get their answers. A paused VM is woken for a moment.

        Clones begin where the VM stood, each with an identity of its own; requests that were under way are
        cancelled in them. Clones share all secrets that the VM's memory held: docs/templates.md.

        Args:
            name: 1 to 64 of the letters, digits, `.`, `_` and `-`, beginning with a letter, digit or `_`.

        Raises:
            InvalidValueError: The name is malformed.
            VmStateError: The VM is neither running nor paused, or it is suspended (`invalid_state`).
            NotSupportedError: The backend or the jail cannot do it; only QEMU can (`not_supported`).
            TemplateError: The name is taken (`template_taken`), or a file that the VM needs was replaced
                since its start (`state_mismatch`).
            CommandError: A program in the guest cannot be stopped (`busy`).
            HostError: The state could not be written (`host_error`); nothing of the template is left.

        Example:
            >>> vm.snapshot("logged-in")
            >>> manager.delete_template("logged-in")
            True
        """
    def suspend(self) -> bool:
        """Writes the VM's state to disk, below `cache_dir`, and ends its process.

        Blocks for at most 5 s while commands and streams end, then for the time of the writing. The VM is
        PAUSED afterwards, with `info["suspended"]` true and no `pid`; its share of the manager's quota is
        given back. It stays suspended when its manager stops.

        Returns:
            `True` when the VM is suspended. `False` after an error, and the VM goes on.

        Errors:
            VmStateError: The VM is neither running nor paused (`invalid_state`).
            NotSupportedError: The backend or the jail cannot do it; only QEMU can (`not_supported`).
            TemplateError: A file that the VM needs was replaced since its start (`state_mismatch`).
            CommandError: Commands or streams do not end (`busy`).
            HostError: The state could not be written (`host_error`).
        """
    def get_state(self) -> VMState:
        """Returns the VM's state.

        Does not block.
        """
    def get_health_metrics(self) -> VMHealthMetrics:
        """Measures the VM's health now: its process, its drives and its agent.

        Blocks for at most 2 s if the guest does not answer. CPU time and memory are those of the VMM's
        process (proc_pid_stat(5)).

        Example:
            >>> vm.get_health_metrics().health_status
            'healthy'
        """
    def send_command(
        self, command: str, params: Optional[Mapping[str, Any]] = None, timeout: Optional[float] = None
    ) -> Optional[CommandAnswer]:
        """Sends a command to the agent in the guest and returns its answer.

        Blocks until the agent answers.

        Args:
            command: The name of the command, such as `ping`, `exec` or `read_file`; docs/commands.md lists
                them with their parameters and results.
            params: The parameters of the command: plain JSON types.
            timeout: Seconds to wait for the answer, 0 to 86400. Where left out, `command_timeout_s`, or
                longer if the command's own `timeout` in `params` is.

        Returns:
            What the guest says: `{"status": "ok", "result": ...}`, or
            `{"status": "error", "error": {"code": ..., "message": ...}}`. `None` when there was no answer.

        Raises:
            InvalidTypeError: An argument has the wrong type, or `params` holds what JSON cannot.
            InvalidValueError: An argument is out of range.

        Errors:
            VmStateError: The VM does not run (`invalid_state`).
            VmDiedError: The VM died meanwhile (`vm_died`).
            ChannelError: The channel failed (`channel_timeout`, `channel_closed`, `message_too_large`);
                `details["sent"]` says whether the command may have run.
            CommandError: The library keeps the command to itself (`reserved_action`).

        Example:
            >>> vm.send_command("exec", {"program": "/bin/echo", "args": ["hello"]})["result"]["stdout"]
            'hello\\n'
        """
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
        on_output: Optional[Callable[[_Channel, bytes], Any]] = None,
    ) -> ProcessStream:
        """Starts a program in the guest and returns a handle to its input and output.

        Blocks until the program runs, at most for `command_timeout_s`.

        Args:
            program: The path of the program in the guest, or a name that is looked up on its `PATH`.
            args: Its arguments.
            env: Environment variables, beside the usual ones and in their place (docs/guest.md).
            cwd: Its working directory; `/` where left out.
            stdin: Its whole input; where left out, `ProcessStream.write` gives it.
            pty: Whether it runs on a terminal (pty(7)); stderr comes with stdout then.
            uid: The user that it runs as, 0 to 4294967294 (setuid(2)); 0, which is root, where left out.
            timeout: Seconds that it may run, more than 0 and at most 86400; no limit where left out.
            rows: The terminal's height in characters, 1 to 65535; 24 where left out.
            columns: The terminal's width in characters, 1 to 65535; 80 where left out.
            on_output: A function that `ProcessStream.wait` calls with `"stdout"` or `"stderr"` and bytes.

        Raises:
            InvalidTypeError: An argument has the wrong type.
            InvalidValueError: An argument is out of range.
            VmStateError: The VM does not run (`invalid_state`).
            CommandError: The guest does not start it (`program_not_found`, `permission_denied`,
                `bad_params`).
            ChannelError: The guest did not answer (`channel_timeout`, `channel_closed`).

        Example:
            >>> with vm.stream("/bin/sh", ["-c", "echo hello"]) as program:
            ...     list(program), program.exit_code
            ([('stdout', b'hello\\n')], 0)
        """
    def connect(
        self, port: int, address: Optional[str] = None, timeout: Optional[float] = None
    ) -> socket.socket:
        """Connects to a TCP port of the guest and returns a socket.

        Blocks until the guest has connected. The bytes go by the channel, so a VM without a network has this, too. The socket is
        one of this process alone (AF_UNIX): `http.client`, `ssl`, `select` and asyncio take it like any other. It has no timeout
        (`settimeout` gives it one). At most 48 connections of a VM are open at once.

        Args:
            port: The port, 1 to 65535.
            address: Where in the guest it is, as an IPv4 or IPv6 address; where left out, 127.0.0.1, and `::1` where that
                refuses.
            timeout: Seconds that it may take, 0 to 86400; `command_timeout_s` where left out.

        Raises:
            InvalidTypeError: An argument has the wrong type.
            InvalidValueError: An argument is out of range or malformed.
            VmStateError: The VM does not run (`invalid_state`).
            PortRefusedError: No program of the guest listens there (`connection_refused`); it is a
                `ConnectionRefusedError`, too.
            CommandError: The guest cannot connect for another reason, with its own code, or its agent, that of an old
                snapshot, knows no ports (`unknown_action`).
            ChannelError: It took too long, also because too many connections are open (`channel_timeout`), or the channel
                failed (`channel_closed`).

        Example:
            >>> vm.send_command("exec", {"program": "httpd", "args": ["-p", "8001", "-h", "/etc"]})["status"]
            'ok'
            >>> with vm.connect(8001) as connection:
            ...     connection.sendall(b"GET /hostname HTTP/1.0\\r\\n\\r\\n"), connection.recv(15)
            (None, b'HTTP/1.1 200 OK')
        """
    def publish(
        self,
        port: int,
        host_port: int = 0,
        address: str = "127.0.0.1",
        protocol: Literal["tcp"] = "tcp",
        guest_address: Optional[str] = None,
    ) -> PublishedPort:
        """Has this host listen at a port, and carries the connections that come to a TCP port of the guest.

        Does not block. The bytes go by the channel, so a VM without a network has this, too, and no privilege is needed. The port
        stays until its handle is closed or the VM is destroyed; while the VM does not run, and where no program of the
        guest listens, connections are reset. At most 48 connections of a VM are open at once; more wait.

        Args:
            port: The port of the guest, 1 to 65535.
            host_port: The port of the host, 0 to 65535; one that is free where it is 0 or left out. Below 1024
                CAP_NET_BIND_SERVICE is needed (capabilities(7)).
            address: The address of the host to listen at. Every program of the host may connect to 127.0.0.1, which is taken
                where it is left out; `0.0.0.0` or `::` lets other machines connect, too.
            protocol: `tcp`.
            guest_address: Where in the guest the port is, as for `connect`.

        Raises:
            InvalidTypeError: An argument has the wrong type.
            InvalidValueError: An argument is out of range or malformed.
            HostError: The host cannot listen there: the port is taken, or needs a privilege (`port_unavailable`).
            VmNotFoundError: The VM is destroyed (`vm_not_found`).

        Example:
            >>> published = vm.publish(8000)
            >>> vm.ports() == [
            ...     {"address": "127.0.0.1", "host_port": published.host_port, "guest_port": 8000, "protocol": "tcp", "connections": 0}
            ... ]
            True
            >>> published.close()
        """
    def ports(self) -> List[PortInfo]:
        """Returns what is published of the VM.

        Does not block.

        Returns:
            `PortInfo` of each port, in the order of the host's addresses.
        """
    def upload(
        self,
        source: Union[_Path, _Reads],
        guest_path: str,
        offset: Optional[int] = None,
        mode: Optional[int] = None,
        progress: Optional[Callable[[int, Optional[int]], Any]] = None,
        timeout: Optional[float] = None,
    ) -> Transferred:
        """Writes a file of the guest from a path or an object with `read`.

        Blocks until the whole file is written. Holds one window (256 KiB) of it in memory. A new file takes
        its place when it is whole. An existing file keeps its mode and owner; a new one gets the permission
        bits of its source, 0644 for an object.

        Args:
            source: A path on the host, or an object whose `read(size)` returns at most that many bytes.
            guest_path: The path in the guest.
            offset: Position in bytes, 0 to 2**62, from which `source` is read and the file is written in
                place; what arrived is kept after a failure, and another call with the file's size resumes.
                Where left out, the whole file is replaced.
            mode: Permission bits of the file, 0 to 0o7777 (chmod(2)).
            progress: A function that is called with the bytes sent so far, and with the size in bytes, or
                `None` where that is not known.
            timeout: Seconds that the guest may take nothing, 0 to 86400; `command_timeout_s` where left out.

        Returns:
            `bytes`, how many this call sent, and `crc32`, their checksum, which both sides compared
            (`zlib.crc32`).

        Raises:
            InvalidTypeError: An argument has the wrong type.
            InvalidValueError: An argument is out of range.
            VmStateError: The VM does not run (`invalid_state`).
            CommandError: The guest refuses the file, with the guest's own code.
            ChannelError: The transfer failed (`channel_timeout`, `channel_closed`, `checksum_mismatch`).
            HostError: `source` cannot be read (`host_error`).

        Example:
            >>> vm.upload(io.BytesIO(b"hello"), "/data/hello")
            {'bytes': 5, 'crc32': 907060870}
        """
    def download(
        self,
        guest_path: str,
        destination: Union[_Path, _Writes],
        offset: Optional[int] = None,
        progress: Optional[Callable[[int, Optional[int]], Any]] = None,
        max_bytes: Optional[int] = None,
        timeout: Optional[float] = None,
    ) -> Transferred:
        """Reads a file of the guest into a path or an object with `write`.

        Blocks until the whole file is read. Holds one window (256 KiB) of it in memory. A new file takes its
        place when it is whole. An existing file keeps its mode and owner; a new one gets the permission bits
        of the guest's file, less the umask.

        Args:
            guest_path: The path in the guest.
            destination: A path on the host, or an object with `write(data)`.
            offset: Position in bytes, 0 to 2**62, from which the guest's file is read and the other is
                written in place. Where left out, the whole file is replaced.
            progress: A function that is called with the bytes received so far and the size in bytes.
            max_bytes: The most bytes that are taken, 0 to 2**62; where left out, what the VM's disk, memory
                and image can hold.
            timeout: Seconds that the guest may send nothing, 0 to 86400; `command_timeout_s` where left out.

        Returns:
            `bytes`, how many this call received, and `crc32`, their checksum, which both sides compared
            (`zlib.crc32`).

        Raises:
            InvalidTypeError: An argument has the wrong type.
            InvalidValueError: An argument is out of range.
            VmStateError: The VM does not run (`invalid_state`).
            CommandError: The guest refuses the file, with the guest's own code, or it is larger than
                `max_bytes` (`too_large`).
            ChannelError: The transfer failed (`channel_timeout`, `channel_closed`, `checksum_mismatch`).
            HostError: `destination` cannot be written (`host_error`).

        Example:
            >>> content = io.BytesIO()
            >>> received = vm.download("/etc/hostname", content)
            >>> received["bytes"] == len(content.getvalue())
            True
        """
    def get_info(self) -> VMInfo:
        """Returns everything there is to know about the VM, as plain JSON types.

        Blocks for at most 2 s if the guest does not answer: it measures the VM's health as
        `get_health_metrics` does. Sizes called `mb` are MiB, `bytes` are bytes, `seconds` are seconds, and
        `time`, `since` and `last_health_check` are Unix seconds.

        Returns:
            `VMInfo`. `start` says how the VM came to be and how long each stage took; `jail` and `limits` say
            what confines it, how, and why a layer is missing.

        Example:
            >>> info = vm.get_info()
            >>> info["state"], info["backend"], info["isolation_grade"] in ("emulated", "hardware")
            ('running', 'qemu', True)
        """

@disjoint_base
class AttachedVM:
    """A VM that another process of this user has, reached through that process.

    The process that made the VM keeps it: closing this handle, by its ``with`` block or by the end of this
    process, ends this process's own programs in the VM and nothing else. Every failure is raised. When the
    process that has the VM ends, what is under way raises `ChannelError` at once. Every method may be called
    from any thread, releases the GIL and sees Ctrl-C within 50 ms; none can be used in a forked child
    (`ForkedProcessError`). Properties do not block. The socket is the user's alone: neither other users' VMs nor other users'
    processes can be reached by it.

    Blocks until the owner answers, at most for `timeout`.

    Args:
        vm_id: The id of a VM that runs, or is paused, in any process of this user.
        runtime_dir: The owner's `runtime_dir`; the default one where left out.
        timeout: Seconds that the owner may take to answer, 0 to 86400.

    Raises:
        InvalidTypeError: An argument has the wrong type.
        InvalidValueError: An argument is malformed.
        VmNotFoundError: No VM of this id runs (`vm_not_found`).
        ChannelError: The owner does not answer (`channel_timeout`), or another user listens at the socket
            (`foreign_socket`).

    Example:
        >>> with manager.attach(vm_id) as attached:
        ...     attached.run(["echo", "hello"]).stdout
        'hello\\n'
    """

    def __new__(
        cls,
        vm_id: str,
        runtime_dir: Optional[_Path] = None,
        timeout: Optional[float] = 5.0,
    ) -> Self: ...
    @property
    def vm_id(self) -> str:
        """The VM's name."""
    @property
    def owner_pid(self) -> Optional[int]:
        """The process that has the VM; `None` where this process cannot see it, as from another PID namespace."""
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        exc_type: Optional[Type[BaseException]],
        exc_value: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> bool: ...
    def send_command(
        self, command: str, params: Optional[Mapping[str, Any]] = None, timeout: Optional[float] = None
    ) -> CommandAnswer:
        """Sends a command to the agent in the guest and returns its answer.

        Blocks until the agent answers.

        Args:
            command: The name of the command; docs/commands.md lists them with their parameters and results.
            params: The parameters of the command: plain JSON types.
            timeout: Seconds to wait for the answer, 0 to 86400. Where left out, the owner's
                `command_timeout_s`, or longer if the command's own `timeout` in `params` is.

        Returns:
            What the guest says: `{"status": "ok", "result": ...}`, or
            `{"status": "error", "error": {"code": ..., "message": ...}}`.

        Raises:
            InvalidTypeError: An argument has the wrong type, or `params` holds what JSON cannot.
            InvalidValueError: An argument is out of range.
            ChannelError: The channel failed (`channel_timeout`, `channel_closed`, `message_too_large`);
                `details["sent"]` says whether the command may have run.
        """
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
        on_output: Optional[Callable[[_Channel, bytes], Any]] = None,
    ) -> ProcessStream:
        """Starts a program in the guest and returns a handle to its input and output.

        Blocks until the program runs. The program ends with the handle, with this process, and with the owner.

        Args:
            program: The path of the program in the guest, or a name that is looked up on its `PATH`.
            args: Its arguments.
            env: Environment variables, beside the usual ones and in their place (docs/guest.md).
            cwd: Its working directory; `/` where left out.
            stdin: Its whole input; where left out, `ProcessStream.write` gives it.
            pty: Whether it runs on a terminal (pty(7)); stderr comes with stdout then.
            uid: The user that it runs as, 0 to 4294967294 (setuid(2)); 0, which is root, where left out.
            timeout: Seconds that it may run, more than 0 and at most 86400; no limit where left out.
            rows: The terminal's height in characters, 1 to 65535; 24 where left out.
            columns: The terminal's width in characters, 1 to 65535; 80 where left out.
            on_output: A function that `ProcessStream.wait` calls with `"stdout"` or `"stderr"` and bytes.

        Raises:
            MicroVMError: Every error of `MicroVMInstance.stream`.
        """
    def connect(
        self, port: int, address: Optional[str] = None, timeout: Optional[float] = None
    ) -> socket.socket:
        """Connects to a TCP port of the guest and returns a socket.

        Blocks until the guest has connected. The connection ends with this handle. The arguments are those of
        `MicroVMInstance.connect`.

        Args:
            port: The port, 1 to 65535.
            address: Where in the guest it is, as an IPv4 or IPv6 address; where left out, 127.0.0.1, and `::1` where that
                refuses.
            timeout: Seconds that it may take, 0 to 86400; the owner's `command_timeout_s` where left out.

        Raises:
            MicroVMError: Every error of `MicroVMInstance.connect`.
        """
    def publish(
        self,
        port: int,
        host_port: int = 0,
        address: str = "127.0.0.1",
        protocol: Literal["tcp"] = "tcp",
        guest_address: Optional[str] = None,
    ) -> PublishedPort:
        """Has this process listen at a port, and carries the connections that come to a TCP port of the guest.

        Does not block. The port ends with this handle, and the owner's `ports` do not tell it. The arguments are those of
        `MicroVMInstance.publish`.

        Args:
            port: The port of the guest, 1 to 65535.
            host_port: The port of the host, 0 to 65535; one that is free where it is 0 or left out.
            address: The address of the host to listen at: 127.0.0.1 where left out.
            protocol: `tcp`.
            guest_address: Where in the guest the port is, as for `connect`.

        Raises:
            MicroVMError: Every error of `MicroVMInstance.publish`.
        """
    def ports(self) -> List[PortInfo]:
        """Returns what the owner has published of the VM.

        Blocks until the owner answers.

        Returns:
            `PortInfo` of each port, in the order of the host's addresses.

        Raises:
            ChannelError: The owner has ended or let go of the VM (`channel_closed`).
        """
    def upload(
        self,
        source: Union[_Path, _Reads],
        guest_path: str,
        offset: Optional[int] = None,
        mode: Optional[int] = None,
        progress: Optional[Callable[[int, Optional[int]], Any]] = None,
        timeout: Optional[float] = None,
    ) -> Transferred:
        """Writes a file of the guest from a path or an object with `read`.

        Blocks until the whole file is written. The arguments are those of `MicroVMInstance.upload`.

        Args:
            source: A path on the host, or an object whose `read(size)` returns at most that many bytes.
            guest_path: The path in the guest.
            offset: Position in bytes, 0 to 2**62, from which `source` is read and the file is written in place.
            mode: Permission bits of the file, 0 to 0o7777 (chmod(2)).
            progress: A function that is called with the bytes sent so far, and with the size in bytes, or
                `None` where that is not known.
            timeout: Seconds that the guest may take nothing, 0 to 86400.

        Returns:
            `bytes`, how many this call sent, and `crc32`, their checksum, which both sides compared
            (`zlib.crc32`).

        Raises:
            MicroVMError: Every error of `MicroVMInstance.upload`.
        """
    def download(
        self,
        guest_path: str,
        destination: Union[_Path, _Writes],
        offset: Optional[int] = None,
        progress: Optional[Callable[[int, Optional[int]], Any]] = None,
        max_bytes: Optional[int] = None,
        timeout: Optional[float] = None,
    ) -> Transferred:
        """Reads a file of the guest into a path or an object with `write`.

        Blocks until the whole file is read. The arguments are those of `MicroVMInstance.download`.

        Args:
            guest_path: The path in the guest.
            destination: A path on the host, or an object with `write(data)`.
            offset: Position in bytes, 0 to 2**62, from which the guest's file is read and the other is
                written in place. Where left out, the whole file is replaced.
            progress: A function that is called with the bytes received so far and the size in bytes.
            max_bytes: The most bytes that are taken, 0 to 2**62; where left out, what the VM's disk, memory
                and image can hold.
            timeout: Seconds that the guest may send nothing, 0 to 86400.

        Returns:
            `bytes`, how many this call received, and `crc32`, their checksum, which both sides compared
            (`zlib.crc32`).

        Raises:
            MicroVMError: Every error of `MicroVMInstance.download`.
        """
    def get_info(self) -> VMInfo:
        """Returns everything there is to know about the VM, as `MicroVMInstance.get_info` does for its owner.

        Blocks for at most 2 s if the guest does not answer.

        Returns:
            `VMInfo`.

        Raises:
            ChannelError: The owner has ended or let go of the VM (`channel_closed`).
        """
    def get_health_metrics(self) -> VMHealthMetrics:
        """Measures the VM's health now.

        Blocks for at most 2 s if the guest does not answer.

        Raises:
            ChannelError: The owner has ended or let go of the VM (`channel_closed`).
        """
    def get_state(self) -> VMState:
        """Returns the VM's state.

        Blocks until the owner answers.

        Raises:
            ChannelError: The owner has ended or let go of the VM (`channel_closed`).
        """
    def snapshot(self, name: str) -> None:
        """Makes a template of the VM as it is now, below the owner's `cache_dir`.

        Blocks as `MicroVMInstance.snapshot` does.

        Args:
            name: 1 to 64 of the letters, digits, `.`, `_` and `-`, beginning with a letter, digit or `_`.

        Raises:
            MicroVMError: Every error of `MicroVMInstance.snapshot`.
        """
    def pause(self) -> None:
        """Stops the vCPUs; memory and disk stay.

        Blocks for milliseconds.

        Raises:
            VmStateError: The VM does not run (`invalid_state`).
            ChannelError: The owner has ended or let go of the VM (`channel_closed`).
        """
    def resume(self) -> None:
        """Resumes a paused VM and sets its clock.

        Blocks for milliseconds.

        Raises:
            VmStateError: The VM is not paused (`invalid_state`).
            ChannelError: The owner has ended or let go of the VM (`channel_closed`).
        """
    def suspend(self) -> None:
        """Has the owner write the VM's state to disk and end its process; this handle is of no use then.

        Blocks as `MicroVMInstance.suspend` does.

        Raises:
            MicroVMError: Every error of `MicroVMInstance.suspend`.
        """
    def stop(self) -> None:
        """Has the owner shut the VM down, as `MicroVMInstance.stop` does; this handle is of no use then.

        Blocks for at most 10 s.

        Raises:
            ChannelError: The owner has ended or let go of the VM (`channel_closed`).
        """
    def kill(self) -> None:
        """Has the owner end the VM without asking the guest; this handle is of no use then.

        Blocks for at most 7 s.

        Raises:
            ChannelError: The owner has ended or let go of the VM (`channel_closed`).
        """
    def destroy(self) -> None:
        """Has the owner destroy the VM, with its files; its manager knows it no more.

        Blocks for about 100 ms.

        Raises:
            ChannelError: The owner has ended or let go of the VM (`channel_closed`).
        """
    def wait(self, timeout: Optional[float] = None) -> bool:
        """Waits until the VM is no more to be used: it was stopped or destroyed, or its owner has ended.

        Blocks until then, at most for `timeout`.

        Args:
            timeout: Seconds to wait, 0 to 86400; without end where left out.

        Returns:
            `True` when it has ended, `False` when the time was over.

        Raises:
            InvalidTypeError: `timeout` is not a number.
            InvalidValueError: `timeout` is out of range.
        """
    def close(self) -> None:
        """Ends what this handle has under way in the VM; the VM goes on.

        Does not block. May be called twice. Does nothing in a forked child of the process that attached.
        """

@final
class PublishedPort:
    """A port of this host that leads to one of a guest, as `publish` makes it.

    Leaving the `with` block closes it; dropping the object does not: the port stays for as long as its VM. It stays while the VM
    is paused, suspended or stopped, and refuses connections meanwhile. Properties do not block.

    Example:
        >>> with vm.publish(8000) as published:
        ...     published.address, published.guest_port, published.protocol
        ('127.0.0.1', 8000, 'tcp')
    """

    @property
    def host_port(self) -> int:
        """The port of the host."""
    @property
    def address(self) -> str:
        """The address of the host that it listens at."""
    @property
    def guest_port(self) -> int:
        """The port of the guest."""
    @property
    def protocol(self) -> str:
        """`tcp`."""
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        exc_type: Optional[Type[BaseException]],
        exc_value: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> bool: ...
    def close(self) -> None:
        """Has the host listen no more, and breaks the connections that came by this port.

        Does not block. May be called twice.

        Raises:
            ForkedProcessError: The calling process is a forked child.
        """

@final
class ProcessStream:
    """A program that runs in a guest: an iterator of `("stdout" or "stderr", bytes)`.

    Made by `MicroVMInstance.stream`. Iterating blocks until there is output; it ends with the output.
    Leaving the `with` block, or dropping the object, kills the program with all its descendants. Ctrl-C
    in a method raises `KeyboardInterrupt` and leaves the program running, as with `subprocess.Popen`.
    Properties do not block. Every error is raised; `ForkedProcessError` in a forked child.

    Example:
        >>> with vm.stream("cat") as program:
        ...     program.write(b"hello"), program.close_stdin(), list(program), program.exit_code
        (True, None, [('stdout', b'hello')], 0)
    """

    @property
    def exit_code(self) -> Optional[int]:
        """The exit code, or the negative number of the signal that ended the program; `None` until its output
        was taken to the end.
        """
    @property
    def pid(self) -> int:
        """The program's process id in the guest."""
    def __iter__(self) -> Self: ...
    def __next__(self) -> Tuple[_Channel, bytes]: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        exc_type: Optional[Type[BaseException]],
        exc_value: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> bool: ...
    def write(self, data: _Bytes) -> bool:
        """Writes to the program's input.

        Blocks while the program does not read, so also while it waits for its own output to be taken: take
        that on another thread, or write at most 64 KiB, which a pipe holds (pipe(7)), at a time.

        Args:
            data: The bytes to write.

        Returns:
            `True` when everything was written; `False` when the program reads no more.

        Raises:
            InvalidTypeError: `data` is not bytes.
            ChannelError: The channel failed (`channel_closed`).
        """
    def close_stdin(self) -> None:
        """Ends the program's input.

        Does not block.
        """
    def signal(self, number: int) -> None:
        """Sends a signal to the program's process group; SIGKILL ends all its descendants.

        Does not block.

        Args:
            number: The number of the signal, 1 to 64 (signal(7)).

        Raises:
            InvalidTypeError: `number` is not an int.
            InvalidValueError: `number` is out of range.
            ChannelError: The channel failed (`channel_closed`).
        """
    def resize(self, rows: int, columns: int) -> None:
        """Sets the size of the program's terminal (TIOCSWINSZ, ioctl_tty(2)).

        Does not block.

        Args:
            rows: The height in characters, 1 to 65535.
            columns: The width in characters, 1 to 65535.

        Raises:
            InvalidTypeError: An argument is not an int.
            InvalidValueError: An argument is out of range, or the program was started without `pty`.
            ChannelError: The channel failed (`channel_closed`).
        """
    def wait(self, timeout: Optional[float] = None) -> Optional[int]:
        """Waits for the program's end; output that was not taken goes to `on_output`, or is dropped.

        Blocks until the program ends. Ctrl-C raises and leaves the program running.

        Args:
            timeout: Seconds to wait, 0 to 86400; no limit where left out.

        Returns:
            The exit code; `-n` after signal `n`, -9 after `kill`, as `subprocess.Popen.returncode`.

        Raises:
            InvalidTypeError: `timeout` is not a number.
            InvalidValueError: `timeout` is out of range.
            CommandError: The program ran longer than the `timeout` of `MicroVMInstance.stream` and was
                killed (`timeout`); raised once, later calls return -9.
            ChannelError: The program did not end in time (`channel_timeout`), or the channel failed
                (`channel_closed`).
        """
    @overload
    def communicate(
        self, input: Union[_Bytes, str, None] = None, timeout: Optional[float] = None, text: Literal[False] = False
    ) -> Tuple[bytes, bytes]:
        """Gives the program its whole input, takes all its output, and waits for its end.

        Blocks until the program ends. Input and output go at the same time, whatever their sizes; the output
        is held in memory. After a failure the program goes on, and another call, without `input`, returns
        this output, too.

        Args:
            input: Its input: bytes, or a string, which is sent as UTF-8. Where left out, its input ends.
            timeout: Seconds to wait, 0 to 86400; no limit where left out.
            text: Whether the output is decoded as UTF-8, with U+FFFD for what is not; else it is bytes.

        Returns:
            Stdout and stderr, without what was taken before. `exit_code` says how the program ended.

        Raises:
            InvalidTypeError: An argument has the wrong type.
            InvalidValueError: `timeout` is out of range.
            CommandError: As of `wait`.
            ChannelError: As of `wait`.

        Example:
            >>> with vm.stream("cat") as program:
            ...     program.communicate("hello", text=True), program.exit_code
            (('hello', ''), 0)
        """
    @overload
    def communicate(
        self, input: Union[_Bytes, str, None] = None, timeout: Optional[float] = None, *, text: Literal[True]
    ) -> Tuple[str, str]:
        """Gives the program its whole input, takes all its output, and waits for its end.

        Blocks until the program ends. Input and output go at the same time, whatever their sizes; the output
        is held in memory. After a failure the program goes on, and another call, without `input`, returns
        this output, too.

        Args:
            input: Its input: bytes, or a string, which is sent as UTF-8. Where left out, its input ends.
            timeout: Seconds to wait, 0 to 86400; no limit where left out.
            text: Whether the output is decoded as UTF-8, with U+FFFD for what is not; else it is bytes.

        Returns:
            Stdout and stderr, without what was taken before. `exit_code` says how the program ended.

        Raises:
            InvalidTypeError: An argument has the wrong type.
            InvalidValueError: `timeout` is out of range.
            CommandError: As of `wait`.
            ChannelError: As of `wait`.

        Example:
            >>> with vm.stream("cat") as program:
            ...     program.communicate("hello", text=True), program.exit_code
            (('hello', ''), 0)
        """
    def text(self) -> Iterator[Tuple[_Channel, str]]:
        """Returns an iterator of the output as text: `("stdout" or "stderr", str)`.

        Does not block; the iterator does, until there is output. A character whose bytes come in two pieces
        is one character; what is not UTF-8 becomes U+FFFD.

        Example:
            >>> with vm.stream("echo", ["hello"]) as program:
            ...     list(program.text())
            [('stdout', 'hello\\n')]
        """
    def kill(self) -> None:
        """Kills the program and all its descendants; `wait` then returns -9.

        Does not block. Does nothing when the program has ended.

        Raises:
            ForkedProcessError: The calling process is a forked child.
        """

@final
class EventStream:
    """The events of a manager from now on: an iterator of dicts, which ends with the manager.

    Made by `MicroVMIsolationManager.events`. Iterating blocks until there is an event, at most for the
    stream's `timeout`; Ctrl-C is seen within 50 ms. Properties do not block. Raises `ForkedProcessError`
    in a forked child.

    Example:
        >>> with manager.events() as events:
        ...     vm.pause(), vm.resume()
        ...     [(event["from"], event["to"]) for event in [next(events), next(events)]]
        (True, True)
        [('running', 'paused'), ('paused', 'running')]
    """

    @property
    def dropped(self) -> int:
        """How many events were dropped because nobody took them in time."""
    def __iter__(self) -> Self: ...
    def __next__(self) -> VMEvent: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        exc_type: Optional[Type[BaseException]],
        exc_value: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> bool: ...
    def get(self, timeout: Optional[float] = None) -> Optional[VMEvent]:
        """Returns the next event, or `None` when none comes in time or the stream has ended.

        Blocks until there is an event.

        Args:
            timeout: Seconds to wait, 0 to 86400; the stream's own where left out.

        Raises:
            InvalidTypeError: `timeout` is not a number.
            InvalidValueError: `timeout` is out of range.
        """
    def close(self) -> None:
        """Takes no more events; those that have come can still be taken.

        Does not block. May be called twice. Does nothing in a forked child.
        """
    def _wait(self) -> Optional[VMEvent]: ...

@disjoint_base
class CommunicationChannel:
    """A connection to the agent of one VM, from any process of the VM's user or of root.

    It talks to the socket of the VM's broker; docs/channel.md has the framing. Properties do not block,
    and neither does the constructor, which connects to nothing. Methods release the GIL and see Ctrl-C
    within 50 ms.

    Errors under "Errors" are logged once and kept as `last_error`, and the method returns `False` or
    `None`. Errors under "Raises" are always raised, and so is `ForkedProcessError` in a forked child.

    Args:
        vm_id: The id of a running VM.
        socket_path: The path of its socket; where left out, the one that the VM has with the default
            `runtime_dir`. With another one it is `info["socket_path"]`.

    Raises:
        InvalidTypeError: An argument has the wrong type.
        InvalidValueError: An argument is malformed.

    Example:
        >>> with CommunicationChannel(vm_id) as channel:
        ...     channel.send_message({"type": "ping"}), channel.receive_message(timeout=5)
        (True, {'type': 'pong'})
    """

    @property
    def vm_id(self) -> str:
        """The name of the VM."""
    @property
    def socket_path(self) -> str:
        """The path at which the VM's broker listens while the VM runs."""
    @property
    def logger(self) -> logging.Logger:
        """The logger of the package, `thirstys_waterfall.security.microvm_isolation`; the package adds no
        handler that prints.
        """
    @property
    def last_error(self) -> Optional[MicroVMError]:
        """The error of the last failure, with a stable `code`; `None` before the first. A success does not
        clear it.
        """
    def __new__(cls, vm_id: str, socket_path: Optional[_Path] = None) -> Self: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        exc_type: Optional[Type[BaseException]],
        exc_value: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> bool: ...
    def connect(self, timeout: float = 5.0) -> bool:
        """Connects to the VM's broker, anew if it was connected.

        Blocks for at most `timeout`.

        Args:
            timeout: Seconds to wait, 0 to 86400.

        Returns:
            `True` when it is connected, else `False`.

        Raises:
            InvalidTypeError: `timeout` is not a number.
            InvalidValueError: `timeout` is out of range.

        Errors:
            ChannelError: The VM does not run (`channel_closed`), does not answer (`channel_timeout`), or
                another user listens at the socket (`foreign_socket`).
        """
    def send_message(self, message: Mapping[str, Any]) -> bool:
        """Sends one message to the VM.

        Blocks for at most 30 s while the broker takes no more.

        Args:
            message: A dict of plain JSON types, such as `{"type": "ping"}`; docs/channel.md lists the types.

        Returns:
            `True` when it was sent, else `False`.

        Raises:
            InvalidTypeError: `message` is not a dict, or holds what JSON cannot.

        Errors:
            ChannelError: It was not sent (`channel_closed`, `channel_timeout`, `message_too_large`).
        """
    def receive_message(self, timeout: float = 1.0) -> Optional[Dict[str, Any]]:
        """Returns the next message of the VM, or `None`.

        Blocks for at most `timeout`.

        Args:
            timeout: Seconds to wait, 0 to 86400.

        Raises:
            InvalidTypeError: `timeout` is not a number.
            InvalidValueError: `timeout` is out of range.

        Errors:
            ChannelError: No message came in time (`channel_timeout`, which is not logged), or the connection
                ended (`channel_closed`).
        """
    def close(self) -> None:
        """Ends the connection.

        Does not block, except while another thread sends or receives on the channel. May be called twice.
        Does nothing in a forked child of the process that made the channel.
        """

@final
class OperationQueue:
    """The operations that one event loop waits for.

    Used by `aio` alone, on the thread of its loop. Does not block.
    """

    def __new__(cls) -> Self: ...
    def fileno(self) -> int:
        """The descriptor that is readable while operations have ended that `drain` has not returned."""
    def drain(self) -> List[Tuple[int, Any, Optional[BaseException]]]:
        """Returns each operation that has ended: its number, and its result or its exception."""
    def cancel(self, number: int) -> None:
        """Forgets an operation; one whose half would be worse than its whole goes on, any other is undone."""

@final
class VmOperations:
    """The operations on one VM: each begins at once and returns its number in the queue.

    Used by `aio` alone. Does not block.
    """

    def __new__(cls, handle: MicroVMInstance) -> Self: ...
    def start(self, queue: OperationQueue) -> int: ...
    def stop(self, queue: OperationQueue) -> int: ...
    def pause(self, queue: OperationQueue) -> int: ...
    def resume(self, queue: OperationQueue) -> int: ...
    def suspend(self, queue: OperationQueue) -> int: ...
    def stream(self, queue: OperationQueue, arguments: Dict[str, Any]) -> int: ...
    def connect(
        self, queue: OperationQueue, port: int, address: Optional[str] = None, timeout: Optional[float] = None
    ) -> int: ...
    def publish(
        self,
        queue: OperationQueue,
        port: int,
        host_port: Optional[int] = None,
        address: Optional[str] = None,
        protocol: Optional[str] = None,
        guest_address: Optional[str] = None,
    ) -> int: ...
    def ports(self, queue: OperationQueue) -> int: ...
    def upload(self, queue: OperationQueue, arguments: Dict[str, Any]) -> int: ...
    def download(self, queue: OperationQueue, arguments: Dict[str, Any]) -> int: ...
    def get_health_metrics(self, queue: OperationQueue) -> int: ...
    def get_info(self, queue: OperationQueue) -> int: ...
    def snapshot(self, queue: OperationQueue, name: str) -> int: ...
    def send_command(
        self,
        queue: OperationQueue,
        command: str,
        params: Optional[Mapping[str, Any]] = None,
        timeout: Optional[float] = None,
    ) -> int: ...

@final
class StreamOperations:
    """The operations on one program: each begins at once and returns its number in the queue.

    Used by `aio` alone. Does not block.
    """

    def __new__(cls, handle: ProcessStream) -> Self: ...
    def next(self, queue: OperationQueue, timeout: Optional[float] = None, waited: float = 0.0) -> int:
        """The next output, `None` at its end; `waited` seconds of the `timeout` have gone by."""
    def put_back(self, queue: OperationQueue, piece: Optional[Tuple[_Channel, bytes]]) -> None:
        """Gives back a piece that `next` gave to a task that was cancelled before it took it."""
    def write(self, queue: OperationQueue, data: _Bytes) -> int: ...
    def wait(self, queue: OperationQueue, timeout: Optional[float] = None) -> int: ...
    def communicate(
        self,
        queue: OperationQueue,
        input: Union[_Bytes, str, None] = None,
        timeout: Optional[float] = None,
        text: bool = False,
    ) -> int: ...

@final
class AttachedOperations:
    """The operations on a VM of another process: each begins at once and returns its number in the queue.

    Used by `aio` alone. Does not block.
    """

    def __new__(cls, handle: AttachedVM) -> Self: ...
    def send_command(
        self,
        queue: OperationQueue,
        command: str,
        params: Optional[Mapping[str, Any]] = None,
        timeout: Optional[float] = None,
    ) -> int: ...
    def stream(self, queue: OperationQueue, arguments: Dict[str, Any]) -> int: ...
    def connect(
        self, queue: OperationQueue, port: int, address: Optional[str] = None, timeout: Optional[float] = None
    ) -> int: ...
    def publish(
        self,
        queue: OperationQueue,
        port: int,
        host_port: Optional[int] = None,
        address: Optional[str] = None,
        protocol: Optional[str] = None,
        guest_address: Optional[str] = None,
    ) -> int: ...
    def ports(self, queue: OperationQueue) -> int: ...
    def upload(self, queue: OperationQueue, arguments: Dict[str, Any]) -> int: ...
    def download(self, queue: OperationQueue, arguments: Dict[str, Any]) -> int: ...
    def get_health_metrics(self, queue: OperationQueue) -> int: ...
    def get_info(self, queue: OperationQueue) -> int: ...
    def get_state(self, queue: OperationQueue) -> int: ...
    def pause(self, queue: OperationQueue) -> int: ...
    def resume(self, queue: OperationQueue) -> int: ...
    def snapshot(self, queue: OperationQueue, name: str) -> int: ...
    def suspend(self, queue: OperationQueue) -> int: ...
    def stop(self, queue: OperationQueue) -> int: ...
    def kill(self, queue: OperationQueue) -> int: ...
    def destroy(self, queue: OperationQueue) -> int: ...
    def wait(self, queue: OperationQueue, timeout: Optional[float] = None) -> int: ...

@final
class TakenEvent:
    """An event that its task has not seen yet.

    Used by `aio` alone. Does not block.
    """

    def claim(self) -> Optional[VMEvent]:
        """Returns the event, once."""
    def put_back(self) -> None:
        """Gives the event back, unless it was claimed."""

@final
class EventOperations:
    """The operations on a stream of events: each begins at once and returns its number in the queue.

    Used by `aio` alone. Does not block.
    """

    def __new__(cls, handle: EventStream) -> Self: ...
    def next(self, queue: OperationQueue, timeout: Optional[float] = None) -> int:
        """The next event; `None` at the end of the stream, and after the `timeout`, which is the stream's own where left out."""

@final
class UploadOperations:
    """One upload: each step begins at once and returns its number in the queue.

    Used by `aio` alone. Does not block.
    """

    @property
    def total(self) -> Optional[int]:
        """Bytes that there are to send; `None` where that is not known."""
    def send(self, queue: OperationQueue, rest: bool) -> int:
        """Sends the next piece of the file, or the rest of it: how many bytes were sent so far, or the result at the end."""
    def write(self, queue: OperationQueue, data: _Bytes) -> int:
        """Sends bytes: how many were sent so far, or the result when there were none."""
    def close(self) -> None:
        """Gives the upload up unless it has ended: a new file never appears in the guest."""

@final
class DownloadOperations:
    """One download: each step begins at once and returns its number in the queue.

    Used by `aio` alone. Does not block.
    """

    @property
    def total(self) -> int:
        """Bytes that there are to receive."""
    def save(self, queue: OperationQueue, rest: bool) -> int:
        """Writes the next piece to the file, or the rest of it: how many bytes have come so far, or the result at the end."""
    def read(self, queue: OperationQueue) -> int:
        """Returns the next bytes, and how many have come so far; at the end none, and the result."""
    def close(self) -> None:
        """Gives the download up unless it has ended: a file that it would have made does not appear."""

@final
class ManagerOperations:
    """The operations on a manager: each begins at once and returns its number in the queue.

    Used by `aio` alone. Does not block.
    """

    def __new__(cls, handle: MicroVMIsolationManager) -> Self: ...
    def start(self, queue: OperationQueue) -> int: ...
    def stop(self, queue: OperationQueue) -> int: ...
    def destroy_all_vms(self, queue: OperationQueue) -> int: ...
    def get_all_vms_info(self, queue: OperationQueue) -> int: ...
    def get_resource_usage(self, queue: OperationQueue) -> int: ...
    def get_health_status(self, queue: OperationQueue) -> int: ...
    def list_suspended(self, queue: OperationQueue) -> int: ...
    def export_disk(self, queue: OperationQueue, vm_id: str, path: _Path) -> int: ...
    def list_templates(self, queue: OperationQueue) -> int: ...
    def create_vm(
        self,
        queue: OperationQueue,
        isolation_type: Union[IsolationType, str],
        resource_limits: Optional[VMResourceLimits] = None,
        backend: Union[VMBackend, str, None] = None,
        network_config: Optional[VMNetworkConfig] = None,
        vm_id: Optional[str] = None,
        kernel_path: Optional[_Path] = None,
        rootfs_path: Optional[_Path] = None,
        template: Optional[str] = None,
        labels: Optional[Mapping[str, str]] = None,
    ) -> int: ...
    def resume_vm(self, queue: OperationQueue, vm_id: str) -> int: ...
    def destroy_vm(self, queue: OperationQueue, vm_id: str) -> int: ...
    def delete_template(self, queue: OperationQueue, name: str) -> int: ...
    def prepare(
        self,
        resource_limits: Optional[VMResourceLimits] = None,
        kernel_path: Optional[_Path] = None,
        rootfs_path: Optional[_Path] = None,
        progress: Optional[Callable[[str, float], Any]] = None,
    ) -> PrepareOperation:
        """The making of a template: its `next` does it, stage by stage."""

@final
class PrepareOperation:
    """The making of a template: each `next` begins at once and returns its number in the queue.

    Used by `aio` alone. Does not block.
    """

    def next(self, queue: OperationQueue) -> int:
        """The stage that begins and its fraction, `None` when the template is there. Cancelling it gives the making up."""

def check_resource_limits(
    vcpu_count: int,
    memory_mb: int,
    disk_size_mb: int,
    network_bandwidth_mbps: int,
    max_file_handles: int,
    max_processes: int,
    disk_bytes_per_s: Optional[int],
    disk_ops_per_s: Optional[int],
) -> None: ...
def check_network_config(
    tap_device: Optional[str],
    ip_address: Optional[str],
    mac_address: Optional[str],
    gateway: Optional[str],
    dns_servers: List[str],
    isolated_network: bool,
    egress: Optional[List[str]],
    ipv6: bool,
    mode: str,
) -> None: ...
def check_vm_id(text: str) -> None: ...
def begin_attach(
    queue: OperationQueue, vm_id: str, runtime_dir: Optional[_Path] = None, timeout: Optional[float] = None
) -> int:
    """Begins to reach a VM of another process; its number in the queue."""

def begin_running_vms(
    queue: OperationQueue, runtime_dir: Optional[_Path] = None, timeout: Optional[float] = None
) -> int:
    """Begins to ask the owners of this user's VMs; its number in the queue."""

def running_vms(runtime_dir: Optional[_Path] = None, timeout: Optional[float] = 2.0) -> List[VMSummary]:
    """The VMs of every process of this user, as their owners describe them.

    Blocks for as long as the owners take to answer, at most for `timeout`. Nothing of other users is looked at.

    Args:
        runtime_dir: The owners' `runtime_dir`; the default ones where left out.
        timeout: Seconds that an owner may take to answer, 0 to 86400.

    Returns:
        `VMSummary` of each VM, in the order of their ids. `error` says why there is no more of one that is
        still starting, whose owner has died, or whose owner does not answer.

    Raises:
        InvalidTypeError: An argument has the wrong type.
        InvalidValueError: An argument is out of range.
        HostError: `runtime_dir` is not this user's alone (`folder_refused`).

    Example:
        >>> vm_id in [vm["vm_id"] for vm in running_vms()]
        True
    """
def doctor(*, start: bool = False) -> DoctorReport:
    """Reports what this host can run, and what to do about what is missing.

    Blocks for about a second, longer where KVM hangs; with `start` for some seconds more. It looks at
    backends, accelerators and privileges, and makes and removes what a start makes before its VMM runs, with
    the default configuration. Needs no privilege, and reports those that are missing.

    Args:
        start: Whether to start a VM of 128 MiB on each backend that is there and have it answer a command:
            the first one connected to the network where the host lets it. Then the verdict is measured, and
            `jail` is what a VM got.

    Returns:
        A dict of plain JSON types: `verdict` (`starts` says whether VMs start here), `platform`,
        `privileges`, `network`, `jail`, `kvm`, `backends`, `starts` (empty without `start`), `guest_image`,
        `runtime_dir`, `cache_dir`, `problems` and `hints`, each of the last two with a `remedy`.

    Raises:
        HostError: The host could not be looked at (`host_error`).

    Example:
        >>> doctor(start=True)["verdict"]["starts"]
        True
    """
def next_log_records(timeout: float) -> Optional[List[Tuple[str, str, str]]]:
    """Waits up to `timeout` seconds for records; `None` once the log is closed."""
def close_events() -> None:
    """Ends every stream of events, so that the threads that wait for one can end: the interpreter exits."""
def close_log() -> None:
    """Takes no more records and wakes whoever waits for them."""
def is_exiting() -> bool:
    """Whether the interpreter is exiting, and the VMs are being destroyed."""
def shutdown() -> None:
    """Destroys every VM of this process and refuses new work; called when the interpreter exits."""
