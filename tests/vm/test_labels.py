"""Labels: words of its owner's by which a VM is found again."""

import os
import shutil
import signal
import tempfile
from typing import Any, Dict, List

from thirstys_waterfall.security.microvm_isolation import MicroVMInstance, MicroVMIsolationManager

from ..support import VMTestCase, eventually, limits

WEB = {"team": "web", "app.example/stage": "test"}


class Labels(VMTestCase):
    def setUp(self) -> None:
        self.cache = tempfile.mkdtemp(prefix="labels-")
        self.addCleanup(shutil.rmtree, self.cache)
        self.config = {"cache_dir": self.cache, "policies": {"plugin": {"on_failure": "replace"}}}
        super().setUp()
        self.seen: List[Dict[str, Any]] = []
        self.manager.on_event(self.seen.append)

    def labels_of_events(self, vm_id: str) -> List[Any]:
        return [event.get("labels") for event in self.seen if event["vm_id"] == vm_id]

    def test_list_vms_by_labels_wants_every_pair(self) -> None:
        for vm_id, labels in (("a", WEB), ("b", {"team": "web"}), ("c", {"team": "db"}), ("d", None)):
            self.assertEqual(self.manager.create_vm("session", limits(), vm_id=vm_id, labels=labels), vm_id)
        self.assertEqual(self.manager.list_vms(labels={"team": "web"}), ["a", "b"])
        self.assertEqual(self.manager.list_vms(labels=WEB), ["a"])
        self.assertEqual(self.manager.list_vms(labels={"team": "web", "owner": "x"}), [])
        self.assertEqual(self.manager.list_vms("session", labels={"team": "db"}), ["c"])
        self.assertEqual(self.manager.list_vms("plugin", labels={"team": "db"}), [])
        self.assertEqual(self.manager.list_vms(labels={}), ["a", "b", "c", "d"])

    def test_get_info_of_a_vm_without_a_manager_has_its_labels(self) -> None:
        self.assertEqual(MicroVMInstance("single", "qemu", "plugin", limits(), labels=WEB).get_info()["labels"], WEB)
        self.assertEqual(MicroVMInstance("single", "qemu", "plugin", limits()).get_info()["labels"], {})

    def test_events_of_a_vm_with_labels_carry_them(self) -> None:
        labelled, plain = self.running(labels=WEB), self.running()
        self.assertTrue(self.manager.destroy_vm(labelled.vm_id) and self.manager.destroy_vm(plain.vm_id))
        gone = lambda: {event["vm_id"] for event in self.seen if event["kind"] == "removed"}
        self.assertTrue(eventually(lambda: len(gone()) == 2), self.seen)
        carried = self.labels_of_events(labelled.vm_id)
        self.assertGreaterEqual(len(carried), 4)
        self.assertEqual(carried, [WEB] * len(carried))
        self.assertEqual(set(self.labels_of_events(plain.vm_id)), {None})

    def test_labels_change_nothing_about_the_template_of_a_vm(self) -> None:
        self.running()
        self.assertEqual(self.running(labels=WEB).get_info()["start"]["origin"], "clone")
        self.assertEqual(self.manager.get_resource_usage()["templates"]["count"], 1)

    def test_resume_brings_the_labels_back_in_another_manager_too(self) -> None:
        vm = self.running(labels=WEB, vm_id="labelled")
        self.assertTrue(vm.suspend(), vm.last_error)
        self.assertEqual(vm.get_info()["labels"], WEB)
        self.assertEqual([entry["labels"] for entry in self.manager.list_suspended()], [WEB])
        with MicroVMIsolationManager(self.manager.config) as other:
            self.assertTrue(other.resume_vm("labelled"), other.last_error)
            self.assertEqual(other.get_vm_info("labelled")["labels"], WEB)
            self.assertEqual(other.list_vms(labels={"team": "web"}), ["labelled"])

    def test_clone_of_a_users_template_has_only_its_own_labels(self) -> None:
        self.running(labels=WEB).snapshot("labelled")
        self.assertEqual([entry["labels"] for entry in self.manager.list_templates()], [WEB])
        self.assertEqual(self.running(template="labelled").get_info()["labels"], {})
        own = {"team": "db"}
        self.assertEqual(self.running(template="labelled", labels=own).get_info()["labels"], own)

    def test_replacement_of_a_failed_vm_keeps_its_labels(self) -> None:
        vm = self.running(isolation_type="plugin", labels=WEB)
        os.kill(int(vm.get_info()["pid"]), signal.SIGKILL)
        found = lambda: [event["replacement"] for event in self.seen if event.get("action") == "replace"]
        self.assertTrue(eventually(found, 20.0), self.seen)
        other = self.manager.get_vm(found()[0])
        self.assertTrue(eventually(lambda: other.get_state().value == "running", 20.0), other.last_error)
        self.assertEqual(other.get_info()["labels"], WEB)
        self.assertEqual(self.manager.list_vms(labels=WEB), [other.vm_id])
