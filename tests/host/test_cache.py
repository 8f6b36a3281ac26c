"""The cache folder: whose disk a VM has, what a copy still fits, and what of others in the folder stays."""

import os
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from typing import Any

from thirstys_waterfall.security.microvm_isolation import (
    InvalidValueError,
    IsolationType,
    MicroVMIsolationManager,
    TemplateError,
    VMState,
)

from ..support import IMPORT, VMTestCase, find_tool, limits, make_rootfs, shell

# One container: a /dev/shm and a /run of its own.
BOX = 'mount -t tmpfs tmpfs /dev/shm && mount -t tmpfs tmpfs /run && exec "$@"'
# What each of two containers does with a VM of the same name; they take turns by files in the shared folder.
TWIN = """
import sys, time
from pathlib import Path
from {module} import *
name, shared = sys.argv[1], Path(sys.argv[2])
def shell(vm, script):
    answer = vm.send_command("exec", {{"program": "/bin/sh", "args": ["-c", script]}})
    return answer["result"]["stdout"].strip() if answer else repr(vm.last_error)
def turn(step):
    (shared / (name + step)).touch()
    other, end = shared / ({{"A": "B", "B": "A"}}[name] + step), time.monotonic() + 60
    while not other.exists() and time.monotonic() < end:
        time.sleep(0.02)
manager = MicroVMIsolationManager({{"default_backend": "QEMU", "cache_dir": str(shared / "cache"), "raise_on_error": True}})
manager.start()
vm = manager.get_vm(manager.create_vm("session", VMResourceLimits(1, 128, 64), vm_id="twin"))
vm.start()
shell(vm, "echo {{}} >/data/who; sync".format(name))
turn("wrote")
MicroVMIsolationManager({{"default_backend": "QEMU", "cache_dir": str(shared / "cache")}}).start()
turn("swept")
if name == "A":
    vm.snapshot("of-a")
    vm.suspend()
    turn("suspended")
    manager.resume_vm("twin")
    clone = manager.get_vm(manager.create_vm("session", template="of-a"))
    clone.start()
    read = "echo 3 >/proc/sys/vm/drop_caches; cat /data/who"
    print(shell(manager.get_vm("twin"), read), shell(clone, read))
    manager.delete_template("of-a")
else:
    turn("suspended")
    vm.suspend()
    print("suspended")
turn("done")
manager.destroy_vm("twin")
manager.stop()
"""


class CacheTestCase(VMTestCase):
    def setUp(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="cache-"))
        self.addCleanup(shutil.rmtree, str(self.folder))
        self.config = dict(self.config, cache_dir=str(self.folder / "cache"))
        super().setUp()

    def output(self, vm: Any, script: str) -> str:
        return str(self.result(vm, "exec", shell(script))["stdout"])


class Disks(CacheTestCase):
    @unittest.skipUnless(os.geteuid() == 0, "needs root to make mount namespaces")
    def test_containers_that_share_a_cache_keep_their_own_disks(self) -> None:
        code = TWIN.format(module=IMPORT)
        runs = {}
        for name in "AB":
            command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", BOX, "x", sys.executable, "-c", code, name]
            runs[name] = subprocess.Popen(
                command + [str(self.folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True
            )
        said = {name: run.communicate(timeout=180) for name, run in runs.items()}
        self.assertEqual(said["A"][0].split(), ["A", "A"], said)
        # Both states have the same name and only one is kept at a time: B suspended after A's resume, or was refused.
        self.assertTrue(said["B"][0].startswith("suspended") or "destroy_vm" in said["B"][1], said)
        self.assertEqual(os.listdir(str(self.folder / "cache" / "disks")), [])

    def test_disk_goes_with_its_vm_and_others_files_stay(self) -> None:
        vm = self.running()
        disks = self.folder / "cache" / "disks"
        (own,) = disks.iterdir()
        foreign = [disks / name for name in ("notes", "5f369f35-" + vm.vm_id, "0123456789abcdef-" + vm.vm_id + "x")]
        for path in foreign[:2]:
            path.write_text("mine")
        foreign[2].symlink_to(foreign[0])
        other = MicroVMIsolationManager(self.config)
        other.start()
        other.stop()
        self.assertTrue(own.exists() and all(os.path.lexists(str(path)) for path in foreign))
        self.manager.destroy_vm(vm.vm_id)
        self.assertFalse(own.exists())
        for path in foreign:
            path.unlink()

    def test_snapshot_has_the_vms_own_disk_whatever_stands_under_its_name(self) -> None:
        vm = self.running()
        self.output(vm, "echo own >/data/file; sync")
        (disk,) = (self.folder / "cache" / "disks").iterdir()
        disk.rename(self.folder / "moved")
        disk.write_bytes(b"another's")
        vm.snapshot("mine")
        self.addCleanup(self.manager.delete_template, "mine")
        clone = self.running(template="mine", isolation_type=IsolationType.SESSION)
        self.assertEqual(self.output(clone, "echo 3 >/proc/sys/vm/drop_caches; cat /data/file"), "own\n")


class Names(CacheTestCase):
    def test_destroying_a_vm_that_was_only_created_leaves_anothers_suspended_one(self) -> None:
        other = MicroVMIsolationManager(self.config)
        other.start()
        self.addCleanup(other.stop)
        vm = self.running(vm_id="mail")
        self.assertEqual(other.create_vm(IsolationType.SESSION, limits(), vm_id="mail"), "mail")
        self.assertTrue(vm.suspend(), vm.last_error)
        self.assertTrue(other.destroy_vm("mail"), other.last_error)
        self.assertEqual([each["vm_id"] for each in other.list_suspended()], ["mail"])
        self.assertTrue(self.manager.resume_vm("mail"), self.manager.last_error)
        self.assertTrue(vm.suspend(), vm.last_error)
        # A manager without a VM of this name may destroy another manager's suspended VM by its id.
        self.assertTrue(other.destroy_vm("mail"), other.last_error)
        self.assertEqual(self.manager.list_suspended(), [])


class Replaced(CacheTestCase):
    """An image or a VMM that is replaced while a VM runs, or is suspended."""

    def rootfs(self) -> Path:
        return make_rootfs(self.folder / "root.ext4")

    def replace(self, path: Path) -> Path:
        kept = path.with_suffix(".kept")
        os.link(str(path), str(kept))
        with tempfile.NamedTemporaryFile(dir=str(self.folder), delete=False) as new:
            new.write(path.read_bytes())
            new.seek(3 << 20)
            new.write(b"replaced")
        os.replace(new.name, str(path))
        return kept

    def test_a_copy_that_could_not_be_started_is_not_made_and_the_vm_goes_on(self) -> None:
        image = self.rootfs()
        # For a clone the image's digest is known, so a replaced image with the same content is accepted.
        self.assertTrue(self.manager.prepare(limits(), rootfs_path=str(image)), self.manager.last_error)
        vm = self.running(rootfs_path=str(image))
        kept = self.replace(image)
        with self.assertRaises(TemplateError) as caught:
            vm.snapshot("mine")
        self.assertEqual(caught.exception.code, "state_mismatch")
        self.assertIn(str(image), str(caught.exception))
        self.assertFalse(vm.suspend())
        self.assertEqual(vm.last_error.code, "state_mismatch")
        self.assertEqual((vm.get_state(), self.output(vm, "echo on")), (VMState.RUNNING, "on\n"))
        os.replace(str(kept), str(image))
        self.assertTrue(vm.suspend(), vm.last_error)
        self.assertTrue(vm.resume(), vm.last_error)

    def test_the_lists_say_beforehand_what_cannot_come_back_and_the_disk_can_be_had(self) -> None:
        image = self.rootfs()
        vm = self.running(rootfs_path=str(image), vm_id="suspended")
        # What the guest has not written to its disk yet is there all the same.
        self.output(vm, "echo precious >/data/file")
        self.assertTrue(vm.suspend(), vm.last_error)
        self.assertEqual([(each["usable"], each["differences"]) for each in self.manager.list_suspended()], [(True, [])])
        kept = self.replace(image)
        (listed,) = self.manager.list_suspended()
        self.assertFalse(listed["usable"])
        self.assertIn("rootfs", " ".join(listed["differences"]))
        self.assertFalse(vm.resume())
        target = self.folder / "disk.ext4"
        told = self.manager.export_disk("suspended", target)
        self.assertEqual(told, {"bytes": 64 << 20, "verified": True}, self.manager.last_error)
        self.assertEqual(target.stat().st_mode & 0o777, 0o600)
        self.assertLess(target.stat().st_blocks * 512, 32 << 20)
        debugfs = find_tool("debugfs")
        if debugfs is not None:
            said = subprocess.check_output([debugfs, "-R", "cat file", str(target)], stderr=subprocess.DEVNULL)
            self.assertEqual(said, b"precious\n")
        with self.assertRaises(InvalidValueError):
            self.manager.export_disk("suspended", target)
        self.assertIsNone(self.manager.export_disk("nobody", self.folder / "other"))
        self.assertEqual(self.manager.last_error.code, "vm_not_found")  # type: ignore[union-attr]
        os.replace(str(kept), str(image))
        self.assertTrue(vm.resume(), vm.last_error)
        self.assertIsNone(self.manager.export_disk("suspended", self.folder / "other"))
        self.assertEqual(self.manager.last_error.code, "invalid_state")  # type: ignore[union-attr]

    def test_the_disk_of_a_damaged_state_can_be_had(self) -> None:
        vm = self.running(vm_id="hurt")
        self.assertTrue(vm.suspend(), vm.last_error)
        (self.folder / "cache" / "suspended" / "hurt" / "manifest").write_text("damaged")
        (listed,) = self.manager.list_suspended()
        self.assertEqual((listed["damaged"], listed["usable"]), (True, False))
        self.assertEqual(self.manager.export_disk("hurt", self.folder / "disk"), {"bytes": 64 << 20, "verified": False})
        self.assertTrue(self.manager.destroy_vm("hurt"), self.manager.last_error)
