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

FAILED = """
running 3 tests
test b::breaks ... FAILED
test b::late - should panic ... FAILED
test b::plain ... ok

successes:

---- b::plain stdout ----
thread 'x' panicked at 'on purpose'


successes:
    b::plain

failures:

---- b::breaks stdout ----
thread 'b::breaks' panicked at src/b.rs:3:9:
one is not two

---- b::late stdout ----
note: test did not panic as expected


failures:
    b::breaks
    b::late

test result: FAILED. 1 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s
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

    def test_rust_test_that_failed_is_told_with_what_it_said(self) -> None:
        first, second = matrix.failed_in(FAILED)
        self.assertEqual(first.splitlines()[0], "b::breaks")
        self.assertIn("one is not two", first)
        self.assertIn("did not panic as expected", second)
        self.assertEqual(list(matrix.failed_in(OUTPUT)), [])
