"""Ports of a VM."""

import socket
from typing import Any, Callable

from .. import _native
from ._operations import result


async def connect(begin: Callable[..., int], *args: Any) -> socket.socket:
    connected: socket.socket = await result(begin, *args, undo=lambda queue, connected: connected.close())
    connected.setblocking(False)
    return connected


async def publish(begin: Callable[..., int], *args: Any) -> _native.PublishedPort:
    published: _native.PublishedPort = await result(begin, *args, undo=lambda queue, published: published.close())
    return published
