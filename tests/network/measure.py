"""What a network costs a VM, and what it carries: ``make network-bench N=30``."""

import sys
import time
from pathlib import Path
from typing import Any, Dict, List, Tuple

from thirstys_waterfall.security.microvm_isolation import MicroVMIsolationManager, VMNetworkConfig

from ..support import limits, shell
from .case import connected, sent_by
from .lab import Lab

KINDS = {"isolated": VMNetworkConfig(), "connected": connected()}
WINDOW_S, WINDOWS = 3.0, 5


def percentiles(values: List[float]) -> str:
    ordered = sorted(values)
    at = [ordered[min(len(ordered) - 1, int(len(ordered) * share))] for share in (0.5, 0.95, 0.99)]
    return "{:>4} {:>8.1f} {:>8.1f} {:>8.1f}".format(len(ordered), *at)


def lives(manager: MicroVMIsolationManager, count: int) -> None:
    """Starts and ends, in turns; one of each first, which makes the templates."""
    taken: Dict[Tuple[str, str], List[float]] = {}
    for number in range(count + 1):
        for kind, network in KINDS.items():
            vm_id = manager.create_vm("plugin", limits(), network_config=network)
            assert vm_id is not None
            times = [time.monotonic()]
            manager.start_vm(vm_id)
            manager.send_command_to_vm(vm_id, "ping")
            times.append(time.monotonic())
            manager.destroy_vm(vm_id)
            times.append(time.monotonic())
            if number:
                taken.setdefault(("start and ping", kind), []).append((times[1] - times[0]) * 1e3)
                taken.setdefault(("destroy", kind), []).append((times[2] - times[1]) * 1e3)
    print("{:<28} {:>4} {:>8} {:>8} {:>8}".format("milliseconds", "n", "p50", "p95", "p99"))
    for (step, kind), values in sorted(taken.items()):
        print("{:<28} {}".format("{}, {}".format(step, kind), percentiles(values)))


def rates(lab: Lab, manager: MicroVMIsolationManager) -> None:
    """Mbit/s of one TCP connection without a limit that matters."""
    vm_id = manager.create_vm("plugin", limits(network_bandwidth_mbps=100000), network_config=connected())
    assert vm_id is not None
    manager.start_vm(vm_id)
    info = manager.get_vm_info(vm_id)
    assert info is not None
    tap = info["network_config"]["tap_device"]
    counts: Dict[str, Any] = {
        "from the VM": ("5001 -e dd if=/dev/zero bs=64k", lambda: lab.order("received")),
        "to the VM": ("5002 -e dd of=/dev/null bs=64k", lambda: (sent_by(tap), time.monotonic())),
    }
    print("{:<28} {:>4} {:>8} {:>8} {:>8}".format("Mbit/s", "n", "p50", "p95", "p99"))
    for name, (what, count) in counts.items():
        manager.send_command_to_vm(vm_id, "exec", shell("setsid nc 198.51.100.1 {} >/dev/null 2>&1 &".format(what)))
        time.sleep(1)
        windows = []
        for _ in range(WINDOWS):
            begun = count()
            time.sleep(WINDOW_S)
            ended = count()
            windows.append((ended[0] - begun[0]) * 8 / (ended[1] - begun[1]) / 1e6)
        manager.send_command_to_vm(vm_id, "exec", shell("killall dd"))
        print("{:<28} {}".format(name, percentiles(windows)))


def main(count: int) -> None:
    lab = Lab()
    with MicroVMIsolationManager({"raise_on_error": True}) as manager:
        lives(manager, count)
        rates(lab, manager)
    lab.close()
    print("load: {}".format(Path("/proc/loadavg").read_text().strip()))


if __name__ == "__main__":
    main(int(sys.argv[1]))
