"""How soon a caller is heard."""

import unittest

from ..surface.test_process import SLEEP, interrupt


class Interrupts(unittest.TestCase):
    def test_ctrl_c_is_raised_within_a_tenth_of_a_second(self) -> None:
        for action in ("vm.start()", SLEEP):
            with self.subTest(action):
                delay, _ = interrupt(action)
                print("    Ctrl-C in {}: raised after {:.0f} ms".format(action, delay * 1e3))
                self.assertLess(delay, 0.1)
