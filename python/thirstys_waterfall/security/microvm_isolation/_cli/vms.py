"""``ps``, ``inspect`` and what changes VMs that run, whichever process has them."""

import argparse
import json
import os
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence

from .. import AttachedVM, MicroVMError, VMSummary, attach, running_vms
from . import table
from .fail import complain

HEAD = ["VM", "TYPE", "STATE", "GRADE", "CPUS", "MEMORY", "UP", "OWNER", "LABELS"]
UNITS = (("d", 86_400), ("h", 3_600), ("m", 60))
# What each does to a VM, and how it says so in the help.
CHANGES: Dict[str, str] = {
    "stop": "shut VMs down: the guest is asked first",
    "kill": "end VMs without asking the guest",
    "rm": "destroy VMs with their files",
    "pause": "stop the vCPUs of VMs",
    "resume": "let paused VMs go on",
    "suspend": "write VMs to the disk and end them, until their owners resume them",
    "wait": "wait until VMs have ended",
}


def configure_attach(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runtime-dir", metavar="DIR", type=os.path.abspath, help="the runtime_dir of the VMs' owners (default: the usual one)")


def _configure_list(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--format", metavar="TEXT", help="print this for each VM, such as '{vm_id} {state}'")
    parser.set_defaults(usage=parser.error)


def configure_ps(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-a", "--all", action="store_true", help="list those, too, whose owner does not answer")
    parser.add_argument("-q", "--quiet", action="store_true", help="print the ids alone")
    _configure_list(parser)
    configure_attach(parser)


def configure_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", metavar="TEXT", help="print this for each VM, such as '{vm_id} {pid}'")
    parser.set_defaults(usage=parser.error)
    configure_change(parser)


def configure_change(parser: argparse.ArgumentParser) -> None:
    configure_attach(parser)
    parser.add_argument("vm", metavar="VM", nargs="+", help="the VM's id, which microvm ps lists")


def configure_rm(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", "--force", action="store_true", help="accepted out of habit: a VM is removed in any state")
    configure_change(parser)


def configure_snapshot(parser: argparse.ArgumentParser) -> None:
    configure_attach(parser)
    parser.add_argument("vm", metavar="VM", help="the VM's id, which microvm ps lists")
    parser.add_argument("name", metavar="NAME", help="the name of the snapshot, which no other has")


def ps(options: argparse.Namespace) -> int:
    found = [vm for vm in running_vms(options.runtime_dir) if options.all or vm["error"] is None]
    if options.json:
        print(json.dumps(found, indent=2, sort_keys=True))
    elif options.quiet:
        _print_lines([vm["vm_id"] for vm in found])
    elif options.format:
        _print_lines([formatted(options, vm) for vm in found])
    else:
        table.show([HEAD, *map(_row, found)])
    return 0


def inspect(options: argparse.Namespace) -> int:
    told: List[Mapping[str, Any]] = []

    def tell(vm: AttachedVM) -> None:
        told.append(dict(vm.get_info(), owner_pid=vm.owner_pid))

    code = _each(options, tell)
    if options.format:
        _print_lines([formatted(options, info) for info in told])
    else:
        print(json.dumps(told, indent=2, sort_keys=True))
    return code


def change(options: argparse.Namespace) -> int:
    """Does it to each VM and prints the ids of those where it is done."""
    changes: Dict[str, Callable[[AttachedVM], Any]] = {
        "stop": AttachedVM.stop,
        "kill": AttachedVM.kill,
        "rm": AttachedVM.destroy,
        "pause": AttachedVM.pause,
        "resume": AttachedVM.resume,
        "suspend": AttachedVM.suspend,
        "wait": AttachedVM.wait,
    }

    def one(vm: AttachedVM) -> None:
        changes[options.command](vm)
        print(vm.vm_id, flush=True)

    return _each(options, one)


def snapshot(options: argparse.Namespace) -> int:
    """Prints the name of the snapshot that was taken."""
    with attach(options.vm, options.runtime_dir) as vm:
        vm.snapshot(options.name)
    print(options.name)
    return 0


def _each(options: argparse.Namespace, use: Callable[[AttachedVM], None]) -> int:
    """Goes on after a VM where it fails; then the exit code is 1."""
    code = 0
    for vm_id in options.vm:
        try:
            with attach(vm_id, options.runtime_dir) as vm:
                use(vm)
        except MicroVMError as error:
            complain(error)
            code = 1
    return code


def formatted(options: argparse.Namespace, vm: Mapping[str, Any]) -> str:
    """A VM as ``--format`` wants it."""
    try:
        return str(options.format).format_map(vm)
    except (KeyError, ValueError, IndexError, AttributeError) as error:
        options.usage("--format {!r}: {}; the keys are {}".format(options.format, error, ", ".join(sorted(vm))))
        raise AssertionError("usage() exits") from None


def _row(vm: VMSummary) -> List[str]:
    if vm["error"] is not None:
        # Its folder is there: it starts, it is ending, or its owner stands still.
        return [vm["vm_id"], "-", "no answer", *["-"] * (len(HEAD) - 3)]
    labels = ",".join("{}={}".format(name, value) for name, value in sorted(vm["labels"].items()))
    owner = "-" if vm["owner_pid"] is None else str(vm["owner_pid"])
    memory = "{} MiB".format(vm["memory_mb"])
    return [vm["vm_id"], vm["isolation_type"], vm["state"], vm["isolation_grade"] or "-", str(vm["vcpu_count"]), memory, age(vm["uptime_seconds"]), owner, labels]


def age(seconds: Optional[float]) -> str:
    """It in its largest unit."""
    if seconds is None:
        return "-"
    for unit, length in UNITS:
        if seconds >= length:
            return "{}{}".format(int(seconds // length), unit)
    return "{}s".format(int(seconds))


def _print_lines(lines: Sequence[str]) -> None:
    for line in lines:
        print(line)
