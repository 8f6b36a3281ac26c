"""The terminal that the command line runs on."""

import contextlib
import os
import termios
import tty
from typing import Optional, Tuple

STDIN = 0
MAX_SIZE = 65_535


def size() -> Optional[Tuple[int, int]]:
    """Rows and columns of the terminal, if one of the standard descriptors is one."""
    for descriptor in (0, 1, 2):
        with contextlib.suppress(OSError):
            columns, rows = os.get_terminal_size(descriptor)
            return max(1, min(rows, MAX_SIZE)), max(1, min(columns, MAX_SIZE))
    return None


class Raw:
    """The terminal of stdin, and how it was before."""

    def __init__(self) -> None:
        self._before = termios.tcgetattr(STDIN)

    def enter(self) -> None:
        """Hands on every byte as it is typed, so that the guest's own terminal gives it a meaning."""
        tty.setraw(STDIN, termios.TCSADRAIN)

    def leave(self) -> None:
        # A terminal that has hung up needs no restoring.
        with contextlib.suppress(termios.error):
            termios.tcsetattr(STDIN, termios.TCSADRAIN, self._before)
