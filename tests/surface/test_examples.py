"""Every example, as a user runs it."""

import subprocess
import sys
import unittest

from ..support import ROOT

# tests/network/test_network.py runs network.py, in a network of its own.
EXAMPLES = sorted(path for path in (ROOT / "examples").glob("*.py") if path.name != "network.py")
# Logging is not set up: stderr has the failures that an example is about.
FAILURES = {"resource_management.py": r"not enough vCPUs: .*\n"}


class Examples(unittest.TestCase):
    def test_there_is_one_for_each_section(self) -> None:
        self.assertGreaterEqual(len(EXAMPLES), 6)

    def test_every_example_ends_well(self) -> None:
        for example in EXAMPLES:
            with self.subTest(example.name):
                done = subprocess.run(
                    [sys.executable, str(example)],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    universal_newlines=True,
                    timeout=120,
                )
                self.assertEqual(done.returncode, 0, done.stderr)
                self.assertTrue(done.stdout)
                self.assertRegex(done.stderr, r"\A{}\Z".format(FAILURES.get(example.name, "")))
