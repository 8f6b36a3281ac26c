"""What VMs leave on the host, found without asking the package."""

import fcntl
import glob
import os
import subprocess
from pathlib import Path
from typing import Dict, List, Set, Tuple

LEASES = Path("/run/tw-microvm-uids")
PREFIX = "tw-microvm-"

Process = Tuple[int, str]


def stat(pid: int) -> List[str]:
    """The fields of ``/proc/PID/stat`` from the state on."""
    return Path("/proc/{}/stat".format(pid)).read_text().rpartition(")")[2].split()


def processes() -> Dict[int, List[str]]:
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = stat(int(entry.name))
            except OSError:
                continue
            if fields[0] not in ("Z", "X"):
                found[int(entry.name)] = fields
    return found


def descendants(root: int) -> Set[Process]:
    """The living processes below ``root``, with their start times: a pid may be used again."""
    living = processes()
    below, grew = {root}, True
    while grew:
        more = {pid for pid, fields in living.items() if int(fields[1]) in below} - below
        below |= more
        grew = bool(more)
    return {(pid, living[pid][19]) for pid in below - {root} if pid in living}


def still_alive(known: Set[Process]) -> List[str]:
    living = processes()
    return ["process {} {}".format(pid, name(pid)) for pid, begun in known if pid in living and living[pid][19] == begun]


def name(pid: int) -> str:
    try:
        return Path("/proc/{}/comm".format(pid)).read_text().strip()
    except OSError:
        return "?"


def groups(prefix: str) -> List[str]:
    """The control groups of VMs whose names begin with ``prefix``."""
    found: List[str] = []
    for depth in range(5):
        found += glob.glob("/sys/fs/cgroup/" + "*/" * depth + PREFIX + prefix + "*")
    return found


def unheld_leases() -> List[str]:
    """The leases of uids that nobody holds any more."""
    stale = []
    for path in LEASES.glob("[0-9]*"):
        try:
            with open(str(path)) as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                stale.append("lease {}".format(path))
        except OSError:
            continue
    return stale


def interfaces() -> Set[str]:
    """Network devices of this network namespace but the loopback."""
    return set(os.listdir("/proc/sys/net/ipv4/conf")) - {"all", "default", "lo"}


def tables() -> Set[str]:
    """nftables of this network namespace; empty where there is no ``nft``."""
    try:
        listed = subprocess.run(["nft", "list", "tables"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    except FileNotFoundError:
        return set()
    return set(listed.stdout.decode().splitlines())


def mounts() -> Set[str]:
    return set(Path("/proc/self/mountinfo").read_text().splitlines())


class Host:
    """What there was at first, to compare with what is left at last."""

    def __init__(self, runtime_dir: Path, prefix: str, cache_dir: Path = Path("/var/cache/tw-microvm")) -> None:
        self.runtime_dir, self.prefix, self.cache_dir = runtime_dir, prefix, cache_dir
        self.interfaces, self.tables, self.mounts = interfaces(), tables(), mounts()
        # Leases that other processes of this machine left before the test.
        self.leases = set(unheld_leases())

    def left(self, known: Set[Process]) -> List[str]:
        """Everything that should not be there when no VM is: words for people."""
        files = sorted(str(path) for path in self.runtime_dir.glob("[!.]*")) if self.runtime_dir.exists() else []
        files += sorted(str(path) for path in (self.cache_dir / "disks").glob("*-{}*".format(self.prefix)))
        return (
            still_alive(known)
            + ["file {}".format(path) for path in files]
            + ["group {}".format(group) for group in groups(self.prefix)]
            + ["interface {}".format(link) for link in interfaces() - self.interfaces]
            + ["rules {}".format(table) for table in tables() - self.tables]
            + ["mount {}".format(mount) for mount in mounts() - self.mounts]
            + sorted(set(unheld_leases()) - self.leases)
        )
