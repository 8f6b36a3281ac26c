"""Runs tests, several modules at a time, and prints what passed, failed and was skipped, and what took how long.

``python3 tests/runner.py [--lanes N] [--tries N] [--report FILE] [NAME ...]``: NAME is a folder, module, class or test, as
``tests.vm`` or ``tests.vm.test_quota``; without one it is all of this folder but ``tests.timing``; ``@FILE`` has names. The
package must be where this interpreter finds it.

Each module has a process of its own. Lanes run modules beside each other: guests wait more than they work. A lane is a mount
and PID namespace with a /dev/shm and a cache of its own, so that no test meets another lane's VMs. A module that counts on
the whole host says so by ``ALONE``, a text with the reason; such modules run after the lanes, one by one, on the plain host.
"""

import argparse
import contextlib
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    # This folder is no place to import from: it would hide packages.
    sys.path[0] = str(ROOT)

from tests import skips  # noqa: E402

# Default folders of the ordinary user that some tests switch to.
USER = 61234
USERS_RUNTIME, USERS_CACHE = Path("/dev/shm/tw-microvm-{}".format(USER)), Path("/tmp/tw-microvm-cache-{}".format(USER))
MARK = ".tw-microvm"
CACHE = Path("/var/cache/tw-microvm")
RUNTIME = Path("/run/tw-microvm")
# What measures time or shares has a run of its own: make test-timing.
APART = "tests.timing"
# No module takes half of this on two slow cores; one that hangs must not hang all.
MODULE_S = 1500.0
SLOWEST = 12
# How much of a failure is told again at the end of a run.
LINES, WIDTH = 14, 300
# $1 is the lane's cache. The folder of VMs is in /run where that is in memory, else in /dev/shm.
LANE = """
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mkdir -p -m 700 {cache}
mount --bind "$1" {cache}
[ ! -d {runtime} ] || mount -t tmpfs -o mode=700 tmpfs {runtime}
shift
exec "$@"
""".format(cache=CACHE, runtime=RUNTIME)
NAMESPACES = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--propagation", "private"]


class Module(NamedTuple):
    """What one process runs: a module, or parts of one."""

    name: str
    parts: Tuple[str, ...]
    alone: bool
    weight: int


class Outcome(NamedTuple):
    """What became of one of them."""

    name: str
    seconds: float
    cpu_seconds: float
    passed: int
    failed: List[str]
    skipped: List[Tuple[str, str]]


class Recording(unittest.TextTestResult):
    """A result that also counts what passed."""

    passed = 0

    def addSuccess(self, test: unittest.TestCase) -> None:
        super().addSuccess(test)
        self.passed += 1

    def addExpectedFailure(self, test: unittest.TestCase, err: Any) -> None:
        super().addExpectedFailure(test, err)
        self.passed += 1


@contextlib.contextmanager
def users_folders(*folders: Path) -> Iterator[None]:
    """Remove at the end what the tests' ordinary user made here meanwhile, and say what should not be there any more.

    A folder that was there before is not the tests' own, and is kept.
    """
    own = [folder for folder in folders if not os.path.lexists(str(folder))]
    try:
        yield
    finally:
        for folder in own:
            if os.geteuid() != 0 or not folder.is_dir() or folder.is_symlink() or folder.stat().st_uid != USER:
                continue
            left = [path.name for path in folder.iterdir() if path.name != MARK]
            if folder == USERS_RUNTIME and left:
                print("left behind in {}: {}".format(folder, ", ".join(left)))
            shutil.rmtree(str(folder))


def run_here(names: Sequence[str], report: Path) -> int:
    """Run tests in this process; the numbers go to a file."""
    suite = unittest.TestSuite(unittest.defaultTestLoader.loadTestsFromName(name) for name in names)
    # What a test that passes prints would only hide what a failed one did.
    with users_folders(USERS_RUNTIME):
        result = unittest.TextTestRunner(stream=sys.stdout, verbosity=2, buffer=True, resultclass=Recording).run(suite)
    assert isinstance(result, Recording)
    failed = [described_failure(str(test), text) for test, text in result.failures + result.errors]
    failed += [described_failure(str(test), "it passed, which was not expected") for test in result.unexpectedSuccesses]
    skipped = [(str(test), reason) for test, reason in result.skipped]
    report.write_text(json.dumps({"passed": result.passed, "failed": failed, "skipped": skipped}))
    return 1 if failed else 0


def described_failure(test: str, text: str) -> str:
    """A failed test, and the end of its traceback: what tells the kind of an error stands there, before what the test printed."""
    traceback = re.split(r"\n(?:Stdout|Stderr):\n", text, maxsplit=1)[0]
    return "\n    ".join([test] + [line[:WIDTH] for line in traceback.rstrip().splitlines()[-LINES:]])


def holder(name: str) -> str:
    """The module that a test is in."""
    found = name
    while not ROOT.joinpath(*found.split(".")).with_suffix(".py").is_file():
        found = found.rpartition(".")[0]
        if not found:
            raise SystemExit("{} is no folder, module, class or test of {}".format(name, ROOT / "tests"))
    return found


def modules(names: Sequence[str]) -> List[Module]:
    """The modules that have these tests, each once."""
    parts: Dict[str, List[str]] = {}
    for name in names:
        folder = ROOT.joinpath(*name.split("."))
        if not folder.is_dir():
            parts.setdefault(holder(name), []).append(name)
            continue
        for file in sorted(folder.rglob("test_*.py")):
            found = ".".join(file.relative_to(ROOT).with_suffix("").parts)
            if name.startswith(APART) or not found.startswith(APART + "."):
                parts.setdefault(found, []).append(found)
    return [described(name, tuple(chosen)) for name, chosen in parts.items()]


def described(name: str, parts: Tuple[str, ...]) -> Module:
    try:
        loaded = importlib.import_module(name)
    except (Exception, unittest.SkipTest):
        # Its own process says what is wrong with it.
        return Module(name, parts, False, 0)
    weight = getattr(loaded, "WEIGHT", os.path.getsize(str(loaded.__file__)))
    return Module(name, parts, hasattr(loaded, "ALONE"), weight)


def run_apart(chosen: Module, lane: Optional[Path], output: threading.Lock) -> Outcome:
    """Run a module in a process of its own, and print all that it said at its end."""
    name = chosen.name
    with tempfile.TemporaryDirectory(prefix="tests-") as folder:
        report, log = Path(folder) / "report", Path(folder) / "log"
        command = [sys.executable, str(Path(__file__).resolve()), "--here", "--report", str(report), *chosen.parts]
        if lane is not None:
            command = NAMESPACES + ["sh", "-ec", LANE, "lane", str(lane)] + command
        begun = time.monotonic()
        with log.open("wb") as file:
            process = subprocess.Popen(command, cwd=str(ROOT), stdout=file, stderr=subprocess.STDOUT)
            # The end of a lane's first process is that of all others there.
            deadline = threading.Timer(MODULE_S, os.kill, (process.pid, signal.SIGKILL))
            deadline.start()
            try:
                usage = os.wait4(process.pid, 0)[2]
                late = not deadline.is_alive()
            finally:
                # Ctrl-C ends the wait, too; a timer that is left keeps this process from ending.
                deadline.cancel()
        seconds = time.monotonic() - begun
        told: Dict[str, Any] = json.loads(report.read_text()) if report.exists() else {}
        failed = list(told.get("failed", ["{} {}".format(name, "did not end" if late else "has no result")]))
        skipped = [(test, reason) for test, reason in told.get("skipped", [])]
        outcome = Outcome(name, seconds, usage.ru_utime + usage.ru_stime, told.get("passed", 0), failed, skipped)
        with output:
            print("\n=== {}{}".format(name, "" if lane is None else ", " + lane.name), flush=True)
            print(log.read_text(errors="replace").rstrip(), flush=True)
    return outcome


@contextlib.contextmanager
def caches(count: int) -> Iterator[List[Path]]:
    """A folder for each lane, on the file system where the cache is by default."""
    folders = [Path(tempfile.mkdtemp(prefix="tw-microvm-lane-", dir=str(CACHE.parent))) for _ in range(count)]
    try:
        yield folders
    finally:
        for folder in folders:
            shutil.rmtree(str(folder), ignore_errors=True)


def can_isolate() -> bool:
    """Whether this user may make a lane's namespaces."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        return False
    done = subprocess.run(NAMESPACES + ["sh", "-c", "mount -t tmpfs tmpfs /dev/shm"], stderr=subprocess.DEVNULL)
    return done.returncode == 0


def run_all(chosen: Sequence[Module], lanes: int, tries: int) -> List[Outcome]:
    """What can stand others beside it in lanes, the longest first; then the rest."""
    outcomes: List[Outcome] = []
    output = threading.Lock()
    together = sorted((each for each in chosen if not each.alone), key=lambda each: -each.weight)
    alone = [each for each in chosen if each.alone]
    if lanes < 2 or len(together) < 2 or not can_isolate():
        together, alone = [], list(chosen)

    def run(each: Module, lane: Optional[Path]) -> Outcome:
        for _ in range(tries - 1):
            outcome = run_apart(each, lane, output)
            if not outcome.failed:
                return outcome
            print("{} is tried again: {}".format(each.name, ", ".join(text.splitlines()[0] for text in outcome.failed)), flush=True)
        return run_apart(each, lane, output)

    def work(lane: Path) -> None:
        while True:
            try:
                next_one = together.pop(0)
            except IndexError:
                return
            outcomes.append(run(next_one, lane))

    with caches(min(lanes, len(together))) as folders, ThreadPoolExecutor(lanes) as pool:
        try:
            # A lane's own error ends the run: its module has no outcome.
            list(pool.map(work, folders))
        finally:
            # Ctrl-C has reached the modules that run; no other begins.
            together.clear()
    outcomes += [run(each, None) for each in alone]
    return outcomes


def main(arguments: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, fromfile_prefix_chars="@")
    # In a file of names: a line may be a comment.
    parser.convert_arg_line_to_args = lambda line: line.partition("#")[0].split()  # type: ignore[method-assign]
    parser.add_argument("--lanes", type=int, default=4 if (os.cpu_count() or 1) > 1 else 1, help="modules at a time")
    parser.add_argument("--tries", type=int, default=1, help="run a module that failed again, up to so many times in all")
    parser.add_argument("--report", type=Path, help="write the results to this file, too, as JSON")
    parser.add_argument("--here", action="store_true", help="run in this process, without a table")
    parser.add_argument("names", nargs="*", default=["tests"])
    options = parser.parse_args(arguments)
    if options.here:
        return run_here(options.names, options.report)
    begun = time.monotonic()
    with users_folders(USERS_RUNTIME, USERS_CACHE):
        outcomes = run_all(modules(options.names), options.lanes, options.tries)
    passed = sum(each.passed for each in outcomes)
    failed = [test for each in outcomes for test in each.failed]
    skipped = [skip for each in outcomes for skip in each.skipped]
    failed += skips.unknown(skipped)
    print("\n{:>8}  {:>7}  {:>6}  {:>6}  {:>7}".format("seconds", "of CPU", "passed", "failed", "skipped"))
    slowest = sorted(outcomes, key=lambda each: -each.seconds)[:SLOWEST]
    for each in slowest:
        counts = (each.passed, len(each.failed), len(each.skipped))
        print("{:8.1f}  {:7.1f}  {:6}  {:6}  {:7}  {}".format(each.seconds, each.cpu_seconds, *counts, each.name))
    skips.show(skipped)
    for test in failed:
        print("failed: " + test)
    totals = (passed, len(failed), len(skipped), time.monotonic() - begun)
    print("{} passed, {} failed, {} skipped in {:.0f} s".format(*totals))
    if options.report:
        options.report.write_text(json.dumps({"passed": passed, "failed": failed, "skipped": skipped}))
    # A run that found no test has not shown anything.
    return 1 if failed or passed == 0 else 0


if __name__ == "__main__":
    sys.exit(main())
