"""The runner: what it removes, and that no module is lost."""

import io
import os
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

from .. import runner


class Lanes(unittest.TestCase):
    def test_lane_that_fails_ends_the_run_with_its_error(self) -> None:
        chosen = [runner.Module("tests.{}".format(name), (), False, 1) for name in "abc"]
        with tempfile.TemporaryDirectory() as folder, mock.patch.multiple(
            runner, CACHE=Path(folder) / "cache", can_isolate=lambda: True, run_apart=mock.Mock(side_effect=OSError("no process"))
        ):
            with self.assertRaisesRegex(OSError, "no process"):
                runner.run_all(chosen, lanes=2, tries=1)
            self.assertEqual(list(Path(folder).iterdir()), [])


class Folders(unittest.TestCase):
    def test_folder_of_the_tests_user_is_removed_if_it_was_not_there_before(self) -> None:
        with tempfile.TemporaryDirectory() as folder, mock.patch.object(runner, "USER", os.getuid()), mock.patch.object(
            runner.os, "geteuid", return_value=0
        ):
            before, made = Path(folder) / "before", Path(folder) / "made"
            before.mkdir()
            with runner.users_folders(before, made):
                made.mkdir()
                for path in (before, made):
                    (path / "template").write_text("")
            self.assertTrue((before / "template").exists())
            self.assertFalse(made.exists())


class Failures(unittest.TestCase):
    def test_end_of_a_failure_is_kept_with_the_tests_name(self) -> None:
        told = runner.described_failure("test_a (tests.a.A)", "Traceback\n" + "  frame\n" * 50 + "ValueError: " + "x" * 1000 + "\n")
        lines = told.splitlines()
        self.assertEqual((lines[0], len(lines)), ("test_a (tests.a.A)", runner.LINES + 1))
        self.assertTrue(lines[-1].startswith("    ValueError: xx"))
        self.assertLess(len(lines[-1]), 400)

    def test_what_a_failed_test_printed_does_not_hide_its_error(self) -> None:
        class Fails(unittest.TestCase):
            def runTest(self) -> None:
                print("noise\n" * 100)
                print("noise\n" * 100, file=sys.stderr)
                raise ValueError("the reason")

        result = unittest.TextTestRunner(stream=io.StringIO(), buffer=True).run(Fails())
        ((test, text),) = result.errors
        self.assertIn("noise", text)
        told = runner.described_failure(str(test), text)
        self.assertTrue(told.endswith("ValueError: the reason"), told)
        self.assertNotIn("noise\n", told)
