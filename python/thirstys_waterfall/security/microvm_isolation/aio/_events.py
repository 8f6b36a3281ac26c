"""The events of a manager."""

import asyncio
import logging
from types import TracebackType
from typing import Any, Callable, Optional, Type

from .. import _native
from .._logging import LOGGER_NAME
from .._types import VMEvent
from ._operations import given, result

# How long `close` waits for a running callback.
_LAST_CALL_S = 2.0


class AsyncEventStream:
    """The events of a manager from now on, an asynchronous iterator of dicts: the twin of ``EventStream``.

    Made by ``AsyncMicroVMIsolationManager.events``. ``async for event in events`` ends with the manager, and when no event
    came for the stream's ``timeout``. A task that is cancelled while it waits loses no event. Properties do not block.
    """

    _blocking: _native.EventStream
    _operations: _native.EventOperations

    def __aiter__(self) -> "AsyncEventStream":
        return self

    async def __anext__(self) -> VMEvent:
        event = await self.get()
        if event is None:
            raise StopAsyncIteration
        return event

    async def get(self, timeout: Optional[float] = None) -> Optional[VMEvent]:
        """Returns the next event, or ``None`` when none comes in time or the stream has ended.

        Does not block the loop.

        Args:
            timeout: Seconds to wait, 0 to 86400; the stream's own where left out.
        """
        taken: Optional[_native.TakenEvent] = await result(self._operations.next, timeout, undo=_put_back)
        return None if taken is None else taken.claim()

    def close(self) -> None:
        """Takes no more events; those that have come can still be taken.

        Does not block. May be called twice.
        """
        self._blocking.close()

    @property
    def dropped(self) -> int:
        """How many events were dropped because nobody took them in time."""
        return self._blocking.dropped

    async def __aenter__(self) -> "AsyncEventStream":
        return self

    async def __aexit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], traceback: Optional[TracebackType]
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return "<Async{}".format(repr(self._blocking)[1:])


def wrap(blocking: _native.EventStream) -> AsyncEventStream:
    stream = AsyncEventStream.__new__(AsyncEventStream)
    stream._blocking, stream._operations = blocking, _native.EventOperations(blocking)
    return stream


def _put_back(queue: _native.OperationQueue, taken: Optional[_native.TakenEvent]) -> None:
    if taken is not None:
        taken.put_back()


class AsyncEventSubscription:
    """Calls a function with each event of a manager, in order, until it is closed: the twin of ``EventSubscription``.

    Made by ``AsyncMicroVMIsolationManager.on_event``. A task of the loop calls the function, and waits for what it returns
    where that can be awaited. An exception of the function is logged, and the next event is delivered. It ends with its
    manager, and with its loop. Properties do not block.

    Args:
        stream: The events to deliver; the subscription closes it.
        callback: A function or a coroutine function of one argument, the event: a dict.
    """

    def __init__(self, stream: AsyncEventStream, callback: Callable[[VMEvent], Any]) -> None:
        self._stream = stream
        # While it waits for an event, the loop's queue of operations keeps it alive.
        self._task = asyncio.get_running_loop().create_task(_serve(stream, callback))

    @property
    def dropped(self) -> int:
        """How many events were dropped because the function was too slow."""
        return self._stream.dropped

    @property
    def active(self) -> bool:
        """Whether events are still delivered."""
        return not self._task.done()

    async def close(self) -> None:
        """Delivers the events that have come so far, and no more.

        Does not block the loop; takes at most 2 s, while a call of the function ends. May be called twice, and from the
        function.
        """
        self._stream.close()
        if asyncio.current_task() is not self._task:
            await asyncio.wait([self._task], timeout=_LAST_CALL_S)

    async def __aenter__(self) -> "AsyncEventSubscription":
        return self

    async def __aexit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], traceback: Optional[TracebackType]
    ) -> None:
        await self.close()


async def _serve(stream: AsyncEventStream, callback: Callable[[VMEvent], Any]) -> None:
    try:
        event = await stream.get()
        while event is not None:
            try:
                await given(callback(event))
            except Exception:
                logging.getLogger(LOGGER_NAME).exception("a callback for events failed on %s", event)
            event = await stream.get()
    finally:
        stream.close()
