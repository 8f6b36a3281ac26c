"""Rows with a head, as ``docker ps`` prints them."""

import contextlib
import os
import shutil
import sys
from typing import List, Optional, Sequence


def lines(rows: Sequence[Sequence[str]], longest: Optional[int] = None) -> List[str]:
    """The rows with their columns below each other, each line cut at ``longest`` characters."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()[:longest] for row in rows]


def show(rows: Sequence[Sequence[str]]) -> None:
    """Prints the rows; on a terminal no line is longer than that."""
    longest = None
    with contextlib.suppress(AttributeError, OSError, ValueError):
        longest = shutil.get_terminal_size().columns if os.isatty(sys.stdout.fileno()) else None
    for line in lines(rows, longest):
        print(line)
