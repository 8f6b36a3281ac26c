"""The terminal that the command line runs on."""

import contextlib
import os
import signal
import sys
import termios
import tty
from types import FrameType
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


class Screen:
    """The whole terminal, with the keys as they are typed; afterwards it is as it was, whatever ends the block."""

    def __init__(self) -> None:
        self._before = termios.tcgetattr(STDIN)
        self._resized = False

    def __enter__(self) -> "Screen":
        signal.signal(signal.SIGTSTP, self._stop)
        signal.signal(signal.SIGWINCH, self._resize)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._end)
        self._enter()
        return self

    def __exit__(self, *_: object) -> None:
        self._leave()

    def is_stale(self) -> bool:
        """Whether what is shown was made for another size, or the screen was away."""
        stale, self._resized = self._resized, False
        return stale

    def _enter(self) -> None:
        tty.setcbreak(STDIN, termios.TCSADRAIN)
        self._write("\x1b[?1049h\x1b[?25l")

    def _leave(self) -> None:
        self._write("\x1b[?25h\x1b[?1049l")
        with contextlib.suppress(termios.error):
            termios.tcsetattr(STDIN, termios.TCSADRAIN, self._before)

    @staticmethod
    def _write(text: str) -> None:
        with contextlib.suppress(OSError):
            sys.stdout.write(text)
            sys.stdout.flush()

    def _stop(self, _: int, __: Optional[FrameType]) -> None:
        self._leave()
        os.kill(os.getpid(), signal.SIGSTOP)
        self._enter()
        self._resized = True

    def _resize(self, _: int, __: Optional[FrameType]) -> None:
        self._resized = True

    @staticmethod
    def _end(number: int, _: Optional[FrameType]) -> None:
        raise SystemExit(128 + number)
