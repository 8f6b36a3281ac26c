"""``run``: a VM for one command, with the habits of ``docker run``."""

import argparse
import re
from typing import Any, Dict, NamedTuple, Optional

from .. import MicroVMIsolationManager, ProcessStream, VMBackend, VMNetworkConfig, VMResourceLimits
from .._vm import VM
from . import owner, session
from .fail import complain

# Bad usage, and what keeps a VM from running the program.
FAILED = session.FAILED
UNITS = {"m": 1, "g": 1024}
LOOPBACK = "127.0.0.1"
MAX_PORT = 65_535
TEXTS: Dict[str, Any] = {
    "usage": "microvm run [OPTION]... [--] PROGRAM [ARGUMENT]...\n       microvm run -d [OPTION]... [--] [PROGRAM [ARGUMENT]...]",
    "description": "Runs one command in a VM of its own, which is gone with it. The exit code is the command's; 124 after --timeout, "
    "125 when no VM could run it, 126 when it cannot be executed, 127 when it is not there, 128 and more after a signal.",
}


def configure(parser: argparse.ArgumentParser) -> None:
    session.configure(parser)
    configure_vm(parser)
    configure_one(parser)
    add = parser.add_argument
    add("-d", "--detach", action="store_true", help="print the VM's id and leave it: to its program, or, without one, until microvm rm")
    add("--rm", action="store_true", help="accepted out of habit: the VM is always removed")
    add("program", nargs=argparse.REMAINDER, metavar="PROGRAM", help="the program and its arguments")


def configure_vm(parser: "argparse._ActionsContainer") -> None:
    """What a new VM has, for :func:`start`."""
    add = parser.add_argument
    add("--memory", "-m", type=_mib, metavar="SIZE", help="memory of the VM, such as 256m or 1g (default: 512m)")
    add("--cpus", type=int, metavar="N", help="vCPUs of the VM (default: 1)")
    add("--disk", type=_mib, metavar="SIZE", help="size of the VM's disk at /data (default: 1g)")
    add("--net", action="store_true", help="connect the VM (default: no network)")
    add("--egress", action="append", metavar="HOST[:PORT]", help="connect the VM to this place alone; may be given again")
    add("--backend", choices=[backend.value for backend in VMBackend], help="the VMM (default: the best one of this host)")
    add("--template", metavar="NAME", help="clone the VM from this snapshot, which microvm templates lists")


def configure_one(parser: "argparse._ActionsContainer") -> None:
    """What is one VM's own: where an option is for all that are made, it has none of these."""
    add = parser.add_argument
    add("-p", "--publish", action="append", default=[], metavar="[ADDRESS:]HOST:GUEST", type=_mapping, help="lead a port of this host to one of the VM (default ADDRESS: 127.0.0.1); may be given again")
    add("--label", action="append", default=[], metavar="K=V", type=session.pair, help="label the VM; may be given again")
    add("--name", metavar="VM", help="the id of the VM (default: a new one)")


def run(options: argparse.Namespace) -> int:
    """Runs the program; returns its exit code, with which the process is to exit."""
    if options.detach:
        return _leave(options)
    command = session.command_of(options, "microvm run -it sh")
    return session.carry_out(options, command, "microvm run ls /bin", lambda one: _in_new_vm(options, one))


def _in_new_vm(options: argparse.Namespace, one: session.Session) -> int:
    with MicroVMIsolationManager(owner.CONFIG) as manager:
        with start(options, manager) as vm:
            code = one.run(vm)
    return code


def _leave(options: argparse.Namespace) -> int:
    if options.interactive or options.tty:
        options.usage("-d leaves the VM without a terminal: give -i and -t to microvm exec")
    command = session.command_of(options, "") if options.program not in ([], ["--"]) else []
    if options.timeout is not None and not command:
        options.usage("--timeout is that of a program: name one")
    env = {name: value for name, value in options.env if value is not None}

    def begin(vm: VM) -> Optional[ProcessStream]:
        if not command:
            return None
        program = vm.popen(command, env=env, cwd=options.workdir, user=options.user, timeout=options.timeout)
        program.close_stdin()
        return program

    vm_id = owner.begin(lambda manager: start(options, manager), begin)
    if vm_id is None:
        return FAILED
    print(vm_id)
    return 0


def limits(options: argparse.Namespace) -> Optional[VMResourceLimits]:
    """What the options of :func:`configure_vm` say; a clone has what its snapshot had."""
    given = {"vcpu_count": options.cpus, "memory_mb": options.memory, "disk_size_mb": options.disk}
    given = {name: value for name, value in given.items() if value is not None}
    return None if options.template and not given else VMResourceLimits(**given)


def network(options: argparse.Namespace) -> Optional[VMNetworkConfig]:
    """What the options of :func:`configure_vm` say; isolated where they say nothing."""
    return VMNetworkConfig(isolated_network=False, egress=options.egress) if options.net or options.egress else None


def start(options: argparse.Namespace, manager: MicroVMIsolationManager) -> VM:
    """Starts a VM with the options of :func:`configure_vm`."""
    vm = manager.run_vm(
        resource_limits=limits(options),
        backend=options.backend,
        network_config=network(options),
        vm_id=options.name,
        template=options.template,
        labels=dict(options.label),
    )
    try:
        for mapping in options.publish:
            published = vm.publish(mapping.guest_port, mapping.host_port, mapping.address)
            if mapping.host_port == 0:
                complain("{} leads to port {} of the VM".format(shown(published.address, published.host_port), published.guest_port))
    except BaseException:
        vm.destroy()
        raise
    return vm


class Mapping(NamedTuple):
    """What one ``-p`` asks for; a host's port of 0 is one that is free."""

    address: str
    host_port: int
    guest_port: int


def shown(address: str, port: int) -> str:
    """A socket's address, as URLs write it."""
    return ("[{}]:{}" if ":" in address else "{}:{}").format(address, port)


def _mapping(text: str) -> Mapping:
    match = re.match(r"(?:(?:(\[[^]]+\]|[^][:]+):)?(\d*):)?(\d+)(?:/(\w+))?\Z", text)
    if not match:
        raise argparse.ArgumentTypeError("{!r} is no port; write 8080:80, or 0.0.0.0:8080:80, or 80 for a free port of this host".format(text))
    address, host_port, guest_port, protocol = match.groups()
    if protocol not in (None, "tcp"):
        raise argparse.ArgumentTypeError("{!r}: only tcp is carried".format(text))
    mapping = Mapping((address or LOOPBACK).strip("[]"), int(host_port or 0), int(guest_port))
    if not (mapping.host_port <= MAX_PORT and 0 < mapping.guest_port <= MAX_PORT):
        raise argparse.ArgumentTypeError("{!r}: a port is at most {}, and the VM's at least 1".format(text, MAX_PORT))
    return mapping


def _mib(text: str) -> int:
    match = re.match(r"(\d+)([mg])(?:i?b)?\Z", text.lower())
    if not match:
        raise argparse.ArgumentTypeError("{!r} is no size; write 256m or 1g".format(text))
    return int(match.group(1)) * UNITS[match.group(2)]
