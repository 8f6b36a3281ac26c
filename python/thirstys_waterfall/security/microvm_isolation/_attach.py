"""VMs of other processes of this user: found, and reached through the process that has them."""

import os
from typing import Union

from . import _native
from ._vm import Programs


class AttachedVM(_native.AttachedVM, Programs):
    __doc__ = _native.AttachedVM.__doc__

    @property
    def instance(self) -> _native.AttachedVM:  # type: ignore[override]
        """The handle itself: ``Programs`` runs programs by it."""
        return self


def attach(vm_id: str, runtime_dir: Union[str, "os.PathLike[str]", None] = None, timeout: float = 5.0) -> AttachedVM:
    """Reaches a VM that another process of this user has.

    Blocks until the VM's owner answers, at most for ``timeout``.

    Args:
        vm_id: The id of a VM that runs, or is paused.
        runtime_dir: The owner's ``runtime_dir``; the default one where left out.
        timeout: Seconds that the owner may take to answer, 0 to 86400.

    Raises:
        VmNotFoundError: No VM of this id runs (`vm_not_found`).
        ChannelError: The owner does not answer (`channel_timeout`), or another user listens at the socket
            (`foreign_socket`).

    Example:
        >>> with attach(vm_id) as attached:
        ...     attached.run(["echo", "hello"]).stdout
        'hello\\n'
    """
    return AttachedVM(vm_id, runtime_dir, timeout)
