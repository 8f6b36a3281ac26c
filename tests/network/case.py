"""What the tests inside the lab share."""

import json
from pathlib import Path
from typing import Any, Dict, List, Optional

from thirstys_waterfall.security.microvm_isolation import VMNetworkConfig

from ..support import VMTestCase, shell
from .attacks import End
from .lab import Lab, run


def connected(**fields: Any) -> VMNetworkConfig:
    return VMNetworkConfig(isolated_network=False, **fields)


class NetworkTestCase(VMTestCase):
    """A test with the internet at hand."""

    config: Dict[str, Any] = {"max_vcpus": 128, "max_memory_mb": 1 << 16}
    maxDiff = None
    lab: Lab

    @classmethod
    def setUpClass(cls) -> None:
        cls.lab = Lab()

    @classmethod
    def tearDownClass(cls) -> None:
        cls.lab.close()

    def setUp(self) -> None:
        super().setUp()
        self.lab.order("reset")

    def connected(self, network: Optional[Dict[str, Any]] = None, **options: Any) -> Any:
        return self.running(network_config=connected(**(network or {})), **options)

    def refused(self, word: str, **fields: Any) -> str:
        """A start by a tap that ends with ``network_unavailable``; its message, which holds ``word``."""
        vm_id = self.create(network_config=connected(**dict({"mode": "tap"}, **fields)))
        self.assertFalse(self.manager.start_vm(vm_id))
        error = self.manager.last_error
        self.assertEqual(error.code, "network_unavailable", error)
        self.assertIn(word, str(error))
        self.assertTrue(error.details["remedy"])
        self.manager.destroy_vm(vm_id)
        return str(error)

    def sh(self, vm: Any, script: str, timeout: float = 20.0) -> str:
        """What a script in the guest prints; it must succeed."""
        done = self.result(vm, "exec", shell(script, timeout=timeout))
        self.assertEqual(done["exit_code"], 0, done)
        return str(done["stdout"])

    def fails(self, vm: Any, script: str, timeout: float = 20.0) -> None:
        done = self.result(vm, "exec", shell(script, timeout=timeout))
        self.assertNotEqual(done["exit_code"], 0, done)

    def get(self, vm: Any, url: str, **params: Any) -> Dict[str, Any]:
        return dict(self.result(vm, "process_request", dict(params, url=url)))

    def reason(self, vm: Any, url: str, **params: Any) -> str:
        """Why a URL cannot be fetched."""
        answer = vm.send_command("process_request", dict(params, url=url))
        self.assertEqual(answer["status"], "error", answer)
        self.assertEqual(answer["error"]["code"], "network_error", answer)
        return str(answer["error"]["reason"])

    def end(self, vm: Any) -> End:
        network = vm.get_info()["network_config"]
        tap = network["tap_device"]
        link = json.loads(run("ip -json link show dev {}".format(tap)))[0]
        return End(tap, link["address"], network["mac_address"], network["ip_address"], network["gateway"])


def taps() -> List[str]:
    return [line.split()[0].rstrip(":") for line in Path("/proc/net/dev").read_text().splitlines()[2:]]


def sent_by(interface: str) -> int:
    """Bytes that the host sent by an interface."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    fields = next(line.split(":")[1] for line in lines if line.split(":")[0].strip() == interface)
    return int(fields.split()[8])
