"""What the watch over idle VMs costs: ``make watch-cost`` (``VMS``, ``SECONDS``, ``INTERVALS``).

Starts the VMs once without a watch and once for each interval, lets them idle, and counts the CPU time of this process
and of all VMMs, in per cent of one core. The difference to the run without a watch is what the watch costs.
"""

import argparse
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import List, Optional, Tuple

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

from thirstys_waterfall.security.microvm_isolation import MicroVMIsolationManager  # noqa: E402

from tests.support import limits  # noqa: E402

# A guest's kernel does deferred work for some time after its start.
SETTLE_S = 10.0
TICK_S = 1.0 / os.sysconf("SC_CLK_TCK")


def cpu_s(pid: int) -> float:
    fields = Path("/proc/{}/stat".format(pid)).read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * TICK_S


def measure(count: int, seconds: float, interval: Optional[float]) -> Tuple[float, float]:
    """CPU of this process and of all VMMs together, in per cent of one core."""
    # Idle VMs of one template share most of their memory.
    config = {
        "max_vcpus": count,
        "max_memory_mb": 128 * count,
        "overcommit_memory": True,
        "health_interval_s": interval,
    }
    with MicroVMIsolationManager(config) as manager:
        ids = [manager.create_vm("browser_tab", limits()) for _ in range(count)]
        with ThreadPoolExecutor(4) as pool:
            started = list(pool.map(manager.start_vm, ids))
        if not all(started):
            raise SystemExit("not every VM started: {}".format(manager.last_error))
        pids = [info["pid"] for info in manager.get_all_vms_info().values()]
        time.sleep(SETTLE_S)
        begun, own, others = time.monotonic(), cpu_s(os.getpid()), sum(map(cpu_s, pids))
        time.sleep(seconds)
        elapsed = time.monotonic() - begun
        return 100 * (cpu_s(os.getpid()) - own) / elapsed, 100 * (sum(map(cpu_s, pids)) - others) / elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vms", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--intervals", type=float, nargs="+", default=[30.0, 10.0])
    options = parser.parse_args()
    rows: List[Tuple[Optional[float], float, float]] = []
    for interval in [None] + options.intervals:
        own, others = measure(options.vms, options.seconds, interval)
        rows.append((interval, own, others))
        base = rows[0][1] + rows[0][2]
        name = "none" if interval is None else "{:g} s".format(interval)
        print(
            "{} idle VMs, interval {}: manager {:.2f} %, VMMs {:.2f} %, the watch costs {:.2f} % of one core".format(
                options.vms, name, own, others, own + others - base
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
