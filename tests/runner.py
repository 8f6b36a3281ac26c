"""Runs tests and prints ``N passed, N failed, N skipped``, with the reason of each skip.

``python3 tests/runner.py [--totals FILE] [NAME ...]``: NAME is a folder, module, class or test, as ``tests.vm`` or
``tests.vm.test_quota``; without one it is all of this folder. The wheel must be installed in this interpreter.
"""

import argparse
import os
import shutil
import sys
import unittest
from pathlib import Path
from typing import Optional, Sequence

ROOT = Path(__file__).resolve().parent.parent
# Default folders of the ordinary user that some tests switch to. They are removed at the end; no VM is left in them then.
USER = 61234
USERS_RUNTIME, USERS_CACHE = Path("/dev/shm/tw-microvm-{}".format(USER)), Path("/tmp/tw-microvm-cache-{}".format(USER))
MARK = ".tw-microvm"


class Counting(unittest.TextTestResult):
    """A result that also counts what passed."""

    passed = 0

    def addSuccess(self, test: unittest.TestCase) -> None:
        super().addSuccess(test)
        self.passed += 1

    def addExpectedFailure(self, test: unittest.TestCase, err: object) -> None:
        super().addExpectedFailure(test, err)  # type: ignore[arg-type]
        self.passed += 1


def load(name: str) -> unittest.TestSuite:
    """The tests of a folder, a module, a class or a method, by its dotted name."""
    folder = ROOT.joinpath(*name.split("."))
    if folder.is_dir():
        return unittest.defaultTestLoader.discover(str(folder), "test_*.py", str(ROOT))
    return unittest.defaultTestLoader.loadTestsFromName(name)


def remove_users_folders() -> None:
    """Remove what the tests' ordinary user was given by default, and say what should not be there any more."""
    for folder in (USERS_RUNTIME, USERS_CACHE):
        if os.geteuid() != 0 or not folder.is_dir() or folder.is_symlink() or folder.stat().st_uid != USER:
            continue
        left = [path.name for path in folder.iterdir() if path.name != MARK]
        if folder == USERS_RUNTIME and left:
            print("left behind in {}: {}".format(folder, ", ".join(left)))
        shutil.rmtree(str(folder))


def main(arguments: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--totals", help="write the three numbers to this file, too")
    parser.add_argument("names", nargs="*", default=["tests"])
    options = parser.parse_args(arguments)
    sys.path[0] = str(ROOT)
    suite = unittest.TestSuite(load(name) for name in options.names)
    runner = unittest.TextTestRunner(stream=sys.stdout, verbosity=2, resultclass=Counting)
    result = runner.run(suite)
    assert isinstance(result, Counting)
    remove_users_folders()
    failed = len(result.failures) + len(result.errors) + len(result.unexpectedSuccesses)
    for test, reason in result.skipped:
        print("skipped: {}: {}".format(test, reason))
    print("{} passed, {} failed, {} skipped".format(result.passed, failed, len(result.skipped)))
    if options.totals:
        Path(options.totals).write_text("{} {} {}\n".format(result.passed, failed, len(result.skipped)))
    # A run that found no test has not shown anything.
    return 1 if failed or result.passed == 0 else 0


if __name__ == "__main__":
    sys.exit(main())
