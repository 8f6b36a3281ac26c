"""Files to and from a guest: those of a path go by the runtime, those of an object by the loop, a piece at a time."""

from typing import Any, Awaitable, Callable, Dict, Optional, Protocol, Union

from .. import _native
from .._types import Transferred
from ._operations import Bytes, given, result

# What an object is asked for at a time: one window of the channel.
_PIECE = 256 * 1024

UploadProgress = Callable[[int, Optional[int]], Any]
DownloadProgress = Callable[[int, int], Any]


class Reads(Protocol):
    """What ``upload`` takes in place of a path."""

    def read(self, size: int, /) -> Union[Bytes, Awaitable[Bytes]]: ...


class Writes(Protocol):
    """What ``download`` takes in place of a path."""

    def write(self, data: bytes, /) -> Any: ...


async def upload(begin: Callable[..., int], arguments: Dict[str, Any]) -> Transferred:
    source, progress = arguments["source"], arguments["progress"]
    sending: _native.UploadOperations = await result(begin, arguments, undo=_close)
    try:
        while True:
            if hasattr(source, "read"):
                moved = await result(sending.write, await given(source.read(_PIECE)))
            else:
                moved = await result(sending.send, progress is None)
            if not isinstance(moved, int):
                done: Transferred = moved
                return done
            if progress is not None:
                progress(moved, sending.total)
    finally:
        sending.close()


async def download(begin: Callable[..., int], arguments: Dict[str, Any]) -> Transferred:
    destination, progress = arguments["destination"], arguments["progress"]
    receiving: _native.DownloadOperations = await result(begin, arguments, undo=_close)
    try:
        while True:
            if hasattr(destination, "write"):
                data, moved = await result(receiving.read)
                await _write_all(destination, data)
            else:
                moved = await result(receiving.save, progress is None)
            if not isinstance(moved, int):
                done: Transferred = moved
                return done
            if progress is not None:
                progress(moved, receiving.total)
    finally:
        receiving.close()


def _close(queue: _native.OperationQueue, transfer: Union[_native.UploadOperations, _native.DownloadOperations]) -> None:
    transfer.close()


async def _write_all(destination: Any, data: bytes) -> None:
    while data:
        written = await given(destination.write(data))
        # A raw stream may take less than it is given (io.RawIOBase.write).
        taken = written if isinstance(written, int) else len(data)
        data = data[max(1, taken) :]
