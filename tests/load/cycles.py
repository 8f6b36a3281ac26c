"""Lives of a VM one after the other: ``make cycles`` (``COUNT``).

Each VM is created, started, commanded and destroyed. No life may fail, none may leave anything, and the last hundred
must not be slower than the first hundred by more than the spread of the first.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import List

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

from thirstys_waterfall.security.microvm_isolation import MicroVMIsolationManager  # noqa: E402

from tests.load.stress import ALLOWED_GROWTH_MIB, resources  # noqa: E402
from tests.support import limits  # noqa: E402

WINDOW = 100


def milliseconds(manager: MicroVMIsolationManager) -> float:
    """One life; the time from before start() to the first answer."""
    vm = manager.get_vm(manager.create_vm("browser_tab", limits()))
    begun = time.perf_counter()
    vm.start()
    answer = vm.send_command("ping")
    answered = time.perf_counter()
    assert answer == {"status": "ok", "result": "pong"}, answer
    manager.destroy_vm(vm.vm_id)
    return 1e3 * (answered - begun)


def percentile(values: List[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    options = parser.parse_args()
    wrong = []
    with MicroVMIsolationManager({"raise_on_error": True}) as manager:
        for _ in range(10):
            milliseconds(manager)
        before = resources()
        times = [milliseconds(manager) for _ in range(options.count)]
        # Idle threads of the runtime for blocking work end after 10 s.
        time.sleep(12)
        after = resources()
    first, last = times[:WINDOW], times[-WINDOW:]
    for name, part in (("first", first), ("last", last), ("all", times)):
        shares = ["p{:.0f} {:.1f} ms".format(100 * share, percentile(part, share)) for share in (0.5, 0.95, 0.99)]
        print("{} {}: {}".format(name, len(part), ", ".join(shares)))
    print("before: {}\nafter:  {}".format(before, after))
    if percentile(last, 0.5) > percentile(first, 0.95):
        wrong.append("the median of the last {} is above the p95 of the first".format(WINDOW))
    for name in ("descriptors", "threads", "children"):
        if after[name] > before[name]:
            wrong.append("{} grew from {} to {}".format(name, before[name], after[name]))
    if after["rss_mib"] > before["rss_mib"] + ALLOWED_GROWTH_MIB:
        wrong.append("memory grew from {rss_mib} MiB".format(**before))
    print("\n".join(wrong) if wrong else "{} lives, nothing went wrong, nothing is left".format(len(times)))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
