"""What the tests share: small VMs, waiting with a deadline, and a look at what a VM leaves on the host."""

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple, Union, get_type_hints

from thirstys_waterfall.security import microvm_isolation as package
from thirstys_waterfall.security.microvm_isolation import (
    IsolationType,
    MicroVMIsolationManager,
    VMBackend,
    VMResourceLimits,
)

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(package.__file__).resolve().parent / "_data"
# The code of the description, by the title of its section.
BLOCKS = dict(re.findall(r"^### ([^\n]+)\n+```python\n(.*?)^```", (ROOT / "tests" / "surface" / "mission_blocks.md").read_text(), re.M | re.S))
IMPORT = "thirstys_waterfall.security.microvm_isolation"


def limits(**changes: int) -> VMResourceLimits:
    """The smallest VM that the tests use."""
    return VMResourceLimits(**{**{"vcpu_count": 1, "memory_mb": 128, "disk_size_mb": 64}, **changes})


def eventually(condition: Callable[[], Any], seconds: float = 20.0) -> Any:
    """The first true answer of ``condition`` within the time, else its last answer."""
    end = time.monotonic() + seconds
    answer = condition()
    while not answer and time.monotonic() < end:
        time.sleep(0.01)
        answer = condition()
    return answer


def alive(pid: int) -> bool:
    """Whether a process runs: neither gone nor a zombie."""
    try:
        stat = Path("/proc/{}/stat".format(pid)).read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in ("Z", "X")


def disks_of(vm_id: str) -> List[Path]:
    """The disk of a VM with the default ``cache_dir``, if it is there."""
    cache = Path("/var/cache/tw-microvm" if os.geteuid() == 0 else "~/.cache/tw-microvm").expanduser()
    return list((cache / "disks").glob("*-" + vm_id))


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def children(pid: Optional[int] = None) -> List[int]:
    """The living processes whose parent is this one."""
    parent = str(os.getpid() if pid is None else pid)
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[1] == parent and fields[0] not in ("Z", "X"):
            found.append(int(entry.name))
    return found


def run_python(code: str, timeout: float = 120.0, **options: Any) -> "subprocess.CompletedProcess[str]":
    """Run code in a fresh interpreter of the same environment."""
    return subprocess.run(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        universal_newlines=True,
        timeout=timeout,
        **options,
    )


def play(code: str, **names: Any) -> Tuple[Dict[str, Any], str]:
    """Run a block where these names are known, and the package's; returns its names and what it printed."""
    space: Dict[str, Any] = {name: getattr(package, name) for name in package.__all__}
    space.update(names)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "a block of the description", "exec"), space)
    return space, printed.getvalue()


def misfits(value: Any, kind: Any, place: str) -> List[str]:
    """Where a value is not of a type: a key too many or too few, or a value of another type."""
    origin, inner = getattr(kind, "__origin__", None), getattr(kind, "__args__", ())
    if kind is Any:
        return []
    if origin is Union:
        found = [misfits(value, one, place) for one in inner]
        return min(found, key=len)
    if origin is list and isinstance(value, list):
        return [one for i, item in enumerate(value) for one in misfits(item, inner[0], "{}[{}]".format(place, i))]
    if origin is dict and isinstance(value, dict):
        return [one for key, item in value.items() for one in misfits(item, inner[1], "{}[{!r}]".format(place, key))]
    if hasattr(kind, "__total__") and isinstance(value, dict):
        known = get_type_hints(kind)
        wrong = ["{} has the unknown key {!r}".format(place, key) for key in value if key not in known]
        # CPython 3.8 does not know the required keys of a class that adds others.
        required = getattr(kind, "__required_keys__", known if kind.__total__ else ())
        wrong += ["{} lacks {!r}".format(place, key) for key in required if key not in value]
        inside = [(value[key], known[key], "{}[{!r}]".format(place, key)) for key in value if key in known]
        return wrong + [one for each in inside for one in misfits(*each)]
    # `bool` is an `int` to isinstance().
    return [] if type(value) is kind else ["{} is {!r}, not {}".format(place, value, kind)]


def find_tool(name: str) -> Optional[str]:
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


def make_rootfs(path: Path, kind: str = "ext4", fill: Callable[[Path], Any] = lambda tree: None) -> Path:
    """An ext4 or EROFS image with a static busybox, a file that says whose it is, and what ``fill`` adds."""
    busybox, mke2fs, mkfs_erofs = find_tool("busybox"), find_tool("mke2fs"), find_tool("mkfs.erofs")
    if busybox is None or mke2fs is None:
        raise unittest.SkipTest("needs busybox (busybox-static) and mke2fs (e2fsprogs) to make a root file system")
    if kind == "erofs" and mkfs_erofs is None:
        raise unittest.SkipTest("needs mkfs.erofs (erofs-utils) to make a root file system")
    with tempfile.TemporaryDirectory() as name:
        tree = Path(name)
        for folder in ("bin", "etc", "proc", "sys", "dev", "tmp", "run", "mnt"):
            (tree / folder).mkdir()
        shutil.copy(busybox, str(tree / "bin" / "busybox"))
        for applet in ("sh", "cat", "ls", "echo", "touch"):
            (tree / "bin" / applet).symlink_to("busybox")
        (tree / "etc" / "made-by").write_text("tests\n")
        fill(tree)
        command = [mke2fs, "-q", "-F", "-t", "ext4", "-d", name, str(path), "16M"]
        if kind == "erofs":
            command = [str(mkfs_erofs), str(path), name]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    return path


class VMTestCase(unittest.TestCase):
    """A test with a manager of its own; every VM it made is gone afterwards."""

    config: Dict[str, Any] = {}

    def setUp(self) -> None:
        config = {"default_backend": "QEMU", "default_memory_mb": 128, "default_disk_size_mb": 64}
        config.update(self.config)
        self.manager = MicroVMIsolationManager(config)
        self.manager.start()
        self.addCleanup(self.manager.stop)

    def create(self, **options: Any) -> str:
        options.setdefault("isolation_type", IsolationType.BROWSER_TAB)
        options.setdefault("resource_limits", limits())
        vm_id = self.manager.create_vm(**options)
        self.assertIsNotNone(vm_id, self.manager.last_error)
        assert vm_id is not None
        return vm_id

    def running(self, **options: Any) -> Any:
        vm = self.manager.get_vm(self.create(**options))
        assert vm is not None
        self.assertTrue(vm.start(), vm.last_error)
        return vm

    def result(self, vm: Any, command: str, params: Optional[Dict[str, Any]] = None) -> Any:
        answer = vm.send_command(command, params)
        self.assertIsNotNone(answer, vm.last_error)
        self.assertEqual(answer["status"], "ok", answer)
        return answer["result"]

    def failure(self, vm: Any, command: str, params: Optional[Dict[str, Any]] = None) -> str:
        """The code of the structured error that a command is answered with."""
        answer = vm.send_command(command, params)
        self.assertIsNotNone(answer, vm.last_error)
        self.assertEqual(answer["status"], "error", answer)
        self.assertTrue(answer["error"]["message"])
        return str(answer["error"]["code"])


def shell(script: str, **more: Any) -> Dict[str, Any]:
    """Parameters of ``exec`` for a shell script."""
    return dict({"program": "/bin/sh", "args": ["-c", script]}, **more)


QEMU = VMBackend.QEMU
