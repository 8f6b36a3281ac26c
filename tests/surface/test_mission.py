"""Every code block of the description, as written, on real VMs."""

from thirstys_waterfall.security import microvm_isolation as package

from ..support import BLOCKS, VMTestCase, play


class Mission(VMTestCase):
    config = {"max_vcpus": 16, "max_memory_mb": 8192}

    def test_blocks_are_all_there(self) -> None:
        self.assertEqual(len(BLOCKS), 8, list(BLOCKS))

    def test_basic_example_renders_and_leaves_nothing(self) -> None:
        space, printed = play(BLOCKS["Basic Example"])
        self.assertEqual(space["response"]["status"], "ok")
        self.assertEqual(space["response"]["result"]["url"], "about:blank")
        self.assertIn("VM State: running", printed)
        self.assertEqual(space["manager"].list_vms(), [])

    def test_advanced_example_is_created_and_its_start_names_what_is_missing(self) -> None:
        space, _ = play(BLOCKS["Advanced Example"], manager=self.manager)
        self.assertIn("extension", space["vm_id"])
        self.assertFalse(self.manager.start_vm(space["vm_id"]))
        self.assertEqual(self.manager.last_error.code, "image_unreadable")
        self.assertIn("/path/to/custom/kernel", str(self.manager.last_error))

    def test_resource_management_prints_the_numbers(self) -> None:
        self.running()
        _, printed = play(BLOCKS["Resource Management"], manager=self.manager)
        self.assertIn("vCPUs allocated: 1/15", printed)
        self.assertIn("VMs by state: {'running': 1}", printed)

    def test_health_monitoring_prints_real_metrics(self) -> None:
        vm = self.running()
        space, printed = play(BLOCKS["Health Monitoring"], manager=self.manager, vm_id=vm.vm_id)
        self.assertIn("Healthy VMs: 1", printed)
        self.assertIn("Status: healthy", printed)
        self.assertGreater(space["metrics"].memory_usage_mb, 10)

    def test_communication_channel_is_answered(self) -> None:
        vm = self.running()
        space, _ = play(BLOCKS["Communication Channel"], vm_id=vm.vm_id)
        self.assertEqual(space["response"]["error"]["code"], "network_isolated")

    def test_configuration_blocks_are_accepted(self) -> None:
        space, _ = play(BLOCKS["Manager Configuration"])
        manager = package.MicroVMIsolationManager(space["config"])
        self.assertEqual(manager._max_memory_mb, 8192)
        space, _ = play(BLOCKS["Resource Limits"])
        self.assertEqual(space["limits"].disk_size_mb, 2048)
        space, _ = play(BLOCKS["Network Configuration"])
        self.assertEqual(space["network"].mac_address, "52:54:00:12:34:56")
