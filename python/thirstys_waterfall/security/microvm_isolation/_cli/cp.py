"""``cp``: a file into a VM that runs, or out of it."""

import argparse
import os
import posixpath
import sys
import time
from typing import Optional, Tuple

from .. import attach
from .vms import configure_attach

STREAM = "-"
# When a copy begins to tell how far it is, and how often it does.
PATIENCE_S = 0.5
STEP_S = 0.1
MIB = 1 << 20


def configure(parser: argparse.ArgumentParser) -> None:
    configure_attach(parser)
    parser.add_argument("source", metavar="SOURCE", help="VM:PATH, or a file of this host; - is stdin")
    parser.add_argument("destination", metavar="DESTINATION", help="a file of this host, - for stdout; or VM:PATH")
    parser.set_defaults(usage=parser.error)


def run(options: argparse.Namespace) -> int:
    source, destination = _place(options.source), _place(options.destination)
    if (source is None) == (destination is None):
        options.usage("one of the two is VM:PATH, the other a file of this host, such as ./a:b")
    if destination is not None:
        vm_id, path = destination
        if os.path.isdir(options.source):
            options.usage("{0} is a folder; tar c -C {0} . | microvm exec -i {1} tar x -C {2} copies one".format(options.source, vm_id, path))
        if path.endswith("/") and options.source != STREAM:
            path = posixpath.join(path, os.path.basename(options.source))
        with attach(vm_id, options.runtime_dir) as vm:
            with _Progress(path) as progress:
                vm.upload(sys.stdin.buffer if options.source == STREAM else options.source, path, progress=progress)
    if source is not None:
        vm_id, path = source
        to = options.destination
        if to != STREAM and os.path.isdir(to):
            to = os.path.join(to, posixpath.basename(path))
        with attach(vm_id, options.runtime_dir) as vm:
            with _Progress(path) as progress:
                vm.download(path, sys.stdout.buffer if to == STREAM else to, progress=progress)
    return 0


class _Progress:
    """Says on stderr how far a copy is, if that is a terminal, and removes it at the end."""

    def __init__(self, name: str) -> None:
        self._name = posixpath.basename(name)
        self._next = time.monotonic() + PATIENCE_S
        self._is_on = sys.stderr is not None and sys.stderr.isatty()
        self._is_shown = False

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_shown:
            self._show("")

    def __call__(self, done: int, total: Optional[int]) -> None:
        if not self._is_on or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + STEP_S
        self._is_shown = True
        of = " of {:.1f}".format(total / MIB) if total else ""
        self._show("{}: {:.1f}{} MiB".format(self._name, done / MIB, of))

    def _show(self, text: str) -> None:
        sys.stderr.write("\r{}\x1b[K".format(text))
        sys.stderr.flush()


def _place(text: str) -> Optional[Tuple[str, str]]:
    """The VM and the path in it; ``None`` of a file of this host, which may have a colon after a slash."""
    vm_id, colon, path = text.partition(":")
    return (vm_id, path) if colon and vm_id and "/" not in vm_id else None
