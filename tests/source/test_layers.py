"""The layers of the core, held by reading its ``use`` lines: arrows point down, never up, and there is no circle."""

import re
import unittest
from pathlib import Path
from typing import Dict, Optional, Sequence, Set

SRC = Path(__file__).resolve().parent.parent.parent / "src"
# What each top-level module may use; ARCHITECTURE draws the same picture.
# The lock is used by all of them.
LOCK = "mutex"
BELOW = {
    LOCK: set(),
    "error": {"model"},
    "model": {"error"},
    "net": {"error", "model"},
    "host": {"error", "model"},
    "store": {"error", "model", "host"},
    "image": {"error", "model", "host", "store"},
    "channel": {"error", "model", "host", "store"},
    "vmm": {"error", "model", "host", "store"},
    "vm": {"error", "model", "net", "host", "store", "image", "channel", "vmm"},
    "manager": {"error", "model", "host", "store", "image", "vmm", "vm"},
    "doctor": {"error", "model", "net", "host", "store", "image", "vmm", "vm", "manager"},
    "py": {"error", "model", "net", "host", "store", "image", "channel", "vmm", "vm", "manager", "doctor"},
}
TESTS = "#[cfg(test)]\nmod tests {"


def used() -> Dict[str, Dict[str, Set[str]]]:
    """For each module, what it uses of the others, and in which files; the files' own tests may use anything."""
    found: Dict[str, Dict[str, Set[str]]] = {}
    for path in sorted(SRC.rglob("*.rs")):
        parts = path.relative_to(SRC).with_suffix("").parts
        if parts[0] in ("crates", "lib"):
            continue
        lines = [line for line in path.read_text().split(TESTS)[0].splitlines() if not line.lstrip().startswith("//")]
        targets = found.setdefault(parts[0], {})
        text = "\n".join(lines)
        names = re.findall(r"\bcrate::(\w+)", text)
        for group in re.findall(r"\buse crate::\{(.*?)\};", text, re.S):
            names += re.findall(r"(?:^|,)\s*(\w+)", group)
        for name in names:
            if name not in (parts[0], LOCK):
                targets.setdefault(name, set()).add(str(path.relative_to(SRC)))
    return found


def file_of(name: Sequence[str]) -> Optional[Path]:
    """The file that a path of modules below ``src`` leads to; a ``mod.rs`` hands names on and is left out."""
    for length in range(len(name), 0, -1):
        path = SRC.joinpath(*name[:length]).with_suffix(".rs")
        if path.is_file():
            return path
    return None


def files_used(path: Path) -> Set[Path]:
    """The files that a file of the same top-level module is made of, by its ``use`` lines."""
    module = path.relative_to(SRC).with_suffix("").parts
    found = set()
    for line in path.read_text().split(TESTS)[0].splitlines():
        match = re.match(r"(?:pub )?use (crate|super)::([\w:]+)", line)
        if match:
            above = () if match.group(1) == "crate" else module[:-1]
            target = file_of((*above, *match.group(2).strip(":").split("::")))
            if target and target != path and target.relative_to(SRC).parts[0] == module[0]:
                found.add(target)
    return found


class Layers(unittest.TestCase):
    def test_every_module_has_its_place(self) -> None:
        self.assertEqual(set(used()) - set(BELOW), set())

    def test_no_module_uses_what_is_above_it(self) -> None:
        for module, targets in used().items():
            for target, files in targets.items():
                with self.subTest(module=module, target=target):
                    self.assertIn(target, BELOW[module], sorted(files))

    def test_picture_has_no_circle_but_errors_names(self) -> None:
        def reaches(start: str, goal: str, seen: Set[str]) -> bool:
            below = BELOW[start] - seen - ({"error"} if start == "model" else set())
            return goal in below or any(reaches(each, goal, seen | {each}) for each in below)

        self.assertEqual([module for module in BELOW if reaches(module, module, set())], [])

    def test_files_of_vm_use_each_other_without_a_circle(self) -> None:
        below = {path: files_used(path) for path in (SRC / "vm").rglob("*.rs") if path.name != "mod.rs"}
        self.assertGreater(sum(map(len, below.values())), 40, "the use lines are read no more")

        def reached(start: Path, seen: Set[Path]) -> Set[Path]:
            for each in below.get(start, set()) - seen:
                seen.add(each)
                reached(each, seen)
            return seen

        circular = [str(path.relative_to(SRC)) for path in sorted(below) if path in reached(path, set())]
        self.assertEqual(circular, [])


class Statics(unittest.TestCase):
    def test_static_with_a_lock_is_made_anew_by_a_forked_child(self) -> None:
        wrong = []
        for path in sorted(SRC.rglob("*.rs")):
            if path.relative_to(SRC).parts[0] != "crates":
                text = path.read_text().split(TESTS)[0]
                found = re.findall(r"static \w+: (?:Mutex|RwLock|Condvar|Once|OnceLock|OnceCell|LazyLock)\b[^;]*", text)
                wrong += ["{}: {}".format(path.relative_to(SRC), one) for one in found]
        self.assertEqual(wrong, [], "use host::fork::PerProcess: another thread may hold it at the fork")
