"""Runs attacks and reads their reports."""

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

from ..support import DATA, ROOT


def built_intruder() -> Path:
    """The program that ``make attackers`` builds."""
    named = os.environ.get("MICROVM_INTRUDER")
    path = Path(named) if named else ROOT / "build" / "microvm-intruder"
    if not path.is_file():
        raise unittest.SkipTest("needs the intruder: make attackers builds it, MICROVM_INTRUDER names it")
    return path


def open_to_all(path: Path) -> bool:
    """Whether any user may come here."""
    return all(part.stat().st_mode & stat.S_IXOTH for part in [path.parent, *path.parent.parents])


class Arena(unittest.TestCase):
    """Attacks as root, or as an ordinary user."""

    uid: Optional[int] = None
    namespaces = True
    backend = "qemu"
    connected = False
    # Begins the intruder's name; `intr-own-` says that it is the QEMU of our own package.
    prefix = "intr-"
    folder: Path
    intruder: Path

    @classmethod
    def setUpClass(cls) -> None:
        if os.geteuid() != 0:
            raise unittest.SkipTest("needs root: it attacks as root and as an ordinary user")
        if cls.uid is not None and not open_to_all(DATA / "microvm-jail"):
            raise unittest.SkipTest("needs the package in a folder that other users may enter, not {}".format(DATA))
        intruder = built_intruder()
        cls.folder = Path(tempfile.mkdtemp(dir="/tmp"))
        cls.addClassCleanup(shutil.rmtree, str(cls.folder))
        cls.folder.chmod(0o755)
        # A name of its own, by which the driver finds the process: other suites may run at the same time.
        cls.intruder = cls.folder / "{}{}".format(cls.prefix, os.getpid())
        shutil.copy(str(intruder), str(cls.intruder))

    def attack(
        self, mode: str, jailed: bool = True, victim: bool = False, timeout: float = 30.0, **more: Any
    ) -> Dict[str, Any]:
        """What the driver has to say about one attack."""
        task = {
            "uid": self.uid,
            "namespaces": self.namespaces,
            "backend": self.backend,
            "connected": self.connected,
            "intruder": str(self.intruder),
            "jailed": jailed,
            "victim": victim,
            "timeout": timeout,
            "orders": dict(more.get("orders", {}), mode=mode),
            "limits": dict({"vcpu_count": 1, "memory_mb": 64, "disk_size_mb": 16}, **more.get("limits", {})),
            "config": more.get("config", {}),
        }
        done = subprocess.run(
            [sys.executable, "-m", "tests.escape.driver", json.dumps(task)],
            cwd=str(ROOT),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            universal_newlines=True,
            timeout=timeout + 120,
        )
        self.assertEqual(done.returncode, 0, done.stderr)
        return dict(json.loads(done.stdout))

    def probes(self, jailed: bool) -> Tuple[Dict[str, str], Dict[str, Any]]:
        """Every probe's outcome, ``worked`` or ``failed`` and why; and the whole report."""
        report = self.attack("probes", jailed, victim=True, timeout=60)
        lines = [line.split(" ", 2) for line in report["said"].splitlines() if line.startswith("PROBE ")]
        self.assertIn("DONE", report["said"], report)
        return {name: rest for _, name, rest in lines}, report

    def number(self, report: Dict[str, Any], word: str) -> float:
        """The last number that the intruder said after a word."""
        said = [line.split() for line in report["said"].splitlines()]
        found = [float(line[1]) for line in said if line[:1] == [word] and len(line) > 1]
        self.assertTrue(found, report)
        return found[-1]

