"""Nothing of others is touched: folders that hold other files are refused, and what others put into ours stays.

Each case fills a folder with every kind of thing that a file system can hold, has a process use it in every way that there is,
end normally or be killed, and compares the whole tree with what it was.
"""

import hashlib
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

from ..support import IMPORT, alive, eventually

USER = 61234
# Calls every method of a manager that touches folders, prints the outcomes, then ends as told on stdin.
LIFE = """
import os, sys, time
from {module} import *
uid, end, config = int(sys.argv[1]), sys.argv[2], eval(sys.argv[3])
here = os.getcwd()
if uid:
    os.setgroups([]); os.setresgid(uid, uid, uid); os.setresuid(uid, uid, uid)
try:
    manager = MicroVMIsolationManager(dict({{"default_backend": "QEMU", "health_interval_s": None, "jail": "default"}}, **config))
except Exception as error:
    print("refused", type(error).__name__, error)
    sys.exit()
# A relative folder is what it was when the manager was made.
os.chdir("/")
manager.start()
vm = manager.get_vm(manager.create_vm("session", VMResourceLimits(1, 128, 64), vm_id="guest"))
if not vm.start():
    print("refused", type(vm.last_error).__name__, vm.last_error)
    manager.list_templates(); manager.list_suspended(); manager.get_resource_usage()
    manager.delete_template("project"); manager.destroy_vm("git"); manager.resume_vm("project"); manager.prepare()
    manager.destroy_all_vms()
    manager.stop()
    sys.exit()
vm.snapshot("mine")
clone = manager.get_vm(manager.create_vm("session", template="mine"))
assert clone.start(), clone.last_error
assert vm.suspend(), vm.last_error
manager.list_templates(); manager.list_suspended(); manager.get_resource_usage()
assert vm.resume(), vm.last_error
assert manager.delete_template("mine"), manager.last_error
# What has the name of something foreign: it may fail, or it is of ours and goes.
for name in ("git", "project", "smith", "app-templates"):
    for operation in (
        lambda: name in ("project", "smith") and vm.snapshot(name),
        lambda: manager.delete_template(name),
        lambda: manager.resume_vm(name),
        lambda: manager.export_disk(name, "/nonexistent/exported"),
        lambda: manager.create_vm("session", VMResourceLimits(1, 128, 64), vm_id=name),
        lambda: manager.get_vm(name) and name == "git" and manager.get_vm(name).start(),
        lambda: manager.destroy_vm(name),
    ):
        try:
            operation()
        except MicroVMError:
            pass
manager.prepare(VMResourceLimits(1, 128, 64))
running_vms(config.get("runtime_dir")); doctor()
os.chdir(here)
other = MicroVMIsolationManager(dict({{"default_backend": "QEMU"}}, **config))
other.start(); other.stop()
print("ran", flush=True)
if end == "kill":
    os.kill(os.getpid(), 9)
manager.stop()
"""


class Foreign:
    """Things of every kind in a folder, and outside of it what links in it lead to."""

    def __init__(self, outside: Path) -> None:
        self.outside, self.mounts = outside, []  # type: Path, List[Path]
        (outside / "home" / "thesis").mkdir(parents=True)
        (outside / "home" / "thesis" / "chapter").write_text("ten years of work")
        (outside / "bashrc").write_text("export A=1\n")
        self.bystander = subprocess.Popen(["sleep", "600"])

    def kinds(self) -> Dict[str, Callable[[Path], Any]]:
        """The name of each kind, and what makes it at a path."""

        def tree(path: Path) -> None:
            (path / "a" / "b").mkdir(parents=True)
            (path / "a" / "b" / "file").write_text("content")
            os.utime(str(path), (1, 1))

        def with_files(**files: str) -> Callable[[Path], None]:
            def make(path: Path) -> None:
                path.mkdir()
                for name, text in files.items():
                    (path / name.replace("_", ".")).write_text(text)
                os.utime(str(path), (1, 1))

            return make

        def traps(path: Path) -> None:
            group = path / "tw-microvm-evil"
            group.mkdir(parents=True)
            (group / "cgroup.procs").write_text("{}\n".format(self.bystander.pid))
            (group / "cgroup.kill").symlink_to(self.outside / "bashrc")
            (path / "cgroups").write_text("{}\n".format(group))
            (path / "lock").symlink_to(self.outside / "made-through-a-link")

        def closed(path: Path) -> None:
            path.mkdir()
            (path / "file").write_text("read only")
            path.chmod(0o500)

        def like_a_vm(path: Path) -> None:
            path.mkdir()
            path.chmod(0o700)
            (path / "lock").write_text("")
            (path / "HEAD").write_text("ref: main")

        def a_socket(path: Path) -> None:
            with socket.socket(socket.AF_UNIX) as server:
                here = os.getcwd()
                os.chdir(str(path.parent))  # sun_path is short
                try:
                    server.bind(path.name)
                finally:
                    os.chdir(here)

        def sparse(path: Path) -> None:
            with path.open("wb") as file:
                file.truncate(1 << 40)

        def others(path: Path) -> None:
            tree(path)
            os.chown(str(path), USER + 1, USER + 1)

        def mount(path: Path) -> None:
            path.mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)], check=True)
            self.mounts.append(path)
            (path / "inside").write_text("another file system")

        made: Dict[str, Callable[[Path], Any]] = {
            "a file": lambda path: path.write_text("text"),
            "an empty folder": lambda path: path.mkdir(),
            "a tree of long ago": tree,
            ".a hidden file": lambda path: path.write_text("text"),
            ".ssh": tree,
            "a link to a file": lambda path: path.symlink_to(self.outside / "bashrc"),
            "a link to a folder": lambda path: path.symlink_to(self.outside / "home"),
            "a link to nothing": lambda path: path.symlink_to("/nonexistent/target"),
            "a link with a VM's name".replace(" ", "-").replace("'", ""): lambda path: path.symlink_to(self.outside / "home"),
            "a FIFO": lambda path: os.mkfifo(str(path)),
            "a socket": a_socket,
            "a hard link": lambda path: os.link(str(self.outside / "bashrc"), str(path)),
            "a sparse file": sparse,
            "an unreadable file": lambda path: (path.write_text("secret"), path.chmod(0)),
            "a read-only folder": closed,
            "app-templates": with_files(index_html="<html>"),
            "traps": traps,
            "tw-microvm-evil": with_files(cgroup_procs="{}\n".format(self.bystander.pid)),
            "0123456789abcdef0123456789abcdef": with_files(ram="x", disk="x"),
            "0123456789abcdef-guest": lambda path: path.mkdir(),
            "0123456789abcdef-notes": lambda path: path.write_text("text"),
            "git": like_a_vm,
            "project": tree,
            "work.new": tree,
            ".new-project": tree,
            ".gone-fishing": tree,
            ".lock-smith": lambda path: path.write_text("not a lock"),
            "x" * 255: lambda path: path.write_text("long"),
            "two\nlines": lambda path: path.write_text("text"),
            os.fsdecode(b"not \xff UTF-8"): lambda path: path.write_text("text"),
        }
        if os.geteuid() == 0:
            made["another user's"] = others
            made["a mount"] = mount
            made["a device"] = lambda path: os.mknod(str(path), 0o600 | stat.S_IFCHR, os.makedev(1, 3))
        return made

    def fill(self, folder: Path, owner: int) -> List[Path]:
        paths = []
        for name, make in self.kinds().items():
            path = folder / name
            make(path)
            paths.append(path)
            if owner and name not in ("another user's", "a hard link", "a mount"):
                own(path, owner)
        return paths

    def end(self) -> None:
        for path in self.mounts:
            subprocess.run(["umount", "-l", str(path)], check=True)
        self.bystander.kill()
        self.bystander.wait()


def own(path: Path, owner: int) -> None:
    """Give a tree to a user, links themselves and not what they lead to."""
    os.chown(str(path), owner, owner, follow_symlinks=False)
    if path.is_dir() and not path.is_symlink():
        for entry in list(path.iterdir()):
            own(entry, owner)


def digest(path: Path, into: Optional[Any] = None) -> str:
    """Of a tree: names, kinds, modes, owners, sizes, names of each file, contents, where links lead."""
    into = into or hashlib.sha256()
    meta = os.lstat(str(path))
    facts = (os.fsencode(path.name), meta.st_mode, meta.st_uid, meta.st_gid, meta.st_nlink, meta.st_rdev)
    into.update(repr(facts).encode())
    if stat.S_ISLNK(meta.st_mode):
        into.update(os.fsencode(os.readlink(str(path))))
    elif stat.S_ISREG(meta.st_mode):
        into.update(repr((meta.st_size, meta.st_mtime_ns)).encode())
        if meta.st_size < 1 << 20:
            into.update(path.read_bytes())
    elif stat.S_ISDIR(meta.st_mode):
        for name in sorted(os.listdir(os.fsencode(str(path)))):
            digest(path / os.fsdecode(name), into)
    return str(into.hexdigest())


class ForeignFolders(unittest.TestCase):
    def setUp(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="foreign-"))
        self.addCleanup(self.remove)
        self.folder.chmod(0o755)
        (self.folder / "outside").mkdir()
        self.foreign = Foreign(self.folder / "outside")
        self.addCleanup(self.foreign.end)

    def remove(self) -> None:
        for path in self.folder.rglob("a read-only folder"):
            path.chmod(0o700)
        shutil.rmtree(str(self.folder))

    def users(self) -> List[int]:
        """As whom the manager runs: this user, and an ordinary one where that can be had."""
        return [0, USER] if os.geteuid() == 0 else [0]

    def place(self, name: str, uid: int) -> Path:
        path = self.folder / name
        path.mkdir()
        path.chmod(0o700)
        if uid:
            os.chown(str(path), uid, uid)
        return path

    def life(self, uid: int, end: str, **config: Any) -> str:
        config = {key: str(value) if isinstance(value, Path) else value for key, value in config.items()}
        command = [sys.executable, "-c", LIFE.format(module=IMPORT), str(uid), end, repr(config)]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True, timeout=180, cwd=str(self.folder)
        )
        self.assertIn(done.returncode, (0, -signal.SIGKILL), done.stderr)
        self.assertTrue(done.stdout, done.stderr)
        return done.stdout

    def assert_untouched(self, before: Dict[Path, str]) -> None:
        for path, seen in before.items():
            with self.subTest(path=path.name[:40]):
                self.assertTrue(os.path.lexists(str(path)), "it is gone")
                self.assertEqual(digest(path), seen)
        self.assertTrue(alive(self.foreign.bystander.pid), "a process that a file named was killed")
        self.assertFalse((self.folder / "outside" / "made-through-a-link").exists())

    def test_a_folder_with_other_files_is_refused_by_its_key_and_stays_as_it_is(self) -> None:
        for uid in self.users():
            for key in ("runtime_dir", "cache_dir"):
                with self.subTest(uid=uid, key=key):
                    folder = self.place("{}-{}".format(key, uid), uid)
                    paths = self.foreign.fill(folder, uid)
                    self.assertGreaterEqual(len(paths), 20)
                    before = {path: digest(path) for path in [folder, self.folder / "outside"]}
                    other = {"runtime_dir": "cache_dir", "cache_dir": "runtime_dir"}[key]
                    beside = self.place("beside-{}-{}".format(key, uid), uid)
                    said = self.life(uid, "exit", **{key: folder, other: beside / "own"})
                    self.assertIn("refused", said)
                    self.assertTrue(key in said and str(folder) in said, said)
                    self.assert_untouched(before)
                    for path in self.foreign.mounts:
                        subprocess.run(["umount", "-l", str(path)], check=True)
                    self.foreign.mounts.clear()

    def test_what_others_put_into_folders_of_ours_survives_every_operation(self) -> None:
        for uid in self.users():
            for end in ("exit", "kill"):
                with self.subTest(uid=uid, end=end):
                    base = self.place("base-{}-{}".format(uid, end), uid)
                    runtime, cache = base / "run", base / "cache"
                    config = {"runtime_dir": runtime, "cache_dir": cache, "cache_max_mb": 1, "cache_max_age_days": 1}
                    self.assertEqual(self.life(uid, "exit", **config), "ran\n")
                    paths: List[Path] = []
                    folders = [runtime, cache] + [cache / name for name in ("templates", "snapshots", "suspended", "disks")]
                    for folder in folders:
                        self.assertTrue(folder.is_dir(), folder)
                        paths += self.foreign.fill(folder, uid)
                    before = {path: digest(path) for path in paths + [self.folder / "outside"]}
                    self.assertEqual(self.life(uid, end, **config), "ran\n")
                    # The janitor removes what the killed one left, and nothing else.
                    self.assertTrue(eventually(lambda: not (runtime / "guest").exists(), 15.0))
                    time.sleep(0.5)
                    self.assertEqual(self.life(uid, "exit", **config), "ran\n")
                    self.assert_untouched(before)
                    for path in self.foreign.mounts:
                        subprocess.run(["umount", "-l", str(path)], check=True)
                    self.foreign.mounts.clear()

    def test_relative_and_nested_folders_never_mean_another_place(self) -> None:
        here = self.place("here", 0)
        for config in (
            {"runtime_dir": here / "x", "cache_dir": here / "x"},
            {"runtime_dir": here / "c" / "run", "cache_dir": here / "c"},
            {"runtime_dir": "", "cache_dir": here / "c"},
            {"runtime_dir": here / "r", "cache_dir": ""},
        ):
            with self.subTest(config=config):
                self.assertIn("refused", self.life(0, "exit", **config))
        self.assertEqual(self.life(0, "exit", runtime_dir="relative-run", cache_dir="relative-cache"), "ran\n")
        self.assertTrue((self.folder / "relative-run").is_dir() and (self.folder / "relative-cache").is_dir())
