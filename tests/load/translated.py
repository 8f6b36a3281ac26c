"""What an emulated CPU translates for a start and for the first program: the code that each clone runs for the first time.

``python3 tests/load/translated.py PYTHON [--vms 24] [--symbols VMLINUX AGENT]``; PYTHON is the interpreter of an environment that holds a wheel.
As root, with ``perf`` and a QEMU that has symbols: a probe on its ``tb_gen_code`` counts blocks. VMs that were started idle while the others
start, and what they translate then counts, too: compare two wheels on a quiet host, with as many VMs. With a vmlinux and an agent that were not
stripped, the functions are told that have most of them.
"""

import argparse
import bisect
import collections
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Counter, List, Tuple

PROBE = "probe_qemu:tb_gen_code"
# The upper half of the addresses is the kernel's.
KERNEL = 1 << 63
WORKER = r"""
import json, sys
from thirstys_waterfall.security.microvm_isolation import MicroVMIsolationManager, VMResourceLimits
limits = VMResourceLimits(memory_mb=128, disk_size_mb=64)
config = {"max_vcpus": 1024, "max_memory_mb": 1 << 20, "overcommit_memory": True, "raise_on_error": True, "cache_dir": sys.argv[1], "default_backend": "QEMU",
          "health_interval_s": None}
with MicroVMIsolationManager(config) as manager:
    vms = [manager.get_vm(manager.create_vm("plugin", limits)) for _ in range(int(sys.argv[2]) + 1)]
    first = vms.pop()
    manager.prepare(limits)
    first.start()
    first.send_command("ping")
    steps = {"start": lambda vm: (vm.start(), vm.send_command("ping")), "program": lambda vm: vm.send_command("exec", {"program": "/bin/true"})}
    for line in sys.stdin:
        for vm in vms:
            steps[line.strip()](vm)
        print(json.dumps([vm.get_info()["pid"] for vm in vms]), flush=True)
"""


def recorded(worker: "subprocess.Popen[str]", step: str, file: Path) -> List[int]:
    """The addresses of the blocks that the VMs translated during a step."""
    assert worker.stdin is not None and worker.stdout is not None
    perf = subprocess.Popen(["perf", "record", "-q", "-a", "-e", PROBE, "-o", str(file), "sleep", "600"])
    try:
        # perf says nothing when it has begun; its file has a header then.
        while not (file.exists() and file.stat().st_size):
            if perf.poll() is not None:
                raise SystemExit("perf record ended with {} before the step {}".format(perf.returncode, step))
            time.sleep(0.1)
        worker.stdin.write(step + "\n")
        worker.stdin.flush()
        line = worker.stdout.readline()
        if not line:
            raise SystemExit("the worker ended during the step {}".format(step))
    finally:
        perf.send_signal(2)
        perf.wait()
    call = ["perf", "script", "-i", str(file), "-F", "pid,trace"]
    script = subprocess.run(call, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, universal_newlines=True).stdout
    pids = {str(pid) for pid in json.loads(line)}
    found = re.findall(r"^\s*(\d+) \(\w+\) pc=0x([0-9a-f]+)", script, re.M)
    return [int(address, 16) for pid, address in found if pid in pids]


class Symbols:
    """The functions of a program that was not stripped."""

    def __init__(self, path: str) -> None:
        table = subprocess.check_output(["nm", "-nC", path], universal_newlines=True)
        found: List[Tuple[int, str]] = [(int(at, 16), name) for at, name in re.findall(r"^([0-9a-f]+) [tTwW] (.*)", table, re.M)]
        self.starts, self.names = [at for at, _ in found], [name for _, name in found]

    def name(self, address: int) -> str:
        index = bisect.bisect_right(self.starts, address) - 1
        return self.names[index] if index >= 0 else "?"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python", help="the interpreter that has the wheel")
    parser.add_argument("--vms", type=int, default=24, help="clones, one after the other (default: 24)")
    parser.add_argument("--symbols", nargs=2, metavar=("VMLINUX", "AGENT"), help="programs that were not stripped")
    parser.add_argument("--top", type=int, default=30, help="how many functions are told (default: 30)")
    options = parser.parse_args()
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None or shutil.which("perf") is None:
        raise SystemExit("perf and qemu-system-x86_64 must be in PATH")
    symbols = [Symbols(path) for path in options.symbols] if options.symbols else None
    subprocess.run(["perf", "probe", "-q", "-x", qemu, "tb_gen_code pc=%si"], check=True)
    try:
        with tempfile.TemporaryDirectory(prefix="translated-") as folder:
            cache = Path(folder) / "cache"
            cache.mkdir(mode=0o700)
            call = [options.python, "-c", WORKER, str(cache), str(options.vms)]
            worker = subprocess.Popen(call, stdin=subprocess.PIPE, stdout=subprocess.PIPE, universal_newlines=True)
            for step in ("start", "program"):
                every = recorded(worker, step, Path(folder) / step)
                kernel = sum(address >= KERNEL for address in every)
                print("{}: {:.0f} blocks a VM, {:.0f} of them the kernel's".format(step, len(every) / options.vms, kernel / options.vms))
                if symbols:
                    names: Counter[str] = collections.Counter()
                    names.update(symbols[0].name(at) if at >= KERNEL else symbols[1].name(at) for at in every)
                    for name, count in names.most_common(options.top):
                        print("{:10.1f}  {}".format(count / options.vms, name))
            assert worker.stdin is not None
            worker.stdin.close()
            worker.wait(60)
    finally:
        subprocess.run(["perf", "probe", "-q", "-d", PROBE], check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
