"""A channel to a running VM. Any process of the same user can open one; it needs only the VM's id."""

import sys

from thirstys_waterfall.security.microvm_isolation import (
    CommunicationChannel,
    IsolationType,
    MicroVMIsolationManager,
    VMResourceLimits,
)


def main() -> int:
    with MicroVMIsolationManager({"raise_on_error": True}) as manager:
        vm_id = manager.create_vm(IsolationType.BROWSER_TAB, VMResourceLimits(memory_mb=128, disk_size_mb=64))
        assert vm_id is not None
        manager.start_vm(vm_id)

        channel = CommunicationChannel(vm_id)
        if not channel.connect():
            print("connect failed: {}".format(channel.last_error), file=sys.stderr)
            return 1
        channel.send_message({"type": "ping"})
        print("Response: {}".format(channel.receive_message(timeout=5.0)))
        # This VM has no network, so the answer is the error network_isolated.
        channel.send_message(
            {"type": "command", "action": "process_request", "data": {"url": "https://example.com"}}
        )
        print("Response: {}".format(channel.receive_message(timeout=5.0)))
        channel.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
