"""Whole lives of VMs on several threads, and what they leave behind: ``make stress`` (``SECONDS``, ``THREADS``).

Every thread creates, starts, commands, pauses, resumes, stops and destroys VMs until the time is over. Afterwards the
process must hold no more descriptors, threads, children and memory than after its first VM.
"""

import argparse
import os
import sys
import threading
import time
from pathlib import Path
from typing import Dict, List

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

from thirstys_waterfall.security.microvm_isolation import MicroVMIsolationManager  # noqa: E402

from tests.support import children, limits, open_files  # noqa: E402

# An allocator may keep this much; a leak in each VM's life exceeds it by far after 3 minutes.
ALLOWED_GROWTH_MIB = 16


def resources() -> Dict[str, int]:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    tasks = len(list(Path("/proc/self/task").iterdir()))
    return {"descriptors": open_files(), "threads": tasks, "children": len(children()), "rss_mib": pages * 4096 >> 20}


def one_life(manager: MicroVMIsolationManager) -> List[str]:
    """The steps that went wrong."""
    vm_id = manager.create_vm("browser_tab", limits())
    vm = manager.get_vm(vm_id)
    text = {"program": "echo", "args": [vm_id]}
    steps = [
        ("start", lambda: vm.start()),
        ("ping", lambda: vm.send_command("ping") == {"status": "ok", "result": "pong"}),
        ("exec", lambda: vm.send_command("exec", text)["result"]["stdout"] == vm_id + "\n"),
        ("pause", lambda: vm.pause()),
        ("resume", lambda: vm.resume()),
        ("ping again", lambda: vm.send_command("ping")["result"] == "pong"),
        ("stop", lambda: vm.stop()),
    ]
    wrong = ["{}: {}: {}".format(vm_id, name, vm.last_error) for name, step in steps if not step()]
    if not manager.destroy_vm(vm_id):
        wrong.append("{}: destroy: {}".format(vm_id, manager.last_error))
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--threads", type=int, default=8)
    options = parser.parse_args()
    manager = MicroVMIsolationManager({"max_vcpus": 4 * options.threads, "max_memory_mb": 512 * options.threads})
    manager.start()
    wrong = one_life(manager)
    before = resources()
    end = time.monotonic() + options.seconds
    lives = [0] * options.threads

    def live(index: int) -> None:
        while time.monotonic() < end:
            wrong.extend(one_life(manager))
            lives[index] += 1

    threads = [threading.Thread(target=live, args=(index,)) for index in range(options.threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # Idle threads of the runtime for blocking work end after 10 s.
    time.sleep(12)
    after = resources()
    left = manager.get_resource_usage()["total_vms"]
    manager.stop()
    print("{} lives on {} threads in {:.0f} s".format(sum(lives), options.threads, options.seconds))
    print("before: {}\nafter:  {}".format(before, after))
    wrong += ["{} VMs are left".format(left)] if left else []
    for name in ("descriptors", "threads", "children"):
        if after[name] > before[name]:
            wrong.append("{} grew from {} to {}".format(name, before[name], after[name]))
    if after["rss_mib"] > before["rss_mib"] + ALLOWED_GROWTH_MIB:
        wrong.append("memory grew from {rss_mib} MiB".format(**before))
    print("\n".join(wrong) if wrong else "nothing went wrong, nothing is left")
    return 1 if wrong else 0


if __name__ == "__main__":
    # Without this an exception in a thread would look like success.
    failures: List[str] = []
    threading.excepthook = lambda problem: (failures.append(repr(problem.exc_value)), os.write(2, repr(problem).encode()))[0]
    status = main()
    sys.exit(1 if failures else status)
