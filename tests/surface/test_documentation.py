"""What help() shows, that the stub says the same, and that its examples are true."""

import doctest
import enum
import inspect
import io
import os
import pickle
import re
import runpy
import sys
import tempfile
import unittest
from pathlib import Path
from typing import Any, Dict, Iterator, List, Set, Tuple

from thirstys_waterfall.security import microvm_isolation as package
from thirstys_waterfall.security.microvm_isolation import (
    VM,
    IsolationType,
    MicroVMIsolationManager,
    VMResourceLimits,
    _errors,
    _types,
    doctor,
)

from ..support import ROOT, VMTestCase, eventually, misfits, play

STUB = Path(package.__file__).with_name("_native.pyi")
# Members of base classes and enums, which are documented elsewhere.
INHERITED = {"with_traceback", "add_note", "args", "name", "value", "count", "index"}
# An argument or key whose name matches must have a description that matches.
UNITS = {
    r"(timeout|_s|_seconds|_check)$": r"[Ss]econd",
    r"_mb$": r"MiB",
    r"_mbps$": r"Mbit/s",
    r"(bytes|^offset)": r"[Bb]ytes",
    r"_ops_": r"operations",
    r"_percent$": r"percent",
    r"^(rows|columns)$": r"characters",
    r"^capacity$": r"Number of events",
}
RANGE = r"\d[\d*]* to [\d*x]+|more than \d+ and at most \d+"
BLOCKS = re.compile(r"\b(Blocks|Does not block)\b")


def members(value: type) -> Dict[str, Any]:
    """What a class of the package has, with what it inherits from the core's class of the same name."""
    return {**(vars(getattr(package._native, value.__name__, object))), **vars(value)}


def public() -> Iterator[Tuple[str, Any]]:
    """Every public name of the package, and of its classes."""
    for name in package.__all__:
        value = getattr(package, name)
        yield name, value
        if inspect.isclass(value):
            for member, raw in members(value).items():
                is_data = not callable(raw) and not isinstance(raw, (property, classmethod, staticmethod))
                is_data = is_data and not inspect.isdatadescriptor(raw)
                if not member.startswith("_") and member not in INHERITED and not is_data:
                    yield "{}.{}".format(name, member), raw


def calls() -> Iterator[Tuple[str, Any]]:
    """The functions and methods among them."""
    return ((name, value) for name, value in public() if inspect.isroutine(value))


def constructors() -> Iterator[Tuple[str, Any]]:
    """The classes among them with a constructor of their own; those of the core have no signature before CPython 3.10."""
    for name, value in public():
        if inspect.isclass(value) and not issubclass(value, enum.Enum):
            core = getattr(package._native, name, value)
            if inspect.isfunction(vars(value).get("__init__")) or core.__text_signature__:
                yield name, value


def parameters(call: Any) -> List[str]:
    # Before CPython 3.9 the signature of a generic class is that of typing.Generic.__new__.
    call = vars(call).get("__init__", call) if inspect.isclass(call) else call
    return [name for name in inspect.signature(call).parameters if name != "self"]


def described(value: Any, title: str = "Args") -> Dict[str, str]:
    """What a section of a docstring says of each argument, or of each key."""
    section = (inspect.getdoc(value) or "").partition("\n{}:\n".format(title))[2].partition("\n\n")[0]
    found = re.findall(r"^    (\w+): (.*(?:\n        .*)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}


def anchors(page: Path) -> Set[str]:
    """The names by which GitHub knows a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dicts() -> Iterator[Tuple[str, Any]]:
    """The types of the dicts that the package returns."""
    return ((name, value) for name, value in vars(_types).items()
            if isinstance(value, type) and issubclass(value, dict) and not name.startswith("_"))


class Docstrings(unittest.TestCase):
    def test_every_public_name_has_one(self) -> None:
        names = list(public())
        self.assertGreater(len(names), 80)
        # Not inspect.getdoc(), which gives a class the docstring of its base.
        self.assertEqual([name for name, value in names if not (value.__doc__ or "").strip()], [])

    def test_every_one_begins_with_a_sentence(self) -> None:
        firsts = {name: (inspect.getdoc(value) or "").partition("\n\n")[0] for name, value in public()}
        self.assertEqual([name for name, first in firsts.items() if not re.match(r"[A-Z`].*[.:]\Z", first, re.DOTALL)], [])

    def test_every_call_says_whether_it_blocks(self) -> None:
        names = list(calls())
        self.assertGreater(len(names), 50)
        self.assertEqual([name for name, value in names if not BLOCKS.search(inspect.getdoc(value) or "")], [])

    def test_every_class_with_properties_says_whether_they_block(self) -> None:
        classes = {name.split(".")[0] for name, value in public() if inspect.isdatadescriptor(value)}
        self.assertGreater(len(classes), 4)
        docs = {name: " ".join((inspect.getdoc(getattr(package, name)) or "").split()) for name in classes}
        silent = [name for name, doc in docs.items() if "Properties do not block" not in doc]
        self.assertEqual(silent, [])

    def test_every_argument_is_described_and_no_other(self) -> None:
        self.assertGreater(len(list(constructors())), 4)
        for name, value in [*calls(), *constructors()]:
            with self.subTest(name):
                self.assertEqual(list(described(value)), parameters(value))

    def test_every_argument_with_a_unit_tells_it_and_its_range(self) -> None:
        told = [(name, *one) for name, value in [*calls(), *constructors()] for one in described(value).items()]
        checked = [(name, argument, text, unit) for name, argument, text in told
                   for pattern, unit in UNITS.items() if re.search(pattern, argument)]
        self.assertGreater(len(checked), 30)
        self.assertEqual([one for one in checked if not re.search(one[3], one[2])], [])
        # Measurements have no range.
        asked = [one for one in checked if one[0] != "VMHealthMetrics"]
        self.assertEqual([one for one in asked if not re.search(RANGE, one[2])], [])

    def test_every_key_of_a_dict_is_described_and_tells_its_unit(self) -> None:
        self.assertGreater(len(list(dicts())), 30)
        for name, value in dicts():
            with self.subTest(name):
                told = described(value, "Keys")
                self.assertEqual(set(told), set(value.__annotations__))
                unitless = {key: text for key, text in told.items() if text != "The same."
                            for pattern, unit in UNITS.items() if re.search(pattern, key) and not re.search(unit, text)}
                self.assertEqual(unitless, {})

    def test_stub_is_what_make_stub_writes(self) -> None:
        with_docs = runpy.run_path(str(ROOT / "tools" / "stub-docs.py"))["with_docs"]
        stub = STUB.read_text()
        self.assertGreater(len(BLOCKS.findall(stub)), 50)
        self.assertEqual(stub, with_docs(stub, package._native))


class Examples(VMTestCase):
    # No heartbeat, whose event could come between those that an example shows.
    config = {"health_interval_s": None}

    def test_every_example_of_a_docstring_says_what_happens(self) -> None:
        names = {name: getattr(package, name) for name in package.__all__}
        vm = self.running()
        names.update(io=io, manager=self.manager, vm=vm, vm_id=vm.vm_id)
        # The examples of its methods call it `vm`, too.
        of_vm = dict(names, vm=package.VM(self.manager, vm))
        tests = [doctest.DocTestParser().get_doctest(inspect.getdoc(value) or "", of_vm if name.startswith("VM.") else names, name, None, 0)
                 for name, value in [("the package", package), *public()]]
        tests = [test for test in tests if test.examples]
        self.assertGreater(len(tests), 25)
        for test in tests:
            with self.subTest(test.name):
                said = io.StringIO()
                result = doctest.DocTestRunner(verbose=False).run(test, out=said.write)
                self.assertEqual(result.failed, 0, said.getvalue())


class Types(VMTestCase):
    """The dicts of a real VM against their types."""

    config = {"health_interval_s": 1, "pool": [{"memory_mb": 64, "disk_size_mb": 8, "size": 1, "form": "blank"}]}

    def check(self, value: Any, kind: Any) -> None:
        self.assertEqual(misfits(value, kind, "it"), [])

    def test_every_dict_of_a_real_vm_has_the_keys_and_types_that_are_told(self) -> None:
        manager, events = self.manager, self.manager.events()
        vm = manager.get_vm(self.create())
        self.check(vm.get_info(), package.VMInfo)
        self.assertFalse(vm.pause())
        self.assertTrue(vm.start(), vm.last_error)
        self.check(manager.get_all_vms_info(), Dict[str, package.VMInfo])
        self.check(manager.get_vm_info(vm.vm_id)["health"]["guest"], _types.GuestHealth)
        self.assertTrue(eventually(lambda: vm.get_info()["health"]["history"], 20.0))
        self.check(vm.get_info(), package.VMInfo)
        self.check(manager.get_health_status(), package.HealthReport)
        self.check(manager.get_resource_usage(), package.ResourceUsage)
        self.check(doctor(), package.DoctorReport)

        answer = vm.send_command("exec", {"program": "/bin/sh", "args": ["-c", "printf '\\377'"]})
        self.check(answer, package.CommandAnswer)
        self.check(answer["result"], package.ExecResult)
        self.check(vm.send_command("exec", {"program": "/no/such"}), package.CommandAnswer)
        self.check(vm.send_command("process_request", {"url": "http://elsewhere.test/"}), package.CommandAnswer)
        self.check(self.result(vm, "write_file", {"path": "/data/a", "data": "a"}), package.FileWritten)
        self.check(self.result(vm, "read_file", {"path": "/data/a"}), package.FileContent)
        self.check(self.result(vm, "system_info"), package.SystemInfo)
        html = "<a href='https://example.com/'>a</a>"
        self.check(self.result(vm, "render_page", {"html": html}), package.RenderedPage)
        self.check(vm.upload(io.BytesIO(b"a"), "/data/a"), package.Transferred)

        name = "types-{}".format(os.getpid())
        vm.snapshot(name)
        self.addCleanup(manager.delete_template, name)
        self.check(manager.list_templates(), List[package.TemplateInfo])
        self.assertTrue(vm.suspend(), vm.last_error)
        self.check(manager.list_suspended(), List[package.SuspendedVM])
        with tempfile.TemporaryDirectory() as folder:
            self.check(manager.export_disk(vm.vm_id, Path(folder) / "disk"), package.ExportedDisk)
        manager.destroy_vm(vm.vm_id)
        manager.stop()
        told = list(events)
        self.assertGreater(len(told), 5)
        self.check(told, List[package.VMEvent])

    def test_misfits_are_found(self) -> None:
        page = {"url": "u", "title": "t", "text": "x", "links": [{"href": "h", "text": "t"}], "sanitized_html": ""}
        self.assertEqual(misfits(page, package.RenderedPage, "it"), [])
        self.assertEqual(len(misfits(dict(page, links=[{"href": 3, "text": "t"}]), package.RenderedPage, "it")), 1)
        self.assertEqual(len(misfits(dict(page, more=1), package.RenderedPage, "it")), 1)
        self.assertEqual(len(misfits({"given": 1, "how": ""}, _types.JailLayer, "it")), 1)
        self.assertEqual(len(misfits({"a": None}, Dict[str, str], "it")), 1)

        self.assertEqual(misfits({"bytes": 1}, package.Transferred, "it"), ["it lacks 'crc32'"])
        self.assertEqual(misfits({"status": "ok"}, package.CommandAnswer, "it"), [])


class Codes(unittest.TestCase):
    def test_every_code_of_the_core_has_its_class(self) -> None:
        body = (ROOT / "src" / "error.rs").read_text().partition("pub fn code(&self)")[2].partition("\n    }\n")[0]
        codes = re.findall(r'=> "([a-z_]+)",', body)
        self.assertGreater(len(codes), 25)
        self.assertEqual(set(codes), set(_errors._CLASSES))

    def test_what_a_backend_cannot_do_has_a_class_and_a_row_of_the_docs(self) -> None:
        error = _errors.make_error("not_supported", "a sentence", {"remedy": "use backend=\"qemu\""})
        self.assertIs(type(error), package.NotSupportedError)
        self.assertIsInstance(error, package.MicroVMError)
        self.assertEqual((error.code, error.details["remedy"]), ("not_supported", "use backend=\"qemu\""))
        page = (ROOT / "docs" / "troubleshooting.md").read_text()
        rows = [line for line in page.splitlines() if line.startswith("| `not_supported` |")]
        self.assertEqual(len(rows), 1)
        for word in ("`snapshot()`", "`suspend()`", 'backend="qemu"'):
            self.assertIn(word, rows[0])


class Pages(unittest.TestCase):
    def test_every_link_leads_somewhere(self) -> None:
        pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
        links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text())]
        self.assertGreater(len(links), 30)
        dead = []
        for page, link in links:
            name, _, anchor = link.partition("#")
            target = page.parent / name if name else page
            if "://" not in link and not (target.exists() and (not anchor or anchor in anchors(target))):
                dead.append("{}: {}".format(page.name, link))
        self.assertEqual(dead, [])

    def test_every_key_of_the_configuration_has_a_row(self) -> None:
        with self.assertRaises(ValueError) as caught:
            MicroVMIsolationManager({"no_such_key": 1})
        known = set(str(caught.exception).partition("the keys ")[2].split(", "))
        self.assertGreater(len(known), 20)
        page = (ROOT / "docs" / "configuration.md").read_text()
        rows = [line.split(" | ")[0] for line in page.splitlines() if line.startswith("| `")]
        self.assertEqual({name for row in rows for name in re.findall(r"`(\w+)`", row)}, known)

    def test_first_success_of_the_readme_prints_what_it_says(self) -> None:
        blocks = re.findall(r"```(?:python)?\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1:5]
        for block, said in (blocks[:2], blocks[2:]):
            with self.subTest(block):
                self.assertEqual(play(block)[1], said)

    def test_lines_of_the_twin_of_subprocess_run(self) -> None:
        page = (ROOT / "docs" / "commands.md").read_text()
        block = page.partition("## As `subprocess`")[2].partition("```python\n")[2].partition("```")[0]
        self.assertIn("vm.run(", block)
        with MicroVMIsolationManager({"default_memory_mb": 128}) as manager:
            play(block, manager=manager)


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

    def test_repr_of_a_vm_says_its_state_and_its_last_error(self) -> None:
        vm = self.manager.get_vm(self.create())
        assert vm is not None
        self.assertEqual(repr(vm), "<MicroVMInstance {} created>".format(vm.vm_id))
        self.assertFalse(vm.resume())
        error = vm.last_error
        assert error is not None
        said = "{} created, last error {}: {}>".format(vm.vm_id, error.code, error)
        self.assertEqual(repr(vm), "<MicroVMInstance " + said)
        self.assertEqual(repr(VM(self.manager, vm)), "<VM " + said)

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
