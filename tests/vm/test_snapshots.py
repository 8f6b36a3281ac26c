"""Templates of running VMs, and VMs that are suspended: copies of what runs, and the one way back."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from pathlib import Path
from typing import Any, Dict, List

from thirstys_waterfall.security.microvm_isolation import (
    CommandError,
    CommunicationChannel,
    InvalidStateError,
    InvalidValueError,
    IsolationType,
    MicroVMInstance,
    MicroVMIsolationManager,
    TemplateError,
    TemplateInfo,
    VMNetworkConfig,
    VMState,
)

from ..support import (
    IMPORT,
    QEMU,
    VMTestCase,
    alive,
    eventually,
    find_tool,
    limits,
    make_rootfs,
    misfits,
    run_python,
    shell,
)
from .test_templates import ASK_FOR_RANDOM

CACHE = ""
# A program that counts in its memory, and says so in a file; it outlives the request that started it.
COUNTER = "(i=0; while true; do i=$((i+1)); echo $i >/tmp/new; mv /tmp/new /tmp/count; sleep 0.02; done) </dev/null >/dev/null 2>&1 &"

# Asks for the host name as fast as it can. When the name changes, it prints its number of steps and random numbers.
STEPS = r"""
#include <stdio.h>
#include <string.h>
#include <sys/random.h>
#include <unistd.h>
int main(int count, char **words) {
    char first[65], now[65], draft[65];
    unsigned long steps = 0, number;
    if (count != 2 || gethostname(first, sizeof first)) return 1;
    do steps++; while (gethostname(now, sizeof now) == 0 && strcmp(first, now) == 0);
    snprintf(draft, sizeof draft, "%s.new", words[1]);
    FILE *file = fopen(draft, "w");
    if (!file) return 1;
    fprintf(file, "%lu", steps);
    for (int i = 0; i < 4 && getrandom(&number, sizeof number, 0) == sizeof number; i++) fprintf(file, " %016lx", number);
    return fclose(file) || rename(draft, words[1]);
}
"""


def setUpModule() -> None:
    global CACHE
    CACHE = tempfile.mkdtemp(prefix="snapshots-")


def tearDownModule() -> None:
    shutil.rmtree(CACHE)


def static_program(folder: Path, source: str) -> Path:
    """A program for the guest."""
    compiler = find_tool("cc")
    if compiler is None:
        raise unittest.SkipTest("needs a C compiler (gcc) for a program of the guest's")
    (folder / "program.c").write_text(source)
    command = [compiler, "-static", "-O1", "-o", str(folder / "program"), str(folder / "program.c")]
    subprocess.run(command, check=True, stderr=subprocess.PIPE)
    return folder / "program"


class SnapshotTestCase(VMTestCase):
    def setUp(self) -> None:
        # Cleanups run from the last to the first: this one after the manager has stopped.
        self.addCleanup(self.assert_nothing_kept)
        self.config = dict(self.config, cache_dir=CACHE)
        super().setUp()

    def assert_nothing_kept(self) -> None:
        """Whatever a test keeps, it deletes itself."""
        folders = [Path(CACHE) / name for name in ("snapshots", "suspended")]
        left = [path for folder in folders if folder.exists() for path in folder.iterdir()]
        for path in left:
            shutil.rmtree(str(path), ignore_errors=True)
        self.assertEqual(left, [])

    def output(self, vm: Any, script: str) -> str:
        result = self.result(vm, "exec", shell(script))
        self.assertEqual(result["exit_code"], 0, result)
        return str(result["stdout"])

    def count(self, vm: Any) -> int:
        return int(self.output(vm, "cat /tmp/count"))

    def counting(self, **options: Any) -> Any:
        vm = self.running(**options)
        self.output(vm, "echo kept >/data/file; " + COUNTER)
        self.assertTrue(eventually(lambda: self.output(vm, "cat /tmp/count 2>/dev/null || true")))
        return vm

    def snapshot(self, vm: Any, name: str = "mine") -> None:
        vm.snapshot(name)
        self.addCleanup(self.manager.delete_template, name)

    def clone(self, name: str = "mine", **options: Any) -> Any:
        options.setdefault("isolation_type", IsolationType.SESSION)
        vm_id = self.manager.create_vm(template=name, **options)
        self.assertIsNotNone(vm_id, self.manager.last_error)
        assert vm_id is not None
        vm = self.manager.get_vm(vm_id)
        assert vm is not None
        self.assertTrue(vm.start(), vm.last_error)
        return vm

    def refused(self, **options: Any) -> Any:
        """The error with which a clone is not created."""
        self.assertIsNone(self.manager.create_vm(IsolationType.SESSION, **options))
        return self.manager.last_error


class Clones(SnapshotTestCase):
    def test_clones_go_on_where_the_vm_was_copied_and_so_does_the_vm(self) -> None:
        vm = self.counting()
        pid, before = vm.get_info()["pid"], self.count(vm)
        self.snapshot(vm)
        first, second = self.clone(), self.clone()
        for clone in (first, second):
            begun = self.count(clone)
            self.assertGreaterEqual(begun, before)
            self.assertTrue(eventually(lambda: self.count(clone) > begun))
            self.assertEqual(self.output(clone, "cat /data/file"), "kept\n")
            info = clone.get_info()
            self.assertEqual((info["start"]["origin"], info["template"]), ("clone", "mine"))
        now = self.count(vm)
        self.assertTrue(eventually(lambda: self.count(vm) > now))
        self.assertEqual(vm.get_info()["pid"], pid)

    def test_clones_disks_are_their_own(self) -> None:
        vm = self.counting()
        self.snapshot(vm)
        clone = self.clone()
        self.output(clone, "echo changed >/data/file; sync")
        self.output(vm, "echo other >/data/file; sync")
        self.assertEqual(self.output(self.clone(), "cat /data/file"), "kept\n")
        self.assertEqual([self.output(each, "cat /data/file") for each in (clone, vm)], ["changed\n", "other\n"])

    def test_clones_share_nothing_that_tells_vms_apart(self) -> None:
        vm = self.counting()
        with tempfile.TemporaryDirectory() as folder:
            vm.upload(str(static_program(Path(folder), ASK_FOR_RANDOM)), "/data/ask", mode=0o755)
        self.snapshot(vm)
        clones: List[Any] = []
        threads = [threading.Thread(target=lambda: clones.extend(self.clone() for _ in range(3))) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        look = "hostname; cat /etc/machine-id /proc/sys/kernel/random/boot_id; head -c 16 /dev/urandom | od -An -tx1; /data/ask | tr ' ' '\\n'"
        seen: List[List[str]] = [self.output(each, look).split("\n")[:-1] for each in [vm] + clones]
        self.assertEqual((len(seen), {len(each) for each in seen}), (7, {6}))
        everything = [line for each in seen for line in each]
        self.assertEqual(len(set(everything)), len(everything), seen)
        for each in [vm] + clones:
            told = self.result(each, "system_info")
            self.assertEqual(told["vm_id"], each.vm_id)
            self.assertLess(abs(told["time_unix"] - time.time()), 2.0)

    def test_no_program_takes_a_step_before_its_clone_has_settled(self) -> None:
        vm = self.running()
        with tempfile.TemporaryDirectory() as folder:
            vm.upload(str(static_program(Path(folder), STEPS)), "/data/steps", mode=0o755)
        self.output(vm, "/data/steps /tmp/steps </dev/null >/dev/null 2>&1 & sleep 0.3")
        self.snapshot(vm)
        told = []
        for clone in (self.clone(), self.clone(), self.clone()):
            self.assertTrue(eventually(lambda: self.output(clone, "cat /tmp/steps 2>/dev/null || true")))
            told.append(self.output(clone, "cat /tmp/steps").split())
        steps = [each[0] for each in told]
        # All were frozen at the same step, and none took another one as who it had been.
        self.assertEqual(len(set(steps)), 1, steps)
        self.assertGreater(int(steps[0]), 100)
        numbers = [number for each in told for number in each[1:]]
        self.assertEqual((len(numbers), len(set(numbers))), (12, 12))
        self.assertEqual(self.output(vm, "ls /tmp"), "")

    def test_a_program_outside_the_agents_groups_stands_still_too(self) -> None:
        vm = self.running()
        with tempfile.TemporaryDirectory() as folder:
            vm.upload(str(static_program(Path(folder), STEPS)), "/data/steps", mode=0o755)
        # One program in a container engine's group, one in the root group, and one whose group is frozen already.
        start = "mkdir -p {0} && (echo 0 >{0}/cgroup.procs; exec /data/steps /tmp/{1}) </dev/null >/dev/null 2>&1 &"
        groups = {"own": "/sys/fs/cgroup/other", "nested": "/sys/fs/cgroup/engine/box", "root": "/sys/fs/cgroup", "paused": "/sys/fs/cgroup/paused"}
        for name, group in groups.items():
            self.output(vm, start.format(group, name) + " sleep 0.3")
        self.output(vm, "echo 1 >/sys/fs/cgroup/paused/cgroup.freeze; sleep 0.2")
        self.snapshot(vm)
        clones = [self.clone() for _ in range(3)]
        for name in ("own", "nested", "root"):
            with self.subTest(name):
                for clone in clones:
                    self.assertTrue(eventually(lambda: self.output(clone, "cat /tmp/{} 2>/dev/null || true".format(name))))
                told = [self.output(clone, "cat /tmp/" + name).split() for clone in clones]
                self.assertEqual(len({each[0] for each in told}), 1, told)
                numbers = [number for each in told for number in each[1:]]
                self.assertEqual((len(numbers), len(set(numbers))), (12, 12))
        for each in clones + [vm]:
            self.assertEqual(self.output(each, "cat /sys/fs/cgroup/paused/cgroup.freeze /sys/fs/cgroup/other/cgroup.freeze"), "1\n0\n")
            # The programs of the root group are back in it.
            self.assertEqual(self.output(each, "ls -d /sys/fs/cgroup/strays 2>/dev/null || true"), "")

    def test_what_was_under_way_is_answered_in_the_vm_and_cancelled_in_clones(self) -> None:
        vm = self.running()
        answers: Dict[str, Any] = {}
        with CommunicationChannel(vm.vm_id, vm.get_info()["socket_path"]) as channel, vm.stream(
            "/bin/sh", ["-c", "while read line; do echo $line $line; done; exec sleep 777"]
        ) as program:
            asked = shell("touch /tmp/begun; sleep 1; echo done")
            thread = threading.Thread(target=lambda: answers.update(command=vm.send_command("exec", asked)))
            thread.start()
            self.assertTrue(eventually(lambda: self.output(vm, "ls /tmp") == "begun\n"))
            self.assertTrue(channel.send_message({"type": "command", "command": "exec", "params": asked, "id": 7}))
            self.snapshot(vm)
            program.write(b"word\n")
            self.assertEqual(next(program), ("stdout", b"word word\n"))
            thread.join()
            self.assertEqual(answers["command"]["result"]["stdout"], "done\n")
            answer = channel.receive_message(timeout=10.0)
            assert answer is not None
            self.assertEqual((answer["id"], answer["result"]["stdout"]), (7, "done\n"))
            program.close_stdin()
            clone = self.clone()
            self.assertTrue(eventually(lambda: "while read" not in self.output(clone, "ps")))
            self.assertIn("sleep 777", self.output(vm, "ps"))

    def test_many_snapshots_of_a_busy_vm_lose_no_answer(self) -> None:
        vm = self.running()
        wrong: List[Any] = []
        stop = threading.Event()

        def ask() -> None:
            number = 0
            while not stop.is_set():
                number += 1
                answer = vm.send_command("exec", {"program": "/bin/echo", "args": [str(number)]})
                if answer is None or answer["result"]["stdout"] != "{}\n".format(number):
                    wrong.append((number, answer, vm.last_error))

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        for number in range(5):
            self.snapshot(vm, "busy-{}".format(number))
        stop.set()
        for thread in threads:
            thread.join()
        self.assertEqual(wrong, [])
        self.assertEqual(len(self.manager.list_templates()), 5)
        self.output(self.clone("busy-4"), "true")

    def test_a_paused_vm_stays_paused(self) -> None:
        vm = self.counting()
        self.assertTrue(vm.pause())
        self.snapshot(vm)
        self.assertEqual(vm.get_state(), VMState.PAUSED)
        clone = self.clone()
        begun = self.count(clone)
        self.assertTrue(eventually(lambda: self.count(clone) > begun))
        self.assertTrue(vm.resume())
        self.assertGreater(self.count(vm), 0)

    def test_a_clone_of_a_clone_and_a_clone_with_other_limits_of_its_host(self) -> None:
        self.snapshot(self.counting(), "parent")
        clone = self.clone("parent")
        self.output(clone, "echo child >/data/child")
        self.snapshot(clone, "child")
        narrow = self.clone("child", resource_limits=limits(max_processes=9, max_file_handles=77))
        self.assertEqual(self.output(narrow, "cat /data/file /data/child; ulimit -n"), "kept\nchild\n77\n")
        self.assertEqual(self.output(narrow, "cat /sys/fs/cgroup/work/pids.max"), "9\n")

    def test_a_template_outlives_its_vm_and_clones_outlive_their_template(self) -> None:
        vm = self.counting()
        vm.snapshot("mine")
        self.assertTrue(self.manager.destroy_vm(vm.vm_id))
        listed = self.manager.list_templates()
        self.assertEqual([(each["name"], each["source_vm_id"], each["damaged"]) for each in listed], [("mine", vm.vm_id, False)])
        self.assertEqual((listed[0]["resource_limits"]["memory_mb"], listed[0]["isolated_network"]), (128, True))
        self.assertLess(abs(listed[0]["created"] - time.time()), 60)
        clone = self.clone()
        self.assertTrue(self.manager.delete_template("mine"))
        begun = self.count(clone)
        self.assertTrue(eventually(lambda: self.count(clone) > begun))
        self.assertEqual(self.manager.list_templates(), [])

    def test_an_instance_of_its_own_starts_from_a_template(self) -> None:
        # A VM without a manager uses the user's default cache.
        with MicroVMIsolationManager({"default_backend": "QEMU"}) as manager:
            name = "test-{}".format(os.getpid())
            vm_id = manager.create_vm(IsolationType.PLUGIN, limits())
            vm = manager.get_vm(vm_id or "")
            assert vm is not None
            self.assertTrue(vm.start(), vm.last_error)
            self.output(vm, "echo kept >/data/file")
            vm.snapshot(name)
            try:
                vm_id = "alone-{}".format(os.getpid())
                alone = MicroVMInstance(vm_id, QEMU, IsolationType.BROWSER_TAB, limits(), template=name)
                self.assertTrue(alone.start(), alone.last_error)
                self.assertEqual(self.output(alone, "cat /data/file"), "kept\n")
                self.assertTrue(alone.stop())
            finally:
                self.assertTrue(manager.delete_template(name))


class Booted(SnapshotTestCase):
    config = {"templates": False}

    def test_a_vm_that_booted_is_copied_like_any_other(self) -> None:
        vm = self.counting()
        self.assertEqual(vm.get_info()["start"]["origin"], "boot")
        self.snapshot(vm)
        clone = self.clone()
        begun = self.count(clone)
        self.assertTrue(eventually(lambda: self.count(clone) > begun))


class Pooled(SnapshotTestCase):
    config = {"pool": {"vcpu_count": 1, "memory_mb": 128, "disk_size_mb": 64, "size": 1, "form": "ready"}}

    def test_a_vm_that_stood_by_is_copied_under_the_name_that_it_got(self) -> None:
        usage = self.manager.get_resource_usage
        self.assertTrue(eventually(lambda: usage()["pool"][0]["ready"] == 1, 30.0))
        vm = self.counting(vm_id="taken-{}".format(os.getpid()))
        self.assertEqual(vm.get_info()["start"]["origin"], "pool")
        names = self.output(vm, "hostname; cat /etc/machine-id")
        self.snapshot(vm)
        clone = self.clone()
        self.assertEqual(clone.get_info()["start"]["origin"], "clone")
        self.assertFalse(set(names.split()) & set(self.output(clone, "hostname; cat /etc/machine-id").split()))
        self.assertTrue(vm.suspend(), vm.last_error)
        self.assertTrue(vm.resume(), vm.last_error)
        self.assertEqual(self.output(vm, "hostname; cat /etc/machine-id"), names)
        self.assertEqual(self.result(vm, "system_info")["vm_id"], vm.vm_id)


class Images(SnapshotTestCase):
    def test_a_vm_of_an_image_of_ones_own_and_a_changed_image(self) -> None:
        folder = tempfile.mkdtemp(prefix="snapshots-image-")
        self.addCleanup(shutil.rmtree, folder)
        os.chmod(folder, 0o755)
        image = make_rootfs(Path(folder) / "rootfs.ext4")
        vm = self.running(rootfs_path=str(image))
        self.output(vm, "echo more >/etc/more")
        self.snapshot(vm)
        self.assertEqual(self.output(self.clone(), "cat /etc/made-by /etc/more"), "tests\nmore\n")
        with open(str(image), "r+b") as file:
            file.seek(1024 + 120)
            file.write(b"changed")
        clone = self.manager.get_vm(self.manager.create_vm(IsolationType.SESSION, template="mine") or "")
        assert clone is not None
        self.assertFalse(clone.start())
        error = clone.last_error
        self.assertEqual((type(error), error.code), (TemplateError, "state_mismatch"))
        self.assertIn("image was changed", error.details["differences"][0])


class Refusals(SnapshotTestCase):
    def test_names_that_are_taken_malformed_or_missing(self) -> None:
        vm = self.running()
        self.snapshot(vm)
        with self.assertRaises(TemplateError) as taken:
            vm.snapshot("mine")
        self.assertEqual((taken.exception.code, "mine" in str(taken.exception)), ("template_taken", True))
        for bad in ("", "a/b", "..", ".hidden", "x" * 65):
            with self.assertRaises(InvalidValueError):
                vm.snapshot(bad)
            with self.assertRaises(InvalidValueError):
                self.manager.create_vm(IsolationType.SESSION, template=bad)
        with self.assertRaises(TypeError):
            vm.snapshot(3)
        error = self.refused(template="another")
        self.assertEqual((type(error), error.code, "another" in str(error)), (TemplateError, "template_not_found", True))
        self.assertFalse(self.manager.delete_template("another"))
        self.assertEqual(self.manager.last_error.code, "template_not_found")  # type: ignore[union-attr]
        self.output(vm, "true")

    def test_states_without_a_running_guest(self) -> None:
        vm = self.manager.get_vm(self.create())
        assert vm is not None
        with self.assertRaises(InvalidStateError):
            vm.snapshot("mine")
        self.assertFalse(vm.suspend())
        self.assertEqual(vm.last_error.code, "invalid_state")
        self.assertTrue(vm.start() and vm.stop())
        with self.assertRaises(InvalidStateError):
            vm.snapshot("mine")

    def test_another_shape_is_refused_with_every_difference_named(self) -> None:
        self.snapshot(self.running())
        for option, named in (
            ({"resource_limits": limits(vcpu_count=2)}, "vcpu_count: the template has 1, not 2"),
            ({"resource_limits": limits(memory_mb=256)}, "memory_mb: the template has 128, not 256"),
            ({"resource_limits": limits(disk_size_mb=128)}, "disk_size_mb: the template has 64, not 128"),
            ({"network_config": VMNetworkConfig(isolated_network=False)}, "isolated_network: the template has True, not False"),
            ({"backend": "firecracker"}, "backend: the template has qemu, not firecracker"),
            ({"rootfs_path": "/nowhere.ext4"}, "rootfs_path"),
        ):
            error = self.refused(template="mine", **option)
            self.assertEqual((type(error), error.code, len(error.details["differences"])), (TemplateError, "state_mismatch", 1))
            self.assertIn(named, str(error))
        self.assertEqual(len(self.manager.list_vms()), 1)

    def test_a_damaged_template_is_never_used(self) -> None:
        self.snapshot(self.counting())
        # The manager has read the template by now, and must still notice a later change.
        self.clone()
        for name in ("ram", "state", "disk", "manifest"):
            path = Path(CACHE) / "snapshots" / "mine" / name
            content = path.read_bytes()
            damaged = bytearray(content)
            place = max(content.find(b"kept\n"), len(content) // 2)
            damaged[place] ^= 1
            path.write_bytes(bytes(damaged))
            self.assertEqual(misfits(self.manager.list_templates(), List[TemplateInfo], "listed"), [])
            vm_id = self.manager.create_vm(IsolationType.SESSION, template="mine")
            error = self.manager.last_error
            if vm_id is not None:
                vm = self.manager.get_vm(vm_id)
                assert vm is not None
                self.assertFalse(vm.start())
                error = vm.last_error
                self.assertIsNone(vm.get_info()["pid"])
            assert error is not None
            self.assertEqual((type(error), error.code, "mine" in str(error)), (TemplateError, "state_damaged", True), name)
            path.write_bytes(content)
        self.output(self.clone(), "cat /data/file")

    def test_a_full_disk_harms_neither_the_vm_nor_the_name(self) -> None:
        vm = self.counting()
        code = (
            "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "from {} import *\n"
            "manager = MicroVMIsolationManager({{'default_backend': 'QEMU', 'cache_dir': {!r}}})\n"
            "vm = manager.get_vm(manager.create_vm('plugin', VMResourceLimits(1, 128, 64)))\n"
            "assert vm.start(), vm.last_error\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))\n"
            "try:\n    vm.snapshot('full')\nexcept HostError as error:\n    print(error.code)\n"
            "print(vm.suspend(), vm.last_error.code)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
            "print(vm.get_state().value, vm.send_command('ping')['result'], len(manager.list_templates()))\n"
            "manager.stop()\n"
        ).format(IMPORT, CACHE)
        done = run_python(code)
        self.assertEqual(done.stdout.split(), ["host_error", "False", "host_error", "running", "pong", "0"], done.stderr)
        self.output(vm, "true")


class Suspended(SnapshotTestCase):
    def test_resumed_it_is_the_same_vm_with_its_programs_its_disk_and_the_time(self) -> None:
        vm = self.counting()
        who = "hostname; cat /etc/machine-id /proc/sys/kernel/random/boot_id /data/file"
        names, before, pid = self.output(vm, who), self.count(vm), vm.get_info()["pid"]
        for _ in range(2):
            self.assertTrue(vm.suspend(), vm.last_error)
            self.assertTrue(vm.suspend())
            info = vm.get_info()
            self.assertEqual((info["state"], info["suspended"], info["pid"]), ("paused", True, None))
            self.assertFalse(alive(pid))
            usage = self.manager.get_resource_usage()
            self.assertEqual((usage["vcpus_allocated"], usage["memory_allocated_mb"], usage["total_vms"]), (0, 0, 1))
            self.assertEqual(usage["suspended"]["count"], 1)
            self.assertEqual([each["vm_id"] for each in self.manager.list_suspended()], [vm.vm_id])
            self.assertIsNone(vm.send_command("ping"))
            self.assertEqual(vm.last_error.code, "invalid_state")
            with self.assertRaises(InvalidStateError):
                vm.snapshot("mine")
            time.sleep(1.5)
            self.assertTrue(vm.resume(), vm.last_error)
            info = vm.get_info()
            self.assertEqual((info["state"], info["suspended"], info["start"]["origin"]), ("running", False, "resume"))
            self.assertEqual(self.output(vm, who), names)
            self.assertLess(abs(self.result(vm, "system_info")["time_unix"] - time.time()), 1.0)
            now = self.count(vm)
            self.assertGreaterEqual(now, before)
            self.assertTrue(eventually(lambda: self.count(vm) > now))
            self.assertEqual(self.manager.get_resource_usage()["memory_allocated_mb"], 128)
            self.assertEqual(self.manager.list_suspended(), [])
            before, pid = now, vm.get_info()["pid"]

    def process(self, code: str) -> str:
        head = "from {} import *\nmanager = MicroVMIsolationManager({{'default_backend': 'QEMU', 'cache_dir': {!r}}})\nmanager.start()\n"
        done = run_python(head.format(IMPORT, CACHE) + code)
        self.assertEqual(done.returncode, 0, done.stderr)
        return done.stdout.strip()

    def suspended_elsewhere(self, name: str) -> None:
        script = "echo kept >/data/file; " + COUNTER + " sleep 0.3; cat /tmp/count"
        self.process(
            "vm = manager.get_vm(manager.create_vm('browser_tab', VMResourceLimits(1, 128, 64), vm_id={!r}))\n"
            "assert vm.start(), vm.last_error\n"
            "vm.send_command('exec', {!r})\n"
            "assert vm.suspend(), vm.last_error\nmanager.stop()\n".format(name, shell(script))
        )

    def test_it_is_resumed_by_another_process_and_there_once(self) -> None:
        self.suspended_elsewhere("suspended-1")
        self.assertEqual([each["vm_id"] for each in self.manager.list_suspended()], ["suspended-1"])
        self.assertIsNone(self.manager.create_vm(IsolationType.SESSION, vm_id="suspended-1"))
        self.assertEqual(self.manager.last_error.code, "vm_id_taken")  # type: ignore[union-attr]
        self.assertTrue(self.manager.resume_vm("suspended-1"), self.manager.last_error)
        vm = self.manager.get_vm("suspended-1")
        assert vm is not None
        self.assertEqual(vm.isolation_type, IsolationType.BROWSER_TAB)
        begun = self.count(vm)
        self.assertGreater(begun, 3)
        self.assertTrue(eventually(lambda: self.count(vm) > begun))
        self.assertEqual(self.output(vm, "cat /data/file"), "kept\n")
        self.assertEqual(self.process("print(manager.resume_vm('suspended-1'), manager.last_error.code)"), "False vm_not_found")

    def test_of_many_that_resume_it_one_does(self) -> None:
        self.suspended_elsewhere("suspended-2")
        head = (
            "import sys\nfrom {} import *\n"
            "manager = MicroVMIsolationManager({{'default_backend': 'QEMU', 'cache_dir': {!r}}})\nmanager.start()\n"
            "print('ready', flush=True); sys.stdin.readline()\n"
            "done = manager.resume_vm('suspended-2')\n"
            "print(done, manager.last_error and manager.last_error.code, flush=True); sys.stdin.readline()\nmanager.stop()\n"
        ).format(IMPORT, CACHE)
        racers = [
            subprocess.Popen([sys.executable, "-c", head], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, universal_newlines=True)
            for _ in range(3)
        ]
        said = []
        for racer in racers:
            assert racer.stdout is not None
            self.assertEqual(racer.stdout.readline(), "ready\n")
        for racer in racers:
            assert racer.stdin is not None
            racer.stdin.write("go\n")
            racer.stdin.flush()
        for racer in racers:
            assert racer.stdout is not None
            said.append(racer.stdout.readline().split())
        for racer in racers:
            racer.communicate("end\n", timeout=60)
        won = [answer for answer in said if answer[0] == "True"]
        lost = [answer[1] for answer in said if answer[0] == "False"]
        self.assertEqual((len(won), len(lost)), (1, 2), said)
        self.assertLessEqual(set(lost), {"vm_id_taken", "vm_not_found"})
        self.assertEqual(self.manager.list_suspended(), [])

    def test_a_stopped_manager_keeps_it_and_destroying_it_does_not(self) -> None:
        vm = self.counting()
        self.assertTrue(vm.suspend(), vm.last_error)
        self.manager.stop()
        self.assertEqual([each["vm_id"] for each in self.manager.list_suspended()], [vm.vm_id])
        self.assertEqual(self.manager.list_vms(), [])
        self.manager.start()
        self.assertTrue(self.manager.resume_vm(vm.vm_id), self.manager.last_error)
        self.assertTrue(self.manager.suspend_vm(vm.vm_id))
        self.assertTrue(self.manager.destroy_vm(vm.vm_id))
        self.assertEqual(self.manager.list_suspended(), [])
        self.suspended_elsewhere("suspended-3")
        self.assertTrue(self.manager.destroy_vm("suspended-3"))
        self.assertFalse(self.manager.resume_vm("suspended-3"))
        self.assertEqual(self.manager.last_error.code, "vm_not_found")  # type: ignore[union-attr]
        other = self.running()
        self.assertTrue(other.suspend() and other.stop())
        self.assertEqual((other.get_state(), self.manager.list_suspended()), (VMState.STOPPED, []))

    def test_a_resume_that_fails_leaves_the_state_for_the_next(self) -> None:
        vm = self.counting()
        self.assertTrue(vm.suspend(), vm.last_error)
        state = Path(CACHE) / "suspended" / vm.vm_id / "ram"
        content = state.read_bytes()
        state.write_bytes(content[:-1] + b"x")
        self.assertFalse(vm.resume())
        self.assertEqual((vm.last_error.code, vm.get_info()["suspended"]), ("state_damaged", True))
        state.write_bytes(content)
        # Another VM took the share of the quota.
        code = self.process(
            "small = MicroVMIsolationManager({{'max_memory_mb': 64, 'cache_dir': {!r}}})\n"
            "print(small.resume_vm({!r}), small.last_error.code, small.list_vms())".format(CACHE, vm.vm_id)
        )
        self.assertEqual(code, "False quota_exceeded []")
        self.assertTrue(vm.resume(), vm.last_error)
        self.assertGreater(self.count(vm), 0)

    def test_with_something_under_way_it_goes_on(self) -> None:
        vm = self.counting()
        with vm.stream("/bin/sh", ["-c", "read line; echo $line"]) as program:
            self.assertFalse(vm.suspend())
            error = vm.last_error
            self.assertEqual((type(error), error.code, vm.get_state()), (CommandError, "busy", VMState.RUNNING))
            program.write(b"heard\n")
            self.assertEqual(next(program), ("stdout", b"heard\n"))
            self.assertEqual(program.wait(timeout=5.0), 0)
        self.assertTrue(vm.suspend(), vm.last_error)
        self.assertTrue(vm.resume(), vm.last_error)

    def test_a_paused_vm_can_be_suspended(self) -> None:
        vm = self.counting()
        self.assertTrue(vm.pause())
        self.assertTrue(vm.suspend(), vm.last_error)
        self.assertTrue(vm.resume(), vm.last_error)
        begun = self.count(vm)
        self.assertTrue(eventually(lambda: self.count(vm) > begun))


class Killed(SnapshotTestCase):
    def left(self) -> List[str]:
        return sorted(path.name for path in (Path(CACHE) / "snapshots").iterdir())

    def test_a_process_killed_meanwhile_leaves_a_whole_one_or_nothing(self) -> None:
        code = (
            "import sys\nfrom {} import *\n"
            "manager = MicroVMIsolationManager({{'default_backend': 'QEMU', 'cache_dir': {!r}}})\n"
            "vm = manager.get_vm(manager.create_vm('plugin', VMResourceLimits(1, 128, 64)))\n"
            "assert vm.start(), vm.last_error\n"
            "print(vm.get_info()['pid'], flush=True)\n"
            "while True:\n    vm.snapshot('killed'); manager.delete_template('killed')\n"
        ).format(IMPORT, CACHE)
        for moment in (0.03, 0.11, 0.19, 0.27):
            process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, universal_newlines=True)
            assert process.stdout is not None
            pid = int(process.stdout.readline())
            time.sleep(moment)
            process.send_signal(signal.SIGKILL)
            process.communicate()
            self.assertTrue(eventually(lambda: not alive(pid)))
            self.manager.stop()
            self.manager.start()
            # The janitor of the dead process removes files at the same time.
            left = self.left
            self.assertTrue(eventually(lambda: not [name for name in left() if name.startswith(".")]), left())
            listed = self.manager.list_templates()
            self.assertEqual(left(), [each["name"] for each in listed])
            for each in listed:
                self.assertFalse(each["damaged"])
                self.output(self.clone("killed"), "true")
                self.assertTrue(self.manager.delete_template("killed"))

