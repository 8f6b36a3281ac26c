"""The limits under cgroup v2: the core's own tests, run in a guest whose kernel has the unified hierarchy alone."""

import base64
import os
import re
import unittest
from pathlib import Path

from ..support import ROOT, VMTestCase, limits, shell

# Size of the pieces, so that each fits a message as base64.
PIECE = 3 << 20


def built_tests() -> Path:
    """The core's unit tests as one static program, which ``make attackers`` builds."""
    named = os.environ.get("MICROVM_LAB_TESTS")
    path = Path(named) if named else ROOT / "build" / "lab-tests"
    if not path.is_file():
        raise unittest.SkipTest("needs the core's tests as a static program: make attackers builds it, MICROVM_LAB_TESTS names it")
    return path


class UnifiedHierarchy(VMTestCase):
    def test_limits_hold_under_v2_as_they_do_under_v1(self) -> None:
        program = built_tests().read_bytes()
        vm = self.running(resource_limits=limits(memory_mb=512, disk_size_mb=64))
        for at in range(0, len(program), PIECE):
            piece = base64.b64encode(program[at : at + PIECE]).decode()
            write = {"path": "/data/tests", "data_base64": piece, "offset": at, "mode": "0755"}
            self.result(vm, "write_file", write)
        mounts = self.result(vm, "exec", shell("cat /proc/mounts"))["stdout"]
        self.assertIn(" cgroup2 ", mounts)
        self.assertNotIn(" cgroup ", mounts)
        run = "TMPDIR=/tmp /data/tests --test-threads=1 host::cgroup 2>&1"
        done = self.result(vm, "exec", shell(run, timeout=120))
        self.assertEqual(done["exit_code"], 0, done["stdout"])
        counts = re.search(r"(\d+) passed; 0 failed; 0 ignored", done["stdout"])
        self.assertGreaterEqual(int(counts.group(1)) if counts else 0, 8, done["stdout"])
