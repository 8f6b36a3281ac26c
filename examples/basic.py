"""One VM for a browser tab: make it, ask it something, throw it away."""

import sys

from thirstys_waterfall.security.microvm_isolation import (
    IsolationType,
    MicroVMIsolationManager,
    VMNetworkConfig,
    VMResourceLimits,
)


def main() -> int:
    # raise_on_error turns the False and None answers into exceptions.
    with MicroVMIsolationManager({"default_backend": "QEMU", "raise_on_error": True}) as manager:
        vm_id = manager.create_vm(
            isolation_type=IsolationType.BROWSER_TAB,
            resource_limits=VMResourceLimits(vcpu_count=1, memory_mb=128, disk_size_mb=64),
            network_config=VMNetworkConfig(isolated_network=True),
        )
        assert vm_id is not None
        manager.start_vm(vm_id)
        print("Response: {}".format(manager.send_command_to_vm(vm_id, "execute", {"action": "render_page"})))
        info = manager.get_vm_info(vm_id)
        assert info is not None
        print("VM State: {}".format(info["state"]))
        print("Resources: {}".format(info["resource_limits"]))
        print("Isolation grade: {}".format(info["isolation_grade"]))
        manager.stop_vm(vm_id)
        manager.destroy_vm(vm_id)
    return 0


if __name__ == "__main__":
    sys.exit(main())
