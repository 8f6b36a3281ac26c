"""Health: of all VMs at once, the figures of one, and what is told of them meanwhile."""

import sys

from thirstys_waterfall.security.microvm_isolation import (
    IsolationType,
    MicroVMIsolationManager,
    VMResourceLimits,
)


def main() -> int:
    config = {"raise_on_error": True, "health_interval_s": 1, "policies": {"session": {"on_failure": "restart"}}}
    with MicroVMIsolationManager(config) as manager:
        events = manager.events(timeout=5)
        vm_id = manager.create_vm(IsolationType.SESSION, VMResourceLimits(memory_mb=128, disk_size_mb=64))
        assert vm_id is not None
        manager.start_vm(vm_id)

        health = manager.get_health_status()
        print("Healthy VMs: {}".format(health["healthy_vms"]))
        print("Unhealthy VMs: {}".format(health["unhealthy_vms"]))

        vm = manager.get_vm(vm_id)
        assert vm is not None
        metrics = vm.get_health_metrics()
        print("CPU Usage: {}%".format(metrics.cpu_usage_percent))
        print("Memory Usage: {} MB".format(metrics.memory_usage_mb))
        print("Uptime: {:.1f}s".format(metrics.uptime_seconds))
        print("Status: {}".format(metrics.health_status))

        # The loop ends at the first heartbeat. Without the break it ends with the manager, or 5 s after the last event.
        for event in events:
            print("{kind}: {detail}".format(**event))
            if event["kind"] == "health":
                break
        print([line for line in manager.metrics().splitlines() if line.startswith("microvm_vms{") and not line.endswith(" 0.0")])
    return 0


if __name__ == "__main__":
    sys.exit(main())
