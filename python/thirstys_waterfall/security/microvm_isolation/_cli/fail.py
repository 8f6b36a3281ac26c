"""What went wrong, in one sentence with the remedy, on stderr."""

import contextlib
import logging
import sys
import threading
from typing import Set, Union

from .. import MicroVMError

_lock = threading.Lock()
_said: Set[str] = set()


class Complaints(logging.Handler):
    """Complains of what the log has: warnings, and errors that no call raises."""

    def emit(self, record: logging.LogRecord) -> None:
        complain(record.getMessage())


def complain(what: Union[MicroVMError, str]) -> None:
    """Prints a failure, unless it was printed before; a stderr that is closed or broken is no other failure."""
    text = str(what)
    remedy = what.details.get("remedy") if isinstance(what, MicroVMError) else None
    if remedy and remedy not in text:
        text = "{}; {}".format(text, remedy)
    with _lock:
        # The end of a VMM is both logged and raised.
        if text in _said:
            return
        _said.add(text)
        with contextlib.suppress(AttributeError, OSError, ValueError):
            sys.stderr.write("microvm: {}\n".format(text))
            sys.stderr.flush()
