"""How soon a caller is heard."""

import subprocess
import sys
import time
import unittest

from ..support import IMPORT, eventually
from ..surface.test_process import RUNNING, SLEEP, interrupt, left_of, run_python


class Interrupts(unittest.TestCase):
    def test_ctrl_c_is_raised_within_a_tenth_of_a_second(self) -> None:
        for action in ("vm.start()", SLEEP):
            with self.subTest(action):
                delay, _ = interrupt(action)
                print("    Ctrl-C in {}: raised after {:.0f} ms".format(action, delay * 1e3))
                self.assertLess(delay, 0.1)


class Ends(unittest.TestCase):
    def test_vm_of_a_killed_process_is_gone_within_a_second(self) -> None:
        done = run_python(RUNNING + "print(pid, flush=True); os.kill(os.getpid(), 9)")
        begun = time.monotonic()
        self.assertTrue(eventually(lambda: not left_of(done.stdout)))
        took = time.monotonic() - begun
        print("    killed process: its VM is gone {:.0f} ms later".format(took * 1e3))
        self.assertLess(took, 1.0)


class CommandLine(unittest.TestCase):
    def test_help_is_there_within_150_ms(self) -> None:
        took = []
        for _ in range(10):
            begun = time.monotonic()
            subprocess.run([sys.executable, "-m", IMPORT, "run", "--help"], stdout=subprocess.DEVNULL, check=True)
            took.append(time.monotonic() - begun)
        print("    microvm run --help: {:.0f} ms (median of {})".format(sorted(took)[5] * 1e3, len(took)))
        self.assertLess(sorted(took)[5], 0.15)
