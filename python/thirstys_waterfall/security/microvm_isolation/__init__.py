"""A microVM for every browser tab, extension, session and plugin.

A ``MicroVMIsolationManager`` creates, finds and destroys VMs within one quota; a ``VM`` is one that runs, with the names
of ``subprocess`` and ``pathlib``, and a ``MicroVMInstance`` is one with all that it can. Errors are ``MicroVMError`` and its
subclasses. The docstring of each method says whether it blocks.

Example:
    >>> from thirstys_waterfall.security.microvm_isolation import MicroVMIsolationManager
    >>> with MicroVMIsolationManager() as manager, manager.run_vm() as vm:
    ...     vm.run(["echo", "hello"]).stdout
    'hello\\n'
"""

from . import _logging as _logging
from ._attach import AttachedVM, attach
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
    PortRefusedError,
    ProgramFailedError,
    ProgramTimeoutError,
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
from ._manager import MicroVMIsolationManager
from ._models import VMHealthMetrics, VMNetworkConfig, VMResourceLimits
from ._native import (
    CommunicationChannel,
    EventStream,
    MicroVMInstance,
    ProcessStream,
    PublishedPort,
    doctor,
    running_vms,
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
    PortInfo,
    RenderedPage,
    ResourceUsage,
    SuspendedVM,
    SystemInfo,
    TemplateInfo,
    Transferred,
    VMEvent,
    VMInfo,
    VMSummary,
)
from ._vm import VM, CompletedProgram

__version__ = "0.1.0"

__all__ = [
    "AttachedVM",
    "BackendUnavailableError",
    "ChannelError",
    "CommandAnswer",
    "CommandError",
    "CommunicationChannel",
    "CompletedProgram",
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
    "PortInfo",
    "PortRefusedError",
    "ProcessStream",
    "ProgramFailedError",
    "ProgramTimeoutError",
    "PublishedPort",
    "QuotaExceededError",
    "RenderedPage",
    "ResourceUsage",
    "StartError",
    "SuspendedVM",
    "SystemInfo",
    "TemplateError",
    "TemplateInfo",
    "Transferred",
    "VM",
    "VMBackend",
    "VMEvent",
    "VMHealthMetrics",
    "VMInfo",
    "VMNetworkConfig",
    "VMResourceLimits",
    "VMState",
    "VMSummary",
    "VmDiedError",
    "VmIdTakenError",
    "VmNotFoundError",
    "VmStateError",
    "attach",
    "doctor",
    "running_vms",
]
