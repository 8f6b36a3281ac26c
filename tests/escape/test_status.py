"""What the kernel says of a VMM is exactly what docs/security.md says."""

import json
import os
import re
import subprocess
import sys
import unittest
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

from ..support import DATA, ROOT
from .arena import open_to_all
from .driver import USER

UIDS = range(2_000_000_000, 2_001_000_000)


def documented() -> Dict[str, List[str]]:
    """The rows of the table: what, root's, an ordinary user's."""
    text = (ROOT / "docs" / "security.md").read_text().split("## What `/proc` shows of a VMM")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| `")]
    return {what: columns for what, *columns in rows}


class Process:
    """One VMM, in the words of the table."""

    def __init__(self, pid: int, manager: int) -> None:
        self.pid, self.manager = pid, manager
        self.status = dict(line.split(":", 1) for line in self.read("status").splitlines())
        self.mounts = [line.split() for line in self.read("mountinfo").splitlines()]

    def read(self, name: str, pid: Optional[int] = None) -> str:
        return Path("/proc/{}/{}".format(pid or self.pid, name)).read_text()

    def of_manager(self, name: str) -> str:
        lines = self.read("status", self.manager).splitlines()
        return dict(line.split(":", 1) for line in lines)[name].strip()

    def number(self, name: str) -> str:
        own = set(self.status[name].split())
        if own == set(self.of_manager(name).split()):
            return "the manager's"
        return "its own, of uid_range" if len(own) == 1 and int(own.pop()) in UIDS else self.status[name]

    def groups(self) -> str:
        own = self.status["Groups"].strip()
        return "the manager's" if own == self.of_manager("Groups") and self.number("Uid") == "the manager's" else own or "none"

    def capabilities(self) -> str:
        names = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
        return "empty" if all(int(self.status[name], 16) == 0 for name in names) else "not empty"

    def namespaces(self, own: bool) -> str:
        link = lambda pid, name: os.readlink("/proc/{}/ns/{}".format(pid, name))
        names = ["cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts"]
        return " ".join(name for name in names if (link(self.pid, name) != link(self.manager, name)) == own)

    def maps(self) -> str:
        found = [self.read(name).split() for name in ("uid_map", "gid_map")]
        return "one, to itself" if all(m[0] == m[1] and m[2:] == ["1"] for m in found) else str(found)

    def place(self, mount: List[str]) -> str:
        return re.sub(r"^(/lib|/lib64|/vmm)/.*", r"\1/*", mount[4])

    def places(self, fits: Callable[[List[str]], bool] = lambda options: True) -> str:
        found = {self.place(mount) for mount in self.mounts if fits(mount[5].split(","))}
        return " ".join(sorted(found)) or "none"

    def limit(self, name: str) -> str:
        line = lambda pid: next(row for row in self.read("limits", pid).splitlines() if row.startswith(name))
        soft, hard = line(self.pid)[len(name) :].split()[:2]
        if name == "Max processes" and line(self.pid) == line(self.manager):
            return "the manager's"
        return soft if soft == hard else "{} to {}".format(soft, hard)

    def control_groups(self) -> str:
        lines = [line.split(":", 2) for line in self.read("cgroup").split()]
        return " ".join(sorted(names for _, names, path in lines if "/tw-microvm-" in path)) or "none"

    def descriptors(self) -> str:
        folder = Path("/proc/{}/fd".format(self.pid))
        targets = {os.readlink(str(entry)) for entry in folder.iterdir()}
        targets = {re.sub(r"^/memfd:.*", "memfd", target) for target in targets}
        return " ".join(sorted({re.sub(r"^(anon_inode:\[)?(\w+)\]?(:\[\d+\])?$", r"\2", target) for target in targets}))

    def facts(self) -> Dict[str, str]:
        facts = {
            "`status` Uid": self.number("Uid"),
            "`status` Gid": self.number("Gid"),
            "`status` Groups": self.groups(),
            "`status` CapInh, CapPrm, CapEff, CapBnd, CapAmb": self.capabilities(),
            "`status` NoNewPrivs": self.status["NoNewPrivs"].strip(),
            "`status` Seccomp": "{}, filters: {}".format(*(self.status[n].strip() for n in ("Seccomp", "Seccomp_filters"))),
            "`status` Umask": self.status["Umask"].strip(),
            "`status` NSpid": "{} in its own".format(self.status["NSpid"].split()[-1]),
            "`ns` its own": self.namespaces(True),
            "`ns` the host's": self.namespaces(False),
            "`uid_map`, `gid_map`": self.maps(),
            "`setgroups`": self.read("setgroups").strip(),
            "`environ`": " ".join(self.read("environ").rstrip("\0").split("\0")),
            "`cwd`": os.readlink("/proc/{}/cwd".format(self.pid)),
            "`mountinfo` places": self.places(),
            "`mountinfo` writable": self.places(lambda options: "ro" not in options),
            "`cgroup` its own": self.control_groups(),
            "`fd`": self.descriptors(),
        }
        for flag in ("nosuid", "nodev", "noexec"):
            facts["`mountinfo` not " + flag] = self.places(lambda options, flag=flag: flag not in options)  # type: ignore[misc]
        for name in ("file size", "data size", "core file size", "processes", "open files", "locked memory"):
            facts["`limits` Max " + name] = self.limit("Max " + name)
        return facts


class Status(unittest.TestCase):
    maxDiff = None

    def compare(self, column: int, *arguments: str) -> Any:
        if os.geteuid() != 0:
            self.skipTest("needs root: only root sees all of other users' processes")
        if not any(" cgroup " in line for line in Path("/proc/self/mounts").read_text().splitlines()):
            self.skipTest("the table is for cgroup v1, and this host has none")
        command = [sys.executable, "-m", "tests.escape.hold", *arguments]
        holder = subprocess.Popen(
            command, cwd=str(ROOT), stdin=subprocess.PIPE, stdout=subprocess.PIPE, universal_newlines=True
        )
        assert holder.stdin is not None and holder.stdout is not None
        try:
            info = json.loads(holder.stdout.readline())
            facts = Process(info["pid"], holder.pid).facts()
        finally:
            holder.stdin.close()
            holder.stdout.close()
            holder.wait()
        self.assertEqual(facts, {what: columns[column] for what, columns in documented().items()})
        return info

    def test_roots_vmm_is_as_documented(self) -> None:
        info = self.compare(0)
        missing = {name: layer for name, layer in info["jail"].items() if name != "mode" and not layer["given"]}
        self.assertEqual(set(missing), {"address_layout"})
        calls = info["jail"]["seccomp"]["how"].partition(": ")[2].partition(",")[0]
        self.assertIn("an allow-list of {};".format(calls), (ROOT / "docs" / "security.md").read_text())

    def test_an_ordinary_users_vmm_is_as_documented_and_says_what_it_lacks(self) -> None:
        if not open_to_all(DATA / "microvm-jail"):
            self.skipTest("needs the package in a folder that other users may enter, not {}".format(DATA))
        info = self.compare(1, str(USER))
        missing = {name for name, layer in info["jail"].items() if name != "mode" and not layer["given"]}
        self.assertEqual(missing, {"address_layout", "cgroup_cpu", "cgroup_devices", "cgroup_memory", "cgroup_pids"})
        # In a container it is the container's options that give it.
        self.assertRegex(info["jail"]["cgroup_memory"]["how"], "delegate|start the container with")
        self.assertTrue(any("not enforced" in how for how in info["limits"]["vcpu_count"]))
