"""The closed sets of names: backends, states and kinds of isolation."""

from enum import Enum
from typing import Any, Optional


class _Named(Enum):
    """An enum that also finds its members by name or value in any case, with ``-`` or ``_``."""

    @classmethod
    def _missing_(cls, value: Any) -> Optional["_Named"]:
        if not isinstance(value, str):
            return None
        wanted = value.lower().replace("_", "-")
        for member in cls:
            if wanted in (member.value.replace("_", "-"), member.name.lower().replace("_", "-")):
                return member
        allowed = ", ".join(repr(member.value) for member in cls)
        raise ValueError("{!r} is not a valid {}: allowed are {}".format(value, cls.__name__, allowed))


class VMBackend(_Named):
    """A virtual machine monitor (VMM) that can run a VM; docs/backends.md has what differs.

    Attributes:
        FIRECRACKER: Firecracker; needs KVM.
        QEMU: QEMU with the machine ``microvm``; on KVM, or emulated (TCG) without it.
        CLOUD_HYPERVISOR: Cloud Hypervisor; needs KVM.

    Example:
        >>> VMBackend("Cloud_Hypervisor")
        <VMBackend.CLOUD_HYPERVISOR: 'cloud-hypervisor'>
    """

    FIRECRACKER = "firecracker"
    QEMU = "qemu"
    CLOUD_HYPERVISOR = "cloud-hypervisor"


class VMState(_Named):
    """Where a VM is in its life.

    Attributes:
        CREATED: It has a name and a share of the quota, and was never started.
        STARTING: Its VMM is being started.
        RUNNING: Its agent answers commands.
        PAUSED: Its vCPUs are stopped, or it is suspended to disk (``info["suspended"]``).
        STOPPING: It is being shut down.
        STOPPED: It was shut down, or the guest shut itself down; it can be started again.
        ERROR: It did not start, or it died; ``last_error`` says why, and it can be started again.
        DESTROYED: Nothing is left of it.

    Example:
        >>> VMState("running").name
        'RUNNING'
    """

    CREATED = "created"
    STARTING = "starting"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPING = "stopping"
    STOPPED = "stopped"
    ERROR = "error"
    DESTROYED = "destroyed"


class IsolationType(_Named):
    """What a VM is for: policies are set by it, and generated ids contain it.

    Attributes:
        BROWSER_TAB: One tab.
        EXTENSION: One extension.
        SESSION: One session.
        PLUGIN: One plugin.

    Example:
        >>> [kind.value for kind in IsolationType]
        ['browser_tab', 'extension', 'session', 'plugin']
    """

    BROWSER_TAB = "browser_tab"
    EXTENSION = "extension"
    SESSION = "session"
    PLUGIN = "plugin"
