"""Skipped tests: how they are counted, and which reasons CI accepts."""

import unittest
from unittest import mock

from .. import matrix, skips

OUTPUT = """
running 3 tests
test a::plain ... ok
test a::without ... ok

successes:

---- a::plain stdout ----
a line of its own

---- a::without stdout ----
before
skipped: needs root
skipped: needs a tap


successes:
    a::plain
    a::without

test result: ok. 2 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s
"""


class Skips(unittest.TestCase):
    def test_list_says_why_for_each_reason(self) -> None:
        self.assertTrue(all(skips.known().values()))

    def test_unlisted_reason_is_a_failure_in_ci_alone(self) -> None:
        skipped = [("test_a", "it was inconvenient"), ("test_b", "firecracker: no executable")]
        with mock.patch.dict("os.environ", {"CI": "1"}):
            (failure,) = skips.unknown(skipped)
        self.assertIn("test_a: skipped for a reason that is not in skips.txt: it was inconvenient", failure)
        with mock.patch.dict("os.environ", {"CI": ""}):
            self.assertEqual(skips.unknown(skipped), [])

    def test_rust_test_that_says_so_is_skipped_once(self) -> None:
        self.assertEqual(list(matrix.skipped_in(OUTPUT)), [("a::without", "needs root")])
