"""Random faults on VMs under load, and what must hold after each: ``make chaos`` (``SECONDS``, ``VMS``, ``SEED``).

Threads use, restart and replace the VMs all the time. Again and again the load is held, one fault is done, and the load
goes on for a moment; then everything is looked at. The seed, printed first, decides the order of faults and victims; how
they meet the load is up to the machine.
"""

import argparse
import os
import random
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

from thirstys_waterfall.security.microvm_isolation import MicroVMIsolationManager, VMNetworkConfig  # noqa: E402

from tests.chaos.host import Host, descendants, groups, stat  # noqa: E402
from tests.support import eventually, limits, open_files  # noqa: E402

WORKERS = 4
# How long a VM may take to be healthy again after it was stopped, starved or lost its disk.
RECOVERY_S = 30.0
FOLLOWS = {
    "created": {"starting", "destroyed"},
    "starting": {"running", "error", "destroyed"},
    "running": {"paused", "stopping", "error", "destroyed"},
    "paused": {"running", "stopping", "error", "destroyed"},
    "stopping": {"stopped", "error", "destroyed"},
    "stopped": {"starting", "destroyed"},
    "error": {"starting", "stopped", "destroyed"},
    "destroyed": set(),
}


class Storm:
    def __init__(self, seed: int, vms: int, folder: Path, connected: bool, fill: Optional[Path]) -> None:
        self.chance = random.Random(seed)
        self.vms, self.connected, self.fill = vms, connected, fill
        runtime_dir, cache_dir = folder / "run", folder / "cache"
        self.host = Host(runtime_dir, "storm{}-".format(os.getpid()), cache_dir)
        self.wrong: List[str] = []
        self.done: "Counter[str]" = Counter()
        self.numbers = iter(range(1 << 30))
        self.lock = threading.Lock()
        self.go, self.over = threading.Event(), threading.Event()
        self.busy = 0
        self.idle = threading.Condition(self.lock)
        config = {"runtime_dir": str(runtime_dir), "cache_dir": str(cache_dir), "max_vcpus": vms + 8, "max_memory_mb": 128 * (vms + 8)}
        config.update({"health_interval_s": 1.0, "cleanup_interval_s": 600.0, "overcommit_memory": True})
        self.files = open_files()
        self.manager = MicroVMIsolationManager(config)
        self.manager.start()
        self.states: Dict[str, str] = {}
        self.events = self.manager.on_event(self.check_event, capacity=1 << 16)

    # The load.

    def create(self) -> Any:
        slow = {"disk_ops_per_s": 30} if self.chance.random() < 0.2 else {}
        network = VMNetworkConfig(isolated_network=not (self.connected and self.chance.random() < 0.2))
        vm_id = "{}{}".format(self.host.prefix, next(self.numbers))
        made = self.manager.create_vm("browser_tab", limits(**slow), vm_id=vm_id, network_config=network)
        if made is None:
            self.complain("a VM within the quota was refused: {}".format(self.manager.last_error))
            return None
        vm = self.manager.get_vm(made)
        vm.start()
        return vm

    def complain(self, what: str) -> None:
        with self.lock:
            self.wrong.append(what)
        print("WRONG: " + what, flush=True)

    def check_event(self, event: Dict[str, Any]) -> None:
        if event["kind"] != "state":
            return
        before = self.states.get(event["vm_id"], "created")
        if event["from"] != before or event["to"] not in FOLLOWS[event["from"]]:
            self.complain("{vm_id}: from {from} to {to} after {}".format(before, **event))
        self.states[event["vm_id"]] = event["to"]

    def work(self, seed: int) -> None:
        chance = random.Random(seed)
        steps: List[Callable[[Any], Any]] = [
            lambda vm: vm.send_command("ping"),
            lambda vm: self.echo(vm),
            lambda vm: vm.send_command("write_file", {"path": "/data/f", "data": "y" * 200000}, timeout=5),
            lambda vm: vm.pause() and vm.resume(),
            lambda vm: vm.get_info(),
            lambda vm: vm.stop() and vm.start(),
            lambda vm: vm.start(),
        ]
        while not self.over.is_set():
            if not self.go.wait(0.2):
                continue
            with self.lock:
                self.busy += 1
            try:
                vm = self.manager.get_vm(chance.choice(self.manager.list_vms() or [""]))
                if vm is not None and self.go.is_set():
                    chance.choice(steps)(vm)
            except Exception as error:
                self.complain("a call raised {!r}".format(error))
            finally:
                with self.idle:
                    self.busy -= 1
                    self.done["calls"] += 1
                    self.idle.notify_all()

    def echo(self, vm: Any) -> None:
        token = "{}-{}".format(vm.vm_id, random.random())
        answer = vm.send_command("exec", {"program": "echo", "args": [token]}, timeout=5)
        # A guest that shuts down kills its programs, and says so.
        whole = answer and answer["status"] == "ok" and answer["result"]["exit_code"] == 0
        if whole and answer["result"]["stdout"] != token + "\n":
            self.complain("{}: an answer for somebody else: {}".format(vm.vm_id, answer))

    def hold(self) -> None:
        """Waits until no call is under way."""
        self.go.clear()
        with self.idle:
            if not self.idle.wait_for(lambda: self.busy == 0, 120.0):
                self.wrong.append("a call has not ended within 120 s")

    # The faults.

    def pid(self) -> Optional[int]:
        vm = self.manager.get_vm(self.chance.choice(self.manager.list_vms(state="running") or [""]))
        return vm.get_info()["pid"] if vm is not None else None

    def signal(self, pid: Optional[int], number: int) -> None:
        if pid is not None:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                pass

    def kill_vmm(self) -> None:
        self.signal(self.pid(), signal.SIGKILL)

    def kill_jail(self) -> None:
        pid = self.pid()
        if pid is not None:
            try:
                parent = int(stat(pid)[1])
            except OSError:
                return
            # An orphaned VMM's parent may be this process, which must not be killed.
            self.signal(parent if parent not in (1, os.getpid()) else None, signal.SIGKILL)

    def stop_vmm(self) -> None:
        pid = self.pid()
        self.signal(pid, signal.SIGSTOP)
        timer = threading.Timer(self.chance.uniform(0.1, 2.0), self.signal, (pid, signal.SIGCONT))
        timer.start()

    def broken_clients(self) -> None:
        for vm_id in self.manager.list_vms(state="running")[:5]:
            path = self.host.runtime_dir / vm_id / "sock"
            for data in (b"\x00\x00\x10\x00{", b"\xff\xff\xff\xff", b"", b"\x00\x00\x00\x05hello"):
                with socket.socket(socket.AF_UNIX) as client:
                    try:
                        client.settimeout(2)
                        client.connect(str(path))
                        client.sendall(data)
                    except OSError:
                        pass

    def slow_clients(self) -> None:
        """Half a message each, that stays half until much later."""
        clients = []
        for vm_id in self.manager.list_vms(state="running")[:5]:
            client = socket.socket(socket.AF_UNIX)
            try:
                client.settimeout(2)
                client.connect(str(self.host.runtime_dir / vm_id / "sock"))
                client.sendall(b"\x00\x00\x00\x20{\"type\"")
            except OSError:
                pass
            clients.append(client)
        threading.Timer(3.0, lambda: [client.close() for client in clients]).start()

    def destroy_while_it_starts(self) -> None:
        for vm_id in self.manager.list_vms()[-2:]:
            vm = self.manager.get_vm(vm_id)
            thread = threading.Thread(target=lambda: vm.stop() and vm.start())
            thread.start()
            time.sleep(self.chance.uniform(0.0, 0.1))
            self.manager.destroy_vm(vm_id)
            thread.join()

    def full_disk(self) -> None:
        if self.fill is None:
            return
        try:
            with open(str(self.fill), "wb") as file:
                while True:
                    file.write(bytes(1 << 20))
        except OSError:
            pass

    # What must hold.

    def check(self, fault: str) -> None:
        wrong = lambda what: self.complain("after {}: {}".format(fault, what))
        usage, ids = self.manager.get_resource_usage(), self.manager.list_vms()
        if (usage["total_vms"], usage["vcpus_allocated"]) != (len(ids), len(ids)):
            wrong("the quota does not add up: {}".format(usage))
        if usage["vcpus_allocated"] + usage["vcpus_available"] != self.vms + 8:
            wrong("the quota has changed: {}".format(usage))
        for vm_id in self.manager.list_vms(state="running"):
            vm = self.manager.get_vm(vm_id)
            alive = lambda: vm.get_state().value != "running" or vm.send_command("ping", timeout=5)
            if not eventually(alive, RECOVERY_S):
                wrong("{} does not answer: {} {}".format(vm_id, vm.last_error, vm.get_info()["health"]))
        # The clean-up of a VM that died a moment ago may still run.
        if not eventually(lambda: not self.orphans(), 5.0):
            wrong("orphans: {}".format(self.orphans()))

    def orphans(self) -> List[str]:
        live = {i for i in self.manager.list_vms() if self.manager.get_vm(i).get_state().value in ("running", "paused")}
        folders = {path.name for path in self.host.runtime_dir.glob("[!.]*")}
        grouped = {Path(group).name[len("tw-microvm-") :].rpartition("-")[0] for group in groups(self.host.prefix)}
        vmms = [pid for pid, _ in descendants(os.getpid()) if b"qemu" in Path("/proc/{}/cmdline".format(pid)).read_bytes()]
        found = ["folder {}".format(name) for name in folders ^ live] + ["group {}".format(n) for n in grouped - live]
        disks = {path.name.partition("-")[2] for path in (self.host.cache_dir / "disks").glob("*")}
        found += ["disk {}".format(name) for name in disks ^ live]
        return found + (["{} VMMs of {} VMs".format(len(vmms), len(live))] if len(vmms) != len(live) else [])

    # The whole.

    def run(self, seconds: float) -> None:
        for _ in range(self.vms):
            self.create()
        workers = [threading.Thread(target=self.work, args=(self.chance.random(),)) for _ in range(WORKERS)]
        for worker in workers:
            worker.start()
        faults = [
            self.kill_vmm,
            self.kill_jail,
            self.stop_vmm,
            self.broken_clients,
            self.slow_clients,
            self.destroy_while_it_starts,
            self.full_disk,
        ]
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            fault = self.chance.choice(faults)
            self.go.set()
            time.sleep(self.chance.uniform(0.1, 0.5))
            fault()
            self.done[fault.__name__] += 1
            time.sleep(self.chance.uniform(0.1, 1.0))
            if self.fill is not None and self.fill.exists():
                self.fill.unlink()
            self.hold()
            self.check(fault.__name__)
            for vm_id in self.manager.list_vms(state="error") + self.manager.list_vms(state="stopped"):
                self.manager.destroy_vm(vm_id)
            while len(self.manager.list_vms()) < self.vms:
                self.create()
        self.over.set()
        for worker in workers:
            worker.join()
        self.finish()

    def finish(self) -> None:
        known = descendants(os.getpid())
        dropped = self.events.dropped
        self.manager.stop()
        janitor = {process for process in known if b"microvm-janitor" in cmdline(process[0])}
        left = lambda: self.host.left(known - janitor)
        if not eventually(lambda: not left(), 2.0):
            self.complain("left at the end: {}".format(left()))
        # The runtime and the janitor's lifeline hold up to 16 descriptors.
        if not eventually(lambda: open_files() <= self.files + 16, 5.0):
            self.complain("descriptors grew from {} to {}".format(self.files, open_files()))
        if dropped:
            self.complain("{} events were lost".format(dropped))


def cmdline(pid: int) -> bytes:
    try:
        return Path("/proc/{}/cmdline".format(pid)).read_bytes()
    except OSError:
        return b""


def storm(seed: int, vms: int, seconds: float, connected: bool, fill: bool, folder: str) -> Storm:
    """One storm; its ``wrong`` should be empty, its ``done`` says what happened."""
    filler = Path(folder) / "fill" if fill else None
    weather = Storm(seed, vms, Path(folder), connected, filler)
    weather.run(seconds)
    return weather


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "big"))
    parser.add_argument("--vms", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=1800.0)
    parser.add_argument("--connected", action="store_true", help="some VMs with a network; in a namespace of its own")
    parser.add_argument("--fill", action="store_true", help="the folder for temporary files is a small tmpfs: fill it")
    options = parser.parse_args()
    print("seed {}, {} VMs, {:.0f} s".format(options.seed, options.vms, options.seconds), flush=True)
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        weather = storm(options.seed, options.vms, options.seconds, options.connected, options.fill, folder)
    print("done: {}".format(", ".join("{} {}".format(count, name) for name, count in sorted(weather.done.items()))))
    print("\n".join(weather.wrong) if weather.wrong else "every invariant held")
    return 1 if weather.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
