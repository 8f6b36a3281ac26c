import logging
import os
from types import TracebackType
from typing import Any, Callable, Dict, List, Mapping, Optional, Protocol, Sequence, Tuple, Type, Union, type_check_only

from typing_extensions import Literal, Self, TypedDict, disjoint_base, final

from ._enums import IsolationType, VMBackend, VMState
from ._errors import MicroVMError
from ._events import EventSubscription
from ._models import VMHealthMetrics, VMNetworkConfig, VMResourceLimits

__all__ = [
    "CommunicationChannel",
    "EventStream",
    "MicroVMInstance",
    "MicroVMIsolationManager",
    "ProcessStream",
    "check_network_config",
    "check_resource_limits",
    "check_vm_id",
    "close_events",
    "close_log",
    "doctor",
    "next_log_records",
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

@type_check_only
class _Transferred(TypedDict):
    bytes: int
    crc32: int

@disjoint_base
class MicroVMIsolationManager:
    @property
    def config(self) -> Dict[str, Any]: ...
    @property
    def logger(self) -> logging.Logger: ...
    @property
    def last_error(self) -> Optional[MicroVMError]: ...
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
    def start(self) -> None: ...
    def stop(self) -> None: ...
    def create_vm(
        self,
        isolation_type: Union[IsolationType, str],
        resource_limits: Optional[VMResourceLimits] = None,
        backend: Union[VMBackend, str, None] = None,
        network_config: Optional[VMNetworkConfig] = None,
        vm_id: Optional[str] = None,
        kernel_path: Optional[str] = None,
        rootfs_path: Optional[str] = None,
        template: Optional[str] = None,
    ) -> Optional[str]:
        """Reserve quota for a VM and name it; starts no process.

        Args:
            template: A name that was given to `MicroVMInstance.snapshot`: the VM starts as a clone of that VM, with its
                programs running and its disk. What is left out here is the template's; vCPUs, memory, disk size,
                backend, kernel, image and whether there is a network cannot be otherwise.

        Returns:
            The id; `None` with `last_error` when quota is exhausted, the id is taken, or the template is missing
            (`template_not_found`), damaged (`state_damaged`) or of another shape (`state_mismatch`, naming each
            difference).
        """
    def start_vm(self, vm_id: str) -> bool: ...
    def stop_vm(self, vm_id: str) -> bool: ...
    def pause_vm(self, vm_id: str) -> bool: ...
    def resume_vm(self, vm_id: str) -> bool:
        """Let a paused VM go on, or bring a suspended one back, also one that another manager or process suspended.

        Blocks for a start's time. A suspended VM comes back under its id, with its disk, its programs where they were,
        the right time and new session keys; its state on disk is gone then. Of several processes that resume the same
        VM one does, the others get `vm_id_taken` or `vm_not_found`. A resume that fails leaves the state as it was.
        """
    def suspend_vm(self, vm_id: str) -> bool:
        """`MicroVMInstance.suspend` by id."""
    def list_suspended(self) -> List[Dict[str, Any]]:
        """The suspended VMs of this user and `cache_dir`, whichever process suspended them: `vm_id`, `created` (Unix
        seconds), `disk_bytes`, `isolation_type`, `resource_limits`, `damaged`, ...

        `usable` says whether each could be resumed on this host as the host is now; if not, `differences` names what has changed
        since, the old and the new. Blocks; reads an image that has changed.
        """
    def export_disk(self, vm_id: str, path: Union[str, "os.PathLike[str]"]) -> Optional[Dict[str, Any]]:
        """Copy the disk of a suspended VM to a new file: raw ext4, its holes kept. Blocks for the time of the copy.

        Works also for a VM that cannot be resumed any more, because its VMM or its image was replaced.

        Args:
            vm_id: A VM of `list_suspended()`, whichever process suspended it.
            path: A path at which there is no file yet; the file has mode 0600.

        Returns:
            `bytes`, and `verified`: whether the copy has the digest that was noted when the VM was suspended. `None` with
            `last_error` when there is no such VM, or it runs.

        Raises:
            InvalidValueError: There is a file at `path`.
        """
    def list_templates(self) -> List[Dict[str, Any]]:
        """The templates made by `MicroVMInstance.snapshot`: `name`, `source_vm_id`, `created` (Unix seconds),
        `disk_bytes`, `resource_limits`, `isolated_network`, `backend`, `damaged`, `usable`, `differences` (as in
        `list_suspended`), ..."""
    def delete_template(self, name: str) -> bool:
        """Remove a template of one's own; its clones run on. `False` with `last_error` when there is none.

        Raises:
            InvalidValueError: The name is malformed.
        """
    def destroy_vm(self, vm_id: str) -> bool: ...
    def destroy_all_vms(self) -> None: ...
    def get_vm(self, vm_id: str) -> Optional[MicroVMInstance]: ...
    def list_vms(
        self,
        isolation_type: Union[IsolationType, str, None] = None,
        state: Union[VMState, str, None] = None,
    ) -> List[str]: ...
    def get_vm_info(self, vm_id: str) -> Optional[Dict[str, Any]]: ...
    def get_all_vms_info(self) -> Dict[str, Dict[str, Any]]: ...
    def send_command_to_vm(
        self,
        vm_id: str,
        command: str,
        params: Optional[Mapping[str, Any]] = None,
        timeout: Optional[float] = None,
    ) -> Optional[Dict[str, Any]]: ...
    def prepare(
        self,
        resource_limits: Optional[VMResourceLimits] = None,
        kernel_path: Optional[str] = None,
        rootfs_path: Optional[str] = None,
    ) -> bool: ...
    def get_resource_usage(self) -> Dict[str, Any]: ...
    def get_health_status(self) -> Dict[str, Any]: ...
    def events(self, timeout: Optional[float] = None, capacity: int = 1024) -> EventStream: ...
    def on_event(self, callback: Callable[[Dict[str, Any]], Any], capacity: int = 1024) -> EventSubscription: ...
    def metrics(self) -> str: ...

@disjoint_base
class MicroVMInstance:
    @property
    def vm_id(self) -> str: ...
    @property
    def backend(self) -> VMBackend: ...
    @property
    def isolation_type(self) -> IsolationType: ...
    @property
    def resource_limits(self) -> VMResourceLimits: ...
    @property
    def network_config(self) -> VMNetworkConfig: ...
    @property
    def kernel_path(self) -> Optional[str]: ...
    @property
    def rootfs_path(self) -> Optional[str]: ...
    @property
    def logger(self) -> logging.Logger: ...
    @property
    def last_error(self) -> Optional[MicroVMError]: ...
    def __new__(
        cls,
        vm_id: str,
        backend: Union[VMBackend, str],
        isolation_type: Union[IsolationType, str],
        resource_limits: VMResourceLimits,
        network_config: Optional[VMNetworkConfig] = None,
        kernel_path: Optional[str] = None,
        rootfs_path: Optional[str] = None,
        template: Optional[str] = None,
    ) -> Self: ...
    def start(self) -> bool: ...
    def stop(self) -> bool: ...
    def pause(self) -> bool: ...
    def resume(self) -> bool:
        """Let a paused VM go on, or bring a suspended one back; see `MicroVMIsolationManager.resume_vm`."""
    def snapshot(self, name: str) -> None:
        """Make a template of the VM as it is now: memory, running programs, disk.

        The VM goes on: it stands still for some milliseconds, and for as long as what is on its disk takes to be copied
        where the file system cannot share it; commands and streams that are under way get their answers. A paused VM is
        woken for a moment. Clones begin where the VM stood, each with an identity of its own; requests that were under
        way are cancelled in them. They share all that the VM's memory held: docs/templates.md says what that means.

        Args:
            name: 1 to 64 of the letters, digits, `.`, `_` and `-`, beginning with a letter, digit or `_`.

        Raises:
            InvalidValueError: The name is malformed.
            InvalidStateError: The VM is neither running nor paused, or it is suspended.
            TemplateError: The name is taken (`template_taken`).
            CommandError: A program in the guest cannot be stopped (`busy`); the VM goes on.
            HostError: The state could not be written; the VM goes on, and nothing of the template is left.
        """
    def suspend(self) -> bool:
        """Write the VM's state to disk, below `cache_dir`, and end its process.

        The VM is PAUSED then, with `info["suspended"]` true and `pid` `None`; what it had reserved of the manager's
        quota is given back. It stays suspended when its manager stops. Waits up to 5 s for commands and streams to end.

        Returns:
            `False` with `last_error` when it is neither running nor paused (`invalid_state`), commands or streams do not
            end (`busy`), or the state could not be written (`host_error`); the VM goes on then.
        """
    def get_state(self) -> VMState: ...
    def get_health_metrics(self) -> VMHealthMetrics: ...
    def send_command(
        self, command: str, params: Optional[Mapping[str, Any]] = None, timeout: Optional[float] = None
    ) -> Optional[Dict[str, Any]]: ...
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
    ) -> ProcessStream: ...
    def upload(
        self,
        source: Union[_Path, _Reads],
        guest_path: str,
        offset: Optional[int] = None,
        mode: Optional[int] = None,
        progress: Optional[Callable[[int, Optional[int]], Any]] = None,
        timeout: Optional[float] = None,
    ) -> _Transferred: ...
    def download(
        self,
        guest_path: str,
        destination: Union[_Path, _Writes],
        offset: Optional[int] = None,
        progress: Optional[Callable[[int, Optional[int]], Any]] = None,
        max_bytes: Optional[int] = None,
        timeout: Optional[float] = None,
    ) -> _Transferred: ...
    def get_info(self) -> Dict[str, Any]: ...

@final
class ProcessStream:
    @property
    def exit_code(self) -> Optional[int]: ...
    @property
    def pid(self) -> int: ...
    def __iter__(self) -> Self: ...
    def __next__(self) -> Tuple[_Channel, bytes]: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        exc_type: Optional[Type[BaseException]],
        exc_value: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> bool: ...
    def write(self, data: _Bytes) -> bool: ...
    def close_stdin(self) -> None: ...
    def signal(self, number: int) -> None: ...
    def resize(self, rows: int, columns: int) -> None: ...
    def wait(self, timeout: Optional[float] = None) -> Optional[int]: ...
    def kill(self) -> None: ...

@final
class EventStream:
    @property
    def dropped(self) -> int: ...
    def __iter__(self) -> Self: ...
    def __next__(self) -> Dict[str, Any]: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        exc_type: Optional[Type[BaseException]],
        exc_value: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> bool: ...
    def get(self, timeout: Optional[float] = None) -> Optional[Dict[str, Any]]: ...
    def close(self) -> None: ...
    def _wait(self) -> Optional[Dict[str, Any]]: ...

@disjoint_base
class CommunicationChannel:
    @property
    def vm_id(self) -> str: ...
    @property
    def socket_path(self) -> str: ...
    @property
    def logger(self) -> logging.Logger: ...
    @property
    def last_error(self) -> Optional[MicroVMError]: ...
    def __new__(cls, vm_id: str, socket_path: Optional[str] = None) -> Self: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        exc_type: Optional[Type[BaseException]],
        exc_value: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> bool: ...
    def connect(self, timeout: float = 5.0) -> bool: ...
    def send_message(self, message: Mapping[str, Any]) -> bool: ...
    def receive_message(self, timeout: float = 1.0) -> Optional[Dict[str, Any]]: ...
    def close(self) -> None: ...

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
) -> None: ...
def check_vm_id(text: str) -> None: ...
def doctor() -> Dict[str, Any]: ...
def next_log_records(timeout: float) -> Optional[List[Tuple[str, str, str]]]: ...
def close_events() -> None: ...
def close_log() -> None: ...
def shutdown() -> None: ...
