"""Containers as ``docker run`` makes them: a root, mounts, capabilities and a seccomp filter of their own.

``Container(...).run(code)`` runs Python code as the first process of one. Mounts, capabilities and filter are those of Docker's
documentation: the page of ``docker run``, and the default seccomp profile. The code sees this host's programs and libraries; where a
VM leaves something, the folders are the container's.
"""

import ctypes
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from typing import Dict, List, NamedTuple, Tuple

LIBC = ctypes.CDLL(None, use_errno=True)
RDONLY, NOSUID, NODEV, NOEXEC, REMOUNT, BIND, REC, PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
# What Docker grants, of capabilities(7).
CAPABILITIES = (
    "chown dac_override fsetid fowner mknod net_raw setgid setuid setfcap setpcap net_bind_service sys_chroot kill audit_write"
).split()
# x86-64 calls that the default profile has on no list, or only with a capability that Docker does not grant: EPERM.
DENIED = {
    "acct": 163, "add_key": 248, "bpf": 321, "clock_settime": 227, "create_module": 174, "delete_module": 176, "fanotify_init": 300,
    "finit_module": 313, "fsconfig": 431, "fsmount": 432, "fsopen": 430, "fspick": 433, "get_kernel_syms": 177, "get_mempolicy": 239,
    "init_module": 175, "io_uring_enter": 426, "io_uring_register": 427, "io_uring_setup": 425, "ioperm": 173, "iopl": 172, "kcmp": 312,
    "kexec_file_load": 320, "kexec_load": 246, "keyctl": 250, "lookup_dcookie": 212, "mbind": 237, "migrate_pages": 256, "mount": 165,
    "mount_setattr": 442, "move_mount": 429, "move_pages": 279, "nfsservctl": 180, "open_by_handle_at": 304, "open_tree": 428,
    "perf_event_open": 298, "pidfd_getfd": 438, "pivot_root": 155, "process_madvise": 440, "query_module": 178, "quotactl": 179,
    "quotactl_fd": 443, "reboot": 169, "request_key": 249, "set_mempolicy": 238, "set_mempolicy_home_node": 450, "setdomainname": 171,
    "sethostname": 170, "setns": 308, "settimeofday": 164, "swapoff": 168, "swapon": 167, "_sysctl": 156, "sysfs": 139, "syslog": 103,
    "umount2": 166, "unshare": 272, "uselib": 134, "userfaultfd": 323, "ustat": 136, "vhangup": 153,
}  # fmt: skip
# What of these CAP_SYS_ADMIN gives, besides clone3 and new namespaces.
BY_SYS_ADMIN = (
    "bpf fanotify_init fsconfig fsmount fsopen fspick lookup_dcookie mount mount_setattr move_mount open_tree perf_event_open quotactl "
    "quotactl_fd setdomainname sethostname setns syslog umount2 unshare"
).split()
CLONE, CLONE3, PIDFD_OPEN, SOCKET, PERSONALITY = 56, 435, 434, 41, 135
NEW_NAMESPACES, AF_VSOCK, EPERM, EINVAL, ENOSYS = 0x7E020000, 40, 1, 22, 38
PERSONALITIES = (0, 8, 0x20000, 0x20008, 0xFFFFFFFF)
# Hidden and read-only in /proc, as runc has them.
MASKED = ("acpi", "asound", "interrupts", "kcore", "keys", "latency_stats", "scsi", "sched_debug", "timer_list", "timer_stats")
READ_ONLY = ("bus", "fs", "irq", "sys", "sysrq-trigger")
# As user_namespaces(7) maps them for Podman without root: whom root and the others of the container are, and how many there are.
MAPPED, MAPPED_COUNT = 200000, 65536
# Calls from here on are younger than Linux 4.19; so are these seals and this way to wait.
FIRST_AFTER_4_19 = 424
FCNTL, F_ADD_SEALS, F_SEAL_FUTURE_WRITE, WAITID, P_PIDFD = 72, 1033, 16, 247, 3
# The folders of the container's own, with their modes.
WRITABLE = {"/run": 0o755, "/var/cache": 0o755, "/tmp": 0o1777, "/var/tmp": 0o1777}
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
NODES = ("full", "null", "random", "tty", "urandom", "zero")


class Container(NamedTuple):
    """How ``docker run`` was called; the defaults are its own."""

    # --read-only, and --tmpfs for each of the folders.
    read_only: bool = False
    tmpfs: Tuple[str, ...] = ()
    # --shm-size, in bytes; 0: no /dev/shm, as --ipc=none.
    shm_size: int = 64 << 20
    # --privileged: all capabilities, no filter, nothing masked, control groups that can be written.
    privileged: bool = False
    # podman run, without root: the container's root is an ordinary user outside of it, and owns all of its files.
    rootless: bool = False
    # No system call that Linux 4.19 has not.
    old_kernel: bool = False
    # Without --security-opt seccomp=unconfined, and without --security-opt systempaths=unconfined.
    seccomp: bool = True
    masked: bool = True
    # --cap-add
    cap_add: Tuple[str, ...] = ()
    nodes: Tuple[str, ...] = NODES
    # A shell script that runs as root of the host in the finished container, before its rights are taken away.
    script: str = ""
    environment: Tuple[Tuple[str, str], ...] = (("PATH", PATH), ("HOME", "/root"))

    def run(self, code: str, timeout: float = 120.0) -> "subprocess.CompletedProcess[str]":
        """The code's end as the first process of the container; what it mounts and starts ends with it."""
        if os.geteuid() != 0:
            raise unittest.SkipTest("needs root: it mounts other folders, in a namespace of its own")
        for tool in ("unshare", "setpriv"):
            if shutil.which(tool) is None:
                raise unittest.SkipTest("needs {} (util-linux)".format(tool))
        with tempfile.TemporaryDirectory(prefix="container-") as scratch:
            os.mkdir(scratch + "/root")
            command = ["unshare", "--mount", "--pid", "--ipc", "--uts", "--fork", "--kill-child", "--propagation", "private"]
            command += [sys.executable, "-I", str(Path(__file__).resolve()), scratch, json.dumps(self._asdict()), json.dumps(needed()), code]
            return subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True, timeout=timeout
            )


def needed() -> List[str]:
    """Where the interpreter and the package are."""
    package = Path(__file__).resolve().parents[2]
    folders = {sys.prefix, sys.base_prefix, str(package)} | {path for path in sys.path if os.path.isdir(path)}
    folders -= {"/", "/usr"}
    return sorted(path for path in folders if not any(path.startswith(other + "/") for other in folders))


def check(result: int, what: str) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), what + ": " + os.strerror(ctypes.get_errno()))


def mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    check(LIBC.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode()), "mount " + target)


def tmpfs(target: str, data: str, flags: int = 0) -> None:
    mount("tmpfs", target, "tmpfs", flags, data)


def bind(source: str, target: str) -> None:
    mount(source, target, flags=BIND)


def make_read_only(target: str) -> None:
    mount("", target, flags=REMOUNT | BIND | RDONLY)


def make_root(scratch: str, how: Container, paths: Dict[str, int]) -> None:
    """Mounts the container's root and enters it."""
    root = scratch + "/root"
    if how.rootless:
        lay_out(root)
    else:
        bind("/", root)
    mount("proc", root + "/proc", "proc", NOSUID | NODEV | NOEXEC)
    mount("sysfs", root + "/sys", "sysfs", NOSUID | NODEV | NOEXEC)
    groups = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[4].startswith("/sys/fs/cgroup"):
            groups.append(fields[4])
    for path in groups:
        os.makedirs(root + path, exist_ok=True)
        bind(path, root + path)
        if not how.privileged:
            make_read_only(root + path)
    if not how.privileged:
        make_read_only(root + "/sys")
    for folder, mode in WRITABLE.items():
        # On the disk, as the layers of an image are.
        own = scratch + folder.replace("/", "-").replace("-", "/", 1)
        os.mkdir(own)
        os.chmod(own, mode)
        if how.rootless:
            os.chown(own, MAPPED, MAPPED)
        bind(own, root + folder)
    for path in paths:
        os.makedirs(root + path, exist_ok=True)
        bind(path, root + path)
    owner = MAPPED if how.rootless else 0
    tmpfs(root + "/dev", "mode=755,size=64k,uid={}".format(owner), NOSUID)
    for name in ("pts", "mqueue") + (("shm",) if how.shm_size else ()):
        os.mkdir(root + "/dev/" + name)
    mount("devpts", root + "/dev/pts", "devpts", NOSUID | NOEXEC, "newinstance,ptmxmode=0666,mode=620")
    if how.shm_size:
        tmpfs(root + "/dev/shm", "mode=1777,size={},uid={}".format(how.shm_size, owner), NOSUID | NODEV | NOEXEC)
    for name, target in (("ptmx", "pts/ptmx"), ("fd", "/proc/self/fd")):
        os.symlink(target, root + "/dev/" + name)
    for name in how.nodes:
        Path(root + "/dev/" + name).touch()
        bind("/dev/" + name, root + "/dev/" + name)
    if how.masked and not how.privileged:
        for name in MASKED:
            path = root + "/proc/" + name
            if os.path.isdir(path):
                tmpfs(path, "", RDONLY)
            elif os.path.exists(path):
                bind("/dev/null", path)
        for path in (root + "/proc/" + name for name in READ_ONLY):
            if os.path.exists(path):
                bind(path, path)
                make_read_only(path)
    if how.read_only:
        for path in ["", *paths, *WRITABLE]:
            make_read_only(root + path)
    for folder in how.tmpfs:
        # What --tmpfs mounts has these flags.
        tmpfs(root + folder, "mode=1777,uid={}".format(owner), NOSUID | NODEV | NOEXEC)
        for path, fd in paths.items():
            if path.startswith(folder + "/"):
                os.makedirs(root + path)
                bind("/proc/self/fd/{}".format(fd), root + path)
    os.chdir(root)
    pivot_root = 155
    check(LIBC.syscall(pivot_root, b".", b"."), "pivot_root")
    lazily = 2
    check(LIBC.umount2(b".", lazily), "umount2")
    os.chdir("/")


def lay_out(root: str) -> None:
    """A root folder of the mapped root's own, in which the host's folders of programs are mounted."""
    owner = ",uid={0},gid={0}".format(MAPPED)
    tmpfs(root, "mode=755" + owner)
    for entry in os.scandir("/"):
        own = root + entry.path
        if entry.is_symlink():
            os.symlink(os.readlink(entry.path), own)
        elif entry.is_dir():
            os.mkdir(own)
            if entry.name not in ("dev", "home", "proc", "root", "run", "sys", "tmp", "var"):
                bind(entry.path, own)
    for folder in (*WRITABLE, "/dev"):
        os.makedirs(root + folder, exist_ok=True)
    for folder in ("/root", "/var", *WRITABLE):
        os.chown(root + folder, MAPPED, MAPPED)


def enter_user_namespace() -> None:
    """Makes this process root of a user namespace; another one writes the maps, with the rights of the one above."""
    new_user, pid = 0x10000000, os.getpid()
    unshared, done = os.pipe()
    helper = os.fork()
    if helper == 0:
        os.close(done)
        os.read(unshared, 1)
        for name in ("uid_map", "gid_map"):
            Path("/proc/{}/{}".format(pid, name)).write_text("0 {} {}\n".format(MAPPED, MAPPED_COUNT))
        os._exit(0)
    check(LIBC.unshare(new_user), "unshare")
    os.close(done)
    os.close(unshared)
    if os.waitpid(helper, 0)[1] != 0:
        raise OSError("the user namespace was not mapped")
    os.setgroups([])
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    # Another user forgets with whom it is to end.
    parent_death, sigkill = 1, 9
    check(LIBC.prctl(parent_death, sigkill), "prctl(PR_SET_PDEATHSIG)")


def forget_calls() -> None:
    """Has the kernel not know what came after Linux 4.19, as far as a filter can: numbers of calls and plain arguments."""
    at_least, equal, bits = 0x35, 0x15, 0x45
    number, first, second, third = 0, 16, 24, 32
    load, give, allow, errno = 0x20, 0x06, 0x7FFF0000, 0x50000
    program = [(load, 0, 0, number), (at_least, 0, 1, FIRST_AFTER_4_19), (give, 0, 0, errno | ENOSYS)]
    program += [(equal, 0, 3, WAITID), (load, 0, 0, first), (equal, 0, 6, P_PIDFD), (give, 0, 0, errno | EINVAL)]
    program += [(equal, 0, 4, FCNTL), (load, 0, 0, second), (equal, 0, 2, F_ADD_SEALS), (load, 0, 0, third)]
    program += [(bits, 1, 0, F_SEAL_FUTURE_WRITE), (give, 0, 0, allow), (give, 0, 0, errno | EINVAL)]
    load_filter(program)


def load_filter(program: List[Tuple[int, int, int, int]]) -> None:
    """Loads a filter: instructions of bpf(4), each a code, two jumps and an operand."""
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *one) for one in program))
    fprog = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(program), ctypes.addressof(code)))
    set_seccomp, by_filter = 22, 2
    check(LIBC.prctl(set_seccomp, by_filter, fprog, 0, 0), "prctl(PR_SET_SECCOMP)")


def filter_calls(sys_admin: bool) -> None:
    """Loads Docker's default profile, for a container with CAP_SYS_ADMIN or with Docker's default capabilities."""
    load, equal, bits, give = 0x20, 0x15, 0x45, 0x06
    number, architecture, argument = 0, 4, 16
    allow, errno, x86_64 = 0x7FFF0000, 0x50000, 0xC000003E
    program: List[Tuple[int, int, int, int]] = [(load, 0, 0, architecture), (equal, 1, 0, x86_64), (give, 0, 0, errno | EPERM), (load, 0, 0, number)]
    for name, call in DENIED.items():
        if not (sys_admin and name in BY_SYS_ADMIN):
            program += [(equal, 0, 1, call), (give, 0, 0, errno | EPERM)]
    if not sys_admin:
        program += [(equal, 0, 1, CLONE3), (give, 0, 0, errno | ENOSYS)]
        program += [(equal, 0, 4, CLONE), (load, 0, 0, argument), (bits, 0, 1, NEW_NAMESPACES)]
        program += [(give, 0, 0, errno | EPERM), (give, 0, 0, allow)]
    program += [(equal, 0, 4, SOCKET), (load, 0, 0, argument), (equal, 0, 1, AF_VSOCK), (give, 0, 0, errno | EPERM), (give, 0, 0, allow)]
    program += [(equal, 1, 0, PERSONALITY), (give, 0, 0, allow), (load, 0, 0, argument)]
    for value in PERSONALITIES:
        program += [(equal, 0, 1, value), (give, 0, 0, allow)]
    load_filter(program + [(give, 0, 0, errno | EPERM)])


def main() -> None:
    scratch, how, names, code = sys.argv[1], Container(**json.loads(sys.argv[2])), json.loads(sys.argv[3]), sys.argv[4]
    where = [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    paths = {path: os.open(path, os.O_PATH | os.O_DIRECTORY) for path in names}
    make_root(scratch, how, paths)
    for fd in paths.values():
        os.close(fd)
    if how.script:
        subprocess.run(["/bin/sh", "-ec", how.script], check=True)
    if how.rootless:
        enter_user_namespace()
    if how.old_kernel:
        forget_calls()
    command = ["setpriv"]
    if not how.privileged:
        kept = ",".join("+" + name for name in CAPABILITIES + list(how.cap_add))
        command += ["--bounding-set=-all," + kept, "--inh-caps=-all"]
        if how.seccomp:
            filter_calls("sys_admin" in how.cap_add)
    environment = dict(how.environment)
    environment["PYTHONPATH"] = os.pathsep.join(where)
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    os.execvpe("setpriv", command + [sys.executable, "-c", code], environment)


if __name__ == "__main__":
    main()
