"""The QEMU of our own package: preferred where it is installed, told of, and jailed strictly."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from typing import Any, Dict, List

from thirstys_waterfall.security.microvm_isolation import MicroVMIsolationManager

from .. import own_qemu
from ..support import IMPORT, ROOT, VMTestCase, limits, shell

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


class WithOurs(VMTestCase):
    """VMs of our QEMU, out of its wheel."""

    program: str

    @classmethod
    def setUpClass(cls) -> None:
        wheel = own_qemu.wheel()
        if wheel is None:
            raise unittest.SkipTest(own_qemu.MISSING)
        folder = tempfile.mkdtemp(dir="/tmp")
        cls.addClassCleanup(shutil.rmtree, folder)
        os.chmod(folder, 0o755)
        cls.program = str(own_qemu.unpack(wheel, Path(folder)))
        cls.config = {"qemu_binary": cls.program, "start_timeout_s": 120}

    def test_vm_has_qemus_sandbox_and_the_allow_list(self) -> None:
        jail = self.running().get_info()["jail"]
        self.assertIn("-sandbox on,", jail["vmm_sandbox"]["how"])
        self.assertTrue(jail["seccomp_allow_list"]["given"], jail["seccomp_allow_list"])
        name, _, how = jail["seccomp"]["how"].partition(": ")
        self.assertEqual(name, "our QEMU's allow-list")
        self.assertIn("an allow-list of {};".format(how.partition(",")[0]), (ROOT / "docs" / "security.md").read_text())

    def life(self, manager: MicroVMIsolationManager) -> List[Any]:
        """All that a VM can do; the VMs that run at its end."""
        manager.start()
        self.addCleanup(manager.stop)
        name = "own-{}".format(os.getpid())
        vms = [manager.get_vm(manager.create_vm("plugin", limits(vcpu_count=count))) for count in (1, 2)]
        for vm in vms:
            assert vm is not None
            self.assertTrue(vm.start(), vm.last_error)
        vm = vms[0]
        assert vm is not None
        script = "dd if=/dev/zero of=/data/x bs=1M count=20 && sync && cat /data/x >/dev/null && rm /data/x && fstrim /data; echo ram >/run/f"
        self.assertEqual(self.result(vm, "exec", shell(script))["exit_code"], 0)
        self.assertTrue(vm.pause() and vm.resume())
        with vm.stream("/bin/cat") as program:
            self.assertEqual(program.communicate(b"said")[0], b"said")
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "up").write_bytes(os.urandom(1 << 20))
            vm.upload(folder + "/up", "/data/f")
            vm.download("/data/f", folder + "/down")
            self.assertEqual((Path(folder) / "down").read_bytes(), (Path(folder) / "up").read_bytes())
        vm.snapshot(name)
        self.addCleanup(manager.delete_template, name)
        clone = manager.get_vm(manager.create_vm("plugin", template=name))
        assert clone is not None
        self.assertTrue(clone.start(), clone.last_error)
        self.assertTrue(vm.suspend(), vm.last_error)
        self.assertTrue(vm.resume(), vm.last_error)
        for each in (vm, clone):
            self.assertEqual(self.result(each, "exec", shell("cat /run/f"))["stdout"], "ram\n")
            self.assertEqual(each.get_health_metrics().health_status, "healthy")
        return [*vms, clone]

    def test_audit_of_a_life_finds_nothing(self) -> None:
        for vm in self.life(MicroVMIsolationManager(dict(self.config, jail="audit"))):
            self.assertEqual(vm.get_info()["jail"]["would_deny"], [])

    def test_strict_vms_live(self) -> None:
        given = self.running().get_info()["jail"]
        lacks = [name for name, layer in given.items() if name != "mode" and not layer["given"]]
        # The layout is the zygote's, which our QEMU has none of; where cgroups cannot restrict devices (v2), the root does.
        if set(lacks) - {"cgroup_devices"}:
            self.skipTest("this host's jail lacks {}".format(", ".join(lacks)))
        for vm in self.life(MicroVMIsolationManager(dict(self.config, jail="strict"))):
            self.assertEqual(vm.get_info()["jail"]["mode"], "strict")


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
            # This process's own interpreter may lie in a folder that is closed to others.
            candidates = [getattr(sys, "_base_executable", sys.executable), "/usr/bin/python3"]
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

            def is_usable(python: str) -> bool:
                try:
                    return bool(run(python, "-c", "import ensurepip; print(1)"))
                except (OSError, AssertionError):
                    return False

            base = next(filter(is_usable, candidates), None)
            if base is None:
                self.skipTest("needs an interpreter with ensurepip that other users may execute, not {}".format(candidates))
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
