"""The end of what a program of ``run -d`` printed: two files in its VM's folder, of this user alone, gone with the VM."""

import contextlib
import os
import re
import stat
import struct
from io import FileIO
from typing import List, Optional, Tuple

from .. import HostError

NAME = "output"
# What was written before. When the newer file has its full size, it takes the older one's place.
OLDER = NAME + ".1"
MAX_BYTES = 1 << 20
# Before each piece: 1 for stdout, 2 for stderr, and how many bytes follow.
HEAD = struct.Struct(">BI")
CHANNELS = {"stdout": 1, "stderr": 2}
Pieces = List[Tuple[int, bytes]]


class Keeper:
    """Writes the output down. What the folder has no room for is lost, and the program goes on."""

    def __init__(self, folder: str) -> None:
        self._path, self._older = os.path.join(folder, NAME), os.path.join(folder, OLDER)
        self._file = -1
        self._size = 0
        with contextlib.suppress(OSError):
            self._begin()

    def take(self, channel: str, data: bytes) -> None:
        piece = HEAD.pack(CHANNELS[channel], len(data)) + data
        with contextlib.suppress(OSError):
            if self._file < 0 or self._size + len(piece) > MAX_BYTES:
                self._begin()
            try:
                if os.write(self._file, piece) == len(piece):
                    self._size += len(piece)
                    return
            except OSError:
                pass
            # A reader would take the next piece for the rest of this one.
            os.ftruncate(self._file, self._size)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _begin(self) -> None:
        self.close()
        with contextlib.suppress(FileNotFoundError):
            os.replace(self._path, self._older)
        self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._size = 0


class Reader:
    """Reads what a :class:`Keeper` writes, while it does so and after the folder is gone."""

    def __init__(self, folder: str) -> None:
        self._path, self._older = os.path.join(folder, NAME), os.path.join(folder, OLDER)
        self._file = _opened(self._older) or _opened(self._path)

    def is_empty(self) -> bool:
        """Whether no program's output is kept here."""
        return self._file is None

    def is_over(self) -> bool:
        """Whether the files are gone, and with them the VM."""
        return self._file is None or (os.fstat(self._file.fileno()).st_nlink == 0 and not os.path.exists(self._path))

    def read(self) -> Pieces:
        """What has been written since the last time, and is still there."""
        pieces: Pieces = []
        while self._file is not None:
            following = self._following(self._file)
            # Nothing is written to a file that has a following one.
            pieces += _pieces(self._file)
            if following is None:
                break
            self._file.close()
            self._file = following
        return pieces

    def _following(self, file: FileIO) -> Optional[FileIO]:
        for path in (self._older, self._path):
            following = _opened(path)
            if following is None:
                continue
            if not os.path.sameopenfile(following.fileno(), file.fileno()):
                if path == self._path or os.fstat(file.fileno()).st_nlink == 0:
                    return following
            following.close()
        return None


def last_lines(pieces: Pieces, count: int) -> Pieces:
    """The last lines of both streams together, in the order in which they begin."""
    begins: List[int] = []
    is_within = {channel: False for channel in CHANNELS.values()}
    at = 0
    for channel, data in pieces:
        ends = [found.end() for found in re.finditer(b"\n", data)]
        begins += [at + begin for begin in ([] if is_within[channel] else [0]) + ends if begin < len(data)]
        is_within[channel] = not data.endswith(b"\n")
        at += len(data)
    skip = begins[-count] if 0 < count <= len(begins) else 0 if count else at
    left: Pieces = []
    for channel, data in pieces:
        if skip < len(data):
            left.append((channel, data[skip:]))
        skip = max(0, skip - len(data))
    return left


def _opened(path: str) -> Optional[FileIO]:
    try:
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb", buffering=0)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise HostError("{}: it cannot be read: {}".format(path, error.strerror), "host_error") from error
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
        file.close()
        raise HostError("{}: it is no file of this user's; see who made it by ls -l".format(path), "host_error")
    return file


def _pieces(file: FileIO) -> Pieces:
    """The whole pieces from where the file was read to; half a piece is left to the next time."""
    pieces: Pieces = []
    while True:
        begin = file.tell()
        head = file.read(HEAD.size)
        channel, length = HEAD.unpack(head) if len(head) == HEAD.size else (0, 0)
        data = file.read(length) if length <= MAX_BYTES else b""
        if channel not in CHANNELS.values() or len(data) < length:
            file.seek(begin)
            return pieces
        pieces.append((channel, data))
