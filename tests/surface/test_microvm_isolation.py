"""The public API on real VMs."""

import copy
import dataclasses
import json
import os
import pickle
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from pathlib import Path
from typing import Any, Dict

from thirstys_waterfall.security.microvm_isolation import (
    CommunicationChannel,
    IsolationType,
    MicroVMInstance,
    MicroVMIsolationManager,
    QuotaExceededError,
    VMBackend,
    VMHealthMetrics,
    VmIdTakenError,
    VMNetworkConfig,
    VMResourceLimits,
    VMState,
    doctor,
)

from ..support import DATA, IMPORT, VMTestCase, alive, disks_of, eventually, limits, make_rootfs, shell


class Values(unittest.TestCase):
    def test_enums_are_real_enums_found_by_any_spelling(self) -> None:
        self.assertIs(VMBackend("CLOUD_HYPERVISOR"), VMBackend.CLOUD_HYPERVISOR)
        self.assertIs(VMBackend("qemu"), VMBackend.QEMU)
        self.assertEqual([t.value for t in IsolationType], ["browser_tab", "extension", "session", "plugin"])
        self.assertEqual(len(VMState), 8)
        for member in [*VMBackend, *VMState, *IsolationType]:
            self.assertIs(pickle.loads(pickle.dumps(member)), member)

    def test_dataclasses_compare_copy_and_pickle(self) -> None:
        network = VMNetworkConfig("tap0", "10.0.0.2", None, "10.0.0.1", ["8.8.8.8"], False, ["example.com:443"], False)
        for value in (VMResourceLimits(2, 1024), VMNetworkConfig(gateway="10.0.0.1"), network, VMHealthMetrics()):
            self.assertEqual(pickle.loads(pickle.dumps(value)), value)
            self.assertEqual(copy.deepcopy(value), value)
        self.assertEqual(dataclasses.replace(VMResourceLimits(), memory_mb=256).memory_mb, 256)
        self.assertEqual(VMResourceLimits(), VMResourceLimits(1, 512, 1024, 100, 1024, 128, None, None))

    def test_health_metrics_defaults_are_the_documented_ones(self) -> None:
        self.assertEqual(VMHealthMetrics(), VMHealthMetrics(0.0, 0, 0, 0, 0, 0.0, 0.0, "unknown"))


class Quotas(unittest.TestCase):
    def test_create_beyond_the_quota_is_none_with_the_reason(self) -> None:
        manager = MicroVMIsolationManager({"max_vcpus": 2})
        self.assertIsNotNone(manager.create_vm(IsolationType.PLUGIN, VMResourceLimits(vcpu_count=2)))
        self.assertIsNone(manager.create_vm(IsolationType.PLUGIN))
        self.assertIsInstance(manager.last_error, QuotaExceededError)
        self.assertEqual(manager.get_resource_usage()["vcpus_available"], 0)

    def test_destroy_gives_the_quota_back_once(self) -> None:
        manager = MicroVMIsolationManager()
        vm_id = manager.create_vm(IsolationType.PLUGIN)
        self.assertTrue(manager.destroy_vm(vm_id))
        self.assertFalse(manager.destroy_vm(vm_id))
        usage = manager.get_resource_usage()
        self.assertEqual((usage["vcpus_available"], usage["memory_available_mb"]), (16, 8192))

    def test_create_with_a_taken_id_is_none(self) -> None:
        manager = MicroVMIsolationManager()
        self.assertEqual(manager.create_vm("plugin", vm_id="mine"), "mine")
        self.assertIsNone(manager.create_vm("plugin", vm_id="mine"))
        self.assertIsInstance(manager.last_error, VmIdTakenError)

    def test_raise_on_error_raises_instead(self) -> None:
        manager = MicroVMIsolationManager({"raise_on_error": True, "max_vcpus": 1})
        manager.create_vm("plugin")
        with self.assertRaises(QuotaExceededError):
            manager.create_vm("plugin")

    def test_list_filters_by_type_and_state(self) -> None:
        manager = MicroVMIsolationManager()
        tab = manager.create_vm(IsolationType.BROWSER_TAB)
        plugin = manager.create_vm(IsolationType.PLUGIN)
        self.assertEqual(manager.list_vms(), [tab, plugin])
        self.assertEqual(manager.list_vms(isolation_type=IsolationType.PLUGIN), [plugin])
        self.assertEqual(manager.list_vms(state=VMState.RUNNING), [])
        self.assertIn("browser_tab", str(tab))

    def test_get_vm_is_the_same_object_each_time(self) -> None:
        manager = MicroVMIsolationManager()
        vm_id = manager.create_vm("plugin")
        self.assertIs(manager.get_vm(vm_id), manager.get_vm(vm_id))
        self.assertIsNone(manager.get_vm("other"))
        self.assertIsNone(manager.get_vm_info("other"))

    def test_legacy_attributes_are_there(self) -> None:
        manager = MicroVMIsolationManager({"max_vcpus": 3})
        self.assertEqual((manager._max_vcpus, manager._max_memory_mb, manager.config), (3, 8192, {"max_vcpus": 3}))
        self.assertFalse(manager._cleanup_active)
        manager.start()
        manager.start()
        self.assertTrue(manager._cleanup_active)
        manager.stop()
        manager.stop()
        self.assertFalse(manager._cleanup_active)


class Lifecycle(VMTestCase):
    def test_whole_life_of_a_vm(self) -> None:
        vm = self.manager.get_vm(self.create())
        self.assertIs(vm.get_state(), VMState.CREATED)
        self.assertFalse(vm.pause())
        self.assertEqual(vm.last_error.code, "invalid_state")
        self.assertTrue(vm.start() and vm.start())
        info = vm.get_info()
        folder = Path(info["socket_path"]).parent
        self.assertTrue(alive(info["pid"]))
        (disk,) = disks_of(vm.vm_id)
        self.assertTrue(vm.pause())
        self.assertIs(vm.get_state(), VMState.PAUSED)
        self.assertFalse(vm.pause())
        self.assertIsNone(vm.send_command("ping"))
        self.assertTrue(vm.resume())
        self.assertEqual(self.result(vm, "ping"), "pong")
        self.assertTrue(vm.stop() and vm.stop())
        self.assertFalse(alive(info["pid"]) or folder.exists() or disk.exists())
        self.assertTrue(vm.start(), vm.last_error)
        self.assertEqual(self.result(vm, "ping"), "pong")
        self.assertTrue(self.manager.destroy_vm(vm.vm_id))
        self.assertIs(vm.get_state(), VMState.DESTROYED)
        self.assertFalse(vm.start() or folder.exists() or disk.exists())

    def test_instance_without_a_manager_works(self) -> None:
        name = "alone-{}".format(os.getpid())
        vm = MicroVMInstance(name, VMBackend.QEMU, IsolationType.SESSION, limits())
        self.assertEqual((vm.vm_id, vm.backend, vm.isolation_type), (name, VMBackend.QEMU, IsolationType.SESSION))
        self.assertTrue(vm.start(), vm.last_error)
        self.addCleanup(vm.stop)
        self.assertEqual(vm.send_command("ping"), {"status": "ok", "result": "pong"})

    def test_id_taken_by_a_running_vm_of_another_manager_is_refused(self) -> None:
        vm = self.running()
        other = MicroVMInstance(vm.vm_id, "qemu", "plugin", limits())
        self.assertFalse(other.start())
        self.assertEqual(other.last_error.code, "vm_id_taken")
        self.assertEqual(self.result(vm, "ping"), "pong")

    def test_info_is_plain_data_and_true(self) -> None:
        info = self.running(resource_limits=limits(vcpu_count=2)).get_info()
        self.assertEqual(json.loads(json.dumps(info)), info)
        self.assertEqual((info["state"], info["backend"], info["isolation_type"]), ("running", "qemu", "browser_tab"))
        qemu = next(b for b in doctor()["backends"] if b["backend"] == "qemu")
        self.assertEqual(info["isolation_grade"], qemu["isolation_grade"])
        command = Path("/proc/{}/cmdline".format(info["pid"])).read_bytes().split(b"\0")
        accelerator = command[command.index(b"-accel") + 1].split(b",")[0].decode()
        self.assertEqual((info["accelerator"], accelerator), (qemu["accelerator"],) * 2)
        self.assertEqual(info["health_metrics"]["status"], "healthy")
        self.assertTrue(info["network_config"]["isolated"])

    def test_min_isolation_refuses_to_downgrade(self) -> None:
        if doctor()["kvm"]["usable"]:
            self.skipTest("this host has hardware virtualization")
        manager = MicroVMIsolationManager({"min_isolation": "hardware"})
        vm_id = manager.create_vm("plugin")
        self.assertFalse(manager.start_vm(vm_id))
        self.assertEqual(manager.last_error.code, "isolation_unavailable")

    def test_health_metrics_move_with_the_load(self) -> None:
        vm = self.running()
        self.result(vm, "exec", shell("i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done; dd if=/dev/zero of=/data/x bs=1M count=8; sync"))
        metrics = vm.get_health_metrics()
        self.assertEqual(metrics.health_status, "healthy")
        self.assertGreater(metrics.cpu_usage_percent, 1)
        self.assertGreater(metrics.disk_io_bytes, 8 << 20)
        self.assertAlmostEqual(metrics.last_health_check, time.time(), delta=5)

    def test_pause_stops_the_vcpus_and_resume_sets_the_clock(self) -> None:
        vm = self.running()
        pid = vm.get_info()["pid"]
        self.assertTrue(vm.pause())
        ticks = lambda: sum(map(int, Path("/proc/{}/stat".format(pid)).read_text().rpartition(")")[2].split()[11:13]))
        before = ticks()
        time.sleep(3)
        self.assertLessEqual(ticks() - before, 5)
        self.assertTrue(vm.resume())
        asked = time.time()
        told = self.result(vm, "system_info")["time_unix"]
        # However long a busy host takes for the answer.
        self.assertTrue(asked - 0.5 <= told <= time.time() + 0.5, (asked, told, time.time()))

    def test_two_guests_share_no_secret_name_or_number(self) -> None:
        vms = [self.running(), self.running()]
        for command in ("cat /etc/machine-id", "hostname", "cat /proc/sys/kernel/random/uuid"):
            answers = {self.result(vm, "exec", shell(command))["stdout"] for vm in vms}
            self.assertEqual(len(answers), 2, command)

    def test_nothing_secret_is_in_a_file_or_in_argv(self) -> None:
        info = self.running().get_info()
        # QEMU's guest gets its key by a port; the conformance suite checks the backends that use a drive.
        files = {path.name for path in Path(info["socket_path"]).parent.iterdir()}
        self.assertLessEqual(files, {"sock", "lock", "cgroups"})
        self.assertNotIn(b"key", Path("/proc/{}/cmdline".format(info["pid"])).read_bytes())

    def test_vmm_is_in_namespaces_of_its_own(self) -> None:
        pid = self.running().get_info()["pid"]
        for name in ("user", "mnt", "pid", "net", "ipc", "uts"):
            mine, theirs = (os.readlink("/proc/{}/ns/{}".format(who, name)) for who in ("self", pid))
            self.assertNotEqual(mine, theirs, name)
        self.assertEqual(len(Path("/proc/{}/net/dev".format(pid)).read_text().splitlines()), 3)


class Guest(VMTestCase):
    def test_programs_and_their_ends(self) -> None:
        vm = self.running()
        done = self.result(vm, "exec", shell("cat; echo $A; pwd; echo e >&2; exit 3", stdin="in\n", env={"A": "b"}, cwd="/tmp"))
        self.assertEqual((done["stdout"], done["stderr"], done["exit_code"]), ("in\nb\n/tmp\n", "e\n", 3))
        self.assertEqual(self.result(vm, "exec", shell("kill -9 $$"))["signal"], 9)
        self.assertIn("uid=1000", self.result(vm, "exec", {"program": "id", "uid": 1000})["stdout"])
        many = self.result(vm, "exec", shell("yes | head -c 3000000"))
        self.assertTrue(many["stdout_truncated"])
        self.assertEqual(len(many["stdout"]), 1 << 20)
        binary = self.result(vm, "exec", shell("printf '\\377'"))
        self.assertEqual(binary["stdout_base64"], "/w==")
        self.assertEqual(self.failure(vm, "exec", {"program": "sleep", "args": ["9"], "timeout": 0.2}), "timeout")
        self.assertEqual(self.failure(vm, "exec", {"program": "no-such-program"}), "program_not_found")
        self.assertEqual(self.failure(vm, "exec", {"program": "/etc/passwd"}), "permission_denied")
        self.assertEqual(self.result(vm, "ping"), "pong")

    def test_timeout_ends_the_programs_whole_tree(self) -> None:
        vm = self.running()
        script = "setsid sleep 98765 & setsid setsid sleep 98765 & sleep 98765"
        self.assertEqual(self.failure(vm, "exec", shell(script, timeout=0.5)), "timeout")
        found = self.result(vm, "exec", shell("sleep 0.2; ps -o args | grep -c 'sleep 9876[5]'"))
        self.assertEqual(found["stdout"].strip(), "0")

    def test_missing_program_is_said_so_every_time(self) -> None:
        # The agent's reaper and its failed spawn both wait for the child; neither may take the status from the other.
        vm = self.running()
        for _ in range(100):
            self.assertEqual(self.failure(vm, "exec", {"program": "no-such-program"}), "program_not_found")

    def test_many_programs_leave_no_group_behind(self) -> None:
        vm = self.running()
        for _ in range(50):
            self.result(vm, "exec", {"program": "true"})
        groups = self.result(vm, "exec", shell("ls -d /sys/fs/cgroup/work/*/ | wc -l"))["stdout"]
        self.assertLessEqual(int(groups), 3)

    def test_files_round_trip_and_fail_with_codes(self) -> None:
        vm = self.running()
        self.result(vm, "write_file", {"path": "/data/a/b", "data": "hello", "make_dirs": True})
        self.assertEqual(self.result(vm, "read_file", {"path": "/data/a/b", "offset": 1})["data"], "ello")
        self.assertEqual(self.failure(vm, "read_file", {"path": "/none"}), "file_not_found")

    def test_disk_has_its_size_and_no_more(self) -> None:
        vm = self.running(resource_limits=limits(disk_size_mb=64))
        self.assertIn(self.result(vm, "system_info")["disk_total_mb"], range(58, 65))
        full = self.result(vm, "exec", shell("dd if=/dev/zero of=/data/x bs=1M count=80"))
        self.assertIn("No space left", full["stderr"])
        self.assertEqual(self.failure(vm, "write_file", {"path": "/data/y", "data": "x" * 100000}), "no_space")
        self.assertEqual(self.result(vm, "ping"), "pong")

    def test_limits_of_files_and_processes_hold_in_the_guest(self) -> None:
        vm = self.running(resource_limits=limits(max_processes=20, max_file_handles=64))
        done = self.result(vm, "exec", shell("ulimit -n; for i in $(seq 40); do sleep 2 & done"))
        self.assertEqual(done["stdout"].strip(), "64")
        self.assertIn("can't fork", done["stderr"])

    def test_render_page_in_both_forms(self) -> None:
        vm = self.running()
        page = self.result(vm, "render_page", {"html": "<title>T</title><p>a<script>x()</script><a href=/b>c</a>"})
        self.assertEqual((page["title"], page["text"]), ("T", "a c"))
        self.assertNotIn("script", page["sanitized_html"])
        self.assertEqual(self.result(vm, "execute", {"action": "render_page"})["url"], "about:blank")
        self.assertEqual(self.failure(vm, "render_page", {"url": "https://example.com"}), "network_isolated")
        self.assertEqual(self.failure(vm, "process_request", {"url": "https://example.com"}), "network_isolated")

    def test_custom_action_takes_and_gives_json(self) -> None:
        vm = self.running()
        write = {"path": "/data/actions.d/echo_it", "data": "#!/bin/sh\ncat\n", "mode": "0755", "make_dirs": True}
        self.result(vm, "write_file", write)
        self.assertEqual(self.result(vm, "echo_it", {"a": [1]}), {"a": [1]})
        self.assertIn("echo_it", self.result(vm, "list_actions")["actions"])
        self.result(vm, "write_file", dict(write, data="#!/bin/sh\necho no >&2; exit 1\n"))
        self.assertEqual(self.failure(vm, "echo_it", {}), "action_failed")

    def test_guest_has_no_network_device(self) -> None:
        self.assertEqual(self.result(self.running(), "exec", shell("ls /sys/class/net"))["stdout"].split(), ["lo"])


class Images(VMTestCase):
    def test_rootfs_serves_two_vms_and_is_not_written(self) -> None:
        with tempfile.TemporaryDirectory() as name:
            image = make_rootfs(Path(name) / "root.ext4")
            before = image.read_bytes()
            vms = [self.running(rootfs_path=str(image)), self.running(rootfs_path=image)]
            self.result(vms[0], "exec", shell("echo mine > /etc/made-by; touch /new"))
            self.assertEqual(self.result(vms[0], "read_file", {"path": "/etc/made-by"})["data"], "mine\n")
            self.assertEqual(self.result(vms[1], "read_file", {"path": "/etc/made-by"})["data"], "tests\n")
            self.manager.destroy_all_vms()
            self.assertEqual(image.read_bytes(), before)

    def test_kernel_path_is_the_one_that_boots(self) -> None:
        with tempfile.TemporaryDirectory() as name:
            kernel, image = Path(name) / "own", (DATA / "vmlinux").read_bytes()
            self.assertIn(b"(build@microvm)", image)
            kernel.write_bytes(image.replace(b"(build@microvm)", b"(tests@kernel1)"))
            vm = self.running(kernel_path=str(kernel))
            self.assertIn("tests@kernel1", self.result(vm, "exec", shell("cat /proc/version"))["stdout"])

    def test_kernel_that_panics_tells_stage_and_console(self) -> None:
        with tempfile.TemporaryDirectory() as name:
            image = bytearray(make_rootfs(Path(name) / "root.ext4").read_bytes())
            image[4096:400000] = os.urandom(400000 - 4096)
            broken = Path(name) / "broken.ext4"
            broken.write_bytes(image)
            vm = self.manager.get_vm(self.create(rootfs_path=str(broken)))
            self.assertFalse(vm.start())
            self.assertEqual((vm.last_error.code, vm.last_error.details["stage"]), ("start_failed", "guest setup"))
            self.assertIn("EXT4-fs", vm.last_error.details["console_tail"])


class Channels(VMTestCase):
    def test_legacy_framing_on_a_bare_socket_works(self) -> None:
        path = self.running().get_info()["socket_path"]
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(10)
            client.connect(path)

            def ask(body: bytes) -> Dict[str, Any]:
                client.sendall(struct.pack(">I", len(body)) + body)
                (length,) = struct.unpack(">I", client.recv(4, socket.MSG_WAITALL))
                return dict(json.loads(client.recv(length, socket.MSG_WAITALL)))

            self.assertEqual(ask(b'{"type": "ping"}'), {"type": "pong"})
            answer = ask(b'{"type": "command", "command": "exec", "params": {"program": "echo", "args": ["x"]}, "id": 7}')
            self.assertEqual((answer["result"]["stdout"], answer["id"]), ("x\n", 7))
            self.assertEqual(ask(b"{nonsense")["error"]["code"], "bad_message")
            self.assertEqual(ask(b'{"type": "ping"}'), {"type": "pong"})

    def test_channels_get_their_own_answers_in_order(self) -> None:
        vm_id = self.running().vm_id
        wrong = []

        def talk(name: str) -> None:
            with CommunicationChannel(vm_id) as channel:
                for number in range(20):
                    text = "{}-{}".format(name, number)
                    params = {"path": "/tmp/{}".format(name), "data": text}
                    channel.send_message({"type": "command", "command": "write_file", "params": params})
                    channel.send_message({"type": "command", "command": "read_file", "params": {"path": params["path"]}})
                    first, second = channel.receive_message(10), channel.receive_message(10)
                    if not (first and second and second["result"]["data"] == text):
                        wrong.append((text, first, second))

        threads = [threading.Thread(target=talk, args=("c{}".format(n),)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(wrong, [])

    def test_another_process_of_this_user_can_talk(self) -> None:
        vm_id = self.running().vm_id
        code = (
            "from {} import CommunicationChannel as C\nc = C({!r})\nassert c.connect(), c.last_error\n"
            "c.send_message({{'type': 'ping'}}); print(c.receive_message(10))"
        ).format(IMPORT, vm_id)
        output = subprocess.check_output([sys.executable, "-c", code], universal_newlines=True)
        self.assertEqual(output.strip(), "{'type': 'pong'}")

    def test_closed_channel_says_so_and_connects_again(self) -> None:
        vm = self.running()
        channel = CommunicationChannel(vm.vm_id)
        self.assertIn(vm.vm_id, channel.socket_path)
        self.assertFalse(channel.send_message({"type": "ping"}))
        self.assertEqual(channel.last_error.code, "channel_closed")
        for _ in range(2):
            self.assertTrue(channel.connect())
            self.assertIsNone(channel.receive_message(timeout=0.05))
            self.assertEqual(channel.last_error.code, "channel_timeout")
            self.assertTrue(channel.send_message({"type": "ping"}))
            self.assertEqual(channel.receive_message(10), {"type": "pong"})
            channel.close()
        channel.connect()
        vm.stop()
        self.assertIsNone(channel.receive_message(5))
        self.assertFalse(channel.connect())

    def test_oversized_message_is_refused_and_the_vm_lives(self) -> None:
        vm = self.running()
        self.assertIsNone(vm.send_command("write_file", {"path": "/tmp/x", "data": "x" * (17 << 20)}))
        self.assertEqual(vm.last_error.code, "message_too_large")
        self.assertEqual(self.result(vm, "ping"), "pong")


class Deaths(VMTestCase):
    config = {"cleanup_interval_s": 1.0}

    def test_killed_vmm_is_an_error_within_a_second_and_cleaned_up(self) -> None:
        victim, other = self.running(), self.running()
        os.kill(victim.get_info()["pid"], 9)
        self.assertTrue(eventually(lambda: victim.get_state() is VMState.ERROR, 20.0))
        self.assertEqual(victim.last_error.code, "vm_died")
        self.assertIn("SIGKILL", str(victim.last_error))
        self.assertEqual(self.result(other, "ping"), "pong")
        self.assertTrue(eventually(lambda: self.manager.list_vms() == [other.vm_id], 20.0))
        self.assertEqual(self.manager.get_resource_usage()["vcpus_allocated"], 1)

    def test_guest_that_reboots_is_stopped_not_running(self) -> None:
        vm = self.running()
        vm.send_command("exec", shell("reboot -f", timeout=5))
        self.assertTrue(eventually(lambda: vm.get_state() is VMState.STOPPED, 20.0), vm.get_state())


if __name__ == "__main__":
    unittest.main()
