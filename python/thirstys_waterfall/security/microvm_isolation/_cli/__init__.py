"""The command line ``microvm``, also ``python -m thirstys_waterfall.security.microvm_isolation``."""

import argparse
import contextlib
import logging
import os
import sys
from typing import Any, NoReturn, Optional, Sequence

from .. import MicroVMError, __version__
from . import completion, cp, doctor, exec, run, stats, templates, vms
from .fail import Complaints, complain

NAME = "microvm"
USAGE = 2


class Parser(argparse.ArgumentParser):
    """A parser whose bad usage ends with an exit code of its own."""

    def __init__(self, *args: Any, usage_code: int = USAGE, **kwargs: Any) -> None:
        # Abbreviated options would take their meaning from options that are added later.
        kwargs["allow_abbrev"] = False
        super().__init__(*args, **kwargs)
        self._usage_code = usage_code

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(self._usage_code, "{}: {}\n".format(self.prog, message))


def make_parser(program: str = NAME, with_bench: bool = True) -> Parser:
    """The parser of all commands; that of ``bench`` is costly to make."""
    parser = Parser(prog=program, description="MicroVM isolation: a VM for each program")
    parser.add_argument("--version", action="version", version="{} {}".format(NAME, __version__))
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    run.configure(commands.add_parser("run", usage_code=run.FAILED, help="run one command in a VM of its own", **run.TEXTS))
    exec.configure(commands.add_parser("exec", usage_code=exec.FAILED, help="run one command in a VM that runs", **exec.TEXTS))
    exec.configure_shell(commands.add_parser("shell", usage_code=exec.FAILED, help="run a shell in a VM that runs"))
    vms.configure_ps(commands.add_parser("ps", help="list the VMs of all processes of this user"))
    vms.configure_inspect(commands.add_parser("inspect", help="tell everything about VMs, as JSON"))
    cp.configure(commands.add_parser("cp", help="copy a file into a VM, or out of it"))
    for command, help in vms.CHANGES.items():
        configure = vms.configure_rm if command == "rm" else vms.configure_change
        configure(commands.add_parser(command, help=help))
    vms.configure_snapshot(commands.add_parser("snapshot", help="keep a VM's state, that VMs can be cloned from"))
    stats.configure_stats(commands.add_parser("stats", help="print what VMs use, again and again"))
    stats.configure_top(commands.add_parser("top", help="show what VMs use, with charts"))
    doctor.configure(commands.add_parser("doctor", help="say what this host can run and what is missing"))
    bench = commands.add_parser("bench", help="measure VMs beside the bare VMM")
    templates.configure(commands.add_parser("templates", help="list the snapshots that VMs can be cloned from"))
    completion.configure(commands.add_parser("completion", help="print the completion of a shell"))
    commands.add_parser("version", help="print the version")
    if with_bench:
        from .. import _bench

        _bench.configure(bench)
    return parser


def main(arguments: Optional[Sequence[str]] = None, program: str = NAME) -> int:
    """Run one command and return its exit code.

    ``run``, ``exec``, ``shell``: that of the program; 124 to 127 for what kept it from its end (docs/cli.md). ``doctor``: 0 when a VM can
    start here, 1 when not. Others: 0, or 1 when they fail. Bad usage: 2, of those three 125.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(handlers=[Complaints(logging.WARNING)])
    parser = make_parser(program, with_bench=given[:1] in (["bench"], ["completion"]))
    options, unknown = parser.parse_known_args(given)
    if unknown:
        # The command's own parser knows its exit code.
        getattr(options, "usage", parser.error)("unrecognized arguments: {}".format(" ".join(unknown)))
    try:
        code = _call(options, parser)
        # It is None where this process was started with stdout closed.
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except MicroVMError as error:
        complain(error)
        return 1
    except BrokenPipeError:
        # What is left in the buffer has no reader; Python would complain about it at its exit.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130


def _call(options: argparse.Namespace, parser: Parser) -> int:
    if options.command == "run":
        return run.run(options)
    if options.command == "exec":
        return exec.run(options)
    if options.command == "shell":
        return exec.shell(options)
    if options.command == "ps":
        return vms.ps(options)
    if options.command == "inspect":
        return vms.inspect(options)
    if options.command == "cp":
        return cp.run(options)
    if options.command in vms.CHANGES:
        return vms.change(options)
    if options.command == "snapshot":
        return vms.snapshot(options)
    if options.command == "stats":
        return stats.stats(options)
    if options.command == "top":
        return stats.top(options)
    if options.command == "doctor":
        return doctor.run(options)
    if options.command == "bench":
        from .. import _bench

        return _bench.run(options)
    if options.command == "templates":
        return templates.run(options)
    if options.command == "completion":
        return completion.run(options, parser)
    if options.command == "version":
        print(NAME, __version__)
        return 0
    parser.print_help()
    return USAGE
