"""The operations of the core that an event loop waits for: begun at once, and heard of through a queue of the loop's own."""

import asyncio
import contextlib
import inspect
import os
import threading
import weakref
from types import TracebackType
from typing import Any, AsyncContextManager, Callable, Coroutine, Dict, Generator, Optional, Type, TypeVar, Union

from .. import _native

Path = Union[str, "os.PathLike[str]"]
Bytes = Union[bytes, bytearray, memoryview]
Opened = TypeVar("Opened", bound=AsyncContextManager[Any])


class Queue:
    """The operations that one event loop waits for. The loop's reader owns it, so that it goes with the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.operations = _native.OperationQueue()
        self.waiting: Dict[int, "asyncio.Future[Any]"] = {}
        self.undo: Dict[int, Callable[..., Any]] = {}
        loop.add_reader(self.operations.fileno(), self._drain)

    def _drain(self) -> None:
        for number, value, error in self.operations.drain():
            future = self.waiting.pop(number, None)
            if future is None:
                continue
            if future.done():
                # Its task was cancelled, and has not run since.
                undo = self.undo.pop(number, None)
                if undo is not None and error is None:
                    undo(self.operations, value)
                continue
            if error is None:
                future.set_result(value)
            else:
                future.set_exception(error)


_queues: "weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, weakref.ref[Queue]]" = weakref.WeakKeyDictionary()


def queue_of(loop: asyncio.AbstractEventLoop) -> Queue:
    known = _queues.get(loop)
    queue = None if known is None else known()
    if queue is None:
        queue = Queue(loop)
        _queues[loop] = weakref.ref(queue)
    return queue


async def result(begin: Callable[..., int], *args: Any, undo: Optional[Callable[..., Any]] = None) -> Any:
    """Begins an operation and waits for its result; cancels it when the task is cancelled.

    ``undo`` undoes a result that came, but that a cancelled task has not taken.
    """
    loop = asyncio.get_running_loop()
    queue = queue_of(loop)
    future = loop.create_future()
    try:
        number = begin(queue.operations, *args)
    except RuntimeError:
        if threading.current_thread() is threading.main_thread() or not _native.is_exiting():
            raise
        # A loop on a daemon thread ends with the process: an error would be the last that its task says.
        return await future
    queue.waiting[number] = future
    if undo is not None:
        queue.undo[number] = undo
    try:
        return await future
    except BaseException:
        # An operation that has ended is unknown already. GeneratorExit: the loop was closed meanwhile.
        queue.operations.cancel(number)
        queue.waiting.pop(number, None)
        if undo is not None and future.done() and not future.cancelled() and future.exception() is None:
            undo(queue.operations, future.result())
        raise
    finally:
        queue.undo.pop(number, None)


def go_on(begin: Callable[..., int], *args: Any) -> None:
    """Begins an operation that goes on by itself: the loop was closed, and its coroutines are thrown away in the middle."""
    # At the interpreter's exit every VM is destroyed anyway.
    with contextlib.suppress(RuntimeError):
        begin(_native.OperationQueue(), *args)


async def given(value: Any) -> Any:
    """What a function of the user's gave: an awaitable's result, where it is one."""
    return await value if inspect.isawaitable(value) else value


class Opening(Coroutine[Any, Any, Opened]):
    """A coroutine whose result ``async with`` enters, too: ``async with vm.stream("cat") as program``."""

    def __init__(self, coroutine: Coroutine[Any, Any, Opened]) -> None:
        self._coroutine = coroutine

    def __await__(self) -> Generator[Any, Any, Opened]:
        return self._coroutine.__await__()

    def send(self, value: Any) -> Any:
        return self._coroutine.send(value)

    def throw(self, *error: Any) -> Any:
        return self._coroutine.throw(*error)

    def close(self) -> None:
        self._coroutine.close()

    async def __aenter__(self) -> Opened:
        self._opened = await self._coroutine
        await self._opened.__aenter__()
        return self._opened

    async def __aexit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], traceback: Optional[TracebackType]
    ) -> None:
        await self._opened.__aexit__(kind, error, traceback)
