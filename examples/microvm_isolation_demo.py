"""A VM for a browser tab, what it does and how long each step takes, and a second VM for another tab.

The first VM of a shape waits until its template is booted. The second one is a clone, as every later VM is.

Run it with ``make demo``, or with any Python that has the wheel: ``python3 examples/microvm_isolation_demo.py``.
"""

import logging
import sys
import time
from contextlib import contextmanager
from typing import Iterator, Optional

from thirstys_waterfall.security.microvm_isolation import (
    IsolationType,
    MicroVMInstance,
    MicroVMIsolationManager,
    VMNetworkConfig,
    VMResourceLimits,
)

PAGE = """<html><head><title>A page nobody trusts</title></head>
<body><h1>Hello</h1><script>alert('never runs')</script><a href="https://example.com/">a link</a></body></html>"""


@contextmanager
def timed(step: str) -> Iterator[None]:
    begun = time.monotonic()
    yield
    print("  {:<28} {:8.1f} ms".format(step, (time.monotonic() - begun) * 1000))


def main() -> int:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    manager = MicroVMIsolationManager({"max_vcpus": 16, "max_memory_mb": 8192, "default_backend": "QEMU"})
    manager.start()
    try:
        return show(manager)
    finally:
        manager.stop()


def tab(manager: MicroVMIsolationManager) -> Optional[MicroVMInstance]:
    """A running VM for a tab, or None after saying why there is none."""
    with timed("create_vm"):
        vm_id = manager.create_vm(
            isolation_type=IsolationType.BROWSER_TAB,
            resource_limits=VMResourceLimits(vcpu_count=2, memory_mb=1024, disk_size_mb=2048),
            network_config=VMNetworkConfig(isolated_network=True),
        )
    if vm_id is None:
        print("create_vm failed: {}".format(manager.last_error), file=sys.stderr)
        return None
    vm = manager.get_vm(vm_id)
    assert vm is not None
    with timed("start"):
        started = vm.start()
    if not started:
        print("start failed: {}".format(vm.last_error), file=sys.stderr)
        print("Ask: python3 -m thirstys_waterfall.security.microvm_isolation doctor", file=sys.stderr)
        return None
    return vm


def show(manager: MicroVMIsolationManager) -> int:
    print("A microVM for one browser tab; its template is booted first, unless an earlier run left one:")
    vm = tab(manager)
    if vm is None:
        return 1
    with timed("ping"):
        vm.send_command("ping")
    with timed("render_page (blank)"):
        blank = vm.send_command("execute", {"action": "render_page"})
    with timed("render_page (hostile HTML)"):
        page = vm.send_command("render_page", {"html": PAGE})
    with timed("system_info"):
        system = vm.send_command("system_info")

    info = vm.get_info()
    print("VM {} is {}".format(vm.vm_id, info["state"]))
    print("  isolation grade: {}".format(info["isolation_grade"]))
    print("  resource limits: {}".format(info["resource_limits"]))
    print("  blank page:      {}".format(blank))
    print("  hostile page:    {}".format(page))
    print("  in the guest:    {}".format(system))

    print("A microVM for the next tab, a clone of the template:")
    second = tab(manager)
    if second is None:
        return 1
    with timed("ping"):
        second.send_command("ping")
    with timed("destroy_vm"):
        manager.destroy_vm(second.vm_id)

    print("The end of the first one:")
    with timed("pause"):
        vm.pause()
    with timed("resume"):
        vm.resume()
    with timed("stop"):
        vm.stop()
    with timed("destroy_vm"):
        manager.destroy_vm(vm.vm_id)
    print("VMs left: {}".format(manager.get_resource_usage()["total_vms"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
