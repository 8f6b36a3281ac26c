"""One event loop beside threads of the blocking API: ``python tests/load/aio.py [--vms 100] [--threads 8] [--rounds 3]``.

Both do the same work in turns, in one process: each VM is started, runs programs, streams output, takes a file and is
destroyed. The loop has all VMs at once; the threads take one after the other. Beside the loop's work, a timer measures how late the
loop is, and how many threads there are. Last, the round trip of ``send_command("ping")`` by both, in turns.

Exits with 1 when a bound is broken: the loop at most 10 % slower; late by at most 10 ms at the 99th percentile, or by a fifth
more than an idle loop of another process, where the host has too few CPUs for its VMs; a ping at most 1.3 times as long; no
thread more for more calls.
"""

import argparse
import asyncio
import contextlib
import io
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Dict, Iterator, List

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

from thirstys_waterfall.security.microvm_isolation import MicroVMIsolationManager  # noqa: E402
from thirstys_waterfall.security.microvm_isolation.aio import AsyncMicroVMIsolationManager  # noqa: E402

from tests.support import limits  # noqa: E402

FILE = os.urandom(1 << 20)
OUTPUT = ["head", "-c", str(1 << 20), "/dev/zero"]
COMMANDS = 5
TICK_S = 0.002
SLOWER, LATE_MS, PING = 1.1, 10.0, 1.3


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def percentile(values: List[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def quantiles(values: List[float]) -> Dict[str, float]:
    shares = (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))
    return {**{name: round(percentile(values, share), 2) for name, share in shares}, "max": round(max(values), 2), "n": len(values)}


def config(vms: int) -> Dict[str, Any]:
    return {"max_vcpus": vms + 4, "max_memory_mb": 128 * (vms + 4), "overcommit_memory": True, "start_timeout_s": 300.0,
            "command_timeout_s": 120.0}


def work(manager: MicroVMIsolationManager) -> None:
    with manager.run_vm("plugin", limits()) as vm:
        for number in range(COMMANDS):
            assert vm.run(["echo", str(number)]).stdout == "{}\n".format(number)
        with vm.popen(OUTPUT) as program:
            assert sum(len(data) for _, data in program) == 1 << 20
        vm.instance.upload(io.BytesIO(FILE), "/tmp/file")


async def work_in_loop(manager: AsyncMicroVMIsolationManager) -> None:
    async with manager.run_vm("plugin", limits()) as vm:
        for number in range(COMMANDS):
            assert (await vm.run(["echo", str(number)])).stdout == "{}\n".format(number)
        async with vm.popen(OUTPUT) as program:
            total = 0
            async for _, data in program:
                total += len(data)
            assert total == 1 << 20
        await vm.instance.upload(io.BytesIO(FILE), "/tmp/file")


def by_threads(vms: int, count: int) -> float:
    with MicroVMIsolationManager(config(vms)) as manager, ThreadPoolExecutor(count) as pool:
        begun = time.monotonic()
        for done in [pool.submit(work, manager) for _ in range(vms)]:
            done.result()
        return time.monotonic() - begun


async def watch(late_ms: List[float], seen: List[int]) -> None:
    """How late the loop is, and the threads of this process, until it is cancelled."""
    while True:
        due = time.monotonic() + TICK_S
        await asyncio.sleep(TICK_S)
        late_ms.append((time.monotonic() - due) * 1000)
        if len(late_ms) % 20 == 0:
            seen.append(threads())


def idle() -> None:
    """As a program of its own: a loop that does nothing else says how late it is, until its input ends."""

    async def run() -> None:
        late_ms: List[float] = []
        watching = asyncio.ensure_future(watch(late_ms, []))
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
        watching.cancel()
        print(json.dumps(late_ms))

    asyncio.run(run())


@contextlib.contextmanager
def idle_beside(late_ms: List[float]) -> Iterator[None]:
    """What an idle loop of another process sees meanwhile: how late the host itself makes it."""
    with subprocess.Popen([sys.executable, __file__, "--idle"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        yield
        late_ms += json.loads(other.communicate()[0])


async def by_loop(vms: int, late_ms: List[float], seen: List[int]) -> float:
    async with AsyncMicroVMIsolationManager(config(vms)) as manager:
        watching = asyncio.ensure_future(watch(late_ms, seen))
        begun = time.monotonic()
        await asyncio.gather(*(work_in_loop(manager) for _ in range(vms)))
        took = time.monotonic() - begun
        watching.cancel()
        return took


async def pings(count: int) -> Dict[str, List[float]]:
    """Microseconds of a ping by each face, in turns, in one VM."""
    trips: Dict[str, List[float]] = {"blocking": [], "loop": []}
    async with AsyncMicroVMIsolationManager(config(1)) as manager, manager.run_vm("plugin", limits()) as vm:
        blocking = vm.instance._blocking
        for _ in range(count):
            begun = time.perf_counter()
            blocking.send_command("ping")
            trips["blocking"].append((time.perf_counter() - begun) * 1e6)
            begun = time.perf_counter()
            await vm.instance.send_command("ping")
            trips["loop"].append((time.perf_counter() - begun) * 1e6)
    return trips


async def threads_of(calls: int) -> int:
    """The most threads while that many commands are under way."""
    async with AsyncMicroVMIsolationManager(config(4)) as manager:
        vms = [await manager.run_vm("plugin", limits()) for _ in range(4)]
        waiting = [asyncio.ensure_future(vm.run(["sleep", "1"])) for vm in vms for _ in range(calls // 4)]
        most = 0
        while not all(call.done() for call in waiting):
            most = max(most, threads())
            await asyncio.sleep(0.01)
        await asyncio.gather(*waiting)
        return most


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--vms", type=int, default=100)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pings", type=int, default=1000)
    parser.add_argument("--idle", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.idle:
        idle()
        return 0

    with MicroVMIsolationManager(config(options.vms)) as manager:
        work(manager)
    loop_s: List[float] = []
    threads_s: List[float] = []
    late_ms: List[float] = []
    idle_ms: List[float] = []
    seen: List[int] = []
    for turn in range(options.rounds):
        for face in ("threads", "loop") if turn % 2 == 0 else ("loop", "threads"):
            if face == "loop":
                with idle_beside(idle_ms):
                    loop_s.append(asyncio.run(by_loop(options.vms, late_ms, seen)))
            else:
                threads_s.append(by_threads(options.vms, options.threads))
        print("round {}: threads {:.2f} s, loop {:.2f} s".format(turn, threads_s[-1], loop_s[-1]), flush=True)
    trips = asyncio.run(pings(options.pings))
    few, many = asyncio.run(threads_of(8)), asyncio.run(threads_of(80))
    result = {
        "vms": options.vms,
        "threads_s": round(min(threads_s), 2),
        "loop_s": round(min(loop_s), 2),
        "loop_late_ms": quantiles(late_ms),
        "idle_loop_late_ms": quantiles(idle_ms),
        "most_threads": max(seen),
        "threads_at_8_and_80_calls": [few, many],
        "ping_us": {face: quantiles(values) for face, values in trips.items()},
    }
    print(json.dumps(result, indent=1))
    broken = []
    if min(loop_s) > SLOWER * min(threads_s):
        broken.append("the loop is slower than the threads")
    if percentile(late_ms, 0.99) > max(LATE_MS, 1.2 * percentile(idle_ms, 0.99)):
        broken.append("the loop is late")
    if percentile(trips["loop"], 0.5) > PING * percentile(trips["blocking"], 0.5):
        broken.append("a ping takes too long")
    if many > few:
        broken.append("calls take threads")
    print("broken: {}".format("; ".join(broken) or "nothing"))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
