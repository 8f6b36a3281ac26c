"""A manager in a process of an ordinary user, without any capability; ordered about over stdin.

An order is a line of JSON with ``do`` and arguments; the answer is another. ``python3 as_user.py FOLDER``.
"""

import json
import sys
import traceback
from typing import Any, Dict

from thirstys_waterfall.security.microvm_isolation import (
    MicroVMIsolationManager,
    VMNetworkConfig,
    VMResourceLimits,
    doctor,
)


class Driver:
    def __init__(self, folder: str) -> None:
        self.manager = MicroVMIsolationManager(
            {
                "raise_on_error": True,
                "runtime_dir": folder + "/run",
                "cache_dir": folder + "/cache",
                "max_memory_mb": 4096,
            }
        )
        self.manager.start()

    def start(self, network: Dict[str, Any], limits: Dict[str, Any], **options: Any) -> str:
        limits = dict({"vcpu_count": 1, "memory_mb": 128, "disk_size_mb": 64}, **limits)
        vm_id = self.manager.create_vm(
            "plugin",
            network_config=VMNetworkConfig(isolated_network=False, **network),
            resource_limits=VMResourceLimits(**limits),
            **options,
        )
        self.manager.start_vm(vm_id)
        return str(vm_id)

    def command(self, vm_id: str, name: str, params: Dict[str, Any]) -> Any:
        return self.manager.send_command_to_vm(vm_id, name, params)

    def info(self, vm_id: str) -> Any:
        return self.manager.get_vm(vm_id).get_info()

    def call(self, vm_id: str, name: str, *arguments: Any) -> Any:
        """A method of the VM's handle, for what it does."""
        return repr(getattr(self.manager.get_vm(vm_id), name)(*arguments))

    def delete_template(self, name: str) -> None:
        self.manager.delete_template(name)

    def destroy(self, vm_id: str) -> None:
        self.manager.destroy_vm(vm_id)

    def doctor(self) -> Any:
        return doctor()


def main(folder: str) -> None:
    driver = Driver(folder)
    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer = {"result": getattr(driver, order["do"])(*order["arguments"], **order["named"])}
        except Exception as error:
            answer = {"error": str(error), "code": getattr(error, "code", None), "trace": traceback.format_exc()}
        print(json.dumps(answer), flush=True)
    driver.manager.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
