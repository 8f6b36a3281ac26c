"""``bench``: what a VM costs, always beside the bare VMM doing the same in the same run, in turns.

With the jail and the encryption that a user gets by default. ``start`` means that ``start()`` returned; ``answered``
that the first command was answered, and ``first program ended`` that one was run after it, both counted from before ``start()``;
``second program`` is what the next one takes.
"""

import argparse
import errno
import os
import shutil
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

from .. import MicroVMError, MicroVMInstance, MicroVMIsolationManager, VMInfo, VMResourceLimits
from .bare import Machine, Running, memory_mib
from .report import Report

PARTS = ("cold", "clone", "pool", "command", "many")
THREADS = 8
# How long a ready VM of the pool rests before a start takes it.
REST_S = 0.05
DISK_MB = 64
PROGRAM = {"program": "/bin/true"}
DATA = Path(__file__).resolve().parent.parent / "_data"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--n", type=whole(1), default=20, help="samples of each figure (default: 20)")
    parser.add_argument("--memory-mb", type=whole(64, 1 << 20), default=128, help="guest memory in MiB (default: 128)")
    parser.add_argument(
        "--at-once", type=whole(1), nargs="+", default=[1, 10, 50, 100], metavar="N", help="VMs started together"
    )
    parser.add_argument("--rounds", type=whole(1), default=5, help="how often that is done (default: 5)")
    parser.add_argument("--only", choices=PARTS, action="append", help="measure this part; may be given again")
    parser.add_argument("--json", type=writable, metavar="FILE", help="write the figures and all samples as JSON")
    parser.add_argument("--svg", type=writable, metavar="FILE", help="draw the times as a chart")


def whole(low: int, high: int = 1 << 20) -> Callable[[str], int]:
    """A type of argument: a whole number in this range."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = low - 1
        if not low <= number <= high:
            raise argparse.ArgumentTypeError("{!r} is no whole number from {} to {}".format(text, low, high))
        return number

    return read


def writable(name: str) -> str:
    """A type of argument: a file that can be written. Measuring takes minutes, and its figures are written at its end."""
    existed = os.path.lexists(name)
    try:
        with open(name, "ab"):
            pass
        if not existed:
            os.unlink(name)
    except OSError as error:
        raise argparse.ArgumentTypeError("{!r} cannot be written: {}".format(name, error.strerror)) from None
    return name


def run(options: argparse.Namespace) -> int:
    """Measure and print; 0 when everything could be measured."""
    parts = options.only or PARTS
    try:
        with tempfile.TemporaryDirectory(prefix="microvm-bench-") as name:
            bench = Bench(Path(name), options.n, options.memory_mb)
            if "cold" in parts:
                bench.cold()
            if "clone" in parts:
                bench.clone()
            if "pool" in parts:
                bench.pool()
            if "command" in parts:
                bench.command()
            if "many" in parts:
                for count in options.at_once:
                    bench.many(count, options.rounds)
    except MicroVMError as error:
        print("bench: {}".format(error), file=sys.stderr)
        return 1
    print(bench.report.table())
    bench.report.write(options.json, options.svg)
    return 0


def pid_of(info: VMInfo) -> int:
    """The VMM of a running VM."""
    assert info["pid"] is not None, info
    return info["pid"]


class Life(NamedTuple):
    """Milliseconds from the start's begin to its end, to the first answer and to the end of the first program; what the second
    program took, and ``destroy_vm``.
    """

    started: float
    answered: float
    ran: float
    again: float
    destroyed: float


class Bench:
    """One run: managers with a cache of their own, and the folder of the bare VMMs."""

    def __init__(self, folder: Path, n: int, memory_mb: int) -> None:
        self.folder, self.n = folder, n
        self.limits = VMResourceLimits(memory_mb=memory_mb, disk_size_mb=DISK_MB)
        self.config: Dict[str, Any] = {
            "max_vcpus": 1024, "max_memory_mb": 1 << 20, "overcommit_memory": True, "raise_on_error": True,
            "cache_dir": str(folder / "cache"),
        }
        (folder / "cache").mkdir(mode=0o700)
        with self.manager() as manager:
            # This start also makes the template, so that no measured start has to.
            vm = self.vm(manager)
            vm.start()
            info = vm.get_info()
            vmm, accelerator = info["vmm"], info["accelerator"]
            assert vmm is not None and accelerator is not None, info
            self.program = vmm["path"]
            self.cloned = Machine(pid_of(info), self.program)
        (self.template,) = [path for path in (folder / "cache" / "templates").iterdir() if path.is_dir()]
        settings = {"guest_memory_mib": memory_mb, "disk_mib": DISK_MB, "vcpus": 1}
        package = ", of the package thirstys-waterfall-microvm-qemu" if vmm["packaged"] else ""
        self.report = Report((vmm["version"] or self.program) + package, accelerator, settings)

    @contextmanager
    def manager(self, **config: Any) -> Iterator[MicroVMIsolationManager]:
        with MicroVMIsolationManager(dict(self.config, **config)) as manager:
            yield manager

    def vm(self, manager: MicroVMIsolationManager) -> MicroVMInstance:
        vm = manager.get_vm(manager.create_vm("plugin", self.limits) or "")
        assert vm is not None
        return vm

    def drives(self, name: str) -> Dict[str, Path]:
        """A copy of the template's disk."""
        folder = self.folder / "bare-{}".format(name)
        folder.mkdir(exist_ok=True)
        copy_sparse(self.template / "disk", folder / "disk")
        return {"disk": folder / "disk"}

    def life(self, manager: MicroVMIsolationManager) -> Life:
        vm = self.vm(manager)
        program = lambda: vm.send_command("exec", PROGRAM)
        steps = (vm.start, lambda: vm.send_command("ping"), program, program, lambda: manager.destroy_vm(vm.vm_id))
        marks = [time.perf_counter()]
        for step in steps:
            step()
            marks.append(time.perf_counter())
        begun, started, answered, ran, again, ended = (1e3 * mark for mark in marks)
        return Life(started - begun, answered - begun, ran - begun, again - ran, ended - again)

    def add_life(self, name: str, lives: List[Life], base: str) -> None:
        """The rows of a way to start: up to the first answer there is a bare one to compare it with."""
        self.report.add(name + ": start", "ms", [life.started for life in lives], base)
        self.report.add(name + ": answered", "ms", [life.answered for life in lives], base)
        self.report.add(name + ": first program ended", "ms", [life.ran for life in lives])
        self.report.add(name + ": second program", "ms", [life.again for life in lives])

    def cold(self) -> None:
        with self.manager(templates=False) as manager:
            vm = self.vm(manager)
            vm.start()
            booted = Machine(pid_of(vm.get_info()), self.program)
            manager.destroy_vm(vm.vm_id)

            def bare() -> float:
                drives = self.drives("boot")
                files = {"-kernel": str(DATA / "vmlinux"), "-initrd": str(DATA / "initramfs.cpio")}
                running = booted.launch(drives, None, files)
                try:
                    return 1e3 * running.first_byte()
                finally:
                    running.end()

            bares, ours = self.in_turns(bare, lambda: self.life(manager))
        self.report.add("bare boot: first byte", "ms", bares)
        self.add_life("boot", ours, "bare boot: first byte")

    def bare_clone(self, name: str, drives: Optional[Dict[str, Path]] = None) -> Tuple[Running, float]:
        running = self.cloned.launch(drives or self.drives(name), self.template / "ram", {})
        running.restore(self.template / "state")
        running.echo()
        return running, 1e3 * (time.perf_counter() - running.begun)

    def clone(self) -> None:
        def bare() -> float:
            running, answered = self.bare_clone("clone")
            running.end()
            return answered

        with self.manager() as manager:
            bares, ours = self.in_turns(bare, lambda: self.life(manager))
        self.report.add("bare clone: answered", "ms", bares)
        self.add_life("clone", ours, "bare clone: answered")
        self.report.add("clone: destroy_vm", "ms", [life.destroyed for life in ours])

    def pool(self) -> None:
        """Of a ready clone: beside a bare one that was restored, has answered once, and was stopped since."""
        running, _ = self.bare_clone("pool")
        shape = {"memory_mb": self.limits.memory_mb, "disk_size_mb": DISK_MB, "size": 1, "form": "ready"}
        with self.manager(pool=shape) as manager:

            def bare() -> float:
                running.stop()
                time.sleep(REST_S)
                return 1e3 * (running.resume() + running.echo())

            def ours() -> Life:
                while manager.get_resource_usage()["pool"][0]["ready"] == 0:
                    time.sleep(0.01)
                time.sleep(REST_S)
                return self.life(manager)

            bares, mine = self.in_turns(bare, ours)
        running.end()
        self.report.add("bare wake-up: answered", "ms", bares)
        self.add_life("pool", mine, "bare wake-up: answered")

    def command(self) -> None:
        running, _ = self.bare_clone("echo")
        with self.manager() as manager:
            vm = self.vm(manager)
            vm.start()

            def ping() -> float:
                begun = time.perf_counter()
                vm.send_command("ping")
                return time.perf_counter() - begun

            bares, ours = self.in_turns(running.echo, ping, 50 * self.n)
            idle, bare_idle = memory_mib(pid_of(vm.get_info())), running.memory_mib()
        running.end()
        self.report.add("bare echo", "us", [1e6 * s for s in bares])
        self.report.add("command: round trip", "us", [1e6 * s for s in ours], "bare echo")
        for index, kind in enumerate(("PSS", "RSS")):
            self.report.add("bare clone: {}".format(kind), "MiB", [bare_idle[index]])
            self.report.add("clone: {}".format(kind), "MiB", [idle[index]], "bare clone: {}".format(kind))

    def many(self, count: int, rounds: int) -> None:
        """Wall time of ``count`` VMs started from 8 threads, each to its first answer; memory and teardown."""
        bare_walls, bare_pss, walls, pss, teardowns = [], [], [], [], []
        for last in [False] * (rounds - 1) + [True]:
            bares: Dict[int, Running] = {}
            # The copies are made before the clock starts: Python copies a disk slower than QEMU starts.
            drives = [self.drives("many-{}".format(index)) for index in range(count)]

            def bare(index: int) -> None:
                bares[index] = self.bare_clone("many", drives[index])[0]

            bare_walls.append(1e3 * together(count, bare))
            bare_pss = [running.memory_mib()[0] for running in bares.values()] if last else []
            for running in bares.values():
                running.end()
            with self.manager() as manager:
                # The first start reads and checks the template for all later ones.
                self.life(manager)

                def ours(_: int) -> None:
                    vm = self.vm(manager)
                    vm.start()
                    vm.send_command("ping")

                walls.append(1e3 * together(count, ours))
                infos = manager.get_all_vms_info().values() if last else []
                pss = [memory_mib(pid_of(info))[0] for info in infos]
                begun = time.perf_counter()
                manager.destroy_all_vms()
                teardowns.append(1e3 * (time.perf_counter() - begun))
        # Removed only at the end: ext4 is slow to make a file while it still scans recently removed ones.
        for each in drives:
            shutil.rmtree(str(each["disk"].parent))
        names = ["{}{} at once: {}".format(who, count, what) for who in ("bare ", "") for what in ("all answered", "PSS each")]
        self.report.add(names[0], "ms", bare_walls)
        self.report.add(names[2], "ms", walls, names[0])
        self.report.add("{} at once: destroy_all_vms".format(count), "ms", teardowns)
        self.report.add(names[1], "MiB", bare_pss)
        self.report.add(names[3], "MiB", pss, names[1])

    def in_turns(self, bare: Callable[[], float], ours: Callable[[], Any], n: Optional[int] = None) -> Tuple[List[float], List[Any]]:
        """Both by turns, after one of each for the caches."""
        bare(), ours()
        pairs = [(bare(), ours()) for _ in range(n or self.n)]
        return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def copy_sparse(source: Path, target: Path) -> None:
    """Copy a file and keep its holes."""
    with source.open("rb") as original, target.open("wb") as copy:
        length = source.stat().st_size
        copy.truncate(length)
        at = 0
        while at < length:
            try:
                at = os.lseek(original.fileno(), at, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:  # lseek(2): no data after this offset.
                    return
                raise
            end = os.lseek(original.fileno(), at, os.SEEK_HOLE)
            while at < end:
                at += os.copy_file_range(original.fileno(), copy.fileno(), end - at, at, at)


def together(count: int, work: Callable[[int], None]) -> float:
    """Seconds that 8 threads take for ``count`` pieces of work."""
    left = list(range(count))
    failures: List[BaseException] = []

    def loop() -> None:
        while True:
            try:
                index = left.pop()
            except IndexError:
                return
            try:
                work(index)
            except BaseException as failure:
                failures.append(failure)
                return

    threads = [threading.Thread(target=loop) for _ in range(THREADS)]
    begun = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wall = time.perf_counter() - begun
    if failures:
        raise failures[0]
    return wall
