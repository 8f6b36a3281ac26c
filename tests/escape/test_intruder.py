"""A VMM that an attacker controls: the intruder in the place of each, in exactly the jail that each gets, isolated and connected."""

import unittest
from typing import Any, Dict, Set

from .arena import Arena
from .driver import USER

# These attacks work for any user without the jail; otherwise their failure in the jail would prove nothing.
ALWAYS_WORK = {
    "read_host_file", "read_secret", "write_kernel", "write_outside", "make_executable", "set_user_id_bit", "symlink",
    "list_processes", "signal_process", "signal_everyone", "new_process", "tcp_to_host", "abstract_socket",
    "netlink_socket", "execute_shell", "host_name", "read_other_vm", "list_runtime_dir", "other_vms_socket",
}
# Only the seccomp filter stops these. None of them reaches another VM or user: a process or socket in the jail's own
# namespaces, memory, a kernel interface that any user may use on himself.
STOPPED_BY_SECCOMP_ALONE = {
    "new_process", "netlink_socket", "vsock_socket", "packet_socket", "io_uring", "userfaultfd", "perf", "keyring",
    "add_key", "shared_memory", "message_queue", "anonymous_program", "process_descriptor", "bpf", "set_user_id_bit",
    "new_mount_api", "symlink", "real_time",
}

# What works in the jails of Firecracker and Cloud Hypervisor and is theirs: the device of their guests' CPUs, anonymous files,
# and the mode of their own disk's file, which lies in a folder that is closed to others.
WORK_FOR_RUST_VMMS = {"kvm", "anonymous_program", "set_user_id_bit"}


class Attacks:
    """What holds for every user; the classes below say for whom."""

    def test_nothing_works_in_the_jail_and_nobody_is_harmed(self: Any) -> None:
        outcomes, report = self.probes(jailed=True)
        self.assertGreaterEqual(len(outcomes), 60)
        for name, outcome in outcomes.items():
            with self.subTest(name):
                self.assertTrue(outcome.startswith("failed"), outcome)
        self.assertTrue(report["victim_lives"] and report["decoy_lives"])

    def test_the_same_works_without_the_jail(self: Any) -> None:
        outcomes, _ = self.probes(jailed=False)
        self.assertEqual({name for name in ALWAYS_WORK if not outcomes[name].startswith("worked")}, set())
        for name, outcome in outcomes.items():
            with self.subTest(name):
                if not outcome.startswith("worked"):
                    self.skipTest("{} cannot be shown to work here without the jail: it {}".format(name, outcome))

    def test_without_seccomp_and_landlock_the_rest_holds_and_the_audit_tells(self: Any) -> None:
        # An audit denies nothing by these two: what fails now fails by namespaces, root, uid and capabilities alone.
        report = self.attack("probes", victim=True, timeout=60, config={"jail": "audit"})
        lines = [line.split(" ", 2) for line in report["said"].splitlines() if line.startswith("PROBE ")]
        worked = {name for _, name, outcome in lines if outcome.startswith("worked")}
        self.assertGreaterEqual(len(lines), 60, report)
        self.assertEqual(worked - STOPPED_BY_SECCOMP_ALONE, set())
        self.assertIn("new_process", worked)
        self.assertTrue(report["victim_lives"] and report["decoy_lives"])

    def test_processes_cannot_be_made_by_any_call(self: Any) -> None:
        report = self.attack("forks")
        self.assertEqual(report["said"].count("REFUSED"), 5, report)
        self.assertNotIn("FORKED", report["said"])

    def test_system_calls_of_32_bit_programs_end_it(self: Any) -> None:
        report = self.attack("int80")
        self.assertNotIn("INT80", report["said"])
        self.assertIn("killed by SIGSYS", report["error"])

    def test_open_files_end_at_the_limit(self: Any) -> None:
        report = self.attack("files")
        self.assertIn("Too many open files", report["said"])
        # Standard streams and three sockets are open already: the monitor, the channel, the identity.
        self.assertEqual(self.number(report, "FILES"), 200 - 6)

    def test_disk_ends_at_its_size_and_nothing_else_can_be_written(self: Any) -> None:
        report = self.attack("disk", limits={"disk_size_mb": 16})
        self.assertAlmostEqual(self.number(report, "DISK"), 16 << 20, delta=0.1 * (16 << 20))
        self.assertIn("REFUSED grow", report["said"])
        self.assertNotIn("WROTE", report["said"])


class AttacksAsRoot(Attacks, Arena):
    """Root's VMMs have a uid, control groups and a user namespace of their own."""

    def test_memory_ends_at_the_limit(self) -> None:
        limit = 64 + 128
        report = self.attack("memory", orders={"mib": 2 * limit})
        self.assertAlmostEqual(self.number(report, "TOUCHED"), limit, delta=0.1 * limit)
        self.assertIn("killed by SIGKILL", report["error"])

    def test_memory_without_a_jail_has_no_such_end(self) -> None:
        report = self.attack("memory", jailed=False, orders={"mib": 2 * (64 + 128)})
        self.assertEqual(self.number(report, "HELD"), 2 * (64 + 128))

    def test_threads_end_at_the_limit(self) -> None:
        report = self.attack("threads")
        # One for the vCPU, 80 for the VMM and its supervisor; the main thread and the supervisor are there already.
        self.assertEqual(self.number(report, "THREADS"), 81 - 2)


class AttacksAsUser(Attacks, Arena):
    """An ordinary user's VMMs have his uid, alone in a user namespace; control groups only where some were delegated."""

    uid = USER

    def test_memory_ends_at_the_limit_on_data(self) -> None:
        # RAM and overhead, and the stacks that the kernel counts before they are used.
        limit = 64 + 128 + 8 * 81
        report = self.attack("memory", orders={"mib": 2 * limit}, timeout=60)
        self.assertIn("REFUSED", report["said"])
        self.assertAlmostEqual(self.number(report, "HELD"), limit, delta=0.1 * limit)


class AttacksWithoutNamespaces(Arena):
    """Where the host denies namespaces to ordinary users, Landlock and seccomp hold alone."""

    uid = USER
    namespaces = False

    def test_nothing_works_but_to_learn_the_hosts_name(self) -> None:
        outcomes, report = self.probes(jailed=True)
        worked = {name for name, outcome in outcomes.items() if outcome.startswith("worked")}
        self.assertEqual(worked, {"host_name"})
        self.assertTrue(report["victim_lives"] and report["decoy_lives"])


class AttacksOfOwnQemu(Attacks, Arena):
    """In the place of our own QEMU, whose allow-list is shorter."""

    prefix = "intr-own-"


class AttacksOfConnectedQemu(Arena):
    """It holds a tap that was opened for it, and no way to another."""

    connected = True

    def test_nothing_works_in_the_jail_and_nobody_is_harmed(self) -> None:
        outcomes, report = self.probes(jailed=True)
        self.assertEqual({name for name, outcome in outcomes.items() if outcome.startswith("worked")}, set())
        self.assertTrue(report["victim_lives"] and report["decoy_lives"])


class RustVmms(Arena):
    """The other two VMMs as root's, in jails for VMs that boot."""

    config: Dict[str, Any] = {"templates": False}
    works = WORK_FOR_RUST_VMMS

    def worked(self, **config: Any) -> Set[str]:
        report = self.attack("probes", victim=True, timeout=60, config=dict(self.config, **config))
        if report["code"] == "backend_unavailable":
            self.skipTest(report["error"])
        lines = [line.split(" ", 2) for line in report["said"].splitlines() if line.startswith("PROBE ")]
        self.assertGreaterEqual(len(lines), 60, report)
        self.assertIn("DONE", report["said"])
        self.assertTrue(report["victim_lives"] and report["decoy_lives"])
        return {name for _, name, outcome in lines if outcome.startswith("worked")}

    def test_nothing_works_but_what_is_its_own_and_nobody_is_harmed(self) -> None:
        self.assertEqual(self.worked(), self.works)

    def test_without_seccomp_and_landlock_the_rest_holds(self) -> None:
        worked = self.worked(jail="audit")
        self.assertEqual(worked - STOPPED_BY_SECCOMP_ALONE, self.works - STOPPED_BY_SECCOMP_ALONE)
        self.assertIn("new_process", worked)


class AttacksOfFirecracker(RustVmms):
    backend = "firecracker"


class AttacksOfConnectedFirecracker(RustVmms):
    """It opens its tap by name: that one works, once, and shows it nothing else of the host's network."""

    backend = "firecracker"
    connected = True
    works = WORK_FOR_RUST_VMMS | {"own_tap"}


class AttacksOfCloudHypervisor(RustVmms):
    backend = "cloud-hypervisor"


class AttacksOfConnectedCloudHypervisor(RustVmms):
    backend = "cloud-hypervisor"
    connected = True


def load_tests(loader: unittest.TestLoader, tests: unittest.TestSuite, pattern: Dict[str, Any]) -> unittest.TestSuite:
    """The table of attacks is no test case of its own."""
    cases = (
        AttacksAsRoot,
        AttacksAsUser,
        AttacksWithoutNamespaces,
        AttacksOfOwnQemu,
        AttacksOfConnectedQemu,
        AttacksOfFirecracker,
        AttacksOfConnectedFirecracker,
        AttacksOfCloudHypervisor,
        AttacksOfConnectedCloudHypervisor,
    )
    return unittest.TestSuite(loader.loadTestsFromTestCase(case) for case in cases)
