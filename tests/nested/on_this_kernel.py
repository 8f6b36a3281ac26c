"""A VM's life, doctor and the example on the kernel of the lab, and what is told where it is old: ``make test-kernels``."""

import os
import re

from thirstys_waterfall.security.microvm_isolation import MicroVMIsolationManager, doctor

from ..support import ROOT, VMTestCase, alive, eventually, limits, run_python, shell
from ..surface.test_process import RUNNING

RELEASE = tuple(int(number) for number in re.findall(r"\d+", os.uname().release)[:2])
# TCG in TCG: a health check may come late, and is not what is tested.
PATIENT = {"start_timeout_s": 240, "default_backend": "QEMU", "health_interval_s": None}


class Kernel(VMTestCase):
    config = PATIENT

    def setUp(self) -> None:
        super().setUp()
        # It is made once, and found by the others.
        self.assertTrue(self.manager.prepare(limits()), self.manager.last_error)

    def test_doctor_names_the_layers_that_this_kernel_has_not(self) -> None:
        report = doctor(start=False)
        self.assertTrue(report["verdict"]["starts"], report["problems"])
        missing = {name for name, layer in report["jail"].items() if not layer["given"]}
        self.assertEqual(missing - {"cgroup_devices", "cgroup_io"}, set() if RELEASE >= (5, 13) else {"landlock"})
        if RELEASE < (5, 13):
            self.assertIn("Landlock", report["jail"]["landlock"]["how"])
            (remedy,) = [each["remedy"] for each in report["problems"] if "the jail lacks landlock" in each["what"]]
            self.assertIn("5.13", remedy or "")

    def test_vm_has_the_layers_that_doctor_names(self) -> None:
        told = {name: layer["given"] for name, layer in doctor(start=False)["jail"].items()}
        got = {name: layer["given"] for name, layer in self.running().get_info()["jail"].items() if isinstance(layer, dict)}
        self.assertLessEqual(told.items(), got.items())

    def test_strict_is_refused_where_a_layer_is_missing(self) -> None:
        manager = MicroVMIsolationManager(dict(PATIENT, jail="strict"))
        self.addCleanup(manager.stop)
        vm = manager.get_vm(manager.create_vm("plugin", limits()) or "")
        self.assertEqual(vm.start(), RELEASE >= (5, 13), vm.last_error)
        if RELEASE < (5, 13):
            self.assertIn("landlock", str(vm.last_error))

    def test_life(self) -> None:
        say = lambda vm, script: self.result(vm, "exec", shell(script, timeout=120))["stdout"].split()
        first = self.running()
        self.assertEqual(first.get_info()["start"]["origin"], "clone")
        self.assertTrue(first.pause() and first.resume())
        self.assertEqual(say(first, "echo kept >/data/f; echo ram >/run/f; sync; cat /data/f"), ["kept"])
        first.snapshot("kept")
        self.assertIn("kept", [template["name"] for template in self.manager.list_templates()], first.last_error)
        copy = self.running(template="kept")
        self.assertEqual(say(copy, "cat /data/f /run/f"), ["kept", "ram"])
        self.assertTrue(first.suspend() and first.resume(), first.last_error)
        self.assertEqual(say(first, "cat /data/f /run/f"), ["kept", "ram"])
        self.assertTrue(self.manager.delete_template("kept"))

    def test_killed_process_leaves_nothing(self) -> None:
        # By process descriptors, cgroup.kill and the like where the kernel has them, else without.
        code = RUNNING.replace('{"default', '{"start_timeout_s": 240, "default', 1)
        done = run_python(code + "print(vm.get_info()['socket_path'], pid, flush=True); os.kill(os.getpid(), 9)", timeout=600)
        self.assertEqual(done.returncode, -9, done.stderr)
        path, pid = done.stdout.split()
        self.assertTrue(eventually(lambda: not alive(int(pid)), 20.0))
        self.assertTrue(eventually(lambda: not os.path.exists(os.path.dirname(path)), 30.0))

    def test_basic_example(self) -> None:
        code = (ROOT / "examples" / "basic.py").read_text()
        patient = code.replace('{"default_backend"', '{"start_timeout_s": 240, "default_backend"', 1)
        self.assertNotEqual(patient, code)
        done = run_python(patient, timeout=900)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("VM State: running", done.stdout)
