"""Busy VMs for minutes, and what they lost, mixed up or let grow: ``make load`` and ``make soak`` (``VMS``, ``MINUTES``).

``load``: every VM is used all the time, by a fixed number of threads: commands whose answers name their question, files
that are written and read back, now and then a restart. ``soak`` is a day in the life: VMs of all kinds come, work, idle,
are paused, fail and go. Every ten seconds the process's own resources are noted; a line of least squares through the last
two thirds says whether they grow.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import threading
import time
from array import array
from pathlib import Path
from typing import Any, Callable, Dict, List

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

from thirstys_waterfall.security.microvm_isolation import MicroVMIsolationManager  # noqa: E402

from tests.support import children, limits, open_files  # noqa: E402

NOTE_S = 10.0
KINDS = ["browser_tab", "extension", "session", "plugin"]
# Allowed growth in the last two thirds of the run; an allocator's pools settle in the first third.
ALLOWED_GROWTH = {"rss_mib": 4.0, "descriptors": 8.0, "threads": 4.0, "children": 2.0}


def resources(vms: int) -> Dict[str, float]:
    """Of this process, without what the VMs that there are now have of their own."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    tasks = len(list(Path("/proc/self/task").iterdir()))
    return {
        "rss_mib": pages * 4096 / 2**20,
        "descriptors": open_files() - 8 * vms,
        "threads": tasks,
        "children": len(children()) - vms,
    }


def growth(notes: List[Dict[str, float]], name: str) -> float:
    """How much ``name`` grew in the last two thirds, by a line of least squares."""
    points = [(note["at_s"], note[name]) for note in notes[len(notes) // 3 :]]
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0
    return slope * (points[-1][0] - points[0][0])


class Load:
    def __init__(self, vms: int, threads: int, comes_and_goes: bool) -> None:
        config: Dict[str, Any] = {"max_vcpus": vms + 4, "max_memory_mb": 128 * (vms + 4), "overcommit_memory": True}
        if comes_and_goes:
            config["pool"] = [{"size": 2, "memory_mb": 128, "disk_size_mb": 64}]
            config["policies"] = {"session": {"on_failure": "restart"}, "plugin": {"on_failure": "replace"}}
        self.vms, self.threads, self.comes_and_goes = vms, threads, comes_and_goes
        self.manager = MicroVMIsolationManager(config)
        self.manager.start()
        self.wrong: List[str] = []
        self.trips = array("d")
        self.counts = {"commands": 0, "files": 0, "restarts": 0, "lives": 0, "failures": 0}
        self.lock = threading.Lock()
        self.over = threading.Event()
        self.free: List[Any] = []

    def count(self, what: str) -> None:
        with self.lock:
            self.counts[what] += 1

    def complain(self, what: str) -> None:
        with self.lock:
            self.wrong.append(what)
        print("WRONG: " + what, flush=True)

    def create(self, kind: str) -> Any:
        vm_id = self.manager.create_vm(kind, limits())
        vm = self.manager.get_vm(vm_id) if vm_id else None
        if vm is None or not vm.start():
            self.complain("no VM: {}".format(vm.last_error if vm else self.manager.last_error))
            return None
        return vm

    def ask(self, vm: Any) -> None:
        token = "{}-{}".format(vm.vm_id, random.getrandbits(64))
        begun = time.monotonic()
        answer = vm.send_command("exec", {"program": "echo", "args": [token]}, timeout=120)
        trip = time.monotonic() - begun
        if not answer or answer["status"] != "ok" or answer["result"]["stdout"] != token + "\n":
            return self.complain("{}: lost or crossed: {} {}".format(vm.vm_id, answer, vm.last_error))
        with self.lock:
            self.trips.append(trip)
            self.counts["commands"] += 1

    def file(self, vm: Any) -> None:
        data = os.urandom(30000).hex()
        vm.send_command("write_file", {"path": "/data/f", "data": data}, timeout=120)
        answer = vm.send_command("read_file", {"path": "/data/f"}, timeout=120)
        back = answer["result"]["data"] if answer and answer["status"] == "ok" else ""
        if hashlib.sha256(back.encode()).digest() != hashlib.sha256(data.encode()).digest():
            return self.complain("{}: a file came back as another: {} {}".format(vm.vm_id, len(back), vm.last_error))
        self.count("files")

    def restart(self, vm: Any) -> None:
        if not vm.stop() or not vm.start():
            return self.complain("{}: restart: {}".format(vm.vm_id, vm.last_error))
        self.count("restarts")

    def nap(self, vm: Any) -> None:
        if not vm.pause() or self.over.wait(0.2) or not vm.resume():
            if not self.over.is_set():
                self.complain("{}: pause: {}".format(vm.vm_id, vm.last_error))

    def work(self) -> None:
        steps: List[Callable[[Any], None]] = [self.ask] * 12 + [self.file] * 4 + [self.restart]
        steps += [self.nap] * 2 if self.comes_and_goes else []
        while not self.over.is_set():
            with self.lock:
                vm = self.free.pop(random.randrange(len(self.free)))
            random.choice(steps)(vm)
            if self.comes_and_goes and random.random() < 0.05:
                vm = self.successor(vm)
                self.over.wait(random.random())
            if vm is not None:
                with self.lock:
                    self.free.append(vm)

    def successor(self, vm: Any) -> Any:
        """Ends a VM as lives end, sometimes by force, and begins another."""
        if random.random() < 0.3 and vm.isolation_type.value == "browser_tab":
            os.kill(vm.get_info()["pid"], signal.SIGKILL)
            self.count("failures")
        self.manager.destroy_vm(vm.vm_id)
        self.count("lives")
        return self.create(random.choice(KINDS))

    def run(self, minutes: float) -> Dict[str, Any]:
        begun = time.monotonic()
        self.free = [vm for vm in (self.create(KINDS[n % 4]) for n in range(self.vms)) if vm is not None]
        up_s = time.monotonic() - begun
        print("{} VMs are up after {:.0f} s".format(len(self.free), up_s), flush=True)
        workers = [threading.Thread(target=self.work) for _ in range(self.threads)]
        for worker in workers:
            worker.start()
        begun, notes = time.monotonic(), []
        while time.monotonic() < begun + 60 * minutes:
            time.sleep(NOTE_S)
            note = resources(self.manager.get_resource_usage()["total_vms"])
            notes.append(dict(note, at_s=time.monotonic() - begun, commands=self.counts["commands"]))
        self.over.set()
        for worker in workers:
            worker.join()
        usage = self.manager.get_resource_usage()
        self.manager.stop()
        if usage["total_vms"] != usage["vcpus_allocated"]:
            self.complain("the quota does not add up: {}".format(usage))
        grown = {name: growth(notes, name) for name in ALLOWED_GROWTH}
        for name, grew in grown.items():
            if grew > ALLOWED_GROWTH[name]:
                self.complain("{} grew by {:.1f} in the last two thirds".format(name, grew))
        trips = sorted(self.trips) or [0.0]
        at = lambda share: trips[min(len(trips) - 1, int(share * len(trips)))]
        return {
            "vms": self.vms,
            "threads": self.threads,
            "minutes": minutes,
            "up_s": up_s,
            "counts": self.counts,
            "round_trip_ms": {name: 1000 * at(share) for name, share in [("p50", 0.5), ("p95", 0.95), ("p99", 0.99)]},
            "growth": grown,
            "notes": notes,
            "wrong": self.wrong,
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["load", "soak"])
    parser.add_argument("--vms", type=int, default=100)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--report", help="write all figures to this file, as JSON")
    options = parser.parse_args()
    report = Load(options.vms, options.threads, options.what == "soak").run(options.minutes)
    if options.report:
        Path(options.report).write_text(json.dumps(report, indent=1))
    print("{counts}\nround trips of exec, ms: {round_trip_ms}\ngrowth in the last two thirds: {growth}".format(**report))
    print("{} things wrong".format(len(report["wrong"])))
    return 1 if report["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
