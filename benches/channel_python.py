"""The Python side of ``benches/channel.rs``: one VM, and answers to what is asked on stdin, a JSON list a line."""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

from thirstys_waterfall.security.microvm_isolation import MicroVMIsolationManager, VMResourceLimits

SIZE_MIB = 64


def pings(vm, n):
    """Microseconds of each round trip."""
    times = []
    for _ in range(n):
        begun = time.perf_counter()
        vm.send_command("ping")
        times.append((time.perf_counter() - begun) * 1e6)
    return times


def files(vm, folder):
    """MiB/s of an upload and of a download."""
    source, destination = folder / "source", folder / "destination"
    if not source.exists():
        source.write_bytes(os.urandom(1 << 20) * SIZE_MIB)
    begun = time.perf_counter()
    vm.upload(source, "/data/file")
    between = time.perf_counter()
    vm.download("/data/file", destination)
    return [SIZE_MIB / (between - begun), SIZE_MIB / (time.perf_counter() - between)]


def main():
    with MicroVMIsolationManager() as manager, tempfile.TemporaryDirectory() as name:
        vm = manager.get_vm(manager.create_vm("plugin", VMResourceLimits(memory_mb=int(sys.argv[1]))))
        if not vm.start():
            raise SystemExit(str(vm.last_error))
        for line in sys.stdin:
            words = line.split()
            figures = pings(vm, int(words[1])) if words[0] == "ping" else files(vm, Path(name))
            print(json.dumps(figures), flush=True)


main()
