"""One tenant that floods does not slow the others beyond its share."""

import os
import statistics
import subprocess
import sys
import time
import unittest
from typing import Any, Callable, List

from ..support import IMPORT, VMTestCase, shell

FLOODERS = 4
CPUS = len(os.sched_getaffinity(0))
COUNT = shell("i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done", timeout=120)
# Allowance for other work on the machine and for the guests' kernels.
SLACK = 1.8

FLOOD = """
import sys, threading
from {} import CommunicationChannel
def flood():
    with CommunicationChannel(sys.argv[1], sys.argv[2]) as channel:
        while channel.send_message({{"type": "command", "command": "echo", "params": {{"pad": "x" * 50000}}}}):
            channel.receive_message(timeout=30)
threads = [threading.Thread(target=flood, daemon=True) for _ in range(8)]
for thread in threads: thread.start()
print("flooding", flush=True)
for thread in threads: thread.join()
""".format(IMPORT)


def seconds(call: Callable[[], Any], times: int) -> float:
    """The median of how long ``call`` takes."""
    took: List[float] = []
    for _ in range(times):
        begun = time.monotonic()
        call()
        took.append(time.monotonic() - begun)
    return statistics.median(took)


class Fairness(VMTestCase):
    config = {"max_vcpus": 32}

    @unittest.skipUnless(os.geteuid() == 0, "needs control groups, which root makes without a word to anyone")
    def test_busy_vms_leave_another_its_share_of_the_cpus(self) -> None:
        victim = self.running()
        alone = seconds(lambda: self.result(victim, "exec", COUNT), 5)
        busy = [self.running() for _ in range(FLOODERS)]
        script = ["-c", "for i in 1 2 3 4 5 6 7; do while :; do :; done & done; while :; do :; done"]
        streams = [vm.stream("/bin/sh", script) for vm in busy]
        try:
            flooded = seconds(lambda: self.result(victim, "exec", COUNT), 5)
        finally:
            for stream in streams:
                stream.kill()
        # The CPUs are divided among five that want one each.
        share = max(1.0, (FLOODERS + 1) / CPUS)
        told = "{:.2f} s alone, {:.2f} s beside {} that are busy".format(alone, flooded, FLOODERS)
        print("    " + told)
        self.assertLess(flooded, alone * share * SLACK, told)

    def test_flood_of_messages_to_one_vm_does_not_hold_up_another(self) -> None:
        victim, flooded = self.running(), self.running()
        alone = seconds(lambda: self.result(victim, "ping"), 50)
        command = [sys.executable, "-c", FLOOD, flooded.vm_id, flooded.get_info()["socket_path"]]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, universal_newlines=True)
        assert process.stdout is not None
        self.addCleanup(process.stdout.close)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        self.assertEqual(process.stdout.readline(), "flooding\n")
        beside = seconds(lambda: self.result(victim, "ping"), 200)
        # The flooding client, its VM and the broker compete for the CPUs.
        told = "a ping takes {:.1f} ms alone, {:.1f} ms beside a flood".format(alone * 1e3, beside * 1e3)
        print("    " + told)
        self.assertLess(beside, max(10 * alone, 0.05), told)
