"""``stats`` and ``top``: what VMs use, whichever process has them."""

import argparse
import contextlib
import json
import os
import select
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Deque, Dict, List, Mapping, Optional, Sequence

from .. import AttachedVM, MicroVMError, VMHealthMetrics, VMSummary, attach, running_vms
from . import table, terminal, vms
from .fail import complain

HEAD = ["VM", "CPU %", "MEMORY", "OF", "DISK I/O", "RECEIVED", "SENT", "HEALTH", "UP"]
MIB = 1 << 20
MIN_INTERVAL_S, MAX_INTERVAL_S = 0.1, 3600.0
# Owners are asked side by side: one that stands still keeps nobody waiting but its own VMs.
ASKED_AT_ONCE = 16
ANSWER_S = 2.0
BARS = "▁▂▃▄▅▆▇█"
ASCII_BARS = "_.:-=+*#"
CHART_COLUMNS = 20
HOME, CLEAR_LINE, CLEAR_BELOW = "\x1b[H", "\x1b[K", "\x1b[J"
BOLD, PLAIN = "\x1b[1m", "\x1b[m"


class Reading:
    """What one VM uses now."""

    def __init__(self, vm: VMSummary, used: VMHealthMetrics) -> None:
        self.vm, self.used = vm, used

    def told(self) -> Dict[str, Any]:
        """It as ``--json`` and ``--format`` have it."""
        return dict(vars(self.used), vm_id=self.vm["vm_id"], memory_mb=self.vm["memory_mb"], vcpu_count=self.vm["vcpu_count"])

    def row(self) -> List[str]:
        used = self.used
        connected = used.network_rx_bytes or used.network_tx_bytes
        network = [_size(used.network_rx_bytes), _size(used.network_tx_bytes)] if connected else ["-", "-"]
        memory = ["{} MiB".format(used.memory_usage_mb), "{} MiB".format(self.vm["memory_mb"])]
        first = [self.vm["vm_id"], "{:.1f}".format(used.cpu_usage_percent)]
        return [*first, *memory, _size(used.disk_io_bytes), *network, used.health_status, vms.age(used.uptime_seconds)]


class Reader:
    """Reads what VMs use, again and again, over one connection to each."""

    def __init__(self, wanted: Sequence[str], runtime_dir: Optional[str]) -> None:
        self._wanted, self._runtime_dir = wanted, runtime_dir
        self._open: Dict[str, AttachedVM] = {}
        self._threads = ThreadPoolExecutor(ASKED_AT_ONCE)

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown()
        for vm in self._open.values():
            vm.close()

    def read(self) -> List[Reading]:
        """One reading of each VM that runs and whose owner answers, by their ids."""
        found = [vm for vm in running_vms(self._runtime_dir) if vm["error"] is None]
        if self._wanted:
            found = [vm for vm in found if vm["vm_id"] in self._wanted]
        readings = list(self._threads.map(self._of, found))
        for vm_id in set(self._open) - {vm["vm_id"] for vm in found}:
            self._open.pop(vm_id).close()
        return [reading for reading in readings if reading is not None]

    def _of(self, vm: VMSummary) -> Optional[Reading]:
        vm_id = vm["vm_id"]
        try:
            if vm_id not in self._open:
                self._open[vm_id] = attach(vm_id, self._runtime_dir, ANSWER_S)
            return Reading(vm, self._open[vm_id].get_health_metrics())
        except MicroVMError:
            # It has ended since it was listed, or its owner has.
            gone = self._open.pop(vm_id, None)
            if gone is not None:
                gone.close()
            return None


def configure_stats(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-stream", action="store_true", help="print one reading and end")
    parser.add_argument("--json", action="store_true", help="print each reading as a line of JSON")
    parser.add_argument("--format", metavar="TEXT", help="print this for each VM, such as '{vm_id} {cpu_usage_percent:.0f}'")
    _configure_both(parser)
    parser.add_argument("vm", metavar="VM", nargs="*", help="the ids of VMs, which microvm ps lists (default: all)")
    parser.set_defaults(usage=parser.error)


def configure_top(parser: argparse.ArgumentParser) -> None:
    _configure_both(parser)
    parser.set_defaults(usage=parser.error)


def _configure_both(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--interval", metavar="S", type=_interval, default=1.0, help="seconds between two readings (default: 1)")
    vms.configure_attach(parser)


def stats(options: argparse.Namespace) -> int:
    """Prints readings until Ctrl-C, or until each VM that was named has ended."""
    missing = sorted(set(options.vm) - {vm["vm_id"] for vm in running_vms(options.runtime_dir)})
    for vm_id in missing:
        complain("{}: no such VM runs; microvm ps lists those that do".format(vm_id))
    if missing:
        return 1
    clears = not options.no_stream and not options.json and sys.stdout is not None and sys.stdout.isatty()
    with Reader(options.vm, options.runtime_dir) as reader, contextlib.suppress(KeyboardInterrupt):
        while True:
            readings = reader.read()
            if options.json:
                print(json.dumps([reading.told() for reading in readings], sort_keys=True), flush=True)
            elif options.format:
                for reading in readings:
                    print(vms.formatted(options, reading.told()), flush=True)
            else:
                if clears:
                    print(HOME + CLEAR_BELOW, end="")
                table.show([HEAD, *(reading.row() for reading in readings)])
                sys.stdout.flush()
            if options.no_stream or options.vm and not readings:
                break
            time.sleep(options.interval)
    return 0


def top(options: argparse.Namespace) -> int:
    """Shows readings with a chart of each VM's CPU time until q or Ctrl-C."""
    if not (os.isatty(terminal.STDIN) and sys.stdout is not None and sys.stdout.isatty()):
        options.usage("it needs a terminal; microvm stats prints the same without one")
    charts: Dict[str, Deque[float]] = {}
    bars = BARS if (sys.stdout.encoding or "").lower().replace("-", "") == "utf8" else ASCII_BARS
    with Reader([], options.runtime_dir) as reader, contextlib.suppress(KeyboardInterrupt), terminal.Screen() as screen:
        while True:
            readings = sorted(reader.read(), key=lambda one: (-one.used.cpu_usage_percent, one.vm["vm_id"]))
            charts = {one.vm["vm_id"]: charts.get(one.vm["vm_id"], deque(maxlen=CHART_COLUMNS)) for one in readings}
            for one in readings:
                charts[one.vm["vm_id"]].append(one.used.cpu_usage_percent / (100.0 * one.vm["vcpu_count"]))
            _draw(readings, charts, bars)
            if _quits(screen, options.interval):
                break
    return 0


def _draw(readings: Sequence[Reading], charts: Mapping[str, Sequence[float]], bars: str) -> None:
    rows, columns = terminal.size() or (24, 80)
    cpu = sum(one.used.cpu_usage_percent for one in readings)
    memory = sum(one.used.memory_usage_mb for one in readings)
    count = "1 VM" if len(readings) == 1 else "{} VMs".format(len(readings))
    said = "{}, {:.0f} % of a CPU, {} MiB of memory; q quits".format(count, cpu, memory)
    cells = [[row[0], _chart(charts[row[0]], bars), *row[1:]] for row in (one.row() for one in readings)]
    head, *body = table.lines([[HEAD[0], "CPU".ljust(CHART_COLUMNS), *HEAD[1:]], *cells], columns)
    bold, plain = ("", "") if "NO_COLOR" in os.environ else (BOLD, PLAIN)
    shown = [said[:columns], "", bold + head + plain, *body][:rows]
    sys.stdout.write(HOME + "\n".join(line + CLEAR_LINE for line in shown) + CLEAR_BELOW)
    sys.stdout.flush()


def _chart(shares: Sequence[float], bars: str) -> str:
    """A bar for each share, the latest at the right."""
    levels = [bars[max(0, min(len(bars) - 1, int(share * len(bars))))] for share in shares]
    return "".join(levels).rjust(CHART_COLUMNS)


def _quits(screen: "terminal.Screen", seconds: float) -> bool:
    """Waits for the next reading; whether q was typed, or the terminal has hung up."""
    end = time.monotonic() + seconds
    while True:
        left = end - time.monotonic()
        if left <= 0 or screen.is_stale():
            return False
        if select.select([terminal.STDIN], [], [], min(left, 0.2))[0]:
            try:
                typed = os.read(terminal.STDIN, 64)
            except OSError:
                return True
            if not typed or b"q" in typed.lower():
                return True


def _size(count: int) -> str:
    return "{} KiB".format(count >> 10) if count < MIB else "{:.1f} MiB".format(count / MIB)


def _interval(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not MIN_INTERVAL_S <= seconds <= MAX_INTERVAL_S:
        raise argparse.ArgumentTypeError("{!r} is not {:g} to {:g} seconds".format(text, MIN_INTERVAL_S, MAX_INTERVAL_S))
    return seconds
