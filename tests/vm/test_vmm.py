"""What a VMM needs of its host and its guest, and a template that takes longer than a start."""

import contextlib
import fcntl
import shutil
import struct
import tempfile
import threading
import time
import unittest
from pathlib import Path
from typing import Iterator, List

from ..support import VMTestCase, alive, children, eventually, find_tool
from .test_templates import TemplateTestCase

# A busy host takes this long to stop a VMM's vCPUs.
PATIENCE_S = 60.0


def spinning_kernel() -> bytes:
    """A kernel that QEMU boots through PVH and that does nothing for ever (Xen's docs/misc/pvh.pandoc, elf(5))."""
    note = struct.pack("<III4sII", 4, 8, 18, b"Xen\0", 0x100000, 0)
    code = b"\xeb\xfe"
    at = 64 + 2 * 56
    head = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 2, 62, 1, 0x100000, 64, 0, 0, 64, 56, 2, 64, 0, 0)
    load = struct.pack("<IIQQQQQQ", 1, 5, at + len(note), 0x100000, 0x100000, len(code), len(code), 1)
    notes = struct.pack("<IIQQQQQQ", 4, 4, at, 0, 0, len(note), len(note), 4)
    return head + load + notes + note + code


class SlowTemplate(TemplateTestCase):
    """A template that is not ready in time; another process, which is this one, makes it for as long as it likes."""

    more = {"start_timeout_s": 40}

    @contextlib.contextmanager
    def another_maker(self) -> Iterator[None]:
        self.running()
        template = self.template()
        self.manager.stop()
        shutil.rmtree(str(template))
        with open(str(template) + ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            VMTestCase.setUp(self)
            yield

    def test_start_boots_beside_it_and_a_later_one_finds_it(self) -> None:
        with self.another_maker():
            begun = time.monotonic()
            vm = self.running()
            self.assertEqual(self.origin(vm), "boot")
            # The start waited for the template for half of start_timeout_s.
            self.assertGreater(time.monotonic() - begun, 20.0)
            self.assertEqual(self.templates(), [])
        self.assertTrue(eventually(lambda: [path for path in self.templates() if not path.suffix], PATIENCE_S))
        self.assertEqual(self.origin(self.running()), "clone")
        self.assertEqual(len(self.templates()), 1)


class StoppedTemplate(TemplateTestCase):
    def test_stop_ends_what_is_made_and_leaves_no_file_and_no_process(self) -> None:
        vm = self.manager.get_vm(self.create())
        thread = threading.Thread(target=vm.start)
        thread.start()
        making = lambda: list((self.cache / "templates").glob("*.new/ram"))
        self.assertTrue(eventually(making, PATIENCE_S))
        # The processes that make the template, with the jail's supervisor, whose end kills the VMM.
        makers = eventually(self.makers, PATIENCE_S)
        self.assertTrue(makers)
        self.manager.stop()
        thread.join()
        self.assertEqual(self.templates(), [])
        self.assertTrue(eventually(lambda: not [pid for pid in makers if alive(pid)], 10.0), makers)
        # The manager can be started again.
        self.manager.start()
        self.assertEqual(self.result(self.running(), "ping"), "pong")

    def makers(self) -> List[int]:
        return [pid for pid in children() if "janitor" not in Path("/proc/{}/cmdline".format(pid)).read_text()]


class Pairing(VMTestCase):
    def setUp(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="microvm-test-"))
        self.addCleanup(shutil.rmtree, str(self.folder))
        super().setUp()

    def again(self, **config: object) -> None:
        self.manager.stop()
        self.config = dict(config)
        VMTestCase.setUp(self)

    def test_guest_that_computes_and_says_nothing_is_told_from_a_short_timeout(self) -> None:
        kernel = self.folder / "kernel"
        kernel.write_bytes(spinning_kernel())
        self.again(start_timeout_s=4, templates=False)
        vm = self.manager.get_vm(self.create(kernel_path=str(kernel)))
        self.assertFalse(vm.start())
        self.assertEqual(vm.last_error.code, "start_timeout")
        for part in ("the agent said nothing", "do not go together", "QEMU emulator version", "tried with QEMU"):
            self.assertIn(part, str(vm.last_error))

    def test_copied_qemu_finds_the_modules_of_its_release(self) -> None:
        original = find_tool("qemu-system-x86_64")
        assert original is not None
        copy = self.folder / "qemu"
        shutil.copy(original, str(copy))
        self.again(qemu_binary=str(copy), templates=False)
        self.assertEqual(self.result(self.running(), "ping"), "pong")


if __name__ == "__main__":
    unittest.main()
