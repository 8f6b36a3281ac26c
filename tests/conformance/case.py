"""What a conformance test is: one class of tests, made anew for each backend.

Binaries are looked up in the folder that ``MICROVM_TEST_BIN`` names, then on ``PATH``. ``MICROVM_TEST_BACKENDS`` (names
separated by commas) leaves others out. A backend that cannot run here is skipped, with doctor's reason.
"""

import contextlib
import os
import tempfile
import unittest
from pathlib import Path
from typing import Any, Dict, Iterator, Optional, Type

from thirstys_waterfall.security.microvm_isolation import VMBackend, doctor

from ..support import BLOCKS, DATA, VMTestCase, make_rootfs

BINARIES = {
    VMBackend.QEMU: ("qemu_binary", "qemu-system-x86_64"),
    VMBackend.FIRECRACKER: ("firecracker_binary", "firecracker"),
    VMBackend.CLOUD_HYPERVISOR: ("cloud_hypervisor_binary", "cloud-hypervisor"),
}


def config(backend: VMBackend) -> Dict[str, Any]:
    """A manager's configuration that runs VMs on this backend."""
    key, name = BINARIES[backend]
    folder = os.environ.get("MICROVM_TEST_BIN")
    path = Path(folder) / name if folder else None
    settings: Dict[str, Any] = {"default_backend": backend, "start_timeout_s": 60}
    if path and path.is_file():
        settings[key] = str(path)
    return settings


@contextlib.contextmanager
def on_path() -> Iterator[None]:
    """With the binaries on ``PATH``."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join(filter(None, [os.environ.get("MICROVM_TEST_BIN"), before]))
    try:
        yield
    finally:
        os.environ["PATH"] = before


def told_of(backend: VMBackend) -> Dict[str, Any]:
    """What doctor tells of this backend; it looks on ``PATH`` alone."""
    with on_path():
        told: Dict[str, Any] = next(entry for entry in doctor()["backends"] if entry["backend"] == backend.value)
        return told


def why_not(backend: VMBackend) -> Optional[str]:
    """Why this backend cannot be tested here."""
    asked = os.environ.get("MICROVM_TEST_BACKENDS")
    if asked and backend.value not in asked.split(","):
        return "MICROVM_TEST_BACKENDS leaves it out"
    told = told_of(backend)
    return None if told["available"] else str(told["reason"])


class BackendTestCase(VMTestCase):
    """Tests on one backend."""

    backend: VMBackend

    def block(self, title: str) -> str:
        """A block of the description, unchanged but for the backend's name and where the files of it are."""
        code = BLOCKS[title].replace('"QEMU"', '"{}"'.format(self.backend.name))
        code = code.replace("VMBackend.FIRECRACKER", "VMBackend.{}".format(self.backend.name))
        return code.replace("/path/to/custom/kernel", str(DATA / "vmlinux"))

    @classmethod
    def setUpClass(cls) -> None:
        reason = why_not(cls.backend)
        if reason:
            raise unittest.SkipTest("{}: {}".format(cls.backend.value, reason))
        cls.config = dict(config(cls.backend), **cls.config)

    def folder(self) -> Path:
        """A folder whose files root's VMs may read."""
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        os.chmod(folder.name, 0o755)
        return Path(folder.name)

    def rootfs(self) -> Path:
        """An image of a root file system."""
        return make_rootfs(self.folder() / "rootfs.ext4")


def for_each_backend(*classes: Type[BackendTestCase]) -> Dict[str, Type[BackendTestCase]]:
    """A class of the same tests for each backend, by name: ``globals().update(for_each_backend(...))``."""
    made = {}
    for tests in classes:
        for backend in VMBackend:
            name = tests.__name__ + "On" + "".join(part.title() for part in backend.value.split("-"))
            made[name] = type(name, (tests,), {"backend": backend, "__module__": tests.__module__})
    return made


def load_made(loader: unittest.TestLoader, made: Dict[str, Type[BackendTestCase]]) -> unittest.TestSuite:
    """The suite of the classes that were made, and not of those that they were made from."""
    return unittest.TestSuite(loader.loadTestsFromTestCase(tests) for tests in made.values())
