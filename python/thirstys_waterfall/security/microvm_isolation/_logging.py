"""Carries the core's log records to Python's ``logging``, from one Python thread.

The core's worker threads never touch the interpreter: they queue records, and the thread here fetches them. It is a
daemon, so that it cannot hold up the interpreter, and it is stopped before the interpreter finalizes. A forked child
starts one of its own with the first handle that it makes.

There is no handler here, not even a NullHandler: where the program configures none, Python's handler of last resort shows
warnings and errors on stderr.
"""

import atexit
import logging
import os
import threading
from typing import List, Optional, Tuple

from . import _native

LOGGER_NAME = "thirstys_waterfall.security.microvm_isolation"

_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
# How long one call of the thread waits in the core, and how long an exit waits for the thread's end.
_WAIT_S = 1.0
_JOIN_S = 2.0

_lock = threading.Lock()
_thread: Optional[threading.Thread] = None


def start() -> None:
    """Start the thread if it does not run yet; the core calls this when the first handle is made."""
    global _thread
    with _lock:
        if _thread is None:
            thread = threading.Thread(target=_carry, name="microvm-isolation-log", daemon=True)
            # Not before it runs: Ctrl-C may interrupt the start, and a thread that does not run cannot be joined.
            thread.start()
            _thread = thread


def _carry() -> None:
    while True:
        records = _native.next_log_records(_WAIT_S)
        if records is None:
            return
        _deliver(records)


def _deliver(records: List[Tuple[str, str, str]]) -> None:
    for level, name, message in records:
        logging.getLogger(name).log(_LEVELS.get(level, logging.INFO), "%s", message)


def _stop() -> None:
    # Registered after `logging` registered its own exit hook, so this runs while its handlers still work. The log is
    # closed last, so that records about the end of the last VMs are delivered.
    _native.shutdown()
    _native.close_log()
    if _thread is not None:
        _thread.join(_JOIN_S)


def _begin_in_child() -> None:
    # A thread of the parent may hold the lock, and the parent's log thread does not exist in the child.
    global _lock, _thread
    _lock, _thread = threading.Lock(), None


os.register_at_fork(after_in_child=_begin_in_child)
atexit.register(_stop)
