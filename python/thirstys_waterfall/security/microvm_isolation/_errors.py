"""The exceptions of the package. Branch on the class or on ``code``; the message is for people and may change."""

import errno
import subprocess
from typing import Any, Dict, Optional, Tuple, Type


class MicroVMError(Exception):
    """Base of every exception of this package.

    Attributes:
        code: A stable name of the failure, such as ``"quota_exceeded"``.
        details: Facts for programs beside the message, such as the tail of the guest's console.
        __cause__: The ``OSError`` of the system call that failed on this host, with its ``errno``; otherwise ``None``.

    Args:
        message: What failed, on what, and what to do: for people.
        code: The stable name.
        details: The facts; copied.

    Example:
        >>> try:
        ...     VMResourceLimits(memory_mb=1)
        ... except MicroVMError as error:
        ...     error.code
        'invalid_value'
    """

    code: str
    details: Dict[str, Any]

    def __init__(self, message: str, code: str = "microvm_error", details: Optional[Dict[str, Any]] = None) -> None:
        super().__init__(message)
        self.code = code
        self.details = {} if details is None else dict(details)

    def __reduce__(self) -> Tuple[Any, ...]:
        return type(self), (str(self), self.code, self.details)


class InvalidTypeError(MicroVMError, TypeError):
    """An argument or a configuration value has the wrong type (``invalid_type``)."""


class InvalidValueError(MicroVMError, ValueError):
    """An argument or a configuration value is out of range or malformed (``invalid_value``)."""


class QuotaExceededError(MicroVMError):
    """The manager's vCPU or memory quota has no room for the VM (``quota_exceeded``)."""


class VmIdTakenError(MicroVMError):
    """Another VM of this user, in this or another process, has the id (``vm_id_taken``)."""


class VmNotFoundError(MicroVMError):
    """The manager has no VM of this id (``vm_not_found``)."""


class TemplateError(MicroVMError):
    """A template of a snapshot, or the state of a suspended VM, cannot be made or used.

    Codes: ``template_not_found``; ``template_taken``, the name is in use; ``state_mismatch``, with
    ``details["differences"]`` naming what differs, such as limits, backend, the VMM's version or the CPU;
    ``state_damaged``, its digests do not match, and it is never used.
    """


class VmStateError(MicroVMError):
    """The VM's state does not allow the operation (``invalid_state``)."""


class BackendUnavailableError(MicroVMError):
    """The backend cannot run on this host; ``details["remedy"]`` says what to install (``backend_unavailable``)."""


class NotSupportedError(MicroVMError):
    """The VM's backend cannot do this; ``details["remedy"]`` names one that can (``not_supported``)."""


class IsolationUnavailableError(MicroVMError):
    """The host does not give what ``min_isolation`` or ``jail="strict"`` ask for (``isolation_unavailable``)."""


class NetworkUnavailableError(MicroVMError):
    """The VM cannot be connected to a network on this host, and the message says why (``network_unavailable``)."""


class ImageError(MicroVMError):
    """A kernel or root file system cannot be read or used (``image_unreadable``, ``image_invalid``)."""


class StartError(MicroVMError):
    """The VM did not start (``start_failed``, ``start_timeout``).

    ``details`` has the stage that failed and the tails of the guest's console and of the VMM's stderr.
    """


class VmDiedError(MicroVMError):
    """The VM's process ended without being asked to (``vm_died``)."""


class ChannelError(MicroVMError):
    """The channel to the guest failed.

    Codes: ``channel_closed``, ``channel_timeout``, ``handshake_failed``, ``message_too_large``,
    ``checksum_mismatch``, ``foreign_socket`` (another user listens at the VM's socket, or could exchange its path; nothing was sent).
    ``details["sent"]`` of ``channel_closed``, ``channel_timeout`` and ``message_too_large`` is ``False`` when
    nothing reached the guest, so that the command can safely be sent again, and ``True`` when it was sent
    and may have run.
    """


class CommandError(MicroVMError):
    """The guest refused or failed a command; ``code`` is the guest's own, such as ``unknown_action``."""


class PortRefusedError(CommandError, ConnectionRefusedError):
    """No program of the guest listens at the port (``connection_refused``).

    ``except ConnectionRefusedError`` catches it, too, so that what waits for a server of this host waits for one in a VM.

    Args:
        message: What failed, on what, and what to do: for people.
        code: The stable name.
        details: The facts; copied.
    """

    def __init__(self, message: str, code: str = "connection_refused", details: Optional[Dict[str, Any]] = None) -> None:
        super().__init__(message, code, details)
        self.errno = errno.ECONNREFUSED


class ProgramFailedError(MicroVMError, subprocess.CalledProcessError):
    """A program of ``VM.run(..., check=True)`` did not end with exit code 0 (``program_failed``).

    ``except subprocess.CalledProcessError`` catches it, too.

    Args:
        cmd: The program and its arguments, as they were given.
        returncode: The exit code, or the negative number of the signal that ended the program.
        output: What it wrote to stdout; also ``stdout``.
        stderr: What it wrote to stderr.
    """

    def __init__(self, cmd: Any, returncode: int, output: Any = None, stderr: Any = None) -> None:
        subprocess.CalledProcessError.__init__(self, returncode, cmd, output, stderr)
        self.code = "program_failed"
        self.details = {"returncode": returncode}

    def __reduce__(self) -> Tuple[Any, ...]:
        return type(self), (self.cmd, self.returncode, self.output, self.stderr)


class ProgramTimeoutError(MicroVMError, subprocess.TimeoutExpired):
    """A program of ``VM.run(..., timeout=...)`` did not end in time and was killed (``program_timeout``).

    ``except subprocess.TimeoutExpired`` catches it, too.

    Args:
        cmd: The program and its arguments, as they were given.
        timeout: Seconds that it was given, more than 0 and at most 86400.
        output: What it wrote to stdout until then; also ``stdout``.
        stderr: What it wrote to stderr until then.
    """

    def __init__(self, cmd: Any, timeout: float, output: Any = None, stderr: Any = None) -> None:
        subprocess.TimeoutExpired.__init__(self, cmd, timeout, output, stderr)
        self.code = "program_timeout"
        self.details = {"timeout_s": timeout}

    def __reduce__(self) -> Tuple[Any, ...]:
        return type(self), (self.cmd, self.timeout, self.output, self.stderr)


class HostError(MicroVMError):
    """A system call or the VMM failed on the host (``host_error``, ``vmm_error``, ``folder_refused``, ``limit_too_low``,
    ``port_unavailable``).

    ``folder_refused`` is a ``runtime_dir`` or ``cache_dir`` that cannot be trusted: ``details`` has ``field``, ``path``,
    ``reason`` and ``remedy``.
    ``port_unavailable`` is a port of the host that cannot be listened at: ``details`` has ``address``, ``host_port``, ``reason``
    and ``remedy``.
    ``limit_too_low`` is a limit of this process (getrlimit(2)), named in ``details``, that leaves a VMM too little.
    """


class ForkedProcessError(MicroVMError):
    """A handle of a parent process was used in a forked child (``forked_process``); make a new one there."""


class OperationCancelledError(MicroVMError):
    """The VM was destroyed while the operation ran, or its wait was interrupted (``cancelled``)."""


# Their names in earlier versions. `import *` leaves them out, or they would hide asyncio's.
CancelledError = OperationCancelledError
InvalidStateError = VmStateError


# The left column is Error::code() of the Rust core (src/error.rs).
_CLASSES: Dict[str, Type[MicroVMError]] = {
    "invalid_type": InvalidTypeError,
    "invalid_value": InvalidValueError,
    "quota_exceeded": QuotaExceededError,
    "vm_id_taken": VmIdTakenError,
    "vm_not_found": VmNotFoundError,
    "template_not_found": TemplateError,
    "template_taken": TemplateError,
    "state_mismatch": TemplateError,
    "state_damaged": TemplateError,
    "invalid_state": VmStateError,
    "backend_unavailable": BackendUnavailableError,
    "not_supported": NotSupportedError,
    "isolation_unavailable": IsolationUnavailableError,
    "network_unavailable": NetworkUnavailableError,
    "image_unreadable": ImageError,
    "image_invalid": ImageError,
    "start_failed": StartError,
    "start_timeout": StartError,
    "vm_died": VmDiedError,
    "channel_closed": ChannelError,
    "channel_timeout": ChannelError,
    "handshake_failed": ChannelError,
    "foreign_socket": ChannelError,
    "message_too_large": ChannelError,
    "checksum_mismatch": ChannelError,
    "vmm_error": HostError,
    "host_error": HostError,
    "folder_refused": HostError,
    "limit_too_low": HostError,
    "port_unavailable": HostError,
    "forked_process": ForkedProcessError,
    "cancelled": OperationCancelledError,
}


# Of the guest's codes, those that have a class of their own.
_OF_GUEST: Dict[str, Type[MicroVMError]] = {"connection_refused": PortRefusedError}


def make_error(code: str, message: str, details: Optional[Dict[str, Any]] = None) -> MicroVMError:
    """Build the exception for a code of the core; a code that is not the core's is the guest's."""
    known = _CLASSES.get(code) or _OF_GUEST.get(code, CommandError)
    return known(message, code, details)
