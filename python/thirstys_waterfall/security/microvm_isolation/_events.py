"""Callbacks for a manager's events, each on a Python thread of its own.

The core's worker threads never touch the interpreter: a thread here takes the events and makes the calls. It is a daemon
that ends with its manager, with :meth:`EventSubscription.close`, and before the interpreter finalizes.
"""

import atexit
import logging
import os
import threading
import weakref
from typing import Any, Callable

from . import _native
from ._logging import LOGGER_NAME
from ._types import VMEvent

# How long an exit, or `close`, waits for a running callback.
_JOIN_S = 2.0

_live: "weakref.WeakSet[EventSubscription]" = weakref.WeakSet()


class EventSubscription:
    """Calls a function with each event of a manager, in order, until it is closed.

    Made by ``MicroVMIsolationManager.on_event``. The function runs on a thread of the subscription. Its
    exceptions, ``SystemExit`` and ``KeyboardInterrupt`` included, are logged, and the next event is
    delivered. Properties do not block, and neither does the constructor.

    Args:
        stream: The events to deliver; the subscription closes it.
        callback: A function of one argument, the event: a dict.

    Example:
        >>> kinds = []
        >>> with manager.on_event(lambda event: kinds.append(event["kind"])) as subscription:
        ...     vm.pause(), vm.resume()
        (True, True)
        >>> kinds, subscription.active
        (['state', 'state'], False)
    """

    def __init__(self, stream: "_native.EventStream", callback: Callable[[VMEvent], Any]) -> None:
        self._stream = stream
        self._thread = threading.Thread(
            target=_serve, args=(stream, callback), name="microvm-isolation-events", daemon=True
        )
        self._thread.start()
        _live.add(self)

    @property
    def dropped(self) -> int:
        """How many events were dropped because the function was too slow."""
        return self._stream.dropped

    @property
    def active(self) -> bool:
        """Whether events are still delivered."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Delivers the events that have come so far, and no more.

        Blocks for at most 2 s, while a call of the function ends. May be called twice, and from the
        function.
        """
        self._stream.close()
        if threading.current_thread() is not self._thread:
            self._thread.join(_JOIN_S)

    def __enter__(self) -> "EventSubscription":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _serve(stream: "_native.EventStream", callback: Callable[[VMEvent], Any]) -> None:
    while True:
        event = stream._wait()
        if event is None:
            return
        try:
            callback(event)
        except BaseException:
            logging.getLogger(LOGGER_NAME).exception("a callback for events failed on %s", event)


def _stop() -> None:
    _native.close_events()
    for subscription in list(_live):
        if subscription._thread is not threading.current_thread():
            subscription._thread.join(_JOIN_S)


def _begin_in_child() -> None:
    # The threads of the parent's subscriptions do not exist in the child.
    global _live
    _live = weakref.WeakSet()


os.register_at_fork(after_in_child=_begin_in_child)
atexit.register(_stop)
