"""``mcp``: a server of the Model Context Protocol on stdin and stdout, which gives a model VMs."""

import argparse
import sys

from .. import MicroVMError, __version__
from . import run as one_vm
from . import session

EXTRA = "pip install 'thirstys-waterfall-microvm-isolation[mcp]', with CPython 3.10 or later"
MIB = 1 << 20


def configure(parser: argparse.ArgumentParser) -> None:
    one_vm.configure_vm(parser)
    add = parser.add_argument
    add("--max-vms", type=_count, default=4, metavar="N", help="how many VMs there may be at once (default: 4)")
    add("--max-snapshots", type=_count, default=8, metavar="N", help="how many snapshots the model may keep (default: 8)")
    add("--timeout", type=session.seconds, default=300.0, metavar="S", help="the longest that a program may run (default: 300)")
    add("--idle", type=session.seconds, default=1800.0, metavar="S", help="destroy a VM that was not used for so long (default: 1800)")
    add("--deadline", type=session.seconds, metavar="S", help="destroy a VM after so long (default: none)")
    add("--max-output", type=_count, default=64, metavar="KIB", help="how much of each stream an answer has (default: 64)")
    add("--max-file", type=_count, default=1, metavar="MIB", help="the largest file that goes in or out (default: 1)")


def run(options: argparse.Namespace) -> int:
    """Serves until stdin ends; its VMs and snapshots go with it."""
    try:
        from .. import _mcp
    except ImportError as error:
        raise MicroVMError("{}: the MCP server needs the official SDK: {}".format(error, EXTRA), "host_error", {"remedy": EXTRA}) from None
    policy = {"idle_limit_s": options.idle, "deadline_s": options.deadline}
    bounds = _mcp.Bounds(
        limits=one_vm.limits(options),
        network=one_vm.network(options),
        backend=options.backend,
        template=options.template,
        max_vms=options.max_vms,
        max_snapshots=options.max_snapshots,
        timeout_s=options.timeout,
        output_bytes=options.max_output << 10,
        file_bytes=options.max_file * MIB,
        policies={"session": {name: value for name, value in policy.items() if value is not None}},
    )
    try:
        _mcp.make_server(bounds, __version__).run("stdio")
    except KeyboardInterrupt:
        pass
    sys.stderr.flush()
    return 0


def _count(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 1 << 20:
        raise argparse.ArgumentTypeError("{!r} is not 1 to {}".format(text, 1 << 20))
    return int(text)
