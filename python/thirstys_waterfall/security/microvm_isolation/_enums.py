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
    """A virtual machine monitor that can run a VM."""

    FIRECRACKER = "firecracker"
    QEMU = "qemu"
    CLOUD_HYPERVISOR = "cloud-hypervisor"


class VMState(_Named):
    """Where a VM is in its life."""

    CREATED = "created"
    STARTING = "starting"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPING = "stopping"
    STOPPED = "stopped"
    ERROR = "error"
    DESTROYED = "destroyed"


class IsolationType(_Named):
    """What of the browser a VM holds."""

    BROWSER_TAB = "browser_tab"
    EXTENSION = "extension"
    SESSION = "session"
    PLUGIN = "plugin"
