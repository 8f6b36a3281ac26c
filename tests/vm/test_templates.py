"""Templates and clones: what no two clones share, what is noticed, and what a death in the middle leaves.

``MICROVM_CLONES`` and ``MICROVM_KILLS`` lengthen two of them (``make clones``).
"""

import io
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from pathlib import Path
from typing import Any, Dict, List, Set, Tuple

from thirstys_waterfall.security.microvm_isolation import HostError, InvalidTypeError, IsolationType, MicroVMIsolationManager

from ..support import DATA, IMPORT, VMTestCase, children, eventually, find_tool, limits, make_rootfs, run_python, shell

CLONES = int(os.environ.get("MICROVM_CLONES", "12"))
KILLS = int(os.environ.get("MICROVM_KILLS", "3"))
CLOCK_TOLERANCE_S = 0.05

# getrandom(2) by name, and the 16 bytes that the kernel gives every new program (getauxval(3)).
ASK_FOR_RANDOM = r"""
#include <stdio.h>
#include <sys/auxv.h>
#include <sys/random.h>
int main(void) {
    unsigned char bytes[32];
    const unsigned char *start = (const unsigned char *)getauxval(AT_RANDOM);
    if (getrandom(bytes, sizeof bytes, 0) != sizeof bytes || !start) return 1;
    for (unsigned i = 0; i < sizeof bytes; i++) printf("%02x", bytes[i]);
    printf(" ");
    for (unsigned i = 0; i < 16; i++) printf("%02x", start[i]);
    printf("\n");
    return 0;
}
"""

# Starts the smallest VM in a process of its own and prints the origin of the start.
ONE_START = """
import sys
from {module} import MicroVMIsolationManager, VMResourceLimits
with MicroVMIsolationManager({{"cache_dir": {cache!r}, "raise_on_error": True}}) as manager:
    vm = manager.get_vm(manager.create_vm("plugin", VMResourceLimits(memory_mb=128, disk_size_mb=64)))
    vm.start()
    assert vm.send_command("ping")["result"] == "pong"
    print(vm.get_info()["start"]["origin"])
"""

# A manager that makes a template and fills a pool until it is killed.
KEEPS_MAKING = """
import time
from {module} import MicroVMIsolationManager
entry = {{"memory_mb": 128, "disk_size_mb": 64, "size": 2}}
manager = MicroVMIsolationManager({{"cache_dir": {cache!r}, "runtime_dir": {runtime!r}, "pool": entry}})
manager.start()
print("up", flush=True)
time.sleep(600)
"""


def random_program(folder: Path) -> Path:
    """A static program for the guest that prints random numbers."""
    compiler = find_tool("cc")
    if compiler is None:
        raise unittest.SkipTest("needs a C compiler (gcc) for a program that calls getrandom")
    source, program = folder / "ask.c", folder / "ask"
    source.write_text(ASK_FOR_RANDOM)
    subprocess.run([compiler, "-static", "-O1", "-o", str(program), str(source)], check=True, stderr=subprocess.PIPE)
    return program


def flip(path: Path, at: int) -> None:
    """Change one byte, and nothing that stat(2) tells but the times of change."""
    stat = path.stat()
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x40]))
    os.utime(str(path), ns=(stat.st_atime_ns, stat.st_mtime_ns))


def made(path: Path) -> Tuple[int, int]:
    """Which file this is: a number that was given back may be another's soon."""
    stat = path.stat()
    return stat.st_ino, stat.st_ctime_ns


class TemplateTestCase(VMTestCase):
    """With a cache of its own."""

    more: Dict[str, Any] = {}

    def setUp(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="microvm-test-"))
        self.addCleanup(shutil.rmtree, str(self.folder))
        self.cache = self.folder / "cache"
        self.cache.mkdir(mode=0o700)
        self.config = dict(self.more, cache_dir=str(self.cache))
        super().setUp()

    def templates(self) -> List[Path]:
        return sorted(path for path in (self.cache / "templates").iterdir() if path.is_dir())

    def template(self) -> Path:
        (template,) = self.templates()
        return template

    def origin(self, vm: Any) -> str:
        return str(vm.get_info()["start"]["origin"])

    def one_start(self, module_folder: str = "") -> str:
        """The origin of a VM in another process; ``module_folder`` holds another copy of the package."""
        code = "import sys; sys.path.insert(0, {!r})\n".format(module_folder) if module_folder else ""
        done = run_python(code + ONE_START.format(module=IMPORT, cache=str(self.cache)))
        self.assertEqual(done.returncode, 0, done.stderr)
        return done.stdout.strip()


class Making(TemplateTestCase):
    def template_events(self, stream: Any) -> List[Any]:
        stream.close()
        return [event for event in stream if event["kind"] == "template"]

    def test_making_is_told_from_its_beginning_to_its_end_and_a_clone_has_none(self) -> None:
        stream = self.manager.events()
        with self.assertLogs(level="INFO") as logs:
            vm = self.running()
            self.assertTrue(eventually(lambda: any("started in" in line for line in logs.output)))
        told = [line for line in logs.output if vm.vm_id in line and "the template of such VMs is made" in line]
        self.assertEqual(len(told), 1, logs.output)
        events = self.template_events(stream)
        self.assertEqual({event["vm_id"] for event in events}, {vm.vm_id})
        stages = ["template", "drives", "launch", "guest boot", "warm-up", "save", "end", "done"]
        self.assertEqual([event["stage"] for event in events], stages)
        fractions = [event["fraction"] for event in events]
        self.assertEqual((fractions[0], fractions[-1], fractions), (0.0, 1.0, sorted(fractions)))
        again = self.manager.events()
        self.assertEqual(self.origin(self.running()), "clone")
        self.assertEqual(self.template_events(again), [])

    def test_making_that_fails_is_told_so_and_the_vm_boots(self) -> None:
        def kill(event: Any) -> None:
            if event.get("stage") == "guest boot":
                for pid in children():
                    if b"microvm-jail" in Path("/proc/{}/cmdline".format(pid)).read_bytes():
                        os.kill(pid, signal.SIGKILL)

        stream = self.manager.events()
        with self.manager.on_event(kill):
            self.assertEqual(self.origin(self.running()), "boot")
        last = self.template_events(stream)[-1]
        self.assertEqual((last["stage"], last["fraction"]), ("failed", 1.0))
        self.assertTrue(last["detail"])


class TestIdentity(TemplateTestCase):
    def test_clones_share_no_random_number_name_or_key(self) -> None:
        program = random_program(self.folder).read_bytes()
        seen: Dict[str, Set[str]] = {}
        for index in range(CLONES):
            vm = self.running()
            self.assertEqual(self.origin(vm), "clone")
            for name, value in self.identity(vm, program).items():
                self.assertNotIn(value, seen.setdefault(name, set()), "{} of clone {}".format(name, index))
                seen[name].add(value)
            self.assertTrue(self.manager.destroy_vm(vm.vm_id))
        self.assertEqual({name: len(values) for name, values in seen.items()}, {name: CLONES for name in seen})
        self.assertEqual(len(self.templates()), 1)

    def identity(self, vm: Any, program: bytes) -> Dict[str, str]:
        """All that must differ; the clock is checked on the way."""
        # The clock is set by a message, so its error is up to that message's delay: 25 ms, more on a busy host.
        tolerance = max(CLOCK_TOLERANCE_S, vm.get_info()["start"]["stages_seconds"]["handshake"])
        before = time.time()
        told = self.result(vm, "system_info")["time_unix"]
        after = time.time()
        self.assertGreater(told, before - tolerance)
        self.assertLess(told, after + tolerance)
        vm.upload(io.BytesIO(program), "/run/ask", mode=0o755)
        run = lambda script: self.result(vm, "exec", shell(script))["stdout"].strip()
        getrandom, start = run("/run/ask").split()
        found = {
            "getrandom": getrandom,
            "AT_RANDOM": start,
            "/dev/urandom": run("head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \\n'"),
            "/dev/random": run("head -c 32 /dev/random | od -An -tx1 | tr -d ' \\n'"),
            "kernel uuid": run("cat /proc/sys/kernel/random/uuid"),
            "boot id": run("cat /proc/sys/kernel/random/boot_id"),
            "machine id": run("cat /etc/machine-id"),
            "hostname": run("hostname"),
        }
        self.assertEqual(found["hostname"], run("cat /etc/hostname"))
        self.assertRegex(found["machine id"], "^[0-9a-f]{32}$")
        self.assertRegex(found["boot id"], "^[0-9a-f-]{36}$")
        return found

    def test_clones_of_one_moment_share_no_random_number(self) -> None:
        program = random_program(self.folder).read_bytes()
        vms = [self.running() for _ in range(4)]
        found = [self.identity(vm, program) for vm in vms]
        for name in found[0]:
            self.assertEqual(len({identity[name] for identity in found}), len(vms), name)


class TestDamage(TemplateTestCase):
    def damaged(self, name: str, at: int) -> None:
        """A byte of one file is changed; the next VM is a clone of a new template, and the log says why."""
        vm = self.running()
        template = self.template()
        flip(template / name, at)
        before = made(template / name)
        with self.assertLogs(level="WARNING") as logs:
            again = self.running()
            self.assertTrue(eventually(lambda: any("damaged" in line for line in logs.output)), logs.output)
        self.assertEqual(self.result(again, "ping"), "pong")
        self.assertEqual(self.origin(again), "clone")
        self.assertEqual(self.template(), template)
        self.assertNotEqual(made(template / name), before)
        # The first clone still runs on the old template's memory.
        self.assertEqual(self.result(vm, "ping"), "pong")

    def test_ram_with_one_byte_changed_is_made_again(self) -> None:
        self.damaged("ram", 64 << 20)

    def test_state_with_one_byte_changed_is_made_again(self) -> None:
        self.damaged("state", 1000)

    def test_disk_with_one_byte_changed_is_made_again(self) -> None:
        self.damaged("disk", 1025)

    def test_manifest_with_one_byte_changed_is_made_again(self) -> None:
        self.damaged("manifest", 20)

    def test_template_of_another_is_not_restored(self) -> None:
        self.running()
        first = self.template()
        self.running(resource_limits=limits(memory_mb=129))
        (other,) = [path for path in self.templates() if path != first]
        shutil.rmtree(str(first))
        shutil.copytree(str(other), str(first))
        with self.assertLogs(level="WARNING") as logs:
            vm = self.running()
            self.assertTrue(eventually(lambda: any("something else" in line for line in logs.output)), logs.output)
        self.assertEqual(self.origin(vm), "clone")

    def test_another_process_notices_damage_too(self) -> None:
        self.assertEqual(self.one_start(), "clone")
        flip(self.template() / "ram", 64 << 20)
        before = made(self.template() / "ram")
        self.assertEqual(self.one_start(), "clone")
        self.assertNotEqual(made(self.template() / "ram"), before)

    def test_kernel_with_one_byte_changed_has_a_template_of_its_own(self) -> None:
        kernel = self.folder / "vmlinux"
        shutil.copy(str(DATA / "vmlinux"), str(kernel))
        self.running(kernel_path=str(kernel))
        # The flipped byte lies in the text of /proc/version, so the kernel still boots.
        flip(kernel, kernel.read_bytes().index(b"Linux version 6"))
        vm = self.running(kernel_path=str(kernel))
        self.assertEqual(self.origin(vm), "clone")
        self.assertEqual(len(self.templates()), 2)

    def test_initramfs_with_one_byte_changed_has_a_template_of_its_own(self) -> None:
        copied = self.folder / "site" / IMPORT.replace(".", "/")
        shutil.copytree(str(DATA.parent), str(copied))
        self.assertEqual(self.one_start(str(self.folder / "site")), "clone")
        (first,) = self.templates()
        # The flipped byte lies in busybox's help text, so the guest still works.
        initramfs = copied / "_data" / "initramfs.cpio"
        flip(initramfs, initramfs.read_bytes().index(b"Usage: "))
        self.assertEqual(self.one_start(str(self.folder / "site")), "clone")
        self.assertEqual(len(self.templates()), 2)

    def test_rootfs_that_changed_has_a_template_of_its_own(self) -> None:
        rootfs = make_rootfs(self.folder / "rootfs.ext4")
        os.chmod(str(self.folder), 0o755)
        os.chmod(str(rootfs), 0o644)
        self.running(rootfs_path=str(rootfs))
        flip(rootfs, rootfs.read_bytes().index(b"tests\n"))
        vm = self.running(rootfs_path=str(rootfs))
        self.assertEqual(self.origin(vm), "clone")
        self.assertEqual(self.result(vm, "exec", shell("cat /etc/made-by"))["stdout"], "4ests\n")
        self.assertEqual(len(self.templates()), 2)


class TestCache(TemplateTestCase):
    def test_two_processes_make_one_template(self) -> None:
        code = ONE_START.format(module=IMPORT, cache=str(self.cache))
        command = [sys.executable, "-c", code]
        both = [subprocess.Popen(command, stdout=subprocess.PIPE, universal_newlines=True) for _ in range(2)]
        self.assertEqual([process.communicate(timeout=120)[0].strip() for process in both], ["clone", "clone"])
        self.assertEqual(len(self.templates()), 1)

    def test_folders_are_for_their_owner_only(self) -> None:
        self.running()
        for path in (self.cache / "templates", self.template()):
            self.assertEqual(path.stat().st_mode & 0o777, 0o700, path)

    def test_cache_that_others_may_write_to_is_not_used(self) -> None:
        os.chmod(str(self.cache), 0o777)
        (self.cache / "templates").mkdir(mode=0o777)
        os.chmod(str(self.cache / "templates"), 0o777)
        self.assert_refused("777")
        os.chmod(str(self.cache), 0o700)
        self.assert_refused("cache_dir")
        self.assertEqual(list(self.cache.iterdir()), [self.cache / "templates"])

    def assert_refused(self, named: str) -> None:
        """Neither a VM nor a cleaning up uses the cache; the error says which key to set."""
        vm = self.manager.get_vm(self.create())
        self.assertFalse(vm.start())
        self.assertIn("cache_dir", str(vm.last_error))
        self.assertIn(named, str(vm.last_error))
        with self.assertRaises(HostError) as caught, MicroVMIsolationManager(self.config):
            pass
        self.assertEqual((caught.exception.code, caught.exception.details["field"]), ("folder_refused", 'config["cache_dir"]'))

    def test_cache_with_files_of_others_is_refused_and_keeps_them(self) -> None:
        for name in ("templates/admin/base.html", "templates/" + "0" * 32 + "/page.html", "snapshots/2024/photo", "suspended/x/y"):
            path = self.cache / name
            path.parent.mkdir(parents=True)
            path.write_text("kept")
            os.utime(str(path.parent), (1, 1))
        before = sorted(self.cache.rglob("*"))
        self.assert_refused("templates")
        self.assertEqual(sorted(self.cache.rglob("*")), before)

    @unittest.skipUnless(os.geteuid() == 0, "needs root to give a folder to another user")
    def test_template_that_another_user_could_change_is_not_used(self) -> None:
        self.assertEqual(self.one_start(), "clone")
        template = self.template()
        for path in (self.cache, self.cache / "templates"):
            os.chown(str(path), 12345, -1)
            vm = self.manager.get_vm(self.create())
            started = vm.start()
            if path == self.cache:
                self.assertFalse(started)
                self.assertIn("12345", str(vm.last_error))
            else:
                self.assertEqual((started, self.origin(vm)), (True, "boot"), vm.last_error)
            self.assertTrue((template / "ram").exists())
            os.chown(str(path), 0, -1)
        self.assertEqual(self.one_start(), "clone")

    def test_ram_is_kept_sparse(self) -> None:
        self.running()
        stat = (self.template() / "ram").stat()
        self.assertEqual(stat.st_size, 128 << 20)
        self.assertLess(stat.st_blocks * 512, 64 << 20)

    def test_prepare_makes_the_template_ahead(self) -> None:
        self.manager.prepare(limits())
        self.assertEqual(len(self.templates()), 1)
        self.assertEqual(self.manager.get_resource_usage()["templates"]["count"], 1)
        self.assertEqual(self.manager.get_resource_usage()["total_vms"], 0)
        vm = self.running()
        self.assertNotIn("guest boot", vm.get_info()["start"]["stages_seconds"])

    def test_prepare_tells_its_stages_to_the_caller_on_its_own_thread(self) -> None:
        told: List[Any] = []
        threads = set()

        def tell(stage: str, fraction: float) -> None:
            threads.add(threading.current_thread())
            told.append((stage, fraction))

        stream = self.manager.events()
        self.assertTrue(self.manager.prepare(limits(), progress=tell), self.manager.last_error)
        stream.close()
        events = [(event["stage"], event["fraction"]) for event in stream if event["kind"] == "template"]
        self.assertEqual(told, events)
        self.assertEqual((told[0], told[-1], len(told)), (("template", 0.0), ("done", 1.0), 8))
        self.assertEqual(threads, {threading.current_thread()})
        # It is there, and nothing is made.
        told.clear()
        self.assertTrue(self.manager.prepare(limits(), progress=tell))
        self.assertEqual(told, [("done", 1.0)])

    def test_prepare_ends_with_what_its_callback_raises_and_the_template_is_made_all_the_same(self) -> None:
        def tell(stage: str, fraction: float) -> None:
            if stage == "guest boot":
                raise ZeroDivisionError(stage)

        with self.assertRaisesRegex(ZeroDivisionError, "guest boot"):
            self.manager.prepare(limits(), progress=tell)
        self.assertTrue(eventually(self.templates, 60.0))
        self.assertEqual(self.origin(self.running()), "clone")

    def test_prepare_refuses_a_callback_that_cannot_be_called(self) -> None:
        with self.assertRaisesRegex(InvalidTypeError, "progress must be callable with a stage and a fraction, or None, not 7"):
            self.manager.prepare(limits(), progress=7)
        self.assertEqual(self.manager.get_resource_usage()["templates"]["count"], 0)


class TestSmallCache(TemplateTestCase):
    more = {"cache_max_mb": 1}

    def test_more_than_may_be_kept_is_pruned_oldest_first(self) -> None:
        first = self.running()
        (oldest,) = self.templates()
        self.running(resource_limits=limits(memory_mb=129))
        self.assertEqual(len(self.templates()), 1)
        self.assertNotIn(oldest, self.templates())
        # Clones of a pruned template still have its memory.
        self.assertEqual(self.result(first, "ping"), "pong")


class TestOld(TemplateTestCase):
    more = {"cache_max_age_days": 1}

    def test_templates_not_used_for_long_are_pruned(self) -> None:
        self.assertEqual(self.one_start(), "clone")
        template = self.template()
        long_ago = time.time() - 2 * 86400
        os.utime(str(template / "used"), (long_ago, long_ago))
        with MicroVMIsolationManager(self.config):
            self.assertTrue(eventually(lambda: not template.exists()))


class TestWithoutTemplates(TemplateTestCase):
    more = {"templates": False}

    def test_vm_boots(self) -> None:
        vm = self.running()
        self.assertEqual(self.origin(vm), "boot")
        self.assertFalse((self.cache / "templates").exists())


class TestDeath(TemplateTestCase):
    def test_kill_at_any_moment_leaves_nothing_that_is_used_or_stays(self) -> None:
        runtime = self.folder / "run"
        code = KEEPS_MAKING.format(module=IMPORT, cache=str(self.cache), runtime=str(runtime))
        seed = random.randrange(1 << 32)
        moments = random.Random(seed)
        for index in range(KILLS):
            process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
            assert process.stdout is not None
            self.assertEqual(process.stdout.readline(), b"up\n")
            time.sleep(moments.uniform(0.0, 2.5))
            process.send_signal(signal.SIGKILL)
            process.wait()
            process.stdout.close()
            if index % 2 == 0:
                # The other half of the runs find a template that was there before.
                shutil.rmtree(str(self.cache / "templates"), ignore_errors=True)
            with self.subTest(seed=seed, index=index):
                self.assertEqual(self.one_start(), "clone")
                self.assertEqual([path.suffix for path in self.templates()], [""])
                self.assertTrue(eventually(lambda: not self.users_of(runtime)), self.users_of(runtime))

    def users_of(self, runtime: Path) -> List[Tuple[int, str]]:
        """The processes whose mounts come from a runtime folder."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    mounts = (entry / "mountinfo").read_text()
                except OSError:
                    continue
                if str(runtime) in mounts:
                    found.append((int(entry.name), (entry / "comm").read_text().strip()))
        return found


class TestPool(TemplateTestCase):
    more = {"pool": [{"size": 2}], "max_vcpus": 3}

    def ready(self) -> int:
        (usage,) = self.manager.get_resource_usage()["pool"]
        return int(usage["ready"])

    def test_start_takes_a_warm_vm_and_the_pool_is_refilled(self) -> None:
        self.assertTrue(eventually(lambda: self.ready() == 2, 30))
        usage = self.manager.get_resource_usage()
        self.assertEqual((usage["total_vms"], usage["vcpus_allocated"]), (0, 0))
        vm = self.running()
        self.assertEqual(self.origin(vm), "pool")
        self.assertEqual(self.result(vm, "exec", shell("hostname"))["stdout"].strip(), vm.vm_id.replace("_", "-"))
        self.assertEqual(self.result(vm, "system_info")["vm_id"], vm.vm_id)
        self.assertTrue(eventually(lambda: self.ready() == 2, 30))

    def test_vms_of_the_user_come_before_the_pool(self) -> None:
        self.assertTrue(eventually(lambda: self.ready() == 2, 30))
        vms = [self.running() for _ in range(3)]
        self.assertEqual(self.ready(), 0)
        self.assertEqual([self.result(vm, "ping") for vm in vms], ["pong"] * 3)
        time.sleep(1)
        self.assertEqual(self.ready(), 0)

    def test_vm_of_another_shape_is_a_plain_clone(self) -> None:
        self.assertTrue(eventually(lambda: self.ready() == 2, 30))
        vm = self.running(resource_limits=limits(max_processes=77))
        self.assertEqual(self.origin(vm), "clone")

    def test_warm_vms_share_nothing(self) -> None:
        self.assertTrue(eventually(lambda: self.ready() == 2, 30))
        vms = [self.running(), self.running()]
        script = "cat /etc/machine-id /proc/sys/kernel/random/boot_id; head -c 16 /dev/urandom | od -An -tx1"
        told = [self.result(vm, "exec", shell(script))["stdout"].split("\n") for vm in vms]
        self.assertEqual([self.origin(vm) for vm in vms], ["pool", "pool"])
        self.assertEqual([len(lines) for lines in told], [4, 4])
        self.assertEqual([line for line in told[0] if line and line in told[1]], [])

    def test_clock_is_right_after_standing_by(self) -> None:
        self.assertTrue(eventually(lambda: self.ready() == 2, 30))
        time.sleep(1.5)
        vm = self.running()
        before = time.time()
        told = self.result(vm, "system_info")["time_unix"]
        self.assertGreater(told, before - CLOCK_TOLERANCE_S)
        self.assertLess(told, time.time() + CLOCK_TOLERANCE_S)

    def test_warm_vm_that_died_is_replaced(self) -> None:
        self.assertTrue(eventually(lambda: self.ready() == 2, 30))
        for pid in self.warm_pids():
            os.kill(pid, signal.SIGKILL)
        vm = self.running()
        self.assertEqual(self.result(vm, "ping"), "pong")
        self.assertTrue(eventually(lambda: self.ready() == 2, 30))

    def warm_pids(self) -> List[int]:
        """What the pool runs: no VM of the user's does. The janitor is this process's, the zygote the manager's."""
        programs = {pid: Path("/proc/{}/cmdline".format(pid)).read_bytes() for pid in children()}
        return [pid for pid, program in programs.items() if not re.search(b"microvm-(janitor|zygote)", program)]

    def test_pool_goes_with_the_manager(self) -> None:
        self.assertTrue(eventually(lambda: self.ready() == 2, 30))
        pids = self.warm_pids()
        self.assertEqual(len(pids), 2)
        self.manager.stop()
        self.assertTrue(eventually(lambda: not [pid for pid in pids if Path("/proc/{}".format(pid)).exists()]))


class TestPoolForms(TemplateTestCase):
    def test_each_form_becomes_a_vm(self) -> None:
        for form in ("blank", "restored", "ready"):
            with self.subTest(form=form), MicroVMIsolationManager(
                dict(self.config, pool={"memory_mb": 128, "disk_size_mb": 64, "size": 1, "form": form})
            ) as manager:
                self.assertTrue(eventually(lambda: manager.get_resource_usage()["pool"][0]["ready"] == 1, 30))
                vm = manager.get_vm(manager.create_vm(IsolationType.SESSION, limits()))
                self.assertTrue(vm.start(), vm.last_error)
                self.assertEqual(self.origin(vm), "pool")
                self.assertEqual(self.result(vm, "system_info")["hostname"], re.sub("_", "-", vm.vm_id))


if __name__ == "__main__":
    unittest.main()
