"""The package on other kernels: Debian's, each booted in a virtual machine on this machine's root (``make test-kernels``).

``python3 tests/kernels.py [--timeout S] [SUITE ...]``: in each, tests/nested/on_this_kernel.py has VMs emulated by a QEMU that
is emulated itself, which takes minutes. A suite whose kernel the archive has no more is skipped with the reason.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import List

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    # This folder is no place to import from: it would hide packages.
    sys.path[0] = str(ROOT)

from tests.nested import guest, lab, test_nested  # noqa: E402

# Linux 4.19 and 5.10.
DEFAULT = ["buster", "bullseye"]
TESTS = ["tests.nested.on_this_kernel"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", default=DEFAULT, help="Debian's names (default: {})".format(" ".join(DEFAULT)))
    parser.add_argument("--timeout", type=float, default=2400.0, help="seconds for each")
    options = parser.parse_args()
    failed: List[str] = []
    passed = skipped = 0
    lab.CACHE.mkdir(parents=True, exist_ok=True)
    for suite in options.suites:
        why = test_nested.missing()
        if why is None:
            try:
                print("{}: {}".format(suite, guest.kernel(lab.CACHE, suite).name), flush=True)
            except (RuntimeError, subprocess.CalledProcessError) as error:
                why = "its kernel is not to be had: {}".format(error)
        if why is not None:
            print("{}: skipped: {}".format(suite, why), flush=True)
            skipped += 1
            continue
        with tempfile.TemporaryDirectory(dir=str(lab.CACHE)) as name:
            folder = Path(name)
            package = "PYTHONPATH=" + os.environ.get("PYTHONPATH", "")
            command = ["env", package, sys.executable, "tests/runner.py", "--lanes", "1", "--report", "/run/lab/report", *TESTS]
            status = lab.run(command, options.timeout, folder, suite=suite, has_kvm=False)
            report = folder / "report"
            told = json.loads(report.read_text()) if report.exists() else {"passed": 0, "failed": [], "skipped": []}
        passed += told["passed"]
        skipped += len(told["skipped"])
        failed += ["{}: {}".format(suite, test) for test in told["failed"]]
        if status != 0 and not told["failed"]:
            failed.append("{}: ended with {}".format(suite, status))
    for name in failed:
        print("FAILED {}".format(name))
    print("{} passed, {} failed, {} skipped".format(passed, len(failed), skipped))
    # A run in which no kernel was booted has not shown anything.
    return 1 if failed or passed == 0 else 0


if __name__ == "__main__":
    sys.exit(main())
