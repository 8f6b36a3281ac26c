"""What help() shows, and that type checkers' stubs say the same."""

import ast
import inspect
import pickle
import re
import sys
import unittest
from pathlib import Path
from typing import Dict, Iterator, Tuple

from thirstys_waterfall.security import microvm_isolation as package
from thirstys_waterfall.security.microvm_isolation import (
    IsolationType,
    MicroVMIsolationManager,
    VMResourceLimits,
    _errors,
)

from ..support import ROOT, VMTestCase, eventually

STUB = Path(package.__file__).with_name("_native.pyi")
# What their base classes document, and every enum and dataclass has.
INHERITED = {"with_traceback", "add_note", "args", "name", "value", "count", "index"}


def public() -> Iterator[Tuple[str, object]]:
    """Every public name of the package, and of its classes."""
    for name in package.__all__:
        value = getattr(package, name)
        yield name, value
        if inspect.isclass(value):
            for member, raw in vars(value).items():
                is_data = not callable(raw) and not isinstance(raw, (property, classmethod, staticmethod))
                is_data = is_data and not inspect.isdatadescriptor(raw)
                if not member.startswith("_") and member not in INHERITED and not is_data:
                    yield "{}.{}".format(name, member), raw


def of_stub() -> Dict[str, str]:
    """The docstrings of the stub, by the names of what they describe."""
    found = {}
    for node in ast.parse(STUB.read_text()).body:
        for inner in [node, *getattr(node, "body", [])]:
            if isinstance(inner, (ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(inner) is not None:
                name = inner.name if inner is node else "{}.{}".format(node.name, inner.name)
                found[name] = ast.get_docstring(inner) or ""
    return found


class Docstrings(unittest.TestCase):
    def test_every_public_name_has_one(self) -> None:
        names = list(public())
        self.assertGreater(len(names), 80)
        self.assertEqual([name for name, value in names if not (inspect.getdoc(value) or "").strip()], [])

    def test_stub_shows_what_help_shows(self) -> None:
        shown = {name: inspect.getdoc(value) for name, value in public() if name.split(".")[0] in vars(package._native)}
        self.assertEqual({name: " ".join((text or "").split()) for name, text in shown.items()},
                         {name: " ".join(text.split()) for name, text in of_stub().items()})


class Codes(unittest.TestCase):
    def test_every_code_of_the_core_has_its_class(self) -> None:
        body = (ROOT / "src" / "error.rs").read_text().partition("pub fn code(&self)")[2].partition("\n    }\n")[0]
        codes = re.findall(r'=> "([a-z_]+)",', body)
        self.assertGreater(len(codes), 25)
        self.assertEqual(set(codes), set(_errors._CLASSES))

    def test_what_a_backend_cannot_do_has_a_class_and_a_row_of_the_readme(self) -> None:
        error = _errors.make_error("not_supported", "a sentence", {"remedy": "use backend=\"qemu\""})
        self.assertIs(type(error), package.NotSupportedError)
        self.assertIsInstance(error, package.MicroVMError)
        self.assertEqual((error.code, error.details["remedy"]), ("not_supported", "use backend=\"qemu\""))
        rows = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| `not_supported` |")]
        self.assertEqual(len(rows), 1)
        for word in ("`snapshot()`", "`suspend()`", 'backend="qemu"'):
            self.assertIn(word, rows[0])


class Names(unittest.TestCase):
    def test_no_public_name_hides_one_of_asyncio_or_python(self) -> None:
        import asyncio
        import builtins

        self.assertEqual(set(package.__all__) & (set(asyncio.__all__) | set(dir(builtins))), set())
        self.assertIs(package.CancelledError, package.OperationCancelledError)
        self.assertIs(package.InvalidStateError, package.VmStateError)

    def test_resource_limits_serve_as_keys(self) -> None:
        shapes = {VMResourceLimits(): "default", VMResourceLimits(memory_mb=256): "small"}
        self.assertEqual(shapes[VMResourceLimits(memory_mb=256)], "small")
        self.assertEqual(hash(pickle.loads(pickle.dumps(VMResourceLimits()))), hash(VMResourceLimits()))
        changed = VMResourceLimits()
        changed.memory_mb = 256
        self.assertEqual(shapes[changed], "small")


class Handles(VMTestCase):
    def test_repr_says_what_the_thing_is(self) -> None:
        vm = self.running()
        self.assertIn("started: 1 VMs, 1 of 16 vCPUs and 128 of 8192 MiB", repr(self.manager))
        with vm.stream("cat") as program, self.manager.events() as events:
            self.assertEqual(repr(program), "<ProcessStream {} pid {} not at its end>".format(vm.vm_id, program.pid))
            program.close_stdin()
            self.assertEqual(program.wait(), 0)
            self.assertIn("ended with exit code 0", repr(program))
            self.create()
            self.assertEqual(repr(events), "<EventStream 1 events wait, 0 lost>")

    def test_two_managers_of_a_process_are_told_so(self) -> None:
        self.running(vm_id="one-of-two")
        with MicroVMIsolationManager(dict(self.manager.config)) as other:
            other.create_vm(IsolationType.PLUGIN, vm_id="one-of-two")
            self.assertFalse(other.start_vm("one-of-two"))
            self.assertIn("another manager of this process", str(other.last_error))

    def test_vms_that_the_core_removed_are_held_no_more(self) -> None:
        config = dict(self.manager.config, policies={"plugin": {"deadline_s": 0.1}})
        with MicroVMIsolationManager(config) as manager:
            vm = manager.get_vm(manager.create_vm("plugin"))
            before = sys.getrefcount(vm)
            self.assertTrue(vm.start(), vm.last_error)
            self.assertTrue(eventually(lambda: manager.list_vms() == [], 20.0))
            manager.create_vm("session")
            self.assertEqual(sys.getrefcount(vm), before - 1)
