"""A microVM for every browser tab, extension, session and plugin.

A ``MicroVMIsolationManager`` creates, finds and destroys VMs within one quota; a ``MicroVMInstance`` is one VM. Errors
are ``MicroVMError`` and its subclasses. The docstring of each method says whether it blocks.

Example:
    >>> from thirstys_waterfall.security.microvm_isolation import IsolationType, MicroVMIsolationManager
    >>> with MicroVMIsolationManager() as manager:
    ...     vm_id = manager.create_vm(IsolationType.BROWSER_TAB)
    ...     manager.start_vm(vm_id), manager.send_command_to_vm(vm_id, "ping")["result"]
    (True, 'pong')
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
from ._types import (
    CommandAnswer,
    DoctorReport,
    ExecResult,
    ExportedDisk,
    FileContent,
    FileWritten,
    HealthReport,
    HttpResponse,
    RenderedPage,
    ResourceUsage,
    SuspendedVM,
    SystemInfo,
    TemplateInfo,
    Transferred,
    VMEvent,
    VMInfo,
)

__all__ = [
    "BackendUnavailableError",
    "ChannelError",
    "CommandAnswer",
    "CommandError",
    "CommunicationChannel",
    "DoctorReport",
    "EventStream",
    "EventSubscription",
    "ExecResult",
    "ExportedDisk",
    "FileContent",
    "FileWritten",
    "ForkedProcessError",
    "HealthReport",
    "HostError",
    "HttpResponse",
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
    "RenderedPage",
    "ResourceUsage",
    "StartError",
    "SuspendedVM",
    "SystemInfo",
    "TemplateError",
    "TemplateInfo",
    "Transferred",
    "VMBackend",
    "VMEvent",
    "VMHealthMetrics",
    "VMInfo",
    "VMNetworkConfig",
    "VMResourceLimits",
    "VMState",
    "VmDiedError",
    "VmIdTakenError",
    "VmNotFoundError",
    "VmStateError",
    "doctor",
]
