"""Every limit set, and a backend chosen: Firecracker where it can run, else the reason why not, and QEMU."""

import sys

from thirstys_waterfall.security.microvm_isolation import (
    BackendUnavailableError,
    IsolationType,
    MicroVMIsolationManager,
    VMBackend,
    VMNetworkConfig,
    VMResourceLimits,
)

LIMITS = VMResourceLimits(
    vcpu_count=1,
    memory_mb=128,
    disk_size_mb=64,
    network_bandwidth_mbps=100,
    max_file_handles=1024,
    max_processes=128,
)


def run(manager: MicroVMIsolationManager, backend: VMBackend) -> None:
    # kernel_path= and rootfs_path= name a kernel and a root file system of your own.
    vm_id = manager.create_vm(
        isolation_type=IsolationType.EXTENSION,
        resource_limits=LIMITS,
        backend=backend,
        network_config=VMNetworkConfig(isolated_network=True),
    )
    assert vm_id is not None
    try:
        manager.start_vm(vm_id)
        info = manager.get_vm_info(vm_id)
        assert info is not None
        print("{} runs {} (isolation grade {})".format(info["backend"], vm_id, info["isolation_grade"]))
        print("Guest says: {}".format(manager.send_command_to_vm(vm_id, "system_info")))
    finally:
        manager.destroy_vm(vm_id)


def main() -> int:
    with MicroVMIsolationManager({"raise_on_error": True}) as manager:
        try:
            run(manager, VMBackend.FIRECRACKER)
        except BackendUnavailableError as error:
            print("Firecracker is not available: {}".format(error))
            print("Remedy: {}".format(error.details.get("remedy")))
            run(manager, VMBackend.QEMU)
    return 0


if __name__ == "__main__":
    sys.exit(main())
