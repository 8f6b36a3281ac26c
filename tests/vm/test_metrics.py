"""The manager as OpenMetrics text, read by a strict parser that is tested first."""

import threading
import time
import unittest
from functools import partial
from typing import Dict, List

from ..support import VMTestCase, eventually, limits
from .openmetrics import Family, parse

GOOD = """# HELP a_bytes Some \\"help\\".
# TYPE a_bytes gauge
# UNIT a_bytes bytes
a_bytes{x="1",y="q\\"\\\\\\n"} -1.5e3
a_bytes NaN 123.4
# TYPE b counter
b_total 0
# EOF
"""


class Parser(unittest.TestCase):
    def test_good_text_is_read(self) -> None:
        families = parse(GOOD)
        self.assertEqual(list(families), ["a_bytes", "b"])
        self.assertEqual(families["a_bytes"].samples[0][1:], ({"x": "1", "y": 'q"\\\n'}, -1500.0))

    def test_bad_text_is_refused(self) -> None:
        for before, after in [
            ("# EOF\n", ""),
            ("# EOF\n", "# EOF"),
            ("b_total 0", "b 0"),
            ("b_total 0", "b_total -1"),
            ("b_total 0", "b_total 0\nb_total 0"),
            ("b_total 0", "b_total  0"),
            ("b_total 0", "b_total{x=1} 0"),
            ("b_total 0", 'b_total{x="1",} 0'),
            ("b_total 0", 'b_total{x="1",x="2"} 0'),
            ("b_total 0", "b_total zero"),
            ("b_total 0", "b_total 0\n\n"),
            ("b_total 0", "b_total 0\na_bytes{x=\"9\"} 1"),
            ("b_total 0", "b_total 0\n# HELP b late"),
            ("b_total 0", "b_total 0\n# TYPE b_total gauge"),
            ("# TYPE b counter", "# TYPE b Counter"),
            ("# TYPE b counter\n", ""),
            ("UNIT a_bytes bytes", "UNIT a_bytes seconds"),
        ]:
            with self.subTest(after=after), self.assertRaises(ValueError):
                parse(GOOD.replace(before, after))


class Metrics(VMTestCase):
    config = {"health_interval_s": 0.2, "max_vcpus": 8}

    def families(self) -> Dict[str, Family]:
        return parse(self.manager.metrics())

    def values(self, family: str, **labels: str) -> List[float]:
        # A family without samples is left out.
        found = self.families().get(family)
        return [s.value for s in (found.samples if found else []) if labels.items() <= s.labels.items()]

    def test_manager_without_vms_is_valid_and_counts_nothing(self) -> None:
        self.assertEqual(sum(self.values("microvm_vms")), 0)
        self.assertEqual(self.values("microvm_quota_vcpus", share="available"), [8.0])
        self.assertTrue(all(family.help and family.type for family in self.families().values()))

    def test_figures_are_those_of_the_vms(self) -> None:
        vm = self.running()
        self.create(isolation_type="plugin", resource_limits=limits(vcpu_count=2))
        self.assertEqual(self.values("microvm_vms", isolation_type="browser_tab", state="running"), [1.0])
        self.assertEqual(self.values("microvm_vms", isolation_type="plugin", state="created"), [1.0])
        self.assertEqual(self.values("microvm_quota_vcpus", share="allocated"), [3.0])
        self.assertEqual(self.values("microvm_quota_memory_bytes", share="allocated"), [float(256 << 20)])
        mine = {"vm_id": vm.vm_id}
        self.assertTrue(eventually(lambda: self.values("microvm_vm_health", status="healthy", **mine) == [1.0]))
        self.assertEqual(self.values("microvm_vm_health", status="dead", **mine), [0.0])
        self.assertGreater(self.values("microvm_vm_resident_memory_bytes", **mine)[0], 10 << 20)
        # A measurement without the guest's answer has neither of these two families.
        for family, least in [("microvm_vm_guest_memory_available_bytes", 16 << 20), ("microvm_vm_heartbeat_seconds", 0.0)]:
            self.assertGreater((eventually(partial(self.values, family, **mine)) or [0.0])[0], least, family)
        self.assertEqual(self.values("microvm_events", kind="created"), [2.0])
        self.manager.destroy_vm(vm.vm_id)
        self.assertEqual(self.values("microvm_vm_health", **mine), [])

    def test_counters_never_fall_while_a_vm_works(self) -> None:
        vm = self.running()
        end, last = time.monotonic() + 3.0, {}  # type: ignore[var-annotated]
        done = threading.Event()
        worker = threading.Thread(target=lambda: [vm.send_command("ping") for _ in iter(done.is_set, True)])
        worker.start()
        try:
            while time.monotonic() < end:
                now = {
                    (sample.name, tuple(sorted(sample.labels.items()))): sample.value
                    for family in self.families().values()
                    if family.type == "counter"
                    for sample in family.samples
                }
                fallen = [key for key, value in last.items() if now.get(key, value) < value]
                self.assertEqual(fallen, [])
                last = now
        finally:
            done.set()
            worker.join()

    def test_scrape_asks_no_vm_and_is_fast(self) -> None:
        vm = self.running()
        self.assertTrue(vm.pause(), vm.last_error)
        begun = time.monotonic()
        for _ in range(20):
            self.families()
        self.assertLess(time.monotonic() - begun, 10.0)
