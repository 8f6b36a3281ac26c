"""Kills a process with VMs under load at random moments, and looks at what is left: ``make chaos-kill`` (``TIMES``, ``SEED``).

A second after each kill there must be nothing of it: no process, control group, network device, rule, mount or file;
and the next one, in the same folder, must start without a word of remains.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import List

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

from tests.chaos.host import Host, descendants  # noqa: E402

GRACE_S = 1.0
# A process takes this long to have its first VM; the kills reach from before that to well into the load.
LATEST_S = 4.0


def one_kill(host: Host, moment_s: float, threads: int, connected: bool) -> List[str]:
    """What was wrong."""
    command = [sys.executable, "-m", "tests.chaos.victim", str(host.runtime_dir), host.prefix, str(threads)]
    command += ["connected"] if connected else []
    victim = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=sys.path[0], universal_newlines=True)
    assert victim.stdout is not None
    begun = victim.stdout.readline().strip()
    time.sleep(moment_s)
    known = descendants(victim.pid)
    died = victim.poll()
    victim.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    victim.wait()
    time.sleep(max(0.0, killed + GRACE_S - time.monotonic()))
    wrong = host.left(known)
    said = victim.stdout.read()
    victim.stdout.close()
    if begun != "begun":
        wrong.append("the next one did not start clean: {!r}".format(begun))
    if died is not None:
        wrong.append("it had ended by itself ({}): {}".format(died, said))
    return ["killed after {:.3f} s with {} processes: {}".format(moment_s, len(known), what) for what in wrong]


def kills(times: int, seed: int, threads: int, connected: bool = False) -> List[str]:
    """What was wrong in all of them."""
    chance, wrong = random.Random(seed), []
    with tempfile.TemporaryDirectory(prefix="chaos-kill-") as folder:
        host = Host(Path(folder) / "run", "kill{}-".format(os.getpid()))
        for number in range(times):
            found = one_kill(host, chance.uniform(0.0, LATEST_S), threads, connected)
            wrong += found
            for line in found:
                print("kill {}: {}".format(number, line), flush=True)
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=100)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "big"))
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--connected", action="store_true", help="some VMs with a network; in a namespace of its own")
    options = parser.parse_args()
    print("seed {}".format(options.seed), flush=True)
    begun = time.monotonic()
    wrong = kills(options.times, options.seed, options.threads, options.connected)
    print("{} kills in {:.0f} s: {} things wrong".format(options.times, time.monotonic() - begun, len(wrong)))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
