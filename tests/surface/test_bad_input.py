"""A table of wrong input: what is given, and the documented error that must come back."""

import contextlib
import io
import os
import tempfile
import unittest
from typing import Any, Callable, Dict, List, Tuple, Type

from thirstys_waterfall.security.microvm_isolation import (
    CommunicationChannel,
    HostError,
    IsolationType,
    MicroVMInstance,
    MicroVMIsolationManager,
    VMBackend,
    VMNetworkConfig,
    VMResourceLimits,
    VMState,
    _cli,
)
from thirstys_waterfall.security.microvm_isolation._bench.report import Report

from ..support import DATA, VMTestCase, limits, shell

Case = Tuple[str, Callable[[], Any], Type[BaseException], Tuple[str, ...]]


def network(**fields: Any) -> Callable[[], Any]:
    return lambda: VMNetworkConfig(isolated_network=False, **fields)


def size(**fields: Any) -> Callable[[], Any]:
    return lambda: VMResourceLimits(**fields)


def configured(config: Any) -> Callable[[], Any]:
    return lambda: MicroVMIsolationManager(config)


def created(*positional: Any, **fields: Any) -> Callable[[], Any]:
    return lambda: MicroVMIsolationManager().create_vm(*(positional or ("plugin",)), **fields)


def changed_limits() -> Any:
    changed = VMResourceLimits()
    changed.memory_mb = -5
    return MicroVMIsolationManager().create_vm("plugin", changed)


def itself() -> Dict[str, Any]:
    knot: Dict[str, Any] = {}
    knot["knot"] = knot
    return knot


# Name of the case, call, class of the error, words in its message.
RAISED: List[Case] = [
    ("no vCPU", size(vcpu_count=0), ValueError, ("vcpu_count", "0", "1 to 32")),
    ("too many vCPUs", size(vcpu_count=33), ValueError, ("vcpu_count", "33")),
    ("negative memory", size(memory_mb=-1), ValueError, ("memory_mb", "-1")),
    ("too little memory", size(memory_mb=63), ValueError, ("memory_mb", "63", "64")),
    ("memory beyond 64 bits", size(memory_mb=1 << 70), ValueError, ("memory_mb",)),
    ("too small a disk", size(disk_size_mb=7), ValueError, ("disk_size_mb", "7", "8")),
    ("no bandwidth", size(network_bandwidth_mbps=0), ValueError, ("network_bandwidth_mbps",)),
    ("too few files", size(max_file_handles=1), ValueError, ("max_file_handles",)),
    ("no process", size(max_processes=0), ValueError, ("max_processes",)),
    ("vCPUs as text", size(vcpu_count="2"), TypeError, ("vcpu_count", "'2'", "int")),
    ("vCPUs as float", size(vcpu_count=1.5), TypeError, ("vcpu_count", "1.5")),
    ("vCPUs as bool", size(vcpu_count=True), TypeError, ("vcpu_count", "True")),
    ("memory as None", size(memory_mb=None), TypeError, ("memory_mb", "None")),
    ("limits changed after they were made", changed_limits, ValueError, ("memory_mb", "-5")),
    ("IP that is none", network(ip_address="300.1.1.1"), ValueError, ("ip_address", "300.1.1.1")),
    ("IP that is the loopback", network(ip_address="127.0.0.1"), ValueError, ("ip_address",)),
    ("prefix that is none", network(ip_address="10.0.0.1/40"), ValueError, ("ip_address", "/40")),
    ("MAC that is none", network(mac_address="52:54:00"), ValueError, ("mac_address", "52:54:00")),
    ("MAC of a group", network(mac_address="01:00:5e:00:00:01"), ValueError, ("mac_address", "unicast")),
    ("gateway elsewhere", network(ip_address="10.0.0.2", gateway="10.1.0.1"), ValueError, ("gateway", "10.0.0.0/24")),
    ("gateway that is none", network(gateway="gate"), ValueError, ("gateway", "gate")),
    ("DNS that is a name", network(dns_servers=["dns.example"]), ValueError, ("dns_servers", "dns.example")),
    ("DNS as text", network(dns_servers="8.8.8.8"), TypeError, ("dns_servers",)),
    ("DNS of numbers", network(dns_servers=[8]), TypeError, ("dns_servers", "8")),
    ("tap with a slash", network(tap_device="a/b"), ValueError, ("tap_device", "a/b")),
    ("tap with a comment", network(tap_device="a#b"), ValueError, ("tap_device", "a#b")),
    ("tap by its index", network(tap_device="if7"), ValueError, ("tap_device", "if7")),
    ("tap too long", network(tap_device="x" * 16), ValueError, ("tap_device", "15")),
    ("IP that is link-local", network(ip_address="169.254.7.7"), ValueError, ("ip_address", "169.254.7.7")),
    ("IP of everybody", network(ip_address="10.0.0.255"), ValueError, ("ip_address", "10.0.0.255")),
    ("gateway of everybody", network(ip_address="10.0.0.2", gateway="10.0.0.255"), ValueError, ("gateway",)),
    ("gateway that is the VM", network(ip_address="10.0.0.2", gateway="10.0.0.2"), ValueError, ("gateway",)),
    ("egress as text", network(egress="example.com"), TypeError, ("egress", "example.com")),
    ("egress of numbers", network(egress=[443]), TypeError, ("egress", "443")),
    ("egress to no name", network(egress=["a b"]), ValueError, ("egress", "a b")),
    ("egress to no port", network(egress=["example.com:0"]), ValueError, ("egress", "example.com:0")),
    ("egress to an IPv6 network", network(egress=["2001:db8::/32"]), ValueError, ("egress", "IPv4")),
    ("egress without an end", network(egress=["a.test"] * 257), ValueError, ("egress", "257")),
    ("IPv6 as text", network(ipv6="yes"), TypeError, ("ipv6", "yes")),
    ("mode of nobody", network(mode="slirp"), ValueError, ("mode", "slirp", "user")),
    ("tap in user mode", network(tap_device="tap0", mode="user"), ValueError, ("tap_device", "tap0", "user")),
    ("isolated as text", lambda: VMNetworkConfig(isolated_network="no"), TypeError, ("isolated_network",)),
    ("unknown config key", configured({"max_cpus": 2}), ValueError, ("max_cpus", "max_vcpus")),
    ("heartbeat without a pause", configured({"health_interval_s": 0}), ValueError, ("health_interval_s", "0")),
    ("misses as text", configured({"health_misses": "2"}), TypeError, ("health_misses", "whole number")),
    ("policy of no type", configured({"policies": {"tab": {}}}), ValueError, ("policies", "tab", "browser_tab")),
    ("policy of no kind", configured({"policies": {"plugin": {"on_failure": "x"}}}), ValueError, ("plugin", "restart")),
    ("config of a wrong type", configured([1]), TypeError, ("config",)),
    ("config key that is no text", configured({3: 4}), TypeError, ("config", "3")),
    ("quota as text", configured({"max_vcpus": "16"}), TypeError, ("max_vcpus", "16")),
    ("quota of nothing", configured({"max_memory_mb": 0}), ValueError, ("max_memory_mb", "0")),
    ("default out of range", configured({"default_memory_mb": 1}), ValueError, ("default_memory_mb", "1")),
    ("unknown default backend", configured({"default_backend": "xen"}), ValueError, ("default_backend", "xen", "qemu")),
    ("unknown isolation", configured({"min_isolation": "total"}), ValueError, ("total", "hardware")),
    ("no time to start", configured({"start_timeout_s": 0}), ValueError, ("start_timeout_s",)),
    ("endless cleanup", configured({"cleanup_interval_s": float("inf")}), ValueError, ("cleanup_interval_s", "inf")),
    ("range of public addresses", configured({"network_range": "8.8.0.0/16"}), ValueError, ("network_range", "8.8.0.0")),
    ("range too small", configured({"network_range": "10.0.0.0/31"}), ValueError, ("network_range", "30")),
    ("range as a list", configured({"network_range": ["10.0.0.0/8"]}), TypeError, ("network_range",)),
    ("no jail", configured({"jail": "none"}), ValueError, ("jail", "none", "default, strict, audit")),
    ("jail as bool", configured({"jail": True}), TypeError, ("jail", "true")),
    ("uids the wrong way round", configured({"uid_range": [9, 8]}), ValueError, ("uid_range", "[9,8]")),
    ("uid of root", configured({"uid_range": [0, 8]}), ValueError, ("uid_range", "0")),
    ("uids as text", configured({"uid_range": "1-2"}), TypeError, ("uid_range", "1-2")),
    ("group as number", configured({"cgroup_parent": 3}), TypeError, ("cgroup_parent", "3")),
    ("overcommit as number", configured({"overcommit_memory": 1}), TypeError, ("overcommit_memory", "1")),
    ("disk rate of nothing", size(disk_bytes_per_s=0), ValueError, ("disk_bytes_per_s", "0")),
    ("disk rate as text", size(disk_ops_per_s="9"), TypeError, ("disk_ops_per_s", "'9'")),
    ("flag as text", configured({"raise_on_error": "yes"}), TypeError, ("raise_on_error",)),
    ("id with a slash", created(vm_id="a/b"), ValueError, ("vm_id", "a/b")),
    ("id of dots", created(vm_id=".."), ValueError, ("vm_id",)),
    ("id too long", created(vm_id="x" * 65), ValueError, ("vm_id", "64")),
    ("empty id", created(vm_id=""), ValueError, ("vm_id",)),
    ("id with a NUL", created(vm_id="a\0b"), ValueError, ("vm_id",)),
    ("id as number", created(vm_id=7), TypeError, ("vm_id", "7")),
    ("unknown isolation type", created("window"), ValueError, ("isolation_type", "window", "browser_tab")),
    ("isolation type as number", created(1), TypeError, ("isolation_type", "1")),
    ("unknown backend", created(backend="bhyve"), ValueError, ("backend", "bhyve", "firecracker")),
    ("backend as another enum", created(backend=VMState.RUNNING), ValueError, ("backend", "running")),
    ("limits as dict", created(resource_limits={"vcpu_count": 1}), TypeError, ("resource_limits", "VMResourceLimits")),
    ("network as text", created(network_config="tap0"), TypeError, ("network_config", "VMNetworkConfig")),
    ("kernel path as number", created(kernel_path=3), TypeError, ("kernel_path", "3")),
    ("empty rootfs path", created(rootfs_path=""), ValueError, ("rootfs_path",)),
    ("labels as a list", created(labels=["team"]), TypeError, ("labels", "['team']", "dict")),
    ("label that is no text", created(labels={"team": 7}), TypeError, ("labels[\"team\"]", "7", "string")),
    ("key of a label that is no text", created(labels={7: "team"}), TypeError, ("a key of labels", "7")),
    ("empty key of a label", created(labels={"": "x"}), ValueError, ("a key of labels", "1 to 63")),
    ("key of a label with a blank", created(labels={"a b": "x"}), ValueError, ("a key of labels", "a b")),
    ("key of a label too long", created(labels={"x" * 64: "x"}), ValueError, ("a key of labels", "xxx", "63")),
    ("label too long", created(labels={"team": "x" * 257}), ValueError, ("labels[\"team\"]", "256")),
    ("label of two lines", created(labels={"team": "a\nb"}), ValueError, ("labels[\"team\"]", "control characters")),
    ("too many labels", created(labels={str(n): "" for n in range(65)}), ValueError, ("labels", "65", "at most 64")),
    ("filter by a malformed label", lambda: MicroVMIsolationManager().list_vms(labels={"-": ""}), ValueError, ("labels", "-")),
    ("state that is none", lambda: MicroVMIsolationManager().list_vms(state="asleep"), ValueError, ("asleep", "running")),
    ("name that is no text", lambda: MicroVMIsolationManager().get_vm(3), TypeError, ("vm_id",)),
    ("instance without limits", lambda: MicroVMInstance("a", "qemu", "plugin", None), TypeError, ("resource_limits",)),
    ("channel to a path", lambda: CommunicationChannel("../x"), ValueError, ("vm_id", "../x")),
    ("negative timeout", lambda: CommunicationChannel("x").connect(-1), ValueError, ("timeout", "-1")),
    ("timeout as text", lambda: CommunicationChannel("x").receive_message("1"), TypeError, ("timeout",)),
    ("message that is no dict", lambda: CommunicationChannel("x").send_message([1]), TypeError, ("message",)),
    ("message of bytes", lambda: CommunicationChannel("x").send_message({"a": b"x"}), TypeError, ("message", "a")),
    ("message with NaN", lambda: CommunicationChannel("x").send_message({"a": float("nan")}), ValueError, ("nan",)),
    ("message that holds itself", lambda: CommunicationChannel("x").send_message(itself()), ValueError, ("message",)),
    ("message that is no UTF-8", lambda: CommunicationChannel("x").send_message({"a": "\ud800"}), ValueError, ("message",)),
]


class Raised(unittest.TestCase):
    def test_every_row_of_the_table_raises_and_names_the_thing(self) -> None:
        self.assertGreaterEqual(len(RAISED), 40)
        for title, call, error, words in RAISED:
            with self.subTest(title), self.assertRaises(error) as caught:
                call()
            for word in words:
                with self.subTest(title, word=word):
                    self.assertIn(word, str(caught.exception))


# The command, its parameters, and the code of the guest's answer.
REFUSED_BY_THE_GUEST: List[Tuple[str, Any, str]] = [
    ("no_such_action", {}, "unknown_action"),
    ("../../bin/sh", {}, "unknown_action"),
    ("execute", {"action": "freeze"}, "reserved_action"),
    ("exec", {"action": "adopt", "data": {"vm_id": "x", "hostname": "x", "unix_time_ns": 0}}, "reserved_action"),
    ("x" * 10000, {}, "unknown_action"),
    ("ping", {"loud": True}, "bad_params"),
    ("exec", {}, "bad_params"),
    ("exec", {"program": ""}, "bad_params"),
    ("exec", {"program": "a\0b"}, "bad_params"),
    ("exec", {"program": "ls", "args": "x"}, "bad_params"),
    ("exec", {"program": "ls", "timeout": -1}, "bad_params"),
    ("exec", {"program": "ls", "cwd": "/none"}, "bad_params"),
    ("exec", {"program": "ls", "env": {"A=B": "c"}}, "bad_params"),
    ("exec", {"program": "ls", "stdin": "a", "stdin_base64": "YQ=="}, "bad_params"),
    ("exec", {"program": "ls", "max_output_bytes": 1 << 40}, "bad_params"),
    ("execute", {"action": 5}, "bad_params"),
    ("execute", {"action": "execute"}, "bad_params"),
    ("read_file", {"path": "/none"}, "file_not_found"),
    ("read_file", {"path": "/"}, "io_error"),
    ("write_file", {"path": "/tmp/x"}, "bad_params"),
    ("write_file", {"path": "/tmp/x", "data_base64": "!"}, "bad_params"),
    ("write_file", {"path": "/none/x", "data": "x"}, "file_not_found"),
    ("render_page", {"html": 3}, "bad_params"),
    ("render_page", {"url": "not a url"}, "bad_params"),
    ("render_page", {"html": "x" * (5 << 20)}, "too_large"),
    ("render_page", {"html": "<div>" * 400000}, "timeout"),
    ("process_request", {}, "bad_params"),
    ("process_request", {"url": "ftp://a.test/"}, "bad_params"),
    ("process_request", {"url": "http://a.test/", "method": "A B"}, "bad_params"),
    ("process_request", {"url": "http://a.test/", "body": "x"}, "bad_params"),
    ("process_request", {"url": "http://a.test/", "headers": {"a": "b\r\nc: d"}}, "bad_params"),
    ("process_request", {"url": "http://a.test/", "timeout": 0}, "bad_params"),
    ("process_request", {"url": "http://a.test/", "max_bytes": 1 << 40}, "bad_params"),
    ("process_request", {"url": "http://a.test/"}, "network_isolated"),
    ("set_clock", {"unix_time_ns": -1}, "bad_params"),
]


class Refused(VMTestCase):
    def test_every_bad_command_has_its_code_and_the_agent_lives_on(self) -> None:
        vm = self.running()
        for command, params, code in REFUSED_BY_THE_GUEST:
            with self.subTest(command[:30], params=str(params)[:60]):
                self.assertEqual(self.failure(vm, command, params), code)
        self.assertEqual(self.result(vm, "ping"), "pong")

    def test_bad_boot_files_are_refused_before_launch(self) -> None:
        import tempfile
        from pathlib import Path

        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            files = {
                "text": b"not a kernel" * 100,
                "empty": b"",
                "cut": (DATA / "vmlinux").read_bytes()[:1000000],
                "bzimage": bytes(0x202) + b"HdrS" + bytes(1000),
                "zeros": bytes(1 << 20),
            }
            for title, content in files.items():
                (folder / title).write_bytes(content)
            rows = [("kernel_path", str(folder / title), "image_invalid") for title in files]
            rows += [("rootfs_path", str(folder / title), "image_invalid") for title in files]
            rows += [
                (field, path, "image_unreadable")
                for field in ("kernel_path", "rootfs_path")
                for path in ("/none", str(folder), "/dev/null")
            ]
            for field, path, code in rows:
                with self.subTest(field, path=path):
                    vm_id = self.create(**{field: path})
                    self.assertFalse(self.manager.start_vm(vm_id))
                    self.assertEqual(self.manager.last_error.code, code)
                    self.assertIn(path, str(self.manager.last_error))
                    self.assertIsNone(self.manager.get_vm_info(vm_id)["pid"])
                    self.manager.destroy_vm(vm_id)

    def test_error_of_a_system_call_has_it_as_its_cause(self) -> None:
        with tempfile.TemporaryDirectory() as name:
            rows: List[Tuple[str, Any]] = [("/none", FileNotFoundError), (name + "/loop", OSError), (name, None)]
            os.symlink("loop", name + "/loop")
            for path, kind in rows:
                with self.subTest(path):
                    vm = self.manager.get_vm(self.create(kernel_path=path))
                    self.assertFalse(vm.start())
                    cause = vm.last_error.__cause__
                    self.assertEqual(type(cause) if cause else None, kind)
                    if cause:
                        self.assertIn("{} (os error {})".format(cause.strerror, cause.errno), str(vm.last_error))

    def test_missing_things_are_false_or_none_with_a_code(self) -> None:
        for call in (self.manager.start_vm, self.manager.stop_vm, self.manager.pause_vm, self.manager.destroy_vm):
            self.assertFalse(call("nobody"))
            self.assertEqual(self.manager.last_error.code, "vm_not_found")
        self.assertIsNone(self.manager.send_command_to_vm("nobody", "ping"))
        channel = CommunicationChannel("nobody")
        self.assertFalse(channel.connect())
        self.assertEqual(channel.last_error.code, "channel_closed")
        self.assertIsInstance(channel.last_error.__cause__, FileNotFoundError)

    def test_missing_backends_say_what_to_install(self) -> None:
        manager = MicroVMIsolationManager(
            {"firecracker_binary": "/none/firecracker", "cloud_hypervisor_binary": "/none/ch", "qemu_binary": "/none/qemu"}
        )
        for backend in VMBackend:
            vm_id = manager.create_vm(IsolationType.PLUGIN, limits(), backend=backend)
            self.assertFalse(manager.start_vm(vm_id))
            self.assertEqual(manager.last_error.code, "backend_unavailable")
            self.assertIn("install", str(manager.last_error))

    def test_runtime_dir_open_to_others_is_refused(self) -> None:
        with tempfile.TemporaryDirectory() as name:
            os.chmod(name, 0o755)
            manager = MicroVMIsolationManager({"runtime_dir": name})
            self.assertFalse(manager.start_vm(manager.create_vm("plugin", limits())))
            error = manager.last_error
            self.assertEqual(error.code, "folder_refused")
            self.assertIn("chmod 700", str(error))
            self.assertEqual(sorted(error.details), ["field", "path", "reason", "remedy"])
            self.assertEqual((error.details["field"], error.details["path"]), ('config["runtime_dir"]', name))

    def test_with_of_a_manager_that_cannot_start_raises_why(self) -> None:
        with tempfile.TemporaryDirectory() as name:
            os.chmod(name, 0o755)
            manager = MicroVMIsolationManager({"cache_dir": name})
            with self.assertRaises(HostError) as caught:
                with manager:
                    self.fail("the block was entered")
            self.assertEqual(caught.exception.code, "folder_refused")
            os.chmod(name, 0o700)
            # The error of the first try stays, and keeps nothing from starting.
            with manager:
                self.assertEqual(manager.last_error.code, "folder_refused")

    def test_shell_errors_are_results_not_failures(self) -> None:
        self.assertEqual(self.result(self.running(), "exec", shell("exit 7"))["exit_code"], 7)


# The arguments of ``bench``, and the words that the one line on stderr must hold.
REFUSED_BY_BENCH: List[Tuple[List[str], Tuple[str, ...]]] = [
    (["--n", "0"], ("--n", "'0'", "1 to")),
    (["--n", "-1"], ("--n", "'-1'")),
    (["--n", "many"], ("--n", "'many'")),
    (["--at-once", "1", "0"], ("--at-once", "'0'")),
    (["--at-once"], ("--at-once", "expected")),
    (["--rounds", "0"], ("--rounds", "'0'")),
    (["--memory-mb", "1"], ("--memory-mb", "'1'", "64 to 1048576")),
    (["--only", "warm"], ("--only", "warm")),
    (["--json", "/nonexistent/x"], ("--json", "/nonexistent/x", "No such file")),
    (["--svg", "/"], ("--svg", "'/'", "Is a directory")),
]


class CommandLine(unittest.TestCase):
    def refused(self, arguments: List[str]) -> str:
        said = io.StringIO()
        with contextlib.redirect_stderr(said), self.assertRaises(SystemExit) as caught:
            _cli.main(["bench"] + arguments)
        self.assertEqual(caught.exception.code, 2)
        return said.getvalue().splitlines()[-1]

    def test_every_bad_argument_of_bench_is_refused_before_it_measures(self) -> None:
        for arguments, words in REFUSED_BY_BENCH:
            said = self.refused(arguments)
            for word in words:
                with self.subTest(arguments, word=word):
                    self.assertIn(word, said)

    def test_file_that_can_be_written_is_not_made_ahead(self) -> None:
        with tempfile.TemporaryDirectory() as name:
            self.refused(["--json", name + "/new.json", "--n", "0"])
            self.assertEqual(os.listdir(name), [])

    def test_chart_of_a_run_without_milliseconds_is_drawn(self) -> None:
        report = Report("QEMU", "tcg", {})
        report.add("command: round trip", "us", [1.0, 2.0])
        self.assertIn("round trip", report.svg())
