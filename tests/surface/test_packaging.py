"""The wheel beside the application, the command line, and the public names."""

import json
import os
import re
import struct
import subprocess
import sys
import tempfile
import unittest
import zipfile
from pathlib import Path
from typing import Set, Tuple

from thirstys_waterfall.security import microvm_isolation as package
from thirstys_waterfall.security.microvm_isolation import doctor

from ..support import IMPORT, ROOT, run_python

PUBLIC = {
    "CommunicationChannel", "IsolationType", "MicroVMInstance", "MicroVMIsolationManager", "VMBackend",
    "VMHealthMetrics", "VMNetworkConfig", "VMResourceLimits", "VMState", "MicroVMError", "doctor",
}


def glibc_versions(elf: bytes) -> Set[Tuple[int, ...]]:
    """The versions of glibc's symbols that an ELF file needs, from its section SHT_GNU_verneed (the LSB's symbol versioning)."""
    found: Set[Tuple[int, ...]] = set()
    table, size, count = struct.unpack_from("<Q", elf, 40)[0], *struct.unpack_from("<HH", elf, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", elf, table + i * size) for i in range(count)]
    for _, kind, _, _, at, _, link, needed, _, _ in sections:
        if kind != 0x6FFFFFFE:
            continue
        names = sections[link][4]
        for _ in range(needed):
            _, versions, _, aux, following = struct.unpack_from("<HHIII", elf, at)
            one = at + aux
            for _ in range(versions):
                _, _, _, name, more = struct.unpack_from("<IHHII", elf, one)
                text = elf[names + name : elf.index(b"\0", names + name)].decode()
                if text.startswith("GLIBC_"):
                    found.add(tuple(int(number) for number in text[6:].split(".")))
                one += more
            at += following
    return found


class Package(unittest.TestCase):
    def test_public_names_are_promised(self) -> None:
        self.assertLessEqual(PUBLIC, set(package.__all__))
        for name in package.__all__:
            self.assertTrue(hasattr(package, name), name)

    def test_version_is_the_one_of_the_wheel_and_the_core(self) -> None:
        for name in ("pyproject.toml", "Cargo.toml"):
            self.assertIn('\nversion = "{}"\n'.format(package.__version__), (ROOT / name).read_text())

    def test_installed_beside_the_application_ours_wins_and_uninstalled_theirs_is_back(self) -> None:
        wheel = os.environ.get("MICROVM_WHEEL")
        if not wheel:
            self.skipTest("needs MICROVM_WHEEL, the path of the wheel (make test sets it)")
        with tempfile.TemporaryDirectory() as name:
            subprocess.run([sys.executable, "-m", "venv", name], check=True)
            python = str(Path(name) / "bin" / "python")
            pip = [python, "-m", "pip", "-q", "--disable-pip-version-check"]
            where = "import sysconfig; print(sysconfig.get_paths()['platlib'])"
            root = Path(subprocess.check_output([python, "-c", where], universal_newlines=True).strip())
            security = root / "thirstys_waterfall" / "security"
            security.mkdir(parents=True)
            (root / "thirstys_waterfall" / "__init__.py").write_text("from . import security\n")
            (security / "__init__.py").write_text(
                "from .microvm_isolation import MicroVMIsolationManager, MicroVMInstance\n"
            )
            theirs = security / "microvm_isolation.py"
            theirs.write_text("class MicroVMIsolationManager: pass\nclass MicroVMInstance: pass\n")
            application = {path: path.read_bytes() for path in (root / "thirstys_waterfall").rglob("*.py")}
            ask = "import {0}; print(__import__('sys').modules['{0}'].__file__)".format(IMPORT)

            def imported() -> str:
                return subprocess.check_output([python, "-c", ask], cwd=name, universal_newlines=True).strip()

            self.assertEqual(imported(), str(theirs))
            subprocess.run(pip + ["install", "--no-index", wheel], check=True)
            self.assertEqual(imported(), str(security / "microvm_isolation" / "__init__.py"))
            subprocess.run(pip + ["uninstall", "-y", "thirstys-waterfall-microvm-isolation"], check=True)
            self.assertEqual(imported(), str(theirs))
            self.assertEqual({path: path.read_bytes() for path in application}, application)

    def test_wheel_holds_our_folder_alone(self) -> None:
        if sys.version_info < (3, 8):
            self.skipTest("needs importlib.metadata")
        from importlib import metadata

        try:
            files = metadata.files("thirstys-waterfall-microvm-isolation") or []
        except metadata.PackageNotFoundError:
            self.skipTest("not installed from a wheel")
        folder = "thirstys_waterfall/security/microvm_isolation/"
        outside = [f for f in files if not str(f).startswith(folder) and ".dist-info/" not in str(f)]
        self.assertEqual(sorted(f.name for f in outside), ["microvm", "microvm.1"])
        places = {f.name: f.locate().resolve().parent for f in outside}
        self.assertEqual(places["microvm"], Path(sys.executable).parent.resolve())
        # Where man(1) looks beside a bin of PATH (manpath(5)).
        self.assertEqual(places["microvm.1"], Path(sys.prefix).resolve() / "share" / "man" / "man1")
        self.assertTrue({folder + "py.typed", folder + "_native.pyi"} <= {str(f) for f in files})

    def test_every_elf_file_needs_no_newer_glibc_than_the_wheels_tag_says(self) -> None:
        wheel = os.environ.get("MICROVM_WHEEL")
        if not wheel:
            self.skipTest("needs MICROVM_WHEEL, the path of the wheel (make test sets it)")
        tag = re.search(r"manylinux_(\d+)_(\d+)_x86_64", Path(wheel).name)
        assert tag is not None, wheel
        allowed = tuple(int(number) for number in tag.groups())
        self.assertLessEqual(allowed, (2, 17))
        checked = {}
        with zipfile.ZipFile(wheel) as files:
            for name in files.namelist():
                content = files.read(name)
                if content.startswith(b"\x7fELF"):
                    checked[Path(name).name] = max(glibc_versions(content), default=(0,))
        self.assertTrue({"_native.abi3.so", "libmicrovm_zygote.so", "microvm-jail", "microvm-usernet"} <= set(checked), checked)
        self.assertGreater(checked["_native.abi3.so"], (2,))
        self.assertEqual({name: needs for name, needs in checked.items() if needs > allowed}, {})

    def test_licences_of_all_that_is_linked_in_come_along(self) -> None:
        data = Path(package.__file__).parent / "_data"
        listed, *texts = (data / "THIRD-PARTY.txt").read_text().split("=" * 100)
        crates = {line.split(" ")[1] for line in listed.splitlines() if line.startswith("- ")}
        self.assertTrue({"tokio", "snow", "landlock", "smoltcp", "tikv-jemalloc-sys"} <= crates, crates)
        self.assertFalse({crate for crate in crates if crate.startswith("microvm-")})
        self.assertTrue(any("jemalloc" in text and "Redistributions in binary form" in text for text in texts))
        self.assertIn("THIRD-PARTY.txt", (data / "NOTICE-GPL.md").read_text())

    def test_import_starts_no_thread_and_prints_nothing(self) -> None:
        done = run_python("import threading, {}; print(threading.active_count())".format(IMPORT))
        self.assertEqual((done.stdout, done.stderr), ("1\n", ""))

    def test_core_has_a_heap_of_its_own_that_is_set_up_as_wanted(self) -> None:
        # What sets it up is a symbol that a linker could drop without a word.
        done = run_python("import {}".format(IMPORT), env=dict(os.environ, _RJEM_MALLOC_CONF="confirm_conf:true"))
        self.assertIn("-- Set conf value: narenas:2\n", done.stderr)


class Doctor(unittest.TestCase):
    def test_report_is_complete_and_json(self) -> None:
        report = doctor()
        self.assertEqual(json.loads(json.dumps(report)), report)
        self.assertEqual([b["backend"] for b in report["backends"]], ["firecracker", "qemu", "cloud-hypervisor"])
        self.assertTrue(report["guest_image"]["complete"])
        self.assertTrue({"namespaces", "uid", "landlock", "seccomp", "cgroup_memory"} <= set(report["jail"]), report["jail"])
        for backend in report["backends"]:
            self.assertTrue(backend["available"] or backend["remedy"], backend)

    def test_command_line_prints_text_or_json(self) -> None:
        command = [sys.executable, "-m", IMPORT, "doctor", "--quick"]
        text = subprocess.run(command, stdout=subprocess.PIPE, universal_newlines=True)
        self.assertEqual(text.returncode, 0)
        self.assertRegex(text.stdout, r"\n  /dev/kvm: (not )?usable\n")
        for backend in doctor()["backends"]:
            self.assertIn("\n  {}: ".format(backend["backend"]), text.stdout)
            self.assertIn(backend["version"] or "", text.stdout)
        self.assertEqual(json.loads(subprocess.check_output(command + ["--json"])), doctor())
