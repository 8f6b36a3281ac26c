"""What managers and stand-alone VMs of one process have in common: a template's memory, and the zygote."""

import os
from typing import Set

from thirstys_waterfall.security.microvm_isolation import MicroVMInstance, MicroVMIsolationManager

from ..host.test_zygote import zygotes
from ..support import ROOT, VMTestCase, limits, run_python


def template_memories() -> Set[int]:
    """The inodes of the memory of templates that this process has open."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        path = "/proc/self/fd/" + name
        try:
            if os.readlink(path).startswith("/memfd:ram"):
                found.add(os.stat(path).st_ino)
        except FileNotFoundError:
            continue
    return found


class Shared(VMTestCase):
    config = {"health_interval_s": None}

    def test_one_shape_is_in_memory_once_for_managers_and_vms_on_their_own(self) -> None:
        # Runs in a process of its own, because earlier tests of this process may still hold templates.
        done = run_python("from tests.vm.test_shared import Alone; Alone('share').debug(); print('shared')", cwd=str(ROOT))
        self.assertEqual(done.stdout, "shared\n", done.stderr)


class Alone(VMTestCase):
    """Run by the test above, not by discovery: it has no test of its own name."""

    config = {"health_interval_s": None}

    def share(self) -> None:
        self.running()
        with MicroVMIsolationManager(dict(self.manager.config)) as other:
            vm = other.get_vm(other.create_vm("plugin", limits()))
            self.assertTrue(vm.start(), vm.last_error)
            alone = [
                MicroVMInstance("alone-{}-{}".format(os.getpid(), number), "qemu", "plugin", limits()) for number in range(2)
            ]
            for each in alone:
                self.addCleanup(each.stop)
                self.assertTrue(each.start(), each.last_error)
                self.assertTrue(each.start())
            self.assertEqual((len(template_memories()), len(zygotes())), (1, 1))
        # A manager that stops leaves the shared zygote to the others.
        self.assertEqual(len(zygotes()), 1)
        self.running()
