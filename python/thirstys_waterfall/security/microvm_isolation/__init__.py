"""A microVM of its own for every browser tab, extension, session and plugin.

Example:
    >>> from thirstys_waterfall.security.microvm_isolation import IsolationType, MicroVMIsolationManager
    >>> with MicroVMIsolationManager() as manager:  # doctest: +SKIP
    ...     vm_id = manager.create_vm(IsolationType.BROWSER_TAB)
    ...     manager.start_vm(vm_id)
    ...     manager.send_command_to_vm(vm_id, "ping")
"""

from . import _logging as _logging
from ._enums import IsolationType, VMBackend, VMState
from ._errors import (
    BackendUnavailableError,
    ChannelError,
    CommandError,
    ForkedProcessError,
    HostError,
    ImageError,
    InvalidTypeError,
    InvalidValueError,
    IsolationUnavailableError,
    MicroVMError,
    NetworkUnavailableError,
    NotSupportedError,
    OperationCancelledError,
    QuotaExceededError,
    StartError,
    TemplateError,
    VmDiedError,
    VmIdTakenError,
    VmNotFoundError,
    VmStateError,
)
from ._errors import CancelledError as CancelledError
from ._errors import InvalidStateError as InvalidStateError
from ._events import EventSubscription
from ._models import VMHealthMetrics, VMNetworkConfig, VMResourceLimits
from ._native import (
    CommunicationChannel,
    EventStream,
    MicroVMInstance,
    MicroVMIsolationManager,
    ProcessStream,
    doctor,
)

__all__ = [
    "BackendUnavailableError",
    "ChannelError",
    "CommandError",
    "CommunicationChannel",
    "EventStream",
    "EventSubscription",
    "ForkedProcessError",
    "HostError",
    "ImageError",
    "InvalidTypeError",
    "InvalidValueError",
    "IsolationType",
    "IsolationUnavailableError",
    "MicroVMError",
    "MicroVMInstance",
    "MicroVMIsolationManager",
    "NetworkUnavailableError",
    "NotSupportedError",
    "OperationCancelledError",
    "ProcessStream",
    "QuotaExceededError",
    "StartError",
    "TemplateError",
    "VMBackend",
    "VMHealthMetrics",
    "VMNetworkConfig",
    "VMResourceLimits",
    "VMState",
    "VmDiedError",
    "VmIdTakenError",
    "VmNotFoundError",
    "VmStateError",
    "doctor",
]
