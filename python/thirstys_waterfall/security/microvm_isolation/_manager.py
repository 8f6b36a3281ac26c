"""The manager of the core, and what Python adds to it."""

import os
from typing import List, Mapping, Optional, Tuple, Union

from . import _native
from ._attach import AttachedVM
from ._enums import IsolationType, VMBackend
from ._errors import make_error
from ._models import VMNetworkConfig, VMResourceLimits
from ._vm import VM, reason

HostPort = Union[int, Tuple[str, int]]


def published(ports: Optional[Mapping[int, HostPort]]) -> List[Tuple[int, Tuple[int, str]]]:
    """The ports of guests, and for each the host's port and address, as ``publish`` takes them."""
    if ports is None:
        return []
    if not isinstance(ports, Mapping):
        raise make_error("invalid_type", "ports must be a mapping such as {{8000: 0}}, not {!r}".format(ports))
    found = []
    for port, place in ports.items():
        address, host_port = place if isinstance(place, tuple) and len(place) == 2 else ("127.0.0.1", place)
        found.append((port, (host_port, address)))
    return found


class MicroVMIsolationManager(_native.MicroVMIsolationManager):
    __doc__ = _native.MicroVMIsolationManager.__doc__

    def run_vm(
        self,
        isolation_type: Union[IsolationType, str] = IsolationType.SESSION,
        resource_limits: Optional[VMResourceLimits] = None,
        backend: Union[VMBackend, str, None] = None,
        network_config: Optional[VMNetworkConfig] = None,
        vm_id: Optional[str] = None,
        kernel_path: Union[str, "os.PathLike[str]", None] = None,
        rootfs_path: Union[str, "os.PathLike[str]", None] = None,
        template: Optional[str] = None,
        labels: Optional[Mapping[str, str]] = None,
        ports: Optional[Mapping[int, HostPort]] = None,
    ) -> VM:
        """Creates and starts a VM, which is destroyed at the end of its ``with`` block, or by ``VM.destroy``.

        Blocks as ``MicroVMInstance.start`` does. Leaves nothing when the start fails or is interrupted.

        Args:
            isolation_type: What the VM is for.
            resource_limits: As of ``create_vm``, like every argument.
            backend: The VMM.
            network_config: The VM's network; none where left out.
            vm_id: The id; a new one where left out.
            kernel_path: A Linux kernel in place of the package's.
            rootfs_path: An ext4 or EROFS image as the root file system.
            template: The name of a snapshot to clone.
            labels: Strings by strings.
            ports: What is published as soon as the VM runs: the host's port, or its address and port, by the guest's port. As of
                ``VM.publish``, 0 is a port that is free, and 127.0.0.1 the address where none is given.

        Raises:
            MicroVMError: Every error of ``create_vm`` and ``MicroVMInstance.start``, whatever ``raise_on_error``
                says.

        Example:
            >>> with manager.run_vm(resource_limits=VMResourceLimits(memory_mb=128)) as machine:
            ...     machine.run(["id", "-un"]).stdout
            'root\\n'
        """
        mappings = published(ports)
        made = self.create_vm(
            isolation_type,
            resource_limits=resource_limits,
            backend=backend,
            network_config=network_config,
            vm_id=vm_id,
            kernel_path=kernel_path,
            rootfs_path=rootfs_path,
            template=template,
            labels=labels,
        )
        if made is None:
            raise reason(self)
        instance = self.get_vm(made)
        if instance is None:
            raise make_error("vm_not_found", "the VM {} was destroyed before it was started".format(made))
        vm = VM(self, instance)
        try:
            if not instance.start():
                raise reason(instance)
            for port, place in mappings:
                vm.publish(port, *place)
        except BaseException:
            vm.destroy()
            raise
        return vm

    def attach(self, vm_id: str, timeout: float = 5.0) -> AttachedVM:
        """Reaches a VM of any process of this user, with the ``runtime_dir`` of this manager.

        Blocks until the VM's owner answers, at most for ``timeout``. The owner keeps the VM; this manager neither counts
        nor lists it.

        Args:
            vm_id: The id of a VM that runs, or is paused.
            timeout: Seconds that the owner may take to answer, 0 to 86400.

        Raises:
            VmNotFoundError: No VM of this id runs (`vm_not_found`).
            ChannelError: The owner does not answer (`channel_timeout`), or another user listens at the socket
                (`foreign_socket`).

        Example:
            >>> with manager.attach(vm_id) as attached:
            ...     attached.vm_id == vm_id, attached.run(["id", "-un"]).stdout
            (True, 'root\\n')
        """
        return AttachedVM(vm_id, self.config.get("runtime_dir"), timeout)
