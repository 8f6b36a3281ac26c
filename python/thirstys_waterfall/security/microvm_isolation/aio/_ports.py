"""Ports of a VM."""

import socket
from typing import TYPE_CHECKING, List, Optional, Union

from .. import _native
from .._types import PortInfo
from ._operations import result

if TYPE_CHECKING:
    from typing_extensions import Literal


class Ports:
    """The ports of a VM, whichever process has it."""

    _operations: Union[_native.VmOperations, _native.AttachedOperations]

    async def connect(
        self, port: int, address: Optional[str] = None, timeout: Optional[float] = None
    ) -> socket.socket:
        """Connects to a TCP port of the guest and returns a socket that does not block.

        Does not block the loop. Cancelling undoes it. ``asyncio.open_connection(sock=await vm.connect(8000))`` makes streams of it.
        ``MicroVMInstance.connect`` has the details and the errors.

        Args:
            port: The port, 1 to 65535.
            address: Where in the guest it is, as an IPv4 or IPv6 address; where left out, 127.0.0.1, and ``::1`` where that
                refuses.
            timeout: Seconds that it may take, 0 to 86400; ``command_timeout_s`` where left out.
        """
        connected: socket.socket = await result(
            self._operations.connect, port, address, timeout, undo=lambda queue, connected: connected.close()
        )
        connected.setblocking(False)
        return connected

    async def publish(
        self,
        port: int,
        host_port: int = 0,
        address: str = "127.0.0.1",
        protocol: "Literal['tcp']" = "tcp",
        guest_address: Optional[str] = None,
    ) -> _native.PublishedPort:
        """Has this host listen at a port, and carries the connections that come to a TCP port of the guest.

        Does not block the loop. ``MicroVMInstance.publish`` has the details and the errors; no method of the handle blocks.

        Args:
            port: The port of the guest, 1 to 65535.
            host_port: The port of the host, 0 to 65535; one that is free where it is 0.
            address: The address of the host to listen at. Every program of the host may connect to 127.0.0.1; ``0.0.0.0`` or
                ``::`` lets other machines connect, too.
            protocol: ``tcp``.
            guest_address: Where in the guest the port is, as for ``connect``.
        """
        published: _native.PublishedPort = await result(
            self._operations.publish,
            port,
            host_port,
            address,
            protocol,
            guest_address,
            undo=lambda queue, published: published.close(),
        )
        return published

    async def ports(self) -> List[PortInfo]:
        """Returns what its owner has published of the VM, in the order of the host's addresses.

        Does not block the loop.
        """
        listed: List[PortInfo] = await result(self._operations.ports)
        return listed
