"""What a commit costs beside another: the same starts by two installed wheels, in turns, in one run.

``python3 tests/load/against.py BEFORE AFTER [--n 60] [--only clone] [--json FILE]``; BEFORE and AFTER are interpreters of environments
that hold one wheel each. A difference counts only beside the other's figure of the same run: hosts are noisy. The clones of one
template are alike, and two templates of one wheel differ by up to a tenth: so each makes several.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from typing import Any, Dict, List

PARTS = ("cold", "clone", "pool", "exec", "pool-exec", "many")
WORKER = r"""
import json, sys, threading, time
from thirstys_waterfall.security.microvm_isolation import MicroVMIsolationManager, VMResourceLimits
cache, at_once = sys.argv[1], int(sys.argv[2])
limits = VMResourceLimits(memory_mb=128, disk_size_mb=64)
base = {"max_vcpus": 1024, "max_memory_mb": 1 << 20, "overcommit_memory": True, "raise_on_error": True, "cache_dir": cache,
        "default_backend": "QEMU"}
shape = {"memory_mb": 128, "disk_size_mb": 64, "size": 1, "form": "ready"}
managers = {"cold": dict(templates=False), "clone": {}, "pool": dict(pool=shape)}
managers = {name: MicroVMIsolationManager(dict(base, **more)) for name, more in managers.items()}
for name in ("cold", "clone", "pool"):
    managers[name].start()

PROGRAM = ("exec", {"program": "/bin/true"})

def one(manager, command=("ping", {})):
    vm = manager.get_vm(manager.create_vm("plugin", limits))
    begun = time.perf_counter()
    vm.start()
    vm.send_command(*command)
    took = 1e3 * (time.perf_counter() - begun)
    manager.destroy_vm(vm.vm_id)
    return took

def pool(*command):
    while managers["pool"].get_resource_usage()["pool"][0]["ready"] == 0:
        time.sleep(0.01)
    time.sleep(0.05)
    return one(managers["pool"], *command)

def many():
    left, failures, manager = list(range(at_once)), [], managers["clone"]
    def loop():
        while left:
            try:
                vm = manager.get_vm(manager.create_vm("plugin", limits))
                left.pop()
                vm.start()
                vm.send_command("ping")
            except IndexError:
                return
            except BaseException as failure:
                failures.append(failure)
    threads = [threading.Thread(target=loop) for _ in range(8)]
    begun = time.perf_counter()
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    took = 1e3 * (time.perf_counter() - begun)
    manager.destroy_all_vms()
    if failures: raise failures[0]
    return took

work = {"cold": lambda: one(managers["cold"]), "clone": lambda: one(managers["clone"]), "pool": pool, "many": many,
        "exec": lambda: one(managers["clone"], PROGRAM), "pool-exec": lambda: pool(PROGRAM)}
for line in sys.stdin:
    print(json.dumps(work[line.strip()]()), flush=True)
for manager in managers.values():
    manager.stop()
"""


class Worker:
    """A process that measures with one wheel; it waits while the other works."""

    def __init__(self, python: str, cache: str, at_once: int) -> None:
        call = [python, "-c", WORKER, cache, str(at_once)]
        self.process = subprocess.Popen(call, stdin=subprocess.PIPE, stdout=subprocess.PIPE, universal_newlines=True)

    def measure(self, part: str) -> float:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(part + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a worker ended while it measured {}".format(part))
        return float(json.loads(line))

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)


def percentile(values: List[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", help="the interpreter that has the earlier wheel")
    parser.add_argument("after", help="the interpreter that has the later wheel")
    parser.add_argument("--n", type=int, default=60, help="samples of each figure (default: 60; many: a tenth)")
    parser.add_argument("--at-once", type=int, default=50, help="VMs of one sample of many (default: 50)")
    parser.add_argument("--templates", type=int, default=5, help="how often each makes its templates anew (default: 5)")
    parser.add_argument("--only", choices=PARTS, action="append")
    parser.add_argument("--json", help="write all samples to this file")
    options = parser.parse_args()
    parts = options.only or PARTS
    samples: Dict[str, Dict[str, List[float]]] = {part: {"before": [], "after": []} for part in parts}
    for share in range(options.templates):
        with tempfile.TemporaryDirectory(prefix="against-") as before, tempfile.TemporaryDirectory(prefix="against-") as after:
            workers = {"before": Worker(options.before, before, options.at_once), "after": Worker(options.after, after, options.at_once)}
            for part in parts:
                n = max(5, options.n // 10) if part == "many" else options.n
                for worker in workers.values():
                    worker.measure(part)
                for _ in range(share, n, options.templates):
                    for name in random.sample(sorted(workers), 2):
                        samples[part][name].append(workers[name].measure(part))
            for worker in workers.values():
                worker.end()
    for part, rows in samples.items():
        line: List[Any] = [part]
        for name in ("before", "after"):
            line += [percentile(rows[name], share) for share in (0.5, 0.95, 0.99)]
        quotient = statistics.median(rows["after"]) / statistics.median(rows["before"])
        row = "{:9} before p50 {:8.1f} p95 {:8.1f} p99 {:8.1f} | after p50 {:8.1f} p95 {:8.1f} p99 {:8.1f} ms | n {} | p50 after / before {:.3f}"
        print(row.format(*line, len(rows["after"]), quotient), flush=True)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(samples, file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
