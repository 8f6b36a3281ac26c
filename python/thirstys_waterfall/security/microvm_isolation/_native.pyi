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
    """Creates, finds and destroys microVMs within one quota. All methods may be called from any thread, and release the GIL
    while they wait.

    Args:
        config: A dict; the README lists its keys. An unknown key or a wrong value raises. With `"raise_on_error": True`
            methods raise what they otherwise keep as `last_error` behind `False` or `None`.

    Example:
        >>> with MicroVMIsolationManager() as manager:  # doctest: +SKIP
        ...     vm = manager.get_vm(manager.create_vm("browser_tab"))
        ...     vm.start(), vm.send_command("ping")
    """

    @property
    def config(self) -> Dict[str, Any]:
        """The configuration as it was given, copied."""
    @property
    def logger(self) -> logging.Logger:
        """The package's logger, `thirstys_waterfall.security.microvm_isolation`; it has no handlers of its own."""
    @property
    def last_error(self) -> Optional[MicroVMError]:
        """The reason of the last failure, with a stable `code`; `None` when there was none. A success does not clear it."""
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
        """Begins to clean up dead VMs, to enforce `policies` and to fill the `pool`, and removes what dead processes left behind.

        Blocks for milliseconds, longer where much is left. May be called twice. What cannot be removed is logged. A `runtime_dir` or
        `cache_dir` that is refused (`host_error`) is the `last_error`, raised with `raise_on_error`, and nothing is begun then.
        """
    def stop(self) -> None:
        """Destroys every VM and ends what `start` began; suspended VMs stay on disk.

        Blocks until nothing is left, up to some seconds. May be called twice; does nothing in a forked child of the process that made
        the manager. Streams of events end.
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
    ) -> Optional[str]:
        """Reserves quota for a VM and names it; starts no process, and works before `start`.

        Args:
            isolation_type: What the VM is for; generated ids contain its value.
            resource_limits: What it may have; `default_...` of the configuration where left out.
            backend: The VMM; the best that this host can run where left out.
            network_config: Isolated where left out.
            vm_id: 1 to 64 of the letters, digits, `.`, `_` and `-`, beginning with a letter or digit.
            kernel_path: A kernel of one's own, uncompressed with a PVH entry.
            rootfs_path: An ext4 image; it is never written to.
            template: A name that was given to `MicroVMInstance.snapshot`: the VM starts as a clone of that VM, with its
                programs running and its disk. What is left out here is the template's; vCPUs, memory, disk size,
                backend, kernel, image and whether there is a network cannot be otherwise.

        Returns:
            The id; `None` with `last_error` when quota or the host's memory is exhausted (`quota_exceeded`), the id is taken
            (`vm_id_taken`), or the template is missing (`template_not_found`), damaged (`state_damaged`) or of another shape
            (`state_mismatch`, naming each difference).

        Raises:
            TypeError: An argument has the wrong type.
            ValueError: An argument is out of range or malformed; the message names it.
        """
    def start_vm(self, vm_id: str) -> bool:
        """`MicroVMInstance.start` by id. `False` with `last_error` also when there is no such VM (`vm_not_found`)."""
    def stop_vm(self, vm_id: str) -> bool:
        """`MicroVMInstance.stop` by id. `False` with `last_error` also when there is no such VM (`vm_not_found`)."""
    def pause_vm(self, vm_id: str) -> bool:
        """`MicroVMInstance.pause` by id. `False` with `last_error` also when there is no such VM (`vm_not_found`)."""
    def resume_vm(self, vm_id: str) -> bool:
        """Lets a paused VM go on, or brings a suspended one back, also one that another manager or process suspended.

        Blocks for a start's time. A suspended VM comes back under its id, with its disk, its programs where they were,
        the right time and new session keys; its state on disk is gone then. Of several callers that resume the same
        VM one does, the others get `vm_id_taken` or `vm_not_found`. A resume that fails leaves the state as it was; it can fail with
        `quota_exceeded`, for quota is reserved anew.
        """
    def suspend_vm(self, vm_id: str) -> bool:
        """`MicroVMInstance.suspend` by id. `False` with `last_error` also when there is no such VM (`vm_not_found`)."""
    def list_suspended(self) -> List[Dict[str, Any]]:
        """The suspended VMs of this user and `cache_dir`, whichever process suspended them: `vm_id`, `created` (Unix
        seconds), `disk_bytes`, `isolation_type`, `resource_limits`, `damaged`, ...

        `usable` says whether each could be resumed on this host as the host is now; if not, `differences` names what has
        changed since, the old and the new. Blocks; reads an image that has changed.
        """
    def export_disk(self, vm_id: str, path: _Path) -> Optional[Dict[str, Any]]:
        """Copies the disk of a suspended VM to a new file: raw ext4, its holes kept. Blocks for the time of the copy.

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
        `list_suspended`), ...
        """
    def delete_template(self, name: str) -> bool:
        """Removes a template of one's own; its clones run on. `False` with `last_error` when there is none.

        Raises:
            ValueError: The name is malformed.
        """
    def destroy_vm(self, vm_id: str) -> bool:
        """Removes a VM, in whatever state, every trace of it and its suspended state; gives its quota back.

        Blocks for some 100 ms. A start that is under way is cancelled. `False` with `last_error` when there is no such VM
        (`vm_not_found`), or it is suspended and resumed by another caller at this moment (`vm_id_taken`).
        """
    def destroy_all_vms(self) -> None:
        """Destroys every VM of this manager, side by side; suspended VMs stay on disk."""
    def get_vm(self, vm_id: str) -> Optional[MicroVMInstance]:
        """The VM of this id, the same object each time; `None` when there is none.

        Raises:
            TypeError: The id is no string.
        """
    def list_vms(
        self,
        isolation_type: Union[IsolationType, str, None] = None,
        state: Union[VMState, str, None] = None,
    ) -> List[str]:
        """The ids of the VMs of a type and in a state, all of them by default, in the order of their creation.

        Raises:
            ValueError: There is no such type or state.
        """
    def get_vm_info(self, vm_id: str) -> Optional[Dict[str, Any]]:
        """`MicroVMInstance.get_info` by id; `None` when there is no such VM."""
    def get_all_vms_info(self) -> Dict[str, Dict[str, Any]]:
        """`MicroVMInstance.get_info` of every VM, by id; all are asked at the same time."""
    def send_command_to_vm(
        self,
        vm_id: str,
        command: str,
        params: Optional[Mapping[str, Any]] = None,
        timeout: Optional[float] = None,
    ) -> Optional[Dict[str, Any]]:
        """`MicroVMInstance.send_command` by id; `None` with `last_error` also when there is no such VM (`vm_not_found`)."""
    def prepare(
        self,
        resource_limits: Optional[VMResourceLimits] = None,
        kernel_path: Optional[_Path] = None,
        rootfs_path: Optional[_Path] = None,
    ) -> bool:
        """Makes the template of VMs of this kind ahead of time, so that the first one, too, starts as a clone.

        Blocks for a boot's time, seconds without hardware virtualization; at once when it is there. Reserves no quota. `False` with
        `last_error` as for a start that fails.
        """
    def get_resource_usage(self) -> Dict[str, Any]:
        """What there is and what is reserved, as a dict.

        `total_vms`; `vcpus_allocated`, `vcpus_available`, `memory_allocated_mb`, `memory_available_mb` (of the quota, MiB);
        `vms_by_type`, `vms_by_state`; `pool`, for each entry `ready` of `wanted`; `templates`, `own_templates` and `suspended`, each
        `count` and `disk_bytes`. Suspended VMs reserve nothing. Looks at the cache folder, so it may take milliseconds.
        """
    def get_health_status(self) -> Dict[str, Any]:
        """Looks at every VM now: `total_vms`, `healthy_vms`, `unhealthy_vms` (dead ones, too), and `resource_usage`.

        Blocks for at most 2 s where a guest does not answer.
        """
    def events(self, timeout: Optional[float] = None, capacity: int = 1024) -> EventStream:
        """What happens from now on, as an iterator of dicts; it ends with the manager, or when `timeout` passes without one.

        Args:
            timeout: Seconds to wait for each event, up to 86400; without end where left out.
            capacity: Events that wait to be taken, 1 to 1048576; the oldest are lost after that (`EventStream.dropped`).
        """
    def on_event(self, callback: Callable[[Dict[str, Any]], Any], capacity: int = 1024) -> EventSubscription:
        """Calls `callback` with each event from now on, on a thread of its own, until the subscription is closed.

        An exception of the callback is logged and the next event delivered. `capacity` as in `events`.

        Raises:
            TypeError: `callback` is not callable.
        """
    def metrics(self) -> str:
        """The manager and its VMs as OpenMetrics text; asks no VM anything: figures are those of the last look at each."""

@disjoint_base
class MicroVMInstance:
    """One microVM: `start`, `stop`, `pause`, `resume`, commands and health. Usable on its own, without a manager."""

    @property
    def vm_id(self) -> str:
        """The VM's name."""
    @property
    def backend(self) -> VMBackend:
        """The VMM that was asked for; QEMU where the best was. `get_info()["backend"]` says which one runs."""
    @property
    def isolation_type(self) -> IsolationType:
        """What the VM is for."""
    @property
    def resource_limits(self) -> VMResourceLimits:
        """What the VM may have: a copy, changing it changes nothing."""
    @property
    def network_config(self) -> VMNetworkConfig:
        """The network that was asked for: a copy. `get_info()["network_config"]` says what a running VM got."""
    @property
    def kernel_path(self) -> Optional[str]:
        """The kernel of the VM's own; `None`: the one that comes with the package."""
    @property
    def rootfs_path(self) -> Optional[str]:
        """The image of the VM's own; `None`: the guest that comes with the package."""
    @property
    def logger(self) -> logging.Logger:
        """The package's logger, `thirstys_waterfall.security.microvm_isolation`; it has no handlers of its own."""
    @property
    def last_error(self) -> Optional[MicroVMError]:
        """The reason of the last failure, with a stable `code`; `None` when there was none. A success does not clear it."""
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
    ) -> Self: ...
    def start(self) -> bool:
        """Boots the VM, or clones a template, and waits for its agent; `True` at once when it runs.

        Blocks for 30 to 300 ms as a clone, for seconds where there is no template yet, at most for `start_timeout_s`.
        Ctrl-C undoes it. Starting a stopped or failed VM gives it a new disk. A connected VM needs CAP_NET_ADMIN.

        Returns:
            `False` with `last_error`: the state does not allow it (`invalid_state`) or quota is exhausted (`quota_exceeded`), and
            nothing has changed; or it did not come up (`start_failed`, `start_timeout`, `backend_unavailable`,
            `isolation_unavailable`, `network_unavailable`, `image_invalid`, ...), and it is in ERROR, with nothing running.
        """
    def stop(self) -> bool:
        """Shuts the VM down: the guest is asked, then the VMM told, then killed; `True` at once when it is stopped.

        Blocks for at most 10 s. What is on its disk is gone; a suspended VM's state is thrown away. Its quota stays
        reserved, but for a VM that was suspended. `False` with `last_error` when it was never started or is destroyed (`invalid_state`).
        """
    def pause(self) -> bool:
        """Stops the vCPUs; memory and disk stay. `False` with `last_error` unless it runs (`invalid_state`)."""
    def resume(self) -> bool:
        """Lets a paused VM go on and sets its clock, or brings a suspended one back; see `MicroVMIsolationManager.resume_vm`."""
    def snapshot(self, name: str) -> None:
        """Makes a template of the VM as it is now: memory, running programs, disk.

        The VM goes on: it stands still for some milliseconds, and for as long as what is on its disk takes to be copied
        where the file system cannot share it; commands and streams that are under way get their answers. A paused VM is
        woken for a moment. Clones begin where the VM stood, each with an identity of its own; requests that were under
        way are cancelled in them. They share all that the VM's memory held: docs/templates.md says what that means.

        Args:
            name: 1 to 64 of the letters, digits, `.`, `_` and `-`, beginning with a letter, digit or `_`.

        Raises:
            InvalidValueError: The name is malformed.
            VmStateError: The VM is neither running nor paused, or it is suspended.
            TemplateError: The name is taken (`template_taken`).
            CommandError: A program in the guest cannot be stopped (`busy`); the VM goes on.
            HostError: The state could not be written; the VM goes on, and nothing of the template is left.
        """
    def suspend(self) -> bool:
        """Writes the VM's state to disk, below `cache_dir`, and ends its process.

        The VM is PAUSED then, with `info["suspended"]` true and `pid` `None`; what it had reserved of the manager's
        quota is given back. It stays suspended when its manager stops. Waits up to 5 s for commands and streams to end.

        Returns:
            `False` with `last_error` when it is neither running nor paused (`invalid_state`), commands or streams do not
            end (`busy`), or the state could not be written (`host_error`); the VM goes on then.
        """
    def get_state(self) -> VMState:
        """Where the VM is in its life. Does not block."""
    def get_health_metrics(self) -> VMHealthMetrics:
        """Looks at the VM now: its process, its drives and its agent. Blocks for at most 2 s where the guest does not answer."""
    def send_command(
        self, command: str, params: Optional[Mapping[str, Any]] = None, timeout: Optional[float] = None
    ) -> Optional[Dict[str, Any]]:
        """Asks the agent in the guest; blocks until it answers.

        Args:
            command: Such as `ping`, `exec`, `read_file`; docs/channel.md lists them.
            params: The command's own; plain JSON types, and bytes for data.
            timeout: Seconds to wait, up to 86400; `command_timeout_s` where left out, or what `params` allows a program.

        Returns:
            `{"status": "ok", "result": ...}` or `{"status": "error", "error": {"code", "message", ...}}`, as the guest says; `None`
            with `last_error` when there was no answer: the VM does not run (`invalid_state`), died (`vm_died`), or the channel
            failed (`channel_timeout`, `channel_closed`; `details["sent"]` says whether it may have been done).

        Raises:
            TypeError, ValueError: An argument is none that can be sent.

        Example:
            >>> vm.send_command("exec", {"program": "/bin/echo", "args": ["hello"]})["result"]["stdout"]  # doctest: +SKIP
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
        """Runs a program live; see `ProcessStream`. `timeout` is how long it may run, seconds. Raises when it does not start,
        or when the guest does not begin within `command_timeout_s`.
        """
    def upload(
        self,
        source: Union[_Path, _Reads],
        guest_path: str,
        offset: Optional[int] = None,
        mode: Optional[int] = None,
        progress: Optional[Callable[[int, Optional[int]], Any]] = None,
        timeout: Optional[float] = None,
    ) -> _Transferred:
        """Writes a file of the guest from a path or an object with `read`. An existing file keeps its mode and owner; a new one
        gets the source's permission bits (0644 for an object); `mode` sets others. Raises when it fails, or when the guest
        takes nothing for `timeout` seconds (by default `command_timeout_s`).
        """
    def download(
        self,
        guest_path: str,
        destination: Union[_Path, _Writes],
        offset: Optional[int] = None,
        progress: Optional[Callable[[int, Optional[int]], Any]] = None,
        max_bytes: Optional[int] = None,
        timeout: Optional[float] = None,
    ) -> _Transferred:
        """Reads a file of the guest into a path or an object with `write`. An existing file keeps its mode and owner; a new one
        gets the guest file's permission bits, less the umask. Raises when it fails, when the guest sends nothing for `timeout`
        seconds (by default `command_timeout_s`), or more than `max_bytes` (by default, what the VM's disk, memory and image
        can hold).
        """
    def get_info(self) -> Dict[str, Any]:
        """Everything there is to know about the VM, as plain JSON types; looks at it as `get_health_metrics` does.

        `vm_id`, `backend`, `isolation_type`, `state`, `suspended`, `pid`, `start` (how it came to be, and how long each stage took),
        `resource_limits`, `network_config`, `jail` and `limits` (what confines it, and what could not be had), `health_metrics`,
        `health`, `socket_path`, `last_error`, ...
        """

@final
class ProcessStream:
    """A running program: an iterator of `("stdout" | "stderr", bytes)`. Leaving its `with` block, or dropping it, kills it.
    Ctrl-C in one of its methods raises and leaves it running.
    """

    @property
    def exit_code(self) -> Optional[int]:
        """The exit code, the negative number of the signal that ended the program, or `None` while its output was not taken
        to the end.
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
        """Writes to the program's input, as fast as it reads; `False` when it reads no more. Blocks while the program does not
        read, so also while it waits for its own output to be taken: take that on another thread, or write less than a pipe
        holds (64 KiB) at a time.
        """
    def close_stdin(self) -> None:
        """Ends the program's input."""
    def signal(self, number: int) -> None:
        """Sends a signal, 1 to 64, to the program's process group; SIGKILL ends all its descendants."""
    def resize(self, rows: int, columns: int) -> None:
        """Tells the program's terminal its size; `ValueError` for a program that was started without `pty`."""
    def wait(self, timeout: Optional[float] = None) -> Optional[int]:
        """Waits for the program's end and gives its exit code, `-n` after signal `n`, -9 after `kill()`. Output that was not taken
        goes to `on_output`, or is dropped. A program that its `timeout` ended raises `CommandError` once (`timeout`), then
        gives -9. Ctrl-C raises and leaves the program running: `wait()` again, `kill()` it, or leave its `with` block.
        """
    def kill(self) -> None:
        """Kills the program and all its descendants; `wait()` then gives -9. Nothing when it has ended."""

@final
class EventStream:
    """A manager's events from its making on: an iterator of dicts, which ends with the manager."""

    @property
    def dropped(self) -> int:
        """How many events were lost because nobody took them in time."""
    def __iter__(self) -> Self: ...
    def __next__(self) -> Dict[str, Any]: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        exc_type: Optional[Type[BaseException]],
        exc_value: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> bool: ...
    def get(self, timeout: Optional[float] = None) -> Optional[Dict[str, Any]]:
        """The next event, a dict; `None` when none came within `timeout` seconds (the stream's own where left out), or when there
        will be none.
        """
    def close(self) -> None:
        """Hears no more; what has come can still be taken. May be called twice; does nothing in a forked child."""
    def _wait(self) -> Optional[Dict[str, Any]]: ...

@disjoint_base
class CommunicationChannel:
    """A connection to one VM's agent, from any process of the same user."""

    @property
    def vm_id(self) -> str:
        """The name of the VM."""
    @property
    def socket_path(self) -> str:
        """Where the VM's broker listens, or will."""
    @property
    def logger(self) -> logging.Logger:
        """The package's logger, `thirstys_waterfall.security.microvm_isolation`; it has no handlers of its own."""
    @property
    def last_error(self) -> Optional[MicroVMError]:
        """The reason of the last failure, with a stable `code`; `None` when there was none. A success does not clear it."""
    def __new__(cls, vm_id: str, socket_path: Optional[_Path] = None) -> Self: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        exc_type: Optional[Type[BaseException]],
        exc_value: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> bool: ...
    def connect(self, timeout: float = 5.0) -> bool:
        """Connects to the VM's broker, within `timeout` seconds; anew if it was connected.

        `False` with `last_error` when the VM does not run in a process of this user, or does not answer (`channel_closed`,
        `channel_timeout`).
        """
    def send_message(self, message: Mapping[str, Any]) -> bool:
        """Sends one message, a dict of plain JSON types such as `{"type": "ping"}`; docs/channel.md lists them.

        Blocks for at most 30 s, as long as the broker takes no more. `False` with `last_error` when it was not sent.
        """
    def receive_message(self, timeout: float = 1.0) -> Optional[Dict[str, Any]]:
        """The next message within `timeout` seconds; `None` with `last_error` when none came (`channel_timeout`) or the
        connection ended (`channel_closed`).
        """
    def close(self) -> None:
        """Ends the connection. May be called twice; does nothing in a forked child of the process that made the channel."""

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
def doctor() -> Dict[str, Any]:
    """Tells what this host can run: looks at backends, accelerators and privileges, and makes and removes what a start makes
    before its VMM runs, with the default configuration. Blocks for a second, or some where KVM hangs.
    """
def next_log_records(timeout: float) -> Optional[List[Tuple[str, str, str]]]: ...
def close_events() -> None: ...
def close_log() -> None: ...
def shutdown() -> None: ...
