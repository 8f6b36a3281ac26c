"""Runs every test of this folder and prints ``N passed, N failed, N skipped``, with the reason of each skip.

``python3 tests/runner.py [--totals FILE] [PATTERN ...]``; the wheel must be installed in this interpreter.
"""

import argparse
import sys
import unittest
from pathlib import Path
from typing import Optional, Sequence

ROOT = Path(__file__).resolve().parent.parent
# Where the VMs were of the ordinary user whom some tests become: empty by now, it would outlive that user.
USERS_FOLDER = Path("/dev/shm/tw-microvm-61234")


class Counting(unittest.TextTestResult):
    """A result that also counts what passed."""

    passed = 0

    def addSuccess(self, test: unittest.TestCase) -> None:
        super().addSuccess(test)
        self.passed += 1

    def addExpectedFailure(self, test: unittest.TestCase, err: object) -> None:
        super().addExpectedFailure(test, err)  # type: ignore[arg-type]
        self.passed += 1


def main(arguments: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--totals", help="write the three numbers to this file, too")
    parser.add_argument("patterns", nargs="*", default=["test_*.py"])
    options = parser.parse_args(arguments)
    sys.path[0] = str(ROOT)
    loader = unittest.defaultTestLoader
    found = [loader.discover(str(ROOT / "tests"), pattern, str(ROOT)) for pattern in options.patterns]
    suite = unittest.TestSuite(found)
    runner = unittest.TextTestRunner(stream=sys.stdout, verbosity=2, resultclass=Counting)
    result = runner.run(suite)
    assert isinstance(result, Counting)
    try:
        USERS_FOLDER.rmdir()
    except FileNotFoundError:
        pass
    except OSError as error:
        print("left behind: {}".format(error))
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
