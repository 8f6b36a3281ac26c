"""Holds one VM, as another user if asked to: ``hold.py UID``. Prints its info as JSON, and stops it when stdin ends."""

import json
import sys

from thirstys_waterfall.security.microvm_isolation import MicroVMIsolationManager, VMResourceLimits

from .driver import become

if __name__ == "__main__":
    if len(sys.argv) > 1:
        become(int(sys.argv[1]))
    with MicroVMIsolationManager({"raise_on_error": True}) as manager:
        vm = manager.get_vm(manager.create_vm("plugin", VMResourceLimits(1, 128, 64)))
        vm.start()
        print(json.dumps(vm.get_info()), flush=True)
        sys.stdin.read()
