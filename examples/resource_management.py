"""Quotas: what is allocated, what is left, and what happens when there is not enough. Starts no VM."""

import sys

from thirstys_waterfall.security.microvm_isolation import (
    IsolationType,
    MicroVMIsolationManager,
    VMResourceLimits,
)


def main() -> int:
    with MicroVMIsolationManager({"max_vcpus": 4, "max_memory_mb": 512}) as manager:
        limits = VMResourceLimits(vcpu_count=2, memory_mb=128, disk_size_mb=64)
        manager.create_vm(IsolationType.BROWSER_TAB, limits)
        manager.create_vm(IsolationType.PLUGIN, limits)

        usage = manager.get_resource_usage()
        print("Total VMs: {}".format(usage["total_vms"]))
        print("vCPUs allocated: {}, left: {}".format(usage["vcpus_allocated"], usage["vcpus_available"]))
        print("Memory allocated: {} MB".format(usage["memory_allocated_mb"]))
        print("VMs by type: {}".format(usage["vms_by_type"]))
        print("VMs by state: {}".format(usage["vms_by_state"]))

        refused = manager.create_vm(IsolationType.SESSION, limits)
        print("A third VM: {} ({})".format(refused, manager.last_error))

        manager.destroy_all_vms()
        print("vCPUs left after destroy_all_vms: {}".format(manager.get_resource_usage()["vcpus_available"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
