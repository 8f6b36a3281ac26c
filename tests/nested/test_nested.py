"""The short form of ``make test-nested``: a VM's life on KVM, and jumps of the host's clock, in the lab's guest."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from typing import Optional

from ..support import ROOT
from . import guest, lab

TIMEOUT_S = 900.0
# The runner begins with what takes longest.
WEIGHT = 1 << 20
PARTS = ("tests.conformance.test_conformance_life", "tests.conformance.test_conformance_clock")
# Where the lab's guest has folders of its own.
HIDDEN = ("/run/", "/tmp/", "/var/tmp/", "/var/cache/", "/dev/shm/")


def missing() -> Optional[str]:
    """Why the lab cannot be had here."""
    if os.geteuid() != 0:
        return "the lab shares this machine's files with its guest: it needs root"
    for tool in (lab.QEMU, "busybox", "cpio", "apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            return "the lab needs {}".format(tool)
    for path in (ROOT, Path(sys.executable)):
        if str(path).startswith(HIDDEN):
            return "the lab's guest does not see {}".format(path)
    return None


class NestedLab(unittest.TestCase):
    def test_life_on_kvm(self) -> None:
        why = missing()
        if why:
            self.skipTest(why)
        lab.CACHE.mkdir(parents=True, exist_ok=True)
        try:
            guest.kernel(lab.CACHE)
        except (RuntimeError, subprocess.CalledProcessError) as error:
            self.skipTest("Debian's kernel is not to be had: {}".format(error))
        if lab.release(lab.emulator()[0]) < lab.RELIABLE:
            self.skipTest("a QEMU older than {} hangs now and then as the lab's host".format(lab.RELIABLE))
        with tempfile.TemporaryDirectory(dir=str(lab.CACHE)) as name:
            folder = Path(name)
            command = [sys.executable, "tests/runner.py", "--report", "/run/lab/report", *PARTS]
            status = lab.run(command, TIMEOUT_S, folder)
            self.assertEqual(status, 0, "the lab's output is above")
            report = json.loads((folder / "report").read_text())
        self.assertGreater(report["passed"], 10)
        self.assertEqual(report["failed"], [])


if __name__ == "__main__":
    unittest.main()
