"""The short forms of the chaos suite; ``make chaos`` and ``make chaos-kill`` are the long ones."""

import os
import tempfile
import unittest

from .kill import kills
from .storm import storm

# Read by tests/runner.py, which runs this module by itself.
ALONE = "it looks for what is left on the whole host, a second after a death"
# MICROVM_CHAOS_SEED repeats a failed run; each run prints its seed.
SEED = int(os.environ.get("MICROVM_CHAOS_SEED", "0")) or int.from_bytes(os.urandom(4), "big")


class Chaos(unittest.TestCase):
    def test_storm_of_faults_breaks_no_invariant(self) -> None:
        with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
            weather = storm(SEED, vms=6, seconds=20.0, connected=False, fill=False, folder=folder)
        self.assertEqual(weather.wrong, [], "seed {}".format(SEED))
        self.assertGreater(weather.done["calls"], 20)

    def test_process_killed_at_random_moments_leaves_nothing_after_a_second(self) -> None:
        self.assertEqual(kills(4, SEED, threads=3), [], "seed {}".format(SEED))
