"""Another user of the same host attacks: real uids, in mount, network and pid namespaces of their own.

The names of the default folders can be guessed, and all users may write to ``/dev/shm`` and ``/tmp``. Each trap is first shown to
catch a program that sweeps without looking; then a manager, and a channel, meet it.
"""

import contextlib
import json
import os
import stat
import subprocess
import sys
import unittest
from pathlib import Path
from typing import Any, Dict, Iterator, List, Sequence, Tuple

from ..support import DATA, IMPORT, children, eventually, find_tool

# Read by tests/runner.py, which runs this module by itself.
ALONE = "races are as good as the number of tries within their time"
VICTIM, ATTACKER, HOMELESS = 61240, 61241, 61242
# The home of each victim; ``HOMELESS`` is in no user database, as a service may be.
HOMES = {0: "/mnt/root", VICTIM: "/mnt/home", HOMELESS: "/mnt/data"}
# Where the victims' managers look for their folders: in memory, then where most hosts have them.
RUNTIMES = ("/dev/shm/tw-microvm-{}", "/tmp/tw-microvm-{}")
CACHE = "/tmp/tw-microvm-cache-{}"
RACE_TRIES, RACE_SECONDS = 1000, 300.0

# /tmp and /run are no tmpfs: the default runtime folder is then in /dev/shm. The first process ends with the test's, and all
# others of the namespace with it.
STAGE = """
set -e
cd "$1"
mount -t tmpfs -o mode=755 tmpfs /mnt
mkdir /mnt/package /mnt/python
mount --bind . /mnt/package
mount --bind "$2" /mnt/python
cat /etc/passwd >/mnt/passwd
echo 'tw-victim:x:{victim}:{victim}::{home}:/bin/sh' >>/mnt/passwd
mount --bind /mnt/passwd /etc/passwd
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount -t ramfs -o mode=1777 ramfs /tmp
mount -t ramfs -o mode=755 ramfs /run
mount -t tmpfs -o mode=755 tmpfs /var/cache
echo ready
exec cat
""".format(victim=VICTIM, home=HOMES[VICTIM])

# The attacker's: folders of all that a VM, or a cache, could have left, as inviting as can be.
TRAPS = """
import os, sys
places, home, pid = sys.argv[1].split(":"), sys.argv[2], sys.argv[3]
def put(path, text):
    with open(path, "w") as file:
        file.write(text)
def trap(base, kind):
    os.mkdir(base)
    put(base + "/.tw-microvm", "tw-microvm 1 %s %s\\n" % (kind, "0123456789abcdef" * 2))
    for name, procs in (("link", ""), ("kill", pid)):
        group = base + "/" + name + "/tw-microvm-evil"
        os.makedirs(group)
        put(group + "/cgroup.procs", procs + "\\n")
        put(base + "/" + name + "/cgroups", group + "\\n")
        put(base + "/" + name + "/lock", "tw-microvm lock\\n")
    os.symlink(home + "/.bashrc", base + "/link/tw-microvm-evil/cgroup.kill")
    os.mkdir(base + "/make")
    os.symlink(home + "/.made", base + "/make/lock")
    os.symlink(home, base + "/.gone-0123456789abcdef")
    os.symlink(home, base + "/home")
    key = "f" * 32
    os.makedirs(base + "/templates/" + key)
    os.symlink(home + "/.bashrc", base + "/templates/" + key + "/used")
    os.symlink(home + "/.made", base + "/templates/" + key + ".lock")
    for name in ("disks", "snapshots", "suspended"):
        os.symlink(home, base + "/" + name)
    for folder, _, files in os.walk(base):
        os.chmod(folder, 0o777)
        for name in files:
            path = os.path.join(folder, name)
            os.path.islink(path) or os.chmod(path, 0o666)
for place in places:
    trap(place, "cache" if "cache" in place else "runtime")
"""
# What a manager did before it looked whose its folders are.
NAIVE = """
import os, shutil, signal, sys
def sweep(base):
    for name in sorted(os.listdir(base), key=lambda name: not os.path.islink(base + "/" + name)):
        folder = os.path.join(base, name)
        if not os.path.isdir(folder):
            continue
        with open(folder + "/lock", "a"):
            pass
        groups = open(folder + "/cgroups").read().split() if os.path.exists(folder + "/cgroups") else []
        for group in groups:
            for pid in open(group + "/cgroup.procs").read().split():
                os.kill(int(pid), signal.SIGKILL)
            if os.path.lexists(group + "/cgroup.kill"):
                open(group + "/cgroup.kill", "w").write("1")
        shutil.rmtree(os.path.realpath(folder), ignore_errors=True)
"""
START = """
import json, sys
from {module} import *
def said(error):
    return [type(error).__name__, getattr(error, "code", None), str(error)]
told = []
for config in json.loads(sys.argv[1]):
    manager = MicroVMIsolationManager(config)
    manager.start()
    swept = said(manager.last_error)
    vm = manager.get_vm(manager.create_vm("session", VMResourceLimits(1, 128, 32)))
    started = vm.start()
    told.append([swept, started, said(vm.last_error), (vm.get_info()["start"] or {{}}).get("origin") if started else None])
    manager.stop()
print(json.dumps(told))
""".format(module=IMPORT)
# Swaps what has the name, as fast as it can: a folder of traps, a link to them, a link to the home, nothing.
FLIP = """
import ctypes, os, sys, threading
base, home, turns = sys.argv[1], sys.argv[2], 0
end = threading.Thread(target=sys.stdin.read)
own = base + ".evil"
rename = ctypes.CDLL(None, use_errno=True).renameat2
for name, target in ((".home", home), (".link", own)):
    os.symlink(target, base + name)
end.start()
print("ready", flush=True)
while end.is_alive():
    for name in (".evil", ".home", ".link"):
        try:
            os.rename(base + name, base)
            turns += 1
            if name == ".evil":
                # Both at once: there is no moment at which there is nothing.
                rename(-100, base.encode(), -100, (base + ".home").encode(), 2)
                rename(-100, base.encode(), -100, (base + ".home").encode(), 2)
            os.rename(base, base + name)
        except OSError:
            pass
print(turns)
"""
# One try: a manager sweeps, and goes as far into a start as an ordinary user's connected VM gets, which is behind the making of
# all folders. Then the folder goes, if it was the victim's, so that the race is open again.
RACE = """
import collections, contextlib, json, os, shutil, sys, time
from {module} import *
base, config, tries, seconds = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
told, begun = collections.Counter(), time.monotonic()
while sum(told.values()) < tries and time.monotonic() - begun < seconds:
    # Every other try uses the default folder, the others name it in the configuration.
    manager = MicroVMIsolationManager(config if sum(told.values()) % 2 else {{}})
    manager.start()
    connected = VMNetworkConfig(isolated_network=False, mode="tap")
    vm = manager.get_vm(manager.create_vm("session", VMResourceLimits(1, 128, 32), network_config=connected))
    assert not vm.start()
    told[vm.last_error.code] += 1
    if vm.last_error.code == "folder_refused":
        assert "tw-microvm" in str(vm.last_error) and " is not used: " in str(vm.last_error), vm.last_error
    manager.stop()
    # In a sticky folder, no other user can exchange this user's own.
    with contextlib.suppress(FileNotFoundError):
        if os.lstat(base).st_uid == os.geteuid():
            shutil.rmtree(base)
print(json.dumps([time.monotonic() - begun, told]))
""".format(module=IMPORT)
NAIVE_RACE = (
    NAIVE
    + """
import time
base, end, tries = sys.argv[1], time.monotonic() + 20, 0
home = sys.argv[2]
def whole():
    return os.path.isdir(home + "/Documents") and os.path.getsize(home + "/.bashrc") > 1
while time.monotonic() < end and whole():
    tries += 1
    try:
        # The check and the use are two steps: the race that the attacker waits for.
        if os.lstat(base).st_uid != os.geteuid():
            continue
    except OSError:
        pass
    try:
        sweep(base)
    except OSError:
        pass
print(tries)
"""
)
LISTEN = """
import os, socket, sys
got = b""
listeners = []
for path in sys.argv[1].split(":"):
    os.makedirs(os.path.dirname(path))
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(8)
    for each in (path, os.path.dirname(path), os.path.dirname(os.path.dirname(path))):
        os.chmod(each, 0o777)
    listeners.append(listener)
print("ready", flush=True)
for line in sys.stdin:
    # Every client that has connected by now has sent its request or hung up.
    for listener in listeners:
        listener.setblocking(False)
        try:
            while True:
                taken, _ = listener.accept()
                taken.settimeout(5)
                got += b"<"
                try:
                    part = taken.recv(4096)
                    while part:
                        got += part
                        part = taken.recv(4096)
                except OSError as error:
                    got += repr(error).encode()
                got += b">"
        except BlockingIOError:
            pass
    print(got.decode(), flush=True)
    got = b""
"""
SPEAK = """
import json, sys
from {module} import *
told = []
for path in [None] + sys.argv[2:]:
    with CommunicationChannel(sys.argv[1], path) as channel:
        connected = channel.connect()
        connected and channel.send_message({{"type": "ping"}})
        answer = channel.receive_message(10) if connected else None
        told.append([channel.socket_path, connected, getattr(channel.last_error, "code", None), answer])
print(json.dumps(told))
""".format(module=IMPORT)
HOST = """
import sys
from {module} import *
with MicroVMIsolationManager({{"templates": False, "start_timeout_s": 120}}) as manager:
    vm = manager.get_vm(manager.create_vm("session", VMResourceLimits(1, 128, 32), vm_id="vm"))
    assert vm.start(), vm.last_error
    print("ready", flush=True)
    sys.stdin.read()
""".format(module=IMPORT)
# The attacker's at a VM that runs: its socket, its processes, names in no folder.
TRY = """
import json, os, signal, socket, sys
path, uid = sys.argv[1], int(sys.argv[2])
told = {"processes": 0, "opened": [], "killed": [], "connected": [], "abstract": []}
def attempt(what, name, action):
    try:
        action()
        told[what].append(name)
    except PermissionError:
        pass
for pid in os.listdir("/proc"):
    try:
        owner = os.stat("/proc/" + pid).st_uid
        command = open("/proc/" + pid + "/cmdline").read() if pid.isdigit() else ""
    except OSError:
        continue
    # A process that is not dumpable shows as root's.
    if not pid.isdigit() or owner not in (0, uid) or not command:
        continue
    told["processes"] += 1
    for file in ("mem", "environ", "maps"):
        attempt("opened", [pid, file], lambda: open("/proc/" + pid + "/" + file, "rb"))
    for folder in ("fd", "root", "cwd"):
        attempt("opened", [pid, folder], lambda: os.listdir("/proc/" + pid + "/" + folder))
    attempt("killed", pid, lambda: os.kill(int(pid), signal.SIGKILL))
for each in (path, os.path.dirname(path) + "/../vm/sock"):
    attempt("connected", each, lambda: socket.socket(socket.AF_UNIX).connect(each))
# /proc/net/unix lists every abstract socket; no other user may connect to one of ours.
for line in open("/proc/net/unix").read().splitlines()[1:]:
    name = line.split()[7:]
    if name and name[0].startswith("@"):
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET):
            try:
                socket.socket(socket.AF_UNIX, kind).connect("\\0" + name[0][1:])
                told["abstract"].append([name[0], kind])
            except OSError:
                pass
print(json.dumps(told))
"""
PREPARE = """
from {module} import *
config = {{"cache_dir": "/tmp/attackers/cache", "runtime_dir": "/tmp/attackers/run", "default_memory_mb": 128}}
with MicroVMIsolationManager(config) as manager:
    assert manager.prepare(VMResourceLimits(1, 128, 32)), manager.last_error
    vm = manager.get_vm(manager.create_vm("session", VMResourceLimits(1, 128, 32), vm_id="mail"))
    assert vm.start(), vm.last_error
    vm.snapshot("theirs")
    assert vm.suspend(), vm.last_error
""".format(module=IMPORT)
# Every call that reads kept states by name; a manager for each call, so that last_error is that call's.
ASK = """
import json
from {module} import *
def ask(action):
    manager = MicroVMIsolationManager()
    try:
        return action(manager), getattr(manager.last_error, "code", None)
    except MicroVMError as error:
        return None, error.code
    finally:
        manager.stop()
print(json.dumps(dict(
    list_suspended=ask(lambda manager: [each["vm_id"] for each in manager.list_suspended()]),
    list_templates=ask(lambda manager: [each["name"] for each in manager.list_templates()]),
    usage=ask(lambda manager: manager.get_resource_usage() is None),
    create_from=ask(lambda manager: manager.create_vm("session", template="theirs") is not None),
    create_beside=ask(lambda manager: manager.create_vm("session", vm_id="mail") is not None),
    resume=ask(lambda manager: bool(manager.resume_vm("mail"))),
    export=ask(lambda manager: bool(manager.export_disk("mail", "/mnt/data/disk"))),
    destroy=ask(lambda manager: bool(manager.destroy_vm("mail"))),
    delete=ask(lambda manager: manager.delete_template("theirs") is None),
)))
""".format(module=IMPORT)


class Actor:
    """A process that has said its first line, and ends when its input does."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        assert process.stdin is not None and process.stdout is not None
        self.input, self.output = process.stdin, process.stdout
        self.first = self.output.readline().strip()
        if not self.first:
            raise AssertionError(process.communicate()[1])

    def ask(self) -> str:
        self.input.write("\n")
        self.input.flush()
        return self.output.readline().strip()

    def lives(self) -> bool:
        return self.process.poll() is None

    def end(self) -> Tuple[str, str]:
        """What else it says; nothing when it has ended before."""
        if self.input.closed:
            return "", ""
        try:
            return self.process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            # Killing the first process ends the whole namespace.
            self.process.kill()
            return self.process.communicate()


class Stage:
    """The namespaces, and who acts in them. Root of this test sees their files below :attr:`root`."""

    def __init__(self) -> None:
        # Package and interpreter may lie in folders that other users cannot read or that the namespace hides.
        package, interpreter = str(DATA.parents[3]), os.path.realpath(sys.base_prefix)
        shell = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc", "--propagation", "private"]
        self.outer = subprocess.Popen(
            shell + ["sh", "-c", STAGE, "stage", package, interpreter],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            universal_newlines=True,
        )
        assert self.outer.stdout is not None
        if self.outer.stdout.readline() != "ready\n":
            self.close()
            raise unittest.SkipTest("needs CAP_SYS_ADMIN to make mount, network and pid namespaces, and mounts in them")
        (self.first,) = children(self.outer.pid)
        self.root = Path("/proc/{}/root".format(self.first))

    def close(self) -> None:
        self.outer.kill()
        self.outer.communicate()

    def at(self, path: str) -> Path:
        return self.root / path.lstrip("/")

    def command(self, uid: int, *command: str) -> List[str]:
        enter = ["nsenter", "--target", str(self.first), "--mount", "--net", "--pid"]
        return [*enter, "--setgid", str(uid), "--setuid", str(uid), "--", *command]

    def python(self, code: str, *arguments: str) -> List[str]:
        program = os.path.relpath(os.path.realpath(sys.executable), os.path.realpath(sys.base_prefix))
        return [os.path.join("/mnt/python", program), "-c", code, *arguments]

    def begin(self, uid: int, *command: str) -> "subprocess.Popen[str]":
        pipe = subprocess.PIPE
        environment = {"PATH": os.environ["PATH"] + ":/usr/sbin:/sbin", "PYTHONDONTWRITEBYTECODE": "1"}
        environment.update(PYTHONPATH="/mnt/package", PYTHONHOME="/mnt/python", LD_LIBRARY_PATH="/mnt/python/lib")
        return subprocess.Popen(
            self.command(uid, *command), stdin=pipe, stdout=pipe, stderr=pipe, universal_newlines=True, env=environment
        )

    def run(self, uid: int, *command: str) -> str:
        process = self.begin(uid, *command)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, (command[-4:], out, err)
        return out

    def act(self, uid: int, code: str, *arguments: str) -> str:
        return self.run(uid, *self.python(code, *arguments))

    def started(self, uid: int, *configs: Dict[str, Any]) -> List[List[Any]]:
        """What managers with these settings say of their start, and of a VM's."""
        return list(json.loads(self.act(uid, START, json.dumps(configs))))

    @contextlib.contextmanager
    def going(self, uid: int, *command: str) -> Iterator["Actor"]:
        actor = Actor(self.begin(uid, *command))
        try:
            yield actor
        finally:
            actor.end()

    def bystander(self, uid: int) -> Any:
        """A process of the user's that has nothing to do with it; its first line is its pid in there."""
        return self.going(uid, "sh", "-c", "echo $$; exec cat")

    def seen(self, *places: str) -> Dict[str, Tuple[Any, ...]]:
        """All that is below these places: whose, which mode, when changed, which content. Links are not followed."""
        found: Dict[str, Tuple[Any, ...]] = {}
        for place in places:
            top = self.at(place)
            paths = [top] + [Path(folder) / name for folder, dirs, files in os.walk(str(top)) for name in dirs + files]
            for path in paths:
                info = path.lstat()
                content: Any = None
                if stat.S_ISLNK(info.st_mode):
                    content = os.readlink(str(path))
                elif stat.S_ISREG(info.st_mode) and info.st_size < 1 << 16:
                    content = path.read_bytes()
                key = str(path)[len(str(self.root)) :]
                found[key] = (info.st_mode, info.st_uid, info.st_gid, info.st_ino, info.st_nlink, info.st_mtime_ns, content)
        return found

    def fresh(self) -> None:
        """Empties the places that are open to all, and gives each home what it had at first."""
        fill = "mkdir -p {0}/.ssh {0}/Documents/old; echo alias >{0}/.bashrc; echo key >{0}/.ssh/id; echo x >{0}/Documents/old/text; "
        own = "chown -R {1}:{1} {0}; chmod -R go-rwx {0}; "
        homes = "".join((fill + own).format(home, uid) for uid, home in HOMES.items())
        self.run(0, "sh", "-c", "rm -rf /dev/shm/* /tmp/* /run/* /var/cache/* {}; {}".format(" ".join(HOMES.values()), homes))


@unittest.skipUnless(os.geteuid() == 0, "needs root to become two other users")
class AttackTestCase(unittest.TestCase):
    stage: Stage

    @classmethod
    def setUpClass(cls) -> None:
        if find_tool("nsenter") is None or find_tool("unshare") is None:
            raise unittest.SkipTest("needs nsenter and unshare (util-linux)")
        cls.stage = Stage()
        cls.addClassCleanup(cls.stage.close)
        process = cls.stage.begin(VICTIM, *cls.stage.python("import " + IMPORT))
        _, error = process.communicate(timeout=60)
        if process.returncode != 0:
            raise unittest.SkipTest("needs a Python and a package that other users can read: " + error[-200:])

    def setUp(self) -> None:
        self.stage.fresh()

    def lay(self, uid: int, pid: str, *places: str) -> None:
        """The attacker's traps for a user, and for a process of that user's."""
        self.stage.act(ATTACKER, TRAPS, ":".join(places), HOMES[uid], pid)

    def assert_refused(self, told: Sequence[Any], field: str, path: str) -> None:
        swept, started, error, _ = told
        self.assertFalse(started, told)
        for kind, code, text in (swept, error):
            self.assertEqual((kind, code), ("HostError", "folder_refused"), told)
            self.assertIn('config["{}"]'.format(field), text)
            self.assertIn(path, text)

    def assert_kept(self, before: Dict[str, Any], after: Dict[str, Any], home: str, *own: str) -> None:
        """All is as it was, but for the user's own new folders in the home, whose time that changes."""
        without = lambda seen: {path: info for path, info in seen.items() if path != home and not path.startswith(own)}
        self.assertEqual(without(after), without(before))


def link(target: str, *places: str) -> Tuple[str, ...]:
    return ("sh", "-c", " && ".join("ln -s {} {}".format(target, place) for place in places))


class Bases(AttackTestCase):
    """The default folders are the attacker's, who was there first."""

    def ways(self, uid: int, *places: str) -> Iterator[str]:
        """Each way to occupy them; a process of the user's goes on meanwhile."""
        each = lambda script: ("sh", "-c", " && ".join(script.format(place) for place in places))
        for way in ("traps", "closed traps", "links to traps", "links to the home", "files", "FIFOs", "empty folders"):
            with self.subTest(way, uid=uid), self.stage.bystander(uid) as bystander:
                self.stage.fresh()
                if way == "links to traps":
                    hidden = ["/dev/shm/evil-cache" if "cache" in place else "/dev/shm/evil" for place in places]
                    self.lay(uid, bystander.first, hidden[0])
                    self.stage.run(ATTACKER, *link(hidden[0], *places))
                elif "traps" in way:
                    self.lay(uid, bystander.first, *places)
                if way == "closed traps":
                    self.stage.run(ATTACKER, *each("chmod -R go-rwx {}"))
                elif way == "links to the home":
                    self.stage.run(ATTACKER, *link(HOMES[uid], *places))
                elif way == "files":
                    self.stage.run(ATTACKER, *each("echo x >{}"))
                elif way == "FIFOs":
                    self.stage.run(ATTACKER, *each("mkfifo -m 666 {}"))
                elif way == "empty folders":
                    self.stage.run(ATTACKER, *each("mkdir -m 777 {}"))
                yield way
                self.assertTrue(bystander.lives())

    def test_a_sweep_that_does_not_look_falls_into_each_trap(self) -> None:
        base, home = RUNTIMES[1].format(VICTIM), self.stage.at(HOMES[VICTIM])
        with self.stage.bystander(VICTIM) as bystander:
            self.lay(VICTIM, bystander.first, base)
            self.stage.act(VICTIM, NAIVE + "sweep(sys.argv[1])", base)
            self.assertTrue(eventually(lambda: not bystander.lives()))
        self.assertEqual((home / ".bashrc").read_text(), "1")
        self.assertTrue((home / ".made").exists())
        self.assertFalse((home / "Documents").exists())

    def test_both_runtime_folders_are_anothers_and_nothing_is_touched(self) -> None:
        places = [each.format(VICTIM) for each in RUNTIMES]
        for _ in self.ways(VICTIM, *places):
            before = self.stage.seen("/dev/shm", "/tmp", HOMES[VICTIM])
            (told,) = self.stage.started(VICTIM, {})
            self.assert_refused(told, "runtime_dir", places[1])
            self.assertEqual(self.stage.seen("/dev/shm", "/tmp", HOMES[VICTIM]), before)

    def test_the_homeless_users_cache_is_anothers_and_nothing_is_touched(self) -> None:
        place, own = CACHE.format(HOMELESS), RUNTIMES[0].format(HOMELESS)
        for _ in self.ways(HOMELESS, place):
            before = self.stage.seen("/tmp", HOMES[HOMELESS])
            (told,) = self.stage.started(HOMELESS, {})
            self.assert_refused(told, "cache_dir", place)
            self.assertEqual(self.stage.seen("/tmp", HOMES[HOMELESS]), before)
            self.assertEqual(os.listdir(str(self.stage.at(own))), [".tw-microvm"])

    def test_folders_that_root_is_given_by_name_are_anothers_and_nothing_is_touched(self) -> None:
        places = ["/dev/shm/tw-microvm-0", "/tmp/tw-microvm-cache-0"]
        for _ in self.ways(0, *places):
            before = self.stage.seen("/dev/shm", "/tmp", HOMES[0])
            named = list(zip(("runtime_dir", "cache_dir"), places))
            for (field, place), told in zip(named, self.stage.started(0, *({field: place} for field, place in named))):
                self.assert_refused(told, field, place)
            self.assertEqual(self.stage.seen("/dev/shm", "/tmp", HOMES[0]), before)

    def test_where_one_of_two_is_anothers_vms_run_in_the_other(self) -> None:
        for uid, other in ((VICTIM, RUNTIMES[1].format(VICTIM)), (0, "/run/tw-microvm")):
            with self.subTest(uid=uid), self.stage.bystander(uid) as bystander:
                taken = RUNTIMES[0].format(uid)
                self.lay(uid, bystander.first, taken)
                before = self.stage.seen(taken)
                (told,) = self.stage.started(uid, {"templates": False})
                self.assertTrue(told[1], told)
                self.assertEqual(self.stage.seen(taken), before)
                self.assertTrue(self.stage.at(other + "/.tw-microvm").exists())
                self.assertTrue(bystander.lives())


class Caches(AttackTestCase):
    """A template is memory that a VM starts from: another user's would be another user's guest."""

    def untouched(self, *places: str) -> Any:
        """Sets the times of all files to what no reading leaves; the function tells which of them were read since."""
        paths = [self.stage.root / path.lstrip("/") for path in self.stage.seen(*places)]
        for path in paths:
            os.utime(str(path), ns=(0, path.lstat().st_mtime_ns), follow_symlinks=False)
        return lambda: [str(path) for path in paths if path.lstat().st_atime_ns]

    def planted(self, *changes: str) -> Any:
        """A cache of the attacker's, with all a cache can have, where the homeless user's would be; as :meth:`untouched`."""
        place = CACHE.format(HOMELESS)
        if not self.stage.at("/tmp/attackers/cache").exists():
            self.stage.act(ATTACKER, PREPARE)
        copied = "rm -rf {0} && cp -a --sparse=always /tmp/attackers/cache {0}".format(place)
        self.stage.run(0, "sh", "-c", " && ".join([copied, *(change + " " + place for change in changes)]))
        return self.untouched(place)

    def test_no_vm_starts_from_a_template_that_another_user_left_where_it_would_be_looked_for(self) -> None:
        # A control: the planted template is used when it belongs to the user.
        self.planted("chown -R {0}:{0}".format(HOMELESS))
        (told,) = self.stage.started(HOMELESS, {})
        self.assertEqual((told[1], told[3]), (True, "clone"), told)
        for mode in ("a+rwX", "go-rwx", "u+rwX"):
            with self.subTest(mode):
                read = self.planted("chmod -R " + mode)
                (told,) = self.stage.started(HOMELESS, {})
                self.assert_refused(told, "cache_dir", CACHE.format(HOMELESS))
                self.assertEqual(read(), [])
        # A control: a read of the planted files would be noticed.
        self.stage.run(0, "sh", "-c", "cat {}/templates/*/manifest".format(CACHE.format(HOMELESS)))
        self.assertEqual([Path(path).name for path in read()][1:], ["manifest"])

    def test_nothing_that_another_user_kept_is_listed_resumed_or_removed(self) -> None:
        self.planted("chown -R {0}:{0}".format(HOMELESS))
        own = json.loads(self.stage.act(HOMELESS, ASK))
        self.assertEqual((own["list_suspended"][0], own["list_templates"][0], own["resume"][0]), (["mail"], ["theirs"], True))
        for mode in ("a+rwX", "go-rwx"):
            with self.subTest(mode):
                self.planted("chmod -R " + mode)
                before = self.stage.seen("/tmp", HOMES[HOMELESS])
                read = self.untouched(CACHE.format(HOMELESS))
                told = json.loads(self.stage.act(HOMELESS, ASK))
                self.assertEqual((told["list_suspended"][0], told["list_templates"][0]), ([], []), told)
                for action in ("create_from", "resume", "export", "destroy", "delete"):
                    done, code = told[action]
                    self.assertFalse(done, told)
                    self.assertIn(code, ("folder_refused", "vm_not_found", "template_not_found"), told)
                self.assertEqual(read(), [])
                self.assertEqual(self.stage.seen("/tmp", HOMES[HOMELESS]), before)

    def test_folders_of_another_owner_or_open_to_others_are_refused_by_name(self) -> None:
        for uid, home in HOMES.items():
            self.stage.fresh()
            with self.stage.bystander(uid) as bystander:
                foreign = ["/tmp/traps-cache", "/tmp/closed-cache"]
                self.lay(uid, bystander.first, *foreign)
                script = "chmod -R go-rwx /tmp/closed-cache; mkdir -m 777 /tmp/above /tmp/above/empty"
                self.stage.run(ATTACKER, "sh", "-c", script)
                # Folders that the attacker filled, then given to the user with an open mode; and one below the attacker's folder.
                opened = ["/tmp/{:o}-cache".format(mode) for mode in (0o777, 0o770, 0o707, 0o1777, 0o710)]
                self.lay(uid, bystander.first, *opened)
                script = "chown -R -h {0}:{0} {1}; for f in {1}; do m=${{f#/tmp/}}; chmod ${{m%-cache}} $f; done"
                self.stage.run(0, "sh", "-c", script.format(uid, " ".join(opened)))
                self.stage.run(uid, "mkdir", "-m", "700", "/tmp/above/own")
                places = foreign + opened + ["/tmp/above/empty", "/tmp/above/own"]
                before = self.stage.seen("/tmp", home)
                read = self.untouched(*(foreign + opened))
                for field in ("cache_dir", "runtime_dir"):
                    other = {"cache_dir": "runtime_dir", "runtime_dir": "cache_dir"}[field]
                    configs = [{field: place, other: home + "/" + other} for place in places]
                    for place, told in zip(places, self.stage.started(uid, *configs)):
                        with self.subTest(place, uid=uid, field=field):
                            self.assert_refused(told, field, "/tmp/above" if "above" in place else place)
                self.assertEqual(read(), [])
                self.assert_kept(before, self.stage.seen("/tmp", home), home, home + "/runtime_dir", home + "/cache_dir")
                self.assertTrue(bystander.lives())


class Sockets(AttackTestCase):
    """The way to a VM's agent, from both ends."""

    def test_a_broker_of_another_users_is_told_nothing(self) -> None:
        paths = [each.format(VICTIM) + "/vm/sock" for each in RUNTIMES]
        with self.stage.going(ATTACKER, *self.stage.python(LISTEN, ":".join(paths))) as listener:
            naive = "import socket, sys\ns = socket.socket(socket.AF_UNIX)\ns.connect(sys.argv[1])\ns.sendall(b'secret')"
            self.stage.act(VICTIM, naive, paths[1])
            self.assertEqual(listener.ask(), "<secret>")
            for uid in (VICTIM, HOMELESS, 0):
                default, *named = json.loads(self.stage.act(uid, SPEAK, "vm", *paths))
                for path, connected, code, answer in [default][uid != VICTIM :] + named:
                    with self.subTest(path, uid=uid):
                        self.assertIn(path, paths)
                        self.assertEqual((connected, code, answer), (False, "foreign_socket", None))
                self.assertEqual(listener.ask().replace("<>", ""), "")

    def test_a_vms_broker_and_processes_are_closed_to_another_user(self) -> None:
        path = RUNTIMES[0].format(VICTIM) + "/vm/sock"
        with self.stage.going(VICTIM, *self.stage.python(HOST)):
            ((found, connected, _, answer), _) = json.loads(self.stage.act(VICTIM, SPEAK, "vm", path))
            self.assertEqual((found, connected), (path, True))
            self.assertIn("pong", json.dumps(answer))
            self.stage.run(ATTACKER, *link(path, "/tmp/link"))
            for told in json.loads(self.stage.act(ATTACKER, SPEAK, "vm", path, "/tmp/link"))[1:]:
                self.assertEqual((told[1], told[2], told[3]), (False, "foreign_socket", None))
            # A link of another user's leads the VM's own user nowhere, although the broker at its end is the user's.
            (_, (_, connected, code, answer)) = json.loads(self.stage.act(VICTIM, SPEAK, "vm", "/tmp/link"))
            self.assertEqual((connected, code, answer), (False, "foreign_socket", None))
            tried = json.loads(self.stage.act(ATTACKER, TRY, path, str(VICTIM)))
            self.assertGreaterEqual(tried["processes"], 3)
            self.assertEqual((tried["opened"], tried["killed"], tried["connected"], tried["abstract"]), ([], [], [], []))


class Groups(AttackTestCase):
    """A VM's folder names its control groups, and what is in them is killed."""

    def test_records_that_name_ordinary_folders_have_nothing_written_or_killed(self) -> None:
        for uid in (VICTIM, 0):
            base, evil = RUNTIMES[0].format(uid), "/tmp/evil"
            with self.subTest(uid=uid), self.stage.bystander(uid) as bystander:
                self.stage.fresh()
                self.lay(uid, bystander.first, evil)
                # The records themselves are the user's own: this is about what they name.
                self.stage.act(uid, TRAPS, base, HOMES[uid], bystander.first)
                group = evil + "/{}/tw-microvm-evil"
                named = [group, "/sys/fs/cgroup/../../.." + group, evil + "/{}", ".", "", HOMES[uid]]
                groups = "".join(each.format(name) + "\n" for name in ("kill", "link") for each in named)
                script = 'printf %s "$1" >>{0}/kill/cgroups && printf %s "$1" >>{0}/link/cgroups && chmod -R go-rwx {0}'
                self.stage.run(uid, "sh", "-c", script.format(base), "x", groups)
                before = self.stage.seen(evil, HOMES[uid])
                (told,) = self.stage.started(uid, {"cache_dir": "/tmp/cache-" + str(uid), "templates": False})
                self.assertTrue(told[1], told)
                # Both traps look like folders of dead VMs of this user, and are swept.
                left = os.listdir(str(self.stage.at(base)))
                self.assertFalse({"kill", "link"} & set(left), left)
                self.assertTrue({"make", "home", ".gone-0123456789abcdef"} <= set(left), left)
                self.assertEqual(self.stage.seen(evil, HOMES[uid]), before)
                self.assertTrue(bystander.lives())


class Races(AttackTestCase):
    """The name stands for something else at each look."""

    def race(self, uid: int, base: str, *code: str) -> Tuple[str, int]:
        """What the user's program says at the end, and how often the name had changed."""
        with self.stage.going(ATTACKER, *self.stage.python(FLIP, base, HOMES[uid])) as flipping:
            # As root, too, the start of a connected VM ends behind the making of the folders.
            weak = ("setpriv", "--inh-caps=-net_admin", "--bounding-set=-net_admin") if uid == 0 else ()
            said = self.stage.run(uid, *weak, *self.stage.python(*code))
            return said, int(flipping.end()[0])

    def test_a_program_that_looks_and_then_sweeps_loses(self) -> None:
        base = RUNTIMES[0].format(VICTIM)
        with self.stage.bystander(VICTIM) as bystander:
            self.lay(VICTIM, bystander.first, base + ".evil")
            tries, _ = self.race(VICTIM, base, NAIVE_RACE, base, HOMES[VICTIM])
        home = self.stage.at(HOMES[VICTIM])
        lost = not (home / "Documents").exists() or (home / ".bashrc").read_text() != "alias\n"
        self.assertTrue(lost, tries)

    def lose_nothing(self, uid: int, base: str, field: str, *more: str) -> None:
        with self.stage.bystander(uid) as bystander:
            self.lay(uid, bystander.first, base + ".evil", *more)
            evil = [base + ".evil", *more]
            before = self.stage.seen(HOMES[uid], *evil)
            arguments = (base, json.dumps({field: base}), str(RACE_TRIES), str(RACE_SECONDS))
            said, turns = self.race(uid, base, RACE, *arguments)
            seconds, told = json.loads(said)
            tries = sum(told.values())
            print("uid {}, {}: {} tries in {:.1f} s, {} flips: {}".format(uid, base, tries, seconds, turns, told))
            self.assertGreaterEqual(tries, RACE_TRIES, said)
            # Each side won the race at least once.
            self.assertEqual(set(told), {"folder_refused", "network_unavailable"}, said)
            self.assertGreater(turns, tries)
            self.assert_kept(before, self.stage.seen(HOMES[uid], *evil), HOMES[uid], HOMES[uid] + "/.cache")
            self.assertTrue(bystander.lives())
        # Every other file that the user owns now lies in one of our folders.
        places = ("/dev/shm", "/tmp", "/run", "/var/cache")
        own = {path for path, info in self.stage.seen(*places).items() if info[1] == uid and path not in places}
        self.assertEqual({path for path in own if "/tw-microvm" not in path}, set())
        names = {Path(home).name for home in HOMES.values()} | {"package", "python", "passwd"}
        self.assertEqual(set(os.listdir(str(self.stage.at("/mnt")))), names)

    def test_runtime_folder_of_an_ordinary_user(self) -> None:
        shared, usual = [each.format(VICTIM) for each in RUNTIMES]
        self.lose_nothing(VICTIM, shared, "runtime_dir", usual)

    def test_runtime_folder_of_roots_where_run_is_a_plain_folder(self) -> None:
        self.lose_nothing(0, RUNTIMES[0].format(0), "runtime_dir")

    def test_cache_folder_of_a_user_without_a_home(self) -> None:
        self.lose_nothing(HOMELESS, CACHE.format(HOMELESS), "cache_dir")
