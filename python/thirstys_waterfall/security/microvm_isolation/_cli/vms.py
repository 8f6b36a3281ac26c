"""``ps``, ``inspect`` and what changes VMs that run, whichever process has them."""

import argparse
import json
import os
import secrets
import signal
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence

from .. import AttachedVM, MicroVMError, MicroVMIsolationManager, VmNotFoundError, VMSummary, attach, running_vms
from .._vm import VM
from . import owner, run, table
from .fail import complain

HEAD = ["VM", "TYPE", "STATE", "GRADE", "CPUS", "MEMORY", "UP", "OWNER", "LABELS"]
UNITS = (("d", 86_400), ("h", 3_600), ("m", 60))
# What each does to a VM, and how it says so in the help.
CHANGES: Dict[str, str] = {
    "stop": "shut VMs down: the guest is asked first",
    "kill": "end VMs without asking the guest",
    "rm": "destroy VMs with their files",
    "pause": "stop the vCPUs of VMs",
    "resume": "let paused VMs go on, and bring back suspended ones",
    "suspend": "write VMs to the disk and end them, until they are resumed",
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


def configure_clone(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("vm", metavar="VM", help="the VM's id, which microvm ps lists")
    parser.add_argument("name", metavar="NAME", nargs="?", help="the id of the clone (default: a new one)")


def configure_port(parser: argparse.ArgumentParser) -> None:
    configure_attach(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("vm", metavar="VM", help="the VM's id, which microvm ps lists")
    parser.add_argument("port", metavar="PORT", nargs="?", type=int, help="print where this port of the VM is published, alone")


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

    def tell(vm_id: str) -> bool:
        with attach(vm_id, options.runtime_dir) as vm:
            told.append(dict(vm.get_info(), owner_pid=vm.owner_pid))
        return True

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

    def one(vm_id: str) -> bool:
        try:
            with attach(vm_id, options.runtime_dir) as vm:
                changes[options.command](vm)
        except VmNotFoundError:
            manager = MicroVMIsolationManager(owner.CONFIG)
            if vm_id not in [vm["vm_id"] for vm in manager.list_suspended()]:
                raise
            if options.command == "rm":
                manager.destroy_vm(vm_id)
            elif options.command != "resume":
                raise
            elif owner.begin(lambda its: _resumed(its, vm_id)) is None:
                return False
        print(vm_id, flush=True)
        # The next one's start may be interrupted again.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        return True

    return _each(options, one)


def _resumed(manager: MicroVMIsolationManager, vm_id: str) -> VM:
    manager.resume_vm(vm_id)
    instance = manager.get_vm(vm_id)
    assert instance is not None, "it was resumed"
    return VM(manager, instance)


def port(options: argparse.Namespace) -> int:
    """Prints where the VM's ports are published."""
    with attach(options.vm, options.runtime_dir) as vm:
        found = [one for one in vm.ports() if options.port in (None, one["guest_port"])]
    if options.json:
        print(json.dumps(found, indent=2, sort_keys=True))
        return 0
    for one in found:
        where = run.shown(one["address"], one["host_port"])
        print(where if options.port is not None else "{}/{} -> {}".format(one["guest_port"], one["protocol"], where))
    if options.port is not None and not found:
        complain("port {} of {} is not published; microvm run -p and publish() do that".format(options.port, options.vm))
        return 1
    return 0


def snapshot(options: argparse.Namespace) -> int:
    """Prints the name of the snapshot that was taken."""
    with attach(options.vm, options.runtime_dir) as vm:
        vm.snapshot(options.name)
    print(options.name)
    return 0


def clone(options: argparse.Namespace) -> int:
    """Prints the id of the clone, which has a process of its own."""
    name = "clone-{}".format(secrets.token_hex(8))
    with attach(options.vm) as vm:
        vm.snapshot(name)
    try:
        vm_id = owner.begin(lambda manager: manager.run_vm(vm_id=options.name, template=name))
    finally:
        MicroVMIsolationManager({"raise_on_error": True}).delete_template(name)
    if vm_id is None:
        return 1
    print(vm_id)
    return 0


def _each(options: argparse.Namespace, use: Callable[[str], bool]) -> int:
    """Goes on after a VM where it fails; then the exit code is 1."""
    code = 0
    for vm_id in options.vm:
        try:
            code |= not use(vm_id)
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
