"""``exec`` and ``shell``: a program in a VM that runs, whichever process has it."""

import argparse
import os
from typing import Any, Dict

from .. import attach
from . import session
from .vms import configure_attach

FAILED = session.FAILED
TEXTS: Dict[str, Any] = {
    "usage": "microvm exec [OPTION]... VM [--] PROGRAM [ARGUMENT]...",
    "description": "Runs one command in a VM that runs, and leaves the VM. The exit code is as of microvm run.",
}


def configure(parser: argparse.ArgumentParser) -> None:
    session.configure(parser)
    configure_attach(parser)
    parser.add_argument("vm", metavar="VM", help="the VM's id, which microvm ps lists")
    parser.add_argument("program", nargs=argparse.REMAINDER, metavar="PROGRAM", help="the program and its arguments")


def configure_shell(parser: argparse.ArgumentParser) -> None:
    session.configure(parser)
    configure_attach(parser)
    parser.add_argument("vm", metavar="VM", help="the VM's id, which microvm ps lists")


def run(options: argparse.Namespace) -> int:
    """Runs the program; returns its exit code, with which the process is to exit."""
    command = session.command_of(options, "microvm exec -it VM sh")

    def in_vm(one: session.Session) -> int:
        with attach(options.vm, options.runtime_dir) as vm:
            code = one.run(vm)
        return code

    return session.carry_out(options, command, "microvm exec {} ls /bin".format(options.vm), in_vm)


def shell(options: argparse.Namespace) -> int:
    """Runs a shell at this terminal, or one that reads stdin where that is none."""
    options.program = ["sh"]
    options.interactive, options.tty = True, options.tty or os.isatty(0)
    return run(options)
