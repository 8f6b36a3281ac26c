"""``run``: a VM for one command, with the habits of ``docker run``."""

import argparse
import re
from typing import Any, Dict

from .. import MicroVMIsolationManager, VMBackend, VMNetworkConfig, VMResourceLimits
from . import session

# Bad usage, and what keeps a VM from running the program.
FAILED = session.FAILED
UNITS = {"m": 1, "g": 1024}
TEXTS: Dict[str, Any] = {
    "usage": "microvm run [OPTION]... [--] PROGRAM [ARGUMENT]...",
    "description": "Runs one command in a VM of its own, which is gone with it. The exit code is the command's; 124 after --timeout, "
    "125 when no VM could run it, 126 when it cannot be executed, 127 when it is not there, 128 and more after a signal.",
}


def configure(parser: argparse.ArgumentParser) -> None:
    session.configure(parser)
    add = parser.add_argument
    add("--memory", "-m", type=_mib, metavar="SIZE", help="memory of the VM, such as 256m or 1g (default: 512m)")
    add("--cpus", type=int, metavar="N", help="vCPUs of the VM (default: 1)")
    add("--disk", type=_mib, metavar="SIZE", help="size of the VM's disk at /data (default: 1g)")
    add("--net", action="store_true", help="connect the VM; needs CAP_NET_ADMIN (default: no network)")
    add("--egress", action="append", metavar="HOST[:PORT]", help="connect the VM to this place alone; may be given again")
    add("--backend", choices=[backend.value for backend in VMBackend], help="the VMM (default: the best one of this host)")
    add("--label", action="append", default=[], metavar="K=V", type=session.pair, help="label the VM; may be given again")
    add("--rm", action="store_true", help="accepted out of habit: the VM is always removed")
    add("program", nargs=argparse.REMAINDER, metavar="PROGRAM", help="the program and its arguments")


def run(options: argparse.Namespace) -> int:
    """Runs the program; returns its exit code, with which the process is to exit."""
    command = session.command_of(options, "microvm run -it sh")
    return session.carry_out(options, command, "microvm run ls /bin", lambda one: _in_new_vm(options, one))


def _in_new_vm(options: argparse.Namespace, one: session.Session) -> int:
    given = {"vcpu_count": options.cpus, "memory_mb": options.memory, "disk_size_mb": options.disk}
    limits = VMResourceLimits(**{name: value for name, value in given.items() if value is not None})
    # The quota is for managers of many VMs; this one's only VM may have what was asked for.
    config = {"raise_on_error": True, "max_vcpus": limits.vcpu_count, "max_memory_mb": limits.memory_mb}
    network = VMNetworkConfig(isolated_network=False, egress=options.egress) if options.net or options.egress else None
    with MicroVMIsolationManager(config) as manager:
        with manager.run_vm(
            resource_limits=limits, backend=options.backend, network_config=network, labels=dict(options.label)
        ) as vm:
            code = one.run(vm)
    return code


def _mib(text: str) -> int:
    match = re.match(r"(\d+)([mg])(?:i?b)?\Z", text.lower())
    if not match:
        raise argparse.ArgumentTypeError("{!r} is no size; write 256m or 1g".format(text))
    return int(match.group(1)) * UNITS[match.group(2)]
