"""What surrounds a VM: threads, signals, forks, and the end of the process."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import List, Tuple

from ..support import IMPORT, VMTestCase, alive, children, eventually, limits, open_files, run_python

HEAD = """
import os, signal, sys, threading, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell has it ignored
from {} import *
manager = MicroVMIsolationManager({{"default_memory_mb": 128, "default_disk_size_mb": 64}})
manager.start()
vm = manager.get_vm(manager.create_vm("plugin"))
""".format(IMPORT)
SLEEP = "vm.send_command('exec', {'program': 'sleep', 'args': ['20']})"
RUNNING = HEAD + "assert vm.start(), vm.last_error\npid = vm.get_info()['pid']\n"


def left_of(output: str) -> bool:
    """Whether the VMM whose pid a script printed on its last line is still there."""
    return alive(int(output.split()[-1]))


def interrupt(action: str) -> Tuple[float, List[str]]:
    """Ctrl-C in the middle of an action: how many seconds later it was raised, and what holds afterwards."""
    # A boot takes long enough to be interrupted in the middle.
    code = RUNNING if action.startswith("vm.send") else HEAD.replace("{", '{"templates": False, ', 1)
    code += (
        "threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()\nbegun = time.monotonic()\n"
        "try:\n    " + action + "\nexcept KeyboardInterrupt:\n"
        "    print(time.monotonic() - begun - 0.3)\n    time.sleep(0.5)\n"
        "    print(vm.get_state().value, vm.start(), vm.send_command('ping')['result'])\n"
    )
    done = run_python(code)
    if done.returncode:
        raise AssertionError(done.stderr)
    delay, *words = done.stdout.split()
    return float(delay), words


class Ends(VMTestCase):
    def test_interpreter_exit_with_a_running_vm_leaves_nothing(self) -> None:
        done = run_python(RUNNING + "print(vm.get_info()['socket_path'], pid)")
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        path, _ = done.stdout.split()
        self.assertFalse(left_of(done.stdout) or Path(path).parent.exists())

    def test_without_logging_set_up_failures_are_on_stderr_and_nothing_else(self) -> None:
        code = RUNNING.replace("assert vm.start()", "assert not vm.resume() and vm.start()")
        # A VMM that is killed is an error of the core's threads, the others are the caller's.
        code += (
            "print(vm.last_error)\nos.kill(pid, signal.SIGKILL)\n"
            "while vm.get_state() is VMState.RUNNING: time.sleep(0.01)\nprint(vm.last_error)\n"
            "print(manager.start_vm('nobody'), manager.last_error, sep='\\n')\n"
        )
        done = run_python(code)
        self.assertEqual(done.returncode, 0, done.stderr)
        not_resumed, died, failed, unknown = done.stdout.splitlines()
        self.assertEqual(failed, "False")
        # The log's thread and the caller's write in no order.
        self.assertEqual(sorted(done.stderr.splitlines()), sorted([not_resumed, died, unknown]))

    def test_interpreter_exit_says_what_became_of_the_last_vms(self) -> None:
        begin = "import logging\nlogging.basicConfig(level=logging.INFO, format='%(message)s')\n"
        done = run_python(begin + RUNNING + "print(vm.vm_id, pid)")
        self.assertIn("{}: destroyed\n".format(done.stdout.split()[0]), done.stderr)

    def test_thread_that_is_in_a_call_when_the_interpreter_is_gone_crashes_nothing(self) -> None:
        # Python ends such a thread by pthread_exit, which unwinds through our frames.
        done = run_python(
            "import sys, threading, time\nfrom {} import _native\n"
            "threading.Thread(target=_native.next_log_records, args=(0.3,), daemon=True).start()\n"
            "class Late:\n    def __del__(self, sleep=time.sleep): sleep(0.6)\n"
            "sys.late = Late()".format(IMPORT)
        )
        self.assertEqual((done.returncode, done.stderr), (0, ""))

    def test_ctrl_c_while_the_thread_of_the_log_starts_is_made_up_for(self) -> None:
        done = run_python("""
import threading
from {0} import MicroVMIsolationManager, _logging

def interrupted(thread):
    raise KeyboardInterrupt

start, threading.Thread.start = threading.Thread.start, interrupted
try:
    MicroVMIsolationManager()
except KeyboardInterrupt:
    print(_logging._thread)
threading.Thread.start = start
MicroVMIsolationManager()
print(_logging._thread.is_alive())
""".format(IMPORT))
        self.assertEqual((done.stdout, done.stderr), ("None\nTrue\n", ""))

    def test_processes_look_for_each_other_in_one_place_whatever_tmpdir_they_have(self) -> None:
        code = "from {} import doctor; report = doctor(); print(report['runtime_dir'], report['cache_dir'])".format(IMPORT)
        places = {run_python(code, env=dict(os.environ, TMPDIR=folder)).stdout for folder in ("/tmp", "/var/tmp", "/nonexistent")}
        self.assertEqual(len(places), 1, places)
        self.assertIn("tw-microvm", places.pop())

    def test_killed_process_leaves_no_vmm_and_the_next_manager_sweeps(self) -> None:
        done = run_python(RUNNING + "print(vm.get_info()['socket_path'], pid, flush=True); os.kill(os.getpid(), 9)")
        self.assertEqual(done.returncode, -signal.SIGKILL)
        self.assertTrue(eventually(lambda: not left_of(done.stdout), 20.0))
        folder = Path(done.stdout.split()[0]).parent
        # The dead process's janitor or this manager's start removes the folder.
        self.manager.stop()
        self.manager.start()
        self.assertTrue(eventually(lambda: not folder.exists(), 20.0))

    def test_forked_child_keeps_no_vm_alive(self) -> None:
        code = RUNNING + (
            "child = os.fork()\n"
            "if child == 0:\n    time.sleep(60)\n    os._exit(0)\n"
            "print(child, pid, flush=True); os.kill(os.getpid(), 9)"
        )
        process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], stdout=subprocess.PIPE, universal_newlines=True)
        assert process.stdout is not None
        line = process.stdout.readline()
        process.wait()
        child, pid = map(int, line.split())
        self.addCleanup(process.stdout.close)
        self.addCleanup(os.kill, child, signal.SIGKILL)
        self.assertTrue(eventually(lambda: not alive(pid), 10.0))

    def test_forked_child_gets_a_typed_error_and_harms_nothing(self) -> None:
        code = RUNNING + (
            "child = os.fork()\n"
            "if child == 0:\n"
            "    try:\n        vm.send_command('ping')\n"
            "    except ForkedProcessError as error:\n        print(error.code, flush=True)\n"
            "    sys.exit(0)\n"
            "os.waitpid(child, 0)\nprint(vm.send_command('ping')['result'], pid)"
        )
        done = run_python(code)
        self.assertEqual(done.stdout.split()[:2], ["forked_process", "pong"], done.stderr)

    def test_children_forked_while_others_allocate_have_a_heap_that_works(self) -> None:
        code = (
            "import os, signal, threading, warnings\n"
            "from {} import MicroVMIsolationManager\n"
            "warnings.simplefilter('ignore')\n"
            "def use():\n"
            "    for _ in range(50):\n        MicroVMIsolationManager({{'default_memory_mb': 128}}).list_vms()\n"
            "over = threading.Event()\n"
            "def busy():\n    while not over.is_set():\n        use()\n"
            "threads = [threading.Thread(target=busy) for _ in range(4)]\n"
            "[thread.start() for thread in threads]\n"
            "for _ in range(100):\n"
            "    child = os.fork()\n"
            "    if child == 0:\n"
            "        signal.alarm(20)\n"
            "        mine = threading.Thread(target=use)\n"
            "        mine.start(); use(); mine.join(); os._exit(0)\n"
            "    print(os.waitpid(child, 0)[1], flush=True)\n"
            "over.set()"
        ).format(IMPORT)
        done = run_python(code)
        self.assertEqual((done.stdout.split(), done.stderr), (["0"] * 100, ""))


# One VM of the process's own, and what its guest says.
OWN_VM = """
def run_one():
    with MicroVMIsolationManager({"default_memory_mb": 128, "default_disk_size_mb": 64}) as own:
        mine = own.get_vm(own.create_vm("plugin"))
        assert mine.start(), mine.last_error
        return mine.send_command("ping")["result"]
def ended(child):
    return os.waitpid(child, 0)[1]
"""


class Forks(VMTestCase):
    """A child that never executes anything: multiprocessing's default, prefork servers, notebooks."""

    def test_child_of_a_process_that_used_the_library_has_managers_of_its_own(self) -> None:
        code = RUNNING + OWN_VM + (
            "for depth in range(3):\n    child = os.fork()\n    if child != 0: break\n    print(run_one(), flush=True)\n"
            "if child != 0: assert ended(child) == 0\n"
            "if depth == 0: print(vm.send_command('ping')['result'], manager.list_vms() == [vm.vm_id], run_one())\n"
            "else: os._exit(0)\n"
        )
        done = run_python(code)
        self.assertEqual((done.returncode, done.stdout.split()), (0, ["pong"] * 3 + ["pong", "True", "pong"]), done.stderr)

    def test_forks_in_the_middle_of_everything_harm_neither_side(self) -> None:
        code = HEAD + OWN_VM + (
            "over, wrong = threading.Event(), []\n"
            "def busy():\n"
            "    while not over.is_set():\n"
            "        one = manager.get_vm(manager.create_vm('plugin'))\n"
            "        if not one.start(): wrong.append(one.last_error)\n"
            "        for _ in range(5):\n"
            "            if one.send_command('ping') is None: wrong.append(one.last_error)\n"
            "        manager.get_resource_usage(); manager.destroy_vm(one.vm_id)\n"
            "threads = [threading.Thread(target=busy) for _ in range(4)]\n"
            "[thread.start() for thread in threads]\n"
            "ends = []\n"
            "for number in range(100):\n"
            "    child = os.fork()\n"
            "    if child == 0:\n"
            "        signal.alarm(100)\n"
            "        try:\n"
            "            other = MicroVMIsolationManager()\n"
            "            repr(manager), manager._cleanup_active, manager.stop()\n"
            "            assert other.create_vm('plugin') and other.get_resource_usage()['total_vms'] == 1\n"
            "            if number % 25 == 24: assert run_one() == 'pong'\n"
            "            os._exit(0)\n"
            "        except BaseException as error:\n            print(repr(error), file=sys.stderr, flush=True)\n"
            "        os._exit(9)\n"
            "    ends.append(ended(child))\n"
            "over.set()\n[thread.join() for thread in threads]\nprint(set(ends), wrong, manager.list_vms() == [vm.vm_id])"
        )
        done = run_python(code, timeout=240)
        self.assertEqual((done.returncode, done.stdout), (0, "{0} [] True\n"), done.stderr)

    def test_multiprocessing_pool_by_fork_runs_vms_in_its_children(self) -> None:
        code = RUNNING + OWN_VM + (
            "import multiprocessing\n"
            "with multiprocessing.get_context('fork').Pool(2) as pool:\n"
            "    print(pool.starmap(run_one, [(), (), ()]), vm.send_command('ping')['result'])"
        )
        done = run_python(code)
        self.assertEqual((done.returncode, done.stdout), (0, "['pong', 'pong', 'pong'] pong\n"), done.stderr)

    def test_child_that_leaves_what_it_inherited_ends_nothing_and_exits_as_it_says(self) -> None:
        # CPython 3.12 and later warn of every fork beside threads.
        code = "import warnings; warnings.simplefilter('ignore', DeprecationWarning)\n" + RUNNING + (
            "seen = []\n"
            "with manager, vm.stream('cat') as program, manager.events() as events, manager.on_event(seen.append):\n"
            "    for code in (0, 3):\n"
            "        child = os.fork()\n        if child == 0: sys.exit(code)\n"
            "        assert os.waitpid(child, 0)[1] == code << 8\n"
            "    assert program.write(b'x'), program\n    assert next(program) == ('stdout', b'x')\n"
            "    print(vm.send_command('ping')['result'])\n"
        )
        done = run_python(code)
        self.assertEqual((done.returncode, done.stdout, done.stderr), (0, "pong\n", ""))

    def test_child_logs_and_hears_of_its_own_vms(self) -> None:
        code = RUNNING + (
            "import logging\nlogging.basicConfig(level=logging.INFO, stream=sys.stdout, format='%(message)s')\n"
            "manager.on_event(lambda event: None)\nchild = os.fork()\n"
            "if child == 0:\n"
            "    with MicroVMIsolationManager({'default_memory_mb': 128, 'default_disk_size_mb': 64}) as own:\n"
            "        seen = []\n        heard = own.on_event(seen.append)\n"
            "        mine = own.get_vm(own.create_vm('plugin', vm_id='childs-{}'.format(os.getpid())))\n"
            "        mine.start(); heard.close()\n"
            # One text, which the log's thread cannot write into.
            "    print('told {}'.format([event['kind'] for event in seen][:2]))\n    sys.exit(0)\n"
            "assert os.waitpid(child, 0)[1] == 0\n"
        )
        done = run_python(code)
        self.assertEqual(done.returncode, 0, done.stderr)
        for said in ("told ['created', 'state']", ": started in", ": destroyed"):
            self.assertIn(said, done.stdout)


class Signals(VMTestCase):
    def after(self, action: str) -> List[str]:
        delay, words = interrupt(action)
        # Far below what the action takes; tests/timing has how soon it is.
        self.assertLess(delay, 2.0)
        return words

    def test_interrupted_start_is_undone_and_can_be_tried_again(self) -> None:
        self.assertEqual(self.after("vm.start()"), ["error", "True", "pong"])

    def test_interrupted_command_leaves_the_vm_running(self) -> None:
        self.assertEqual(self.after(SLEEP), ["running", "True", "pong"])


class Pools(VMTestCase):
    """The standard library's ways to do things at once."""

    config = {"max_vcpus": 64}

    def test_concurrent_futures_start_and_use_many_vms(self) -> None:
        def life(number: int) -> str:
            vm = self.manager.get_vm(self.create())
            assert vm.start(), vm.last_error
            said = self.result(vm, "exec", {"program": "echo", "args": [str(number)]})["stdout"]
            assert self.manager.destroy_vm(vm.vm_id)
            return str(said).strip()

        with ThreadPoolExecutor(12) as pool:
            self.assertEqual(list(pool.map(life, range(24))), [str(number) for number in range(24)])

    def test_multiprocessing_children_have_managers_of_their_own(self) -> None:
        code = (
            "import multiprocessing, sys\nfrom {} import *\n"
            "def child(number):\n"
            "    with MicroVMIsolationManager({{'default_memory_mb': 128, 'default_disk_size_mb': 64}}) as manager:\n"
            "        vm = manager.get_vm(manager.create_vm('plugin'))\n        assert vm.start(), vm.last_error\n"
            "        return vm.send_command('ping')['result']\n"
            "if __name__ == '__main__':\n    with multiprocessing.get_context('spawn').Pool(2) as pool:\n"
            "        print(pool.map(child, range(3)))\n"
        ).format(IMPORT)
        with tempfile.NamedTemporaryFile("w", suffix=".py") as script:
            script.write(code)
            script.flush()
            done = subprocess.run([sys.executable, script.name], stdout=subprocess.PIPE, timeout=120)
        self.assertEqual((done.returncode, done.stdout), (0, b"['pong', 'pong', 'pong']\n"))

    def test_multiprocessing_by_fork_ends_cleanly_beside_a_running_vm(self) -> None:
        code = RUNNING + (
            "import multiprocessing\nmanager.on_event(lambda event: None)\n"
            "with multiprocessing.get_context('fork').Pool(2) as pool:\n    print(pool.map(abs, [-1, -2]))\n"
            "print(vm.send_command('ping')['result'], pid)"
        )
        done = run_python(code)
        self.assertEqual((done.returncode, done.stdout.split()[:3]), (0, ["[1,", "2]", "pong"]), done.stderr)
        self.assertFalse(left_of(done.stdout))


class Janitors(VMTestCase):
    def test_there_is_one_and_it_ends_with_its_process(self) -> None:
        code = RUNNING + (
            "names = {}\n"
            "for entry in os.listdir('/proc'):\n    if entry.isdigit():\n        try:\n"
            "            fields = open('/proc/%s/stat' % entry).read()\n        except OSError:\n            continue\n"
            "        if 'microvm-janitor' in fields and int(fields.rpartition(')')[2].split()[1]) == os.getpid():\n"
            "            names[entry] = fields\n"
            "other = MicroVMIsolationManager()\nprint(len(names), *names)"
        )
        done = run_python(code)
        count, janitor = map(int, done.stdout.split())
        self.assertEqual(count, 1)
        self.assertTrue(eventually(lambda: not alive(janitor), 20.0))

    def janitors(self) -> List[int]:
        found = (pid for pid in children() if b"microvm-janitor" in Path("/proc/{}/cmdline".format(pid)).read_bytes())
        return list(found)

    def test_killed_janitor_is_replaced_when_the_next_vm_starts(self) -> None:
        self.running()
        # Where this process is an init, it inherits those of processes that have ended, until they have cleaned up.
        self.assertTrue(eventually(lambda: len(self.janitors()) == 1, 10.0))
        (janitor,) = self.janitors()
        os.kill(janitor, signal.SIGKILL)
        self.assertTrue(eventually(lambda: not alive(janitor)))
        self.running()
        (now,) = self.janitors()
        self.assertNotEqual(now, janitor)


class Boots(VMTestCase):
    config = {"templates": False}

    def test_destroy_during_a_start_cancels_it(self) -> None:
        vm_id = self.create()
        started: List[bool] = []
        thread = threading.Thread(target=lambda: started.append(self.manager.start_vm(vm_id)))
        thread.start()
        time.sleep(0.2)
        self.assertTrue(self.manager.destroy_vm(vm_id))
        thread.join()
        self.assertEqual(started, [False])


class Threads(VMTestCase):
    config = {"max_vcpus": 64}

    def test_gil_is_free_while_a_vm_starts(self) -> None:
        ticks = [0]
        done = threading.Event()

        def count() -> None:
            while not done.wait(0.001):
                ticks[0] += 1

        thread = threading.Thread(target=count)
        thread.start()
        self.running()
        done.set()
        thread.join()
        self.assertGreater(ticks[0], 10)

    def test_eight_threads_of_lives_leak_nothing(self) -> None:
        self.manager.destroy_vm(self.running().vm_id)
        before, wrong = open_files(), []

        def live() -> None:
            for _ in range(3):
                vm_id = self.manager.create_vm("plugin", limits())
                vm = self.manager.get_vm(vm_id)
                steps = [vm.start, lambda: vm.send_command("ping"), vm.pause, vm.resume, vm.stop, vm.start]
                wrong.extend((vm_id, n, vm.last_error) for n, step in enumerate(steps) if not step())
                if not self.manager.destroy_vm(vm_id):
                    wrong.append((vm_id, "destroy", self.manager.last_error))

        threads = [threading.Thread(target=live) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(wrong, [])
        self.assertTrue(eventually(lambda: open_files() <= before, 20.0), (before, open_files()))
