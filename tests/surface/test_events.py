"""The stream of events: iterators, callbacks, and how both end."""

import signal
import subprocess
import sys
import threading
import time
from typing import Any, Dict, List

from thirstys_waterfall.security.microvm_isolation import InvalidTypeError, MicroVMIsolationManager

from ..support import IMPORT, VMTestCase, eventually, limits, run_python

HEAD = """
import os, signal, sys, threading, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from {} import *
manager = MicroVMIsolationManager({{"default_memory_mb": 128, "default_disk_size_mb": 64}})
manager.start()
""".format(IMPORT)


def states(events: List[Dict[str, Any]]) -> List[str]:
    return [event["to"] for event in events if event["kind"] == "state"]


class Streams(VMTestCase):
    def test_a_life_is_told_in_order_and_the_stream_ends_with_the_manager(self) -> None:
        stream = self.manager.events()
        vm = self.running()
        vm.pause()
        vm.resume()
        vm.stop()
        self.manager.destroy_vm(vm.vm_id)
        self.manager.stop()
        events = [event for event in stream if event["kind"] != "health"]
        told = ["starting", "running", "paused", "running", "stopping", "stopped", "destroyed"]
        self.assertEqual(states(events), told)
        self.assertEqual([events[0]["kind"], events[-1]["kind"]], ["created", "removed"])
        details = [event["detail"] for event in events]
        self.assertEqual(details[0], "1 vCPU, 128 MiB of memory, 64 MiB of disk")
        self.assertEqual(details[1:3], ["created -> starting: start", "starting -> running: start"])
        self.assertTrue(all(details), events)
        numbers = [event["sequence"] for event in events]
        self.assertEqual(numbers, sorted(numbers))
        self.assertTrue(all(abs(event["time"] - time.time()) < 60 for event in events))
        self.assertTrue(all(event["isolation_type"] == "browser_tab" for event in events))

    def test_failed_start_says_why(self) -> None:
        stream = self.manager.events(timeout=5)
        vm = self.manager.get_vm(self.create(kernel_path="/nowhere/vmlinux"))
        self.assertFalse(vm.start())
        failed = [event for event in iter(stream.get, None) if event.get("to") == "error"]
        self.assertIn("/nowhere/vmlinux", failed[0]["detail"])

    def test_quota_that_is_exhausted_is_an_event(self) -> None:
        stream = self.manager.events(timeout=2)
        self.assertIsNone(self.manager.create_vm("plugin", limits(vcpu_count=32)))
        event = stream.get()
        self.assertEqual((event["kind"], event["what"]), ("limit", "quota"))
        self.assertIn("vCPUs", event["detail"])

    def test_timeout_ends_an_iteration_and_the_stream_goes_on(self) -> None:
        stream = self.manager.events(timeout=0.2)
        begun = time.monotonic()
        self.assertEqual(list(stream), [])
        self.assertGreater(time.monotonic() - begun, 0.19)
        self.create()
        self.assertEqual([event["kind"] for event in stream], ["created"])
        self.assertIsNone(stream.get(timeout=0))

    def test_slow_reader_loses_the_oldest_and_sees_how_many(self) -> None:
        with self.manager.events(capacity=3) as stream:
            ids = [self.create() for _ in range(5)]
            self.assertEqual(stream.dropped, 2)
        self.assertEqual([event["vm_id"] for event in stream], ids[2:])
        self.assertIn("microvm_events_dropped_total 2.0", self.manager.metrics())

    def test_wrong_arguments_are_named(self) -> None:
        class Silent:
            def __repr__(self) -> str:
                raise RuntimeError("no name")

        for call, error in [
            (lambda: self.manager.on_event(Silent()), InvalidTypeError),
            (lambda: self.manager.events(timeout="1"), TypeError),
            (lambda: self.manager.events(capacity=0), ValueError),
            (lambda: self.manager.on_event(3), InvalidTypeError),
        ]:
            with self.assertRaises(error):
                call()


class Callbacks(VMTestCase):
    def test_exception_in_a_callback_is_logged_and_harms_nothing(self) -> None:
        seen: List[str] = []

        def call(event: Dict[str, Any]) -> None:
            seen.append(event["kind"])
            if len(seen) == 1:
                raise RuntimeError("on purpose")

        subscription = self.manager.on_event(call)
        with self.assertLogs(self.manager.logger, "ERROR") as logs:
            self.create()
            self.create()
            self.assertTrue(eventually(lambda: len(seen) == 2))
        self.assertIn("on purpose", logs.output[0])
        self.assertTrue(subscription.active)

    def test_exit_raised_in_a_callback_is_logged_and_ends_nothing(self) -> None:
        seen: List[str] = []

        def call(event: Dict[str, Any]) -> None:
            seen.append(event["kind"])
            raise [SystemExit(3), KeyboardInterrupt(), GeneratorExit()][len(seen) - 1]

        subscription = self.manager.on_event(call)
        with self.assertLogs(self.manager.logger, "ERROR") as logs:
            for _ in range(3):
                self.create()
            self.assertTrue(eventually(lambda: len(seen) == 3))
            self.assertTrue(eventually(lambda: len(logs.output) == 3))
        self.assertTrue(all(name in text for name, text in zip(("SystemExit", "Keyboard", "Generator"), logs.output)))
        self.assertTrue(subscription.active)

    def test_close_delivers_what_came_and_no_more(self) -> None:
        seen: List[str] = []
        subscription = self.manager.on_event(lambda event: seen.append(event["vm_id"]))
        first = self.create()
        subscription.close()
        self.create()
        self.assertEqual((seen, subscription.active), ([first], False))
        subscription.close()

    def test_callback_that_uses_the_manager_and_stops_it_does_not_hang(self) -> None:
        manager = MicroVMIsolationManager()
        manager.start()
        done = threading.Event()

        def call(event: Dict[str, Any]) -> None:
            manager.get_resource_usage()
            manager.stop()
            done.set()

        subscription = manager.on_event(call)
        manager.create_vm("plugin", limits())
        self.assertTrue(done.wait(10))
        self.assertTrue(eventually(lambda: not subscription.active))

    def test_exit_with_callbacks_streams_and_vms_is_clean(self) -> None:
        code = HEAD + (
            "seen = []\n"
            "manager.on_event(seen.append)\nmanager.on_event(lambda event: time.sleep(0.01))\n"
            "stream = manager.events()\nthreading.Thread(target=lambda: list(stream), daemon=True).start()\n"
            "vm = manager.get_vm(manager.create_vm('plugin'))\nassert vm.start(), vm.last_error\n"
            "end = time.monotonic() + 5\n"
            "while len(seen) < 3 and time.monotonic() < end: time.sleep(0.01)\n"
            "print(len(seen) >= 3)"
        )
        for _ in range(3):
            done = run_python(code)
            self.assertEqual((done.returncode, done.stdout, done.stderr), (0, "True\n", ""))

    def test_exit_while_a_callback_blocks_is_not_held_up(self) -> None:
        code = HEAD + "manager.on_event(lambda event: time.sleep(60))\nmanager.create_vm('plugin')\ntime.sleep(0.2)\n"
        begun = time.monotonic()
        self.assertEqual(run_python(code).returncode, 0)
        self.assertLess(time.monotonic() - begun, 15)

    def test_ctrl_c_ends_an_iteration_at_once(self) -> None:
        code = HEAD + (
            "try:\n    print('ready', flush=True)\n    list(manager.events())\nexcept KeyboardInterrupt:\n    print('interrupted', flush=True)\n"
        )
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, universal_newlines=True)
        assert process.stdout is not None
        self.addCleanup(process.stdout.close)
        self.assertEqual(process.stdout.readline(), "ready\n")
        time.sleep(0.3)
        begun = time.monotonic()
        process.send_signal(signal.SIGINT)
        self.assertEqual(process.stdout.readline(), "interrupted\n")
        self.assertLess(time.monotonic() - begun, 10.0)
        self.assertEqual(process.wait(20), 0)

    def test_forked_child_is_refused_and_the_parent_goes_on(self) -> None:
        code = HEAD + (
            "seen = []\nsubscription = manager.on_event(seen.append)\nstream = manager.events()\nchild = os.fork()\n"
            "if child == 0:\n    try:\n        stream.get(timeout=1)\n"
            "    except ForkedProcessError as error:\n        print(error.code, flush=True)\n    sys.exit(0)\n"
            "assert os.waitpid(child, 0)[1] == 0\nmanager.create_vm('plugin')\n"
            "print(stream.get(timeout=5)['kind'])\nsubscription.close()\nprint(len(seen))\n"
        )
        done = run_python(code)
        self.assertEqual(done.stdout.split(), ["forked_process", "created", "1"], done.stderr)
