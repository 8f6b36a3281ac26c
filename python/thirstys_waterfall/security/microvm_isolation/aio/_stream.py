"""A program that runs in a guest."""

import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, AsyncIterator, Callable, Dict, Optional, Tuple, Type, Union, overload

from .. import _native
from .._text import TextDecoder
from ._operations import Bytes, result

if TYPE_CHECKING:
    from typing_extensions import Literal


class AsyncProcessStream:
    """A program that runs in a guest, an asynchronous iterator of output: the twin of ``ProcessStream``.

    Made by ``AsyncMicroVMInstance.stream``. ``async for channel, data in program`` ends with the output. Leaving the
    ``async with`` block, or dropping the object, kills the program with all its descendants; a task that is cancelled
    in a method leaves it running, and loses no output. Properties do not block. Every error is raised.
    """

    _blocking: _native.ProcessStream
    _operations: _native.StreamOperations
    _on_output: Optional[Callable[[str, bytes], Any]]
    _decoder: TextDecoder

    def __aiter__(self) -> "AsyncProcessStream":
        return self

    async def __anext__(self) -> Tuple[str, bytes]:
        piece = await self._next()
        if piece is None:
            raise StopAsyncIteration
        return piece

    async def _next(self, timeout: Optional[float] = None, waited: float = 0.0) -> Optional[Tuple[str, bytes]]:
        piece: Optional[Tuple[str, bytes]]
        piece = await result(self._operations.next, timeout, waited, undo=self._operations.put_back)
        return piece

    async def write(self, data: Bytes) -> bool:
        """Writes to the program's input.

        Does not block the loop. Waits while the program does not read: another task may take its output meanwhile. What
        was written before the task was cancelled stays written.

        Args:
            data: The bytes to write.

        Returns:
            ``True`` when everything was written; ``False`` when the program reads no more.
        """
        return bool(await result(self._operations.write, data))

    def close_stdin(self) -> None:
        """Ends the program's input.

        Does not block.
        """
        self._blocking.close_stdin()

    def signal(self, number: int) -> None:
        """Sends a signal to the program's process group; SIGKILL ends all its descendants.

        Does not block.

        Args:
            number: The number of the signal, 1 to 64 (signal(7)).
        """
        self._blocking.signal(number)

    def resize(self, rows: int, columns: int) -> None:
        """Sets the size of the program's terminal (TIOCSWINSZ, ioctl_tty(2)).

        Does not block.

        Args:
            rows: The height in characters, 1 to 65535.
            columns: The width in characters, 1 to 65535.
        """
        self._blocking.resize(rows, columns)

    async def wait(self, timeout: Optional[float] = None) -> Optional[int]:
        """Waits for the program's end; output that was not taken goes to ``on_output``, or is dropped.

        Does not block the loop. Cancelling leaves the program running. ``ProcessStream.wait`` has the errors.

        Args:
            timeout: Seconds to wait, 0 to 86400; no limit where left out.

        Returns:
            The exit code; `-n` after signal `n`, -9 after ``kill``.
        """
        if self._on_output is not None:
            begun = time.monotonic()
            piece = await self._next(timeout)
            while piece is not None:
                self._on_output(*piece)
                piece = await self._next(timeout, time.monotonic() - begun)
        code: Optional[int] = await result(self._operations.wait, timeout)
        return code

    @overload
    async def communicate(
        self, input: Union[Bytes, str, None] = ..., timeout: Optional[float] = ..., text: "Literal[False]" = ...
    ) -> Tuple[bytes, bytes]: ...

    @overload
    async def communicate(
        self, input: Union[Bytes, str, None] = ..., timeout: Optional[float] = ..., *, text: "Literal[True]"
    ) -> Tuple[str, str]: ...

    async def communicate(
        self, input: Union[Bytes, str, None] = None, timeout: Optional[float] = None, text: bool = False
    ) -> Union[Tuple[bytes, bytes], Tuple[str, str]]:
        """Gives the program its whole input, takes all its output, and waits for its end.

        Does not block the loop. Cancelling leaves the program running; another call, without ``input``, returns this
        output, too. ``ProcessStream.communicate`` has the errors.

        Args:
            input: Its input: bytes, or a string, which is sent as UTF-8. Where left out, its input ends.
            timeout: Seconds to wait, 0 to 86400; no limit where left out.
            text: Whether the output is decoded as UTF-8, with U+FFFD for what is not; else it is bytes.

        Returns:
            Stdout and stderr, without what was taken before.
        """
        output: Union[Tuple[bytes, bytes], Tuple[str, str]]
        output = await result(self._operations.communicate, input, timeout, text)
        return output

    async def text(self) -> AsyncIterator[Tuple[str, str]]:
        """Returns an asynchronous iterator of the output as text: ``("stdout" or "stderr", str)``.

        Does not block the loop. A character whose bytes come in two pieces is one character; what is not UTF-8 becomes
        U+FFFD.
        """
        async for channel, data in self:
            text = self._decoder.decode(channel, data)
            if text:
                yield channel, text
        for piece in self._decoder.end():
            yield piece

    def kill(self) -> None:
        """Kills the program and all its descendants; ``wait`` then returns -9.

        Does not block. Does nothing when the program has ended.
        """
        self._blocking.kill()

    @property
    def exit_code(self) -> Optional[int]:
        """The exit code, or the negative number of the signal that ended the program; ``None`` until its output was
        taken to the end."""
        return self._blocking.exit_code

    @property
    def pid(self) -> int:
        """The program's process id in the guest."""
        return self._blocking.pid

    async def __aenter__(self) -> "AsyncProcessStream":
        return self

    async def __aexit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], traceback: Optional[TracebackType]
    ) -> None:
        self._blocking.__exit__(kind, error, traceback)

    def __repr__(self) -> str:
        return "<Async{}".format(repr(self._blocking)[1:])


async def open_stream(begin: Callable[..., int], arguments: Dict[str, Any]) -> AsyncProcessStream:
    """Starts a program, by the operation of its VM."""
    stream = AsyncProcessStream.__new__(AsyncProcessStream)
    stream._blocking = await result(begin, arguments, undo=lambda queue, blocking: blocking.kill())
    stream._operations = _native.StreamOperations(stream._blocking)
    stream._on_output, stream._decoder = arguments["on_output"], TextDecoder()
    return stream
