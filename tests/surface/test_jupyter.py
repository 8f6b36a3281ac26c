"""Cells that run in a VM: a real kernel, driven as a notebook drives it, and what managers and VMs look like there."""

import importlib.util
import json
import queue
import re
import subprocess
import sys
import time
import unittest
from html.parser import HTMLParser
from typing import Any, Dict, List

from thirstys_waterfall.security.microvm_isolation import MicroVMIsolationManager, attach, running_vms
from thirstys_waterfall.security.microvm_isolation.jupyter import _display

from ..support import IMPORT, eventually, limits, run_python

LOAD = "%load_ext {}.jupyter".format(IMPORT)
SMALL = "-m 128m --disk 64m"
TIMEOUT_S = 120.0
INSTALLED = all(importlib.util.find_spec(name) for name in ("ipykernel", "nbclient"))
NEEDS = unittest.skipUnless(INSTALLED, "ipykernel is not installed: pip install ipykernel nbclient")
HOSTILE = "<img src=x onerror=alert(1)>&amp;"


class Cell:
    """What a cell brought: its streams, displays, value and error."""

    def __init__(self) -> None:
        self.streams: Dict[str, str] = {"stdout": "", "stderr": ""}
        self.displays: List[Dict[str, str]] = []
        self.value: Dict[str, str] = {}
        self.error: Dict[str, Any] = {}

    def take(self, kind: str, content: Dict[str, Any]) -> None:
        if kind == "stream":
            self.streams[content["name"]] += content["text"]
        elif kind in ("display_data", "update_display_data"):
            self.displays.append(content["data"])
        elif kind == "execute_result":
            self.value = content["data"]
        elif kind == "error":
            self.error = content


class Elements(HTMLParser):
    """The names of a page's elements, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: List[str] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


class KernelCase(unittest.TestCase):
    """A test with a kernel, which has the extension."""

    def setUp(self) -> None:
        from jupyter_client.manager import KernelManager

        # The specification of an installed kernel may name another interpreter.
        self.kernel = KernelManager(kernel_name="python3")
        assert self.kernel.kernel_spec is not None
        self.kernel.kernel_spec.argv[0] = sys.executable
        self.kernel.start_kernel(stderr=subprocess.DEVNULL)
        self.addCleanup(self.kernel.shutdown_kernel, now=True)
        self.connect()

    def connect(self) -> None:
        self.client = self.kernel.client()
        self.client.start_channels()
        self.addCleanup(self.client.stop_channels)
        self.client.wait_for_ready(timeout=TIMEOUT_S)
        self.assertEqual(self.run_cell(LOAD).error, {})

    def begin(self, code: str) -> str:
        number: str = self.client.execute(code)
        return number

    def hear(self, number: str, until: str = "") -> Cell:
        """What a cell brings to its end, or until it has printed some words."""
        cell = Cell()
        end = time.monotonic() + TIMEOUT_S
        while not until or until not in cell.streams["stdout"]:
            try:
                message = self.client.get_iopub_msg(timeout=max(0.1, end - time.monotonic()))
            except queue.Empty:
                self.fail("the cell has not ended: {!r}".format(vars(cell)))
            if message["parent_header"].get("msg_id") != number:
                continue
            if message["msg_type"] == "status" and message["content"]["execution_state"] == "idle":
                break
            cell.take(message["msg_type"], message["content"])
        return cell

    def run_cell(self, code: str) -> Cell:
        return self.hear(self.begin(code))

    def complete(self, code: str) -> List[str]:
        reply = self.client.complete(code, len(code), reply=True, timeout=TIMEOUT_S)
        matches: List[str] = reply["content"]["matches"]
        return matches


@NEEDS
class Cells(KernelCase):
    def in_vm(self, script: str, options: str = "") -> Cell:
        return self.run_cell("%%microvm {} {}\n{}".format(SMALL, options, script))

    def test_cell_runs_in_a_vm_that_the_notebook_keeps(self) -> None:
        cell = self.in_vm("uname -n; echo err >&2; echo kept > /data/note; cat", "-e A=b -w /data")
        self.assertEqual((cell.error, cell.streams["stderr"]), ({}, "err\n"))
        (vm_id,) = [vm["vm_id"] for vm in running_vms() if vm["owner_pid"] == self.kernel.provisioner.pid]  # type: ignore[union-attr]
        self.assertEqual(cell.streams["stdout"], vm_id + "\n")
        self.assertEqual(self.run_cell("%%microvm\ncat /data/note").streams["stdout"], "kept\n")
        self.assertEqual(self.in_vm("echo $A $PWD; id -u", "-e A=b -w /data -u 1000").streams["stdout"], "b /data\n1000\n")
        self.assertEqual(self.run_cell("%%microvm awk -f\nBEGIN { print 6 * 7 }").streams["stdout"], "42\n")
        self.assertEqual(self.run_cell("vm = %microvm\nvm.vm_id").value["text/plain"], repr(vm_id))

    def test_output_comes_while_the_program_runs(self) -> None:
        number = self.begin("%%microvm {}\necho first; while [ ! -e /tmp/go ]; do sleep 0.1; done; printf 'caf\\303'; sleep 1; printf '\\251'".format(SMALL))
        self.hear(number, until="first")
        (vm_id,) = [vm["vm_id"] for vm in running_vms() if vm["owner_pid"] == self.kernel.provisioner.pid]  # type: ignore[union-attr]
        with attach(vm_id) as vm:
            vm.run(["touch", "/tmp/go"], check=True)
        self.assertEqual(self.hear(number).streams["stdout"], "caf\u00e9")

    def test_interrupt_ends_the_program_and_not_the_vm(self) -> None:
        self.in_vm("echo kept > /tmp/it")
        number = self.begin("%%microvm\necho ready; sleep 61 & sleep 61")
        self.hear(number, until="ready")
        self.kernel.interrupt_kernel()
        self.assertEqual(self.hear(number).error["ename"], "KeyboardInterrupt")
        cell = self.run_cell("%%microvm\ncat /tmp/it; ps -o args | grep -c '[s]leep 61'; true")
        self.assertEqual((cell.streams["stdout"], cell.error), ("kept\n0\n", {}))

    def test_interrupt_of_a_start_leaves_no_vm(self) -> None:
        number = self.begin("%%microvm {} --cpus 2\necho never".format(SMALL))
        time.sleep(0.3)
        self.kernel.interrupt_kernel()
        cell = self.hear(number)
        pid = self.kernel.provisioner.pid  # type: ignore[union-attr]
        self.assertEqual((cell.error["ename"], cell.streams["stdout"]), ("KeyboardInterrupt", ""))
        self.assertEqual([vm for vm in running_vms() if vm.get("owner_pid") == pid], [])
        self.assertEqual(self.in_vm("echo again").streams["stdout"], "again\n")

    def test_failures_are_told_without_the_lines_of_this_package(self) -> None:
        for code, name, words in [
            ("%%microvm {}\nexit 3".format(SMALL), "ProgramFailedError", "3"),
            ("%%microvm --timeout 0.5\nsleep 60", "ProgramTimeoutError", "0.5"),
            ("%%microvm no-such-program\nx", "CommandError", "no-such-program"),
            ("%microvm snapshot ../up", "InvalidValueError", "../up"),
        ]:
            with self.subTest(code):
                error = self.run_cell(code).error
                self.assertEqual(error["ename"], name, error)
                self.assertIn(words, "\n".join(error["traceback"]))
                self.assertNotIn("_magic.py", "\n".join(error["traceback"]))

    def test_wrong_use_is_one_line_and_changes_nothing(self) -> None:
        self.in_vm("echo kept > /tmp/it")
        for code, words in [
            ("%%microvm --foo\nx", "--foo"),
            ("%%microvm -m 1q\nx", "'1q' is no size"),
            ("%%microvm -e 'A\nx", "quotation"),
            ("%%microvm -m 256m\nx", "%microvm reset"),
            ("%microvm explode", "explode"),
            ("%microvm snapshot", "snapshot NAME"),
        ]:
            with self.subTest(code):
                cell = self.run_cell(code)
                said = cell.streams["stderr"] + "\n".join(cell.error.get("traceback", []))
                self.assertRegex(said, r"UsageError: [^\n]*{}".format(re.escape(words)))
                self.assertNotIn("Traceback", said)
        self.assertEqual(self.run_cell("%%microvm\ncat /tmp/it").streams["stdout"], "kept\n")

    def test_reset_and_a_vm_that_ended_give_the_next_cell_a_new_one(self) -> None:
        first = self.in_vm("hostname").streams["stdout"]
        self.assertEqual(self.run_cell("%microvm reset\n%microvm").value, {})
        second = self.in_vm("hostname").streams["stdout"]
        self.assertNotIn(second, ("", first))
        self.assertEqual(self.run_cell("vm = %microvm\nvm.instance.stop()").value["text/plain"], "True")
        self.assertEqual(self.in_vm("echo third").streams["stdout"], "third\n")

    def test_snapshot_is_what_another_vm_begins_with(self) -> None:
        name = "jupyter-{}".format(time.monotonic_ns())
        self.addCleanup(lambda: MicroVMIsolationManager().delete_template(name))
        self.in_vm("echo kept > /tmp/it")
        self.assertEqual(self.run_cell("%microvm snapshot {}\n%microvm reset".format(name)).error, {})
        self.assertEqual(self.run_cell("%%microvm --template {}\ncat /tmp/it".format(name)).streams["stdout"], "kept\n")

    def test_kernel_that_restarts_or_is_killed_leaves_no_vm(self) -> None:
        self.in_vm("true")
        pid = self.kernel.provisioner.pid  # type: ignore[union-attr]
        self.kernel.restart_kernel(now=True)
        self.assertTrue(eventually(lambda: not [vm for vm in running_vms() if vm.get("owner_pid") == pid], 20.0))
        self.client.stop_channels()
        self.connect()
        self.assertEqual(self.in_vm("echo again").streams["stdout"], "again\n")

    def test_unloaded_it_leaves_no_vm_and_no_magic(self) -> None:
        self.in_vm("true")
        pid = self.kernel.provisioner.pid  # type: ignore[union-attr]
        self.assertEqual(self.run_cell("%unload_ext {}.jupyter".format(IMPORT)).error, {})
        self.assertEqual([vm for vm in running_vms() if vm.get("owner_pid") == pid], [])
        self.assertIn("not found", self.run_cell("%microvm").streams["stderr"])

    def test_help_and_completion_have_the_options(self) -> None:
        shown = self.client.execute("%%microvm?", reply=True, timeout=TIMEOUT_S)["content"]["payload"]
        self.assertIn("--timeout", json.dumps(shown))
        self.assertIn("--memory", self.complete("%%microvm --me"))
        self.assertIn("snapshot", self.complete("%microvm sn"))

    def test_value_of_the_line_is_a_card_and_ps_a_table(self) -> None:
        self.in_vm("true", "--label team=web")
        card = Elements(self.run_cell("%microvm").value["text/html"])
        for words in ("running", "qemu", "128 MiB", "team=web", "boundary", "jail"):
            self.assertIn(words, card.text)
        table = Elements(self.run_cell("%microvm ps").value["text/html"])
        self.assertIn("team=web", table.text)

    def test_what_a_guest_prints_is_no_markup(self) -> None:
        cell = self.in_vm("echo '{}'; echo '{}' >&2".format(HOSTILE, HOSTILE))
        self.assertEqual((cell.streams, cell.displays, cell.value), ({"stdout": HOSTILE + "\n", "stderr": HOSTILE + "\n"}, [], {}))


@NEEDS
class Template(KernelCase):
    def test_making_of_a_template_is_a_bar(self) -> None:
        # Of a size that no other test has, in a cache where it is made once.
        cell = self.run_cell("%%microvm -m 131m --disk 64m\necho done")
        self.assertEqual(cell.streams["stdout"], "done\n")
        if not cell.displays:
            self.skipTest("the template of 131 MiB is there already")
        self.assertIn("<progress ", cell.displays[0]["text/html"])
        self.assertRegex(cell.displays[-1]["text/html"], 'value="100"')


@NEEDS
class Notebook(unittest.TestCase):
    def test_whole_notebook_runs_by_nbclient(self) -> None:
        import nbformat
        from nbclient import NotebookClient

        cells = [
            LOAD,
            "%%microvm {}\necho hello from $(uname -s)".format(SMALL),
            "import {} as isolation\nmanager = isolation.MicroVMIsolationManager({{'default_memory_mb': 128}})\nmanager.start()\nvm = manager.run_vm()".format(IMPORT),
            "manager",
            "vm",
            "manager.stop()",
        ]
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
        NotebookClient(notebook, timeout=int(TIMEOUT_S), kernel_name="python3").execute()
        outputs = [cell["outputs"] for cell in notebook["cells"]]
        self.assertEqual(outputs[1][-1]["text"], "hello from Linux\n")
        manager = Elements(outputs[3][0]["data"]["text/html"])
        self.assertRegex(manager.text, r"session-\w+.*quota: memory .* 128 of 8192")
        self.assertIn("128 MiB", Elements(outputs[4][0]["data"]["text/html"]).text)


class Pages(unittest.TestCase):
    """What is shown, without a kernel."""

    def test_labels_and_messages_are_text(self) -> None:
        with MicroVMIsolationManager({"raise_on_error": True}) as manager:
            vm = manager.run_vm(resource_limits=limits(), labels={"a": HOSTILE})
            for page in (_display.vm_html(vm), _display.vm_html(vm.instance), _display.manager_html(manager), _display.VMTable(running_vms())._repr_html_()):
                assert page is not None
                shown = Elements(page)
                self.assertIn("a=" + HOSTILE, shown.text)
                self.assertEqual(set(shown.tags) - {"table", "thead", "tbody", "tr", "th", "td", "p"}, set())
            vm.destroy()
            self.assertIn("quota", Elements(_display.manager_html(manager) or "").text)

    def test_vm_of_an_owner_that_is_gone_is_shown_by_its_name(self) -> None:
        with MicroVMIsolationManager({"raise_on_error": True}) as manager, manager.run_vm(resource_limits=limits()) as vm:
            with attach(vm.vm_id) as attached:
                self.assertIn(vm.vm_id, _display.vm_html(attached) or "")
                vm.destroy()
                self.assertTrue(attached.wait(30.0))
                self.assertIsNone(_display.vm_html(attached))

    def test_import_needs_no_ipython(self) -> None:
        code = "import sys; sys.modules['IPython'] = None; import {}.jupyter".format(IMPORT)
        done = run_python(code)
        self.assertEqual((done.returncode, done.stderr), (0, ""))


if __name__ == "__main__":
    unittest.main()
