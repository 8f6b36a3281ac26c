"""A guest whose root wants all of the host: what it uses up is its own, and everyone else lives on."""

import re
import time
import unittest
from pathlib import Path
from typing import Any, Dict, Optional

from ..support import VMTestCase, disks_of, eventually, limits, shell

MEMORY_MB, DISK_MB, OVERHEAD_MB = 128, 32, 128
# Processes that would fill any table, out of reach of the agent's own limits.
OUT_OF_THE_GROUP = "echo 0 > /sys/fs/cgroup/cgroup.procs; ulimit -Hu unlimited; ulimit -Su unlimited; ulimit -n 100000; "


class Host:
    """What one VMM costs the host."""

    def __init__(self, info: Dict[str, Any]) -> None:
        self.pid = info["pid"]
        self.folder = Path(info["socket_path"]).parent
        self.vm_id = info["vm_id"]
        # A clone's group may be charged for pages of the template that it is the first to touch.
        said = re.search(r"up to (\d+) MiB more", " ".join(info["limits"]["memory_mb"])) if "limits" in info else None
        self.first_touch_mb = int(said.group(1)) if said else 0

    def threads(self) -> int:
        return len(list(Path("/proc/{}/task".format(self.pid)).iterdir()))

    def files(self) -> int:
        return len(list(Path("/proc/{}/fd".format(self.pid)).iterdir()))

    def rss_mb(self) -> int:
        return int(Path("/proc/{}/statm".format(self.pid)).read_text().split()[1]) * 4096 >> 20

    def disk_mb(self) -> float:
        """What all files of the VM take, in whatever way the guest wrote them."""
        files = [*self.folder.iterdir(), *disks_of(self.vm_id)]
        return sum(path.stat().st_blocks * 512 for path in files) / (1 << 20)

    def group_peak_mb(self) -> Optional[int]:
        """The most that its memory group ever held; ``None`` without cgroup v1."""
        for line in Path("/proc/{}/cgroup".format(self.pid)).read_text().split():
            _, names, path = line.split(":", 2)
            if names == "memory" and "tw-microvm" in path:
                return int(Path("/sys/fs/cgroup/memory" + path + "/memory.max_usage_in_bytes").read_text()) >> 20
        return None


class Greedy(VMTestCase):
    def setUp(self) -> None:
        super().setUp()
        size = limits(memory_mb=MEMORY_MB, disk_size_mb=DISK_MB, max_processes=64)
        self.vm, self.neighbour = self.running(resource_limits=size), self.running()
        self.host = Host(self.vm.get_info())
        self.before = (self.host.threads(), self.host.files())

    def rage(self, script: str, timeout: float = 20.0) -> Any:
        """Run a script as the guest's root; whatever becomes of it, all that is left must be in order."""
        answer = self.vm.send_command("exec", shell(script, timeout=timeout), timeout=timeout + 20)
        self.assertIsNotNone(answer, self.vm.last_error)
        for vm in (self.vm, self.neighbour):
            self.assertEqual(self.result(vm, "ping"), "pong")
        self.assertLessEqual(self.host.rss_mb(), 3 * MEMORY_MB)
        peak = self.host.group_peak_mb()
        self.assertTrue(peak is None or peak <= MEMORY_MB + OVERHEAD_MB + self.host.first_touch_mb, peak)
        self.assertLessEqual(self.host.disk_mb(), DISK_MB + 1)
        self.assertLessEqual(self.host.threads(), 81)
        self.assertLessEqual(self.host.files(), self.before[1] + 4)
        return answer

    def test_fork_bomb_ends_at_the_guests_limit(self) -> None:
        answer = self.rage("bomb() { bomb | bomb & }; bomb; sleep 3; ls -d /proc/[0-9]* | wc -l")
        self.assertIn("can't fork", str(answer))

    def test_fork_bomb_out_of_its_group_takes_only_the_guest(self) -> None:
        many = "i=0; while [ $i -lt 500 ]; do sleep 10 & i=$((i+1)); done; ls -d /proc/[0-9]* | wc -l"
        answer = self.rage(OUT_OF_THE_GROUP + many, timeout=60.0)
        self.assertGreater(int(answer["result"]["stdout"]), 500)

    def test_memory_is_the_guests_own_to_run_out_of(self) -> None:
        # A program that eats memory is ended by the guest's OOM killer; a tmpfs that fills up reports no space.
        self.assertIn("137", self.rage("tail /dev/zero; echo $?")["result"]["stdout"])
        answer = self.rage("dd if=/dev/zero of=/dev/shm/x bs=1M count=500; rm -f /dev/shm/x")
        self.assertIn("No space left", str(answer))

    def test_memory_of_a_large_clone_is_its_own_to_run_out_of(self) -> None:
        # So large that what the kernel counts twice, a page of the template and its copy, is more than the overhead.
        vm = self.running(resource_limits=limits(memory_mb=4 * MEMORY_MB, disk_size_mb=DISK_MB))
        self.assertEqual(vm.get_info()["start"]["origin"], "clone")
        self.assertIn("137", self.result(vm, "exec", shell("tail /dev/zero; echo $?", timeout=60.0))["stdout"])
        self.assertEqual(self.result(vm, "ping"), "pong")

    def test_disk_takes_no_more_than_its_size(self) -> None:
        answer = self.rage("dd if=/dev/zero of=/data/x bs=1M count=200; sync")
        self.assertIn("No space left", str(answer))
        self.assertGreater(self.host.disk_mb(), DISK_MB / 2)

    def test_disk_device_itself_ends_at_its_size(self) -> None:
        # Past the file system: on the bare device, which root in the guest may do.
        disk = "d=$(for b in /sys/block/*; do [ \"$(cat $b/serial 2>/dev/null)\" = disk ] && echo /dev/${b##*/}; done); "
        answer = self.rage(disk + "dd if=/dev/zero of=$d bs=1M seek=1 count=100; sync")
        self.assertIn("No space left", str(answer))

    def test_inodes_run_out_in_the_guest_alone(self) -> None:
        before = len(list(self.host.folder.iterdir()))
        script = "cd /data; i=0; while [ $i -lt 6000 ]; do echo > f$i || break; i=$((i+1)); done 2>/dev/null; echo $i"
        self.assertLess(int(self.rage(script, timeout=60)["result"]["stdout"]), 6000)
        self.assertEqual(len(list(self.host.folder.iterdir())), before)

    def test_console_flood_fills_no_log(self) -> None:
        manager = Host(dict(self.vm.get_info(), pid="self"))
        before = manager.rss_mb()
        size = sum(path.stat().st_size for path in self.host.folder.iterdir() if path.is_file())
        self.rage("yes flooding the console of this machine | head -c 3000000 > /dev/console; dmesg -n 8; i=0; "
                  "while [ $i -lt 200 ]; do echo \"<0>line $i\" > /dev/kmsg; i=$((i+1)); done", timeout=60)
        self.assertLess(manager.rss_mb() - before, 16)
        now = sum(path.stat().st_size for path in self.host.folder.iterdir() if path.is_file())
        self.assertEqual(now, size)

    def test_open_files_run_out_in_the_guest_alone(self) -> None:
        script = "i=3; while [ $i -lt 3000 ]; do eval \"exec $i</dev/null\" || break; i=$((i+1)); done; echo $i"
        self.assertEqual(self.rage(OUT_OF_THE_GROUP + script)["result"]["stdout"].strip(), "3000")

    def test_busy_vcpus_leave_the_neighbour_its_answers(self) -> None:
        begun = time.monotonic()
        self.rage("for i in 1 2 3 4 5 6 7 8; do while :; do :; done & done; sleep 5; kill 0", timeout=10)
        self.assertLess(time.monotonic() - begun, 60)
        self.assertTrue(eventually(lambda: self.neighbour.get_health_metrics().health_status == "healthy", 10))


if __name__ == "__main__":
    unittest.main()
