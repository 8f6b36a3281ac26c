"""Copies of a VM that runs, and a VM that is away for a while: its program goes on where it was."""

import os
import sys

from thirstys_waterfall.security.microvm_isolation import (
    IsolationType,
    MicroVMInstance,
    MicroVMIsolationManager,
    VMResourceLimits,
)

COUNTER = "(i=0; while true; do i=$((i+1)); echo $i >/tmp/count; sleep 0.05; done) </dev/null >/dev/null 2>&1 &"


def shell(vm: MicroVMInstance, script: str) -> str:
    answer = vm.send_command("exec", {"program": "/bin/sh", "args": ["-c", script]})
    assert answer is not None
    return str(answer["result"]["stdout"]).strip()


def main() -> int:
    template = "example-{}".format(os.getpid())
    with MicroVMIsolationManager({"default_backend": "QEMU", "raise_on_error": True}) as manager:
        limits = VMResourceLimits(vcpu_count=1, memory_mb=128, disk_size_mb=64)
        vm = manager.get_vm(manager.create_vm(IsolationType.BROWSER_TAB, limits) or "")
        assert vm is not None
        vm.start()
        shell(vm, "echo notes >/data/notes; " + COUNTER + " sleep 0.5")

        vm.snapshot(template)
        try:
            for _ in range(2):
                clone = manager.get_vm(manager.create_vm(IsolationType.SESSION, template=template) or "")
                assert clone is not None
                clone.start()
                print("{}: counts on from {}".format(shell(clone, "hostname"), shell(clone, "cat /tmp/count")))
                print("{}: machine id {}".format(clone.vm_id, shell(clone, "cat /etc/machine-id")))
        finally:
            manager.delete_template(template)
        print("{}: counts on, too: {}".format(vm.vm_id, shell(vm, "cat /tmp/count")))

        vm.suspend()
        print("Suspended: {}".format(vm.get_info()["suspended"]))
        print("Memory allocated: {} MB".format(manager.get_resource_usage()["memory_allocated_mb"]))
        # A manager of another process can resume the VM, too.
        manager.resume_vm(vm.vm_id)
        print("Resumed: {} {}".format(shell(vm, "cat /tmp/count"), shell(vm, "cat /data/notes")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
