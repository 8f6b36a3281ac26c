"""``logs``: what the program of a VM of ``run -d`` printed."""

import argparse
import os
import sys
import time

from .. import HostError, attach, running_vms
from . import output
from .vms import configure_attach

# The standard library has no inotify(7). The end of a VM takes longer than this, so its last words are read.
LOOK_AGAIN_S = 0.05


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the VM ends, or Ctrl-C")
    parser.add_argument("-n", "--tail", type=_count, metavar="N", help="begin with the last N lines (default: all that are kept)")
    configure_attach(parser)
    parser.add_argument("vm", metavar="VM", help="the VM's id, which microvm ps lists")


def run(options: argparse.Namespace) -> int:
    """Prints each stream to its own; goes on with ``--follow``."""
    reader = output.Reader(_folder_of(options))
    if reader.is_empty():
        remedy = "microvm run -d PROGRAM keeps its program's output"
        raise HostError("{}: no output of it is kept; {}".format(options.vm, remedy), "host_error", {"remedy": remedy})
    pieces = reader.read()
    _print(pieces if options.tail is None else output.last_lines(pieces, options.tail))
    is_over = not options.follow
    while not is_over:
        time.sleep(LOOK_AGAIN_S)
        is_over = reader.is_over()
        _print(reader.read())
    return 0


def _folder_of(options: argparse.Namespace) -> str:
    # The owners need not answer: an owner that stands still has a folder, too.
    for vm in running_vms(options.runtime_dir, 0):
        if vm["vm_id"] == options.vm:
            return os.path.dirname(vm["socket_path"])
    # It says why there is none, or has one that started meanwhile.
    with attach(options.vm, options.runtime_dir) as found:
        path = found.get_info()["socket_path"]
    return os.path.dirname(path)


def _print(pieces: output.Pieces) -> None:
    for channel, data in pieces:
        stream = sys.stdout if channel == output.CHANNELS["stdout"] else sys.stderr
        # It is None where this process was started with it closed.
        if stream is not None:
            stream.buffer.write(data)
            stream.buffer.flush()


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError("{!r} is no number of lines".format(text))
    return int(text)
