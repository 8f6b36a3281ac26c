"""The command line ``microvm``, also ``python -m thirstys_waterfall.security.microvm_isolation``."""

import argparse
import contextlib
import logging
import os
import sys
from typing import Any, Callable, NoReturn, Optional, Sequence

from .. import MicroVMError, __version__
from . import completion, cp, doctor, exec, logs, mcp, run, space, stats, templates, vms
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
    parser.set_defaults(run=lambda options: _help(parser))
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], int], configure: Optional[Callable[[Parser], None]], **texts: Any) -> None:
        command = commands.add_parser(name, **texts)
        command.set_defaults(run=run)
        if configure:
            configure(command)

    add("run", run.run, run.configure, usage_code=run.FAILED, help="run one command in a VM of its own", **run.TEXTS)
    add("exec", exec.run, exec.configure, usage_code=exec.FAILED, help="run one command in a VM that runs", **exec.TEXTS)
    add("shell", exec.shell, exec.configure_shell, usage_code=exec.FAILED, help="run a shell in a VM that runs")
    add("ps", vms.ps, vms.configure_ps, help="list the VMs of all processes of this user")
    add("inspect", vms.inspect, vms.configure_inspect, help="tell everything about VMs, as JSON")
    add("logs", logs.run, logs.configure, help="print what the program of a detached VM printed")
    add("cp", cp.run, cp.configure, help="copy a file into a VM, or out of it")
    for command, help in vms.CHANGES.items():
        add(command, vms.change, vms.configure_rm if command == "rm" else vms.configure_change, help=help)
    add("port", vms.port, vms.configure_port, help="list the ports of a VM that are published on this host")
    add("snapshot", vms.snapshot, vms.configure_snapshot, help="keep a VM's state, that VMs can be cloned from")
    add("clone", vms.clone, vms.configure_clone, help="start another VM from a VM's state")
    add("stats", stats.stats, stats.configure_stats, help="print what VMs use, again and again")
    add("top", stats.top, stats.configure_top, help="show what VMs use, with charts")
    add("doctor", doctor.run, doctor.configure, help="say what this host can run and what is missing")
    add("bench", _run_bench, _configure_bench if with_bench else None, help="measure VMs beside the bare VMM")
    add("templates", templates.run, templates.configure, help="list the snapshots that VMs can be cloned from")
    add("df", space.df, space.configure_df, help="say how much room the cache takes")
    add("prune", space.prune, space.configure_prune, help="remove what ended processes left, and snapshots that are of no use")
    add("mcp", mcp.run, mcp.configure, help="serve VMs to a model by the Model Context Protocol, on stdin and stdout")
    add("completion", lambda options: completion.run(options, parser), completion.configure, help="print the completion of a shell")
    add("version", _print_version, None, help="print the version")
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
        code: int = options.run(options)
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


def _configure_bench(parser: Parser) -> None:
    from .. import _bench

    _bench.configure(parser)


def _run_bench(options: argparse.Namespace) -> int:
    from .. import _bench

    return _bench.run(options)


def _print_version(_options: argparse.Namespace) -> int:
    print(NAME, __version__)
    return 0


def _help(parser: Parser) -> int:
    parser.print_help()
    return USAGE
