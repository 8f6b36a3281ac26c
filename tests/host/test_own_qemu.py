"""The QEMU of our own package: preferred where it is installed, and told of."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from typing import Any, Dict

from .. import own_qemu
from ..support import IMPORT, ROOT

USER = 61234
# What a VM's manager and doctor tell of the QEMU that they use.
TOLD = """
import json, sys
from {} import *
with MicroVMIsolationManager(dict(json.loads(sys.argv[1]), default_backend="QEMU")) as manager:
    vm = manager.get_vm(manager.create_vm("plugin", VMResourceLimits(1, 128, 64)))
    started = vm.start()
    error = None if started else [vm.last_error.code, str(vm.last_error)]
    told = {{"vmm": vm.get_info()["vmm"], "error": error}}
told["doctor"] = next(backend for backend in doctor()["backends"] if backend["backend"] == "qemu")
print(json.dumps(told))
""".format(IMPORT)


class Preference(unittest.TestCase):
    """Which QEMU is used, by a package that names the one on PATH as its own."""

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        found = shutil.which("qemu-system-x86_64")
        if found is None:
            self.skipTest("needs qemu-system-x86_64 on PATH")
        self.on_path = str(Path(found).resolve())

    def package(self, program: str) -> None:
        module = self.folder / own_qemu.MODULE
        module.mkdir()
        (module / "__init__.py").write_text("import pathlib\ndef path(): return pathlib.Path({!r})\n".format(program))

    def told(self, path: str, **config: Any) -> Dict[str, Any]:
        known = [str(self.folder), *filter(None, sys.path)]
        environment = dict(os.environ, PATH=path, PYTHONPATH=os.pathsep.join(known))
        command = [sys.executable, "-c", TOLD, json.dumps(config)]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True, timeout=180)
        self.assertEqual(done.returncode, 0, done.stderr)
        return dict(json.loads(done.stdout.splitlines()[-1]))

    def test_packages_is_used_where_path_has_none_and_told_of(self) -> None:
        self.package(self.on_path)
        told = self.told("/nonexistent")
        self.assertEqual(told["error"], None)
        self.assertEqual((told["vmm"]["path"], told["vmm"]["packaged"]), (self.on_path, True))
        self.assertTrue(told["doctor"]["available"] and told["doctor"]["packaged"])
        self.assertEqual(told["doctor"]["path"], self.on_path)

    def test_named_one_goes_before_the_packages(self) -> None:
        self.package("/nonexistent/qemu")
        told = self.told(os.environ["PATH"], qemu_binary="qemu-system-x86_64")
        self.assertEqual(told["error"], None)
        self.assertEqual((told["vmm"]["path"], told["vmm"]["packaged"]), (self.on_path, False))

    def test_broken_package_is_named_and_not_passed_over(self) -> None:
        self.package("/nonexistent/qemu")
        told = self.told(os.environ["PATH"])
        self.assertIsNone(told["vmm"])
        code, message = told["error"]
        self.assertEqual(code, "backend_unavailable")
        for part in ("thirstys-waterfall-microvm-qemu", "/nonexistent/qemu", "qemu_binary"):
            self.assertIn(part, message)
        self.assertFalse(told["doctor"]["available"])


class Installed(unittest.TestCase):
    """As on a machine that has no QEMU: both wheels out of files, and an ordinary user."""

    def test_pip_install_is_enough(self) -> None:
        wheel, qemu = os.environ.get("MICROVM_WHEEL"), own_qemu.wheel()
        if not wheel:
            self.skipTest("needs MICROVM_WHEEL, the path of the wheel (make test sets it)")
        if qemu is None:
            self.skipTest(own_qemu.MISSING)
        if os.geteuid() != 0:
            self.skipTest("needs root: it becomes an ordinary user")
        with tempfile.TemporaryDirectory(dir="/tmp") as name:
            os.chmod(name, 0o755)
            home = Path(name) / "home"
            home.mkdir()
            os.chown(str(home), USER, USER)
            base = getattr(sys, "_base_executable", sys.executable)
            # Without what tells this process where its own packages are.
            environment = {"PATH": "/nonexistent", "HOME": str(home)}

            def become() -> None:
                os.setgroups([])
                os.setresgid(USER, USER, USER)
                os.setresuid(USER, USER, USER)

            def run(*command: str, code: int = 0) -> str:
                done = subprocess.run(
                    command, env=environment, cwd=str(home), preexec_fn=become, stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT, universal_newlines=True, timeout=300,
                )  # fmt: skip
                self.assertEqual(done.returncode, code, done.stdout)
                return done.stdout

            try:
                run(base, "-c", "")
            except PermissionError:
                self.skipTest("needs an interpreter that other users may execute, not {}".format(base))
            for file in (Path(wheel), qemu, ROOT / "examples" / "basic.py"):
                shutil.copy(str(file), name)
                os.chmod(str(Path(name) / file.name), 0o644)
            run(base, "-m", "venv", str(home / "venv"))
            python = str(home / "venv" / "bin" / "python")
            asked = "{}[qemu]".format(Path(name) / Path(wheel).name)
            run(python, "-m", "pip", "-q", "--disable-pip-version-check", "install", "--no-index", "--find-links", name, asked)
            self.assertIn("VM State: running", run(python, str(Path(name) / "basic.py")))
            report = json.loads(run(python, "-m", IMPORT, "doctor", "--json"))
            told = next(backend for backend in report["backends"] if backend["backend"] == "qemu")
            self.assertTrue(report["verdict"]["starts"] and told["packaged"], told)
            self.assertIn(str(home / "venv"), str(Path(told["path"])))
            self.assertIn("(of the package thirstys-waterfall-microvm-qemu)", run(python, "-m", IMPORT, "doctor", "--quick"))


if __name__ == "__main__":
    unittest.main()
