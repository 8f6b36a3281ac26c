"""Many connected VMs at once: each fetches a page, all go, and nothing is left. ``make network-many COUNT=100``."""

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from thirstys_waterfall.security.microvm_isolation import MicroVMIsolationManager

from ..support import limits
from .case import connected
from .lab import Lab, state

THREADS = 8


def main(count: int) -> int:
    lab, memory = Lab(), available_mib()
    before = state()
    config = {"max_vcpus": count, "max_memory_mb": count * 128, "start_timeout_s": 300.0, "raise_on_error": True}
    manager = MicroVMIsolationManager(config)
    manager.start()

    def live(_: int) -> Any:
        vm_id = manager.create_vm("plugin", limits(), network_config=connected())
        manager.start_vm(vm_id)
        return manager.send_command_to_vm(vm_id, "process_request", {"url": "http://web.test/"}, 60)

    begun = time.monotonic()
    with ThreadPoolExecutor(THREADS) as pool:
        answers = list(pool.map(live, range(count)))
    started = time.monotonic()
    bad = [answer for answer in answers if answer["status"] != "ok" or answer["result"]["status"] != 200]
    used = memory - available_mib()
    addresses = {info["network_config"]["ip_address"] for info in manager.get_all_vms_info().values()}
    torn = time.monotonic()
    manager.destroy_all_vms()
    ended = time.monotonic()
    left = [name for name, text in state().items() if text != before[name]]
    manager.stop()
    lab.close()
    print("{} VMs: {} addresses, {} without their page".format(count, len(addresses), len(bad)))
    print("started and fetched in {:.1f} s, {} MiB; destroyed in {:.2f} s".format(started - begun, used, ended - torn))
    print("left behind: {}".format(", ".join(left) or "nothing"))
    return 1 if bad or left or len(addresses) != count else 0


def available_mib() -> int:
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    return int(line.split()[1]) >> 10


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
