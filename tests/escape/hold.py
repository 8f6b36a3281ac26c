"""Holds one VM whose VMM was forked, as another user if asked to: ``hold.py UID``.

Prints its info as JSON, and stops it when stdin ends.
"""

import json
import sys

from thirstys_waterfall.security.microvm_isolation import MicroVMIsolationManager, VMResourceLimits

from .driver import become

if __name__ == "__main__":
    if len(sys.argv) > 1:
        become(int(sys.argv[1]))
    with MicroVMIsolationManager({"raise_on_error": True}) as manager:
        info = {}
        for _ in range(50):
            vm = manager.get_vm(manager.create_vm("plugin", VMResourceLimits(1, 128, 64)))
            vm.start()
            info = vm.get_info()
            if not info["jail"]["address_layout"]["given"]:
                break
            manager.destroy_vm(vm.vm_id)
        print(json.dumps(info), flush=True)
        sys.stdin.read()
