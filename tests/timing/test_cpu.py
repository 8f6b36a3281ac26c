"""CPU time that a VMM in an attacker's hands can take, beside what it takes without a jail."""

from ..escape.arena import Arena


class CpuTime(Arena):
    """As root, whose VMMs have control groups."""

    def test_cpu_time_ends_at_the_quota(self) -> None:
        report = self.attack("cpu", orders={"seconds": 6})
        quota = 1.1
        self.assertLess(self.number(report, "CPU"), 1.1 * quota)
        # The same rate, measured from outside between two samples.
        first, last = report["samples"][5], report["samples"][-1]
        self.assertLess((last["cpu"] - first["cpu"]) / (last["time"] - first["time"]), 1.1 * quota)
        print("    {:.2f} CPUs of {:.2f}".format(self.number(report, "CPU"), quota))
        if not last["throttled"]:
            self.skipTest("this host had less CPU time to give than the quota; a smaller one is held by cargo test cgroup")

    def test_cpu_without_a_jail_takes_more_than_the_quota(self) -> None:
        report = self.attack("cpu", jailed=False, orders={"seconds": 6})
        if self.number(report, "CPU") < 1.3:
            self.skipTest("this host has too little CPU time to spare to show what the quota takes away")
