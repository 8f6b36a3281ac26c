"""One attack, in a process of its own that may become another user first: ``driver.py JSON`` prints JSON.

After the change of user nothing is imported any more: the interpreter's own files may be closed to that user.
"""

import ctypes
import json
import os
import resource  # noqa: F401  (subprocess wants it late)
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Dict, List, Optional

from thirstys_waterfall.security.microvm_isolation import (
    MicroVMIsolationManager,
    VMBackend,
    VMNetworkConfig,
    VMResourceLimits,
)

LIBC = ctypes.CDLL(None)
IMAGE_BYTES = 64 * 1024
# The tap of a connected intruder, and the tap of another VM.
OWN_TAP, OTHERS_TAP = "intruder0", "somebody0"
# The tests run as root and as this user, who need not exist.
USER = 61234


def become(uid: int) -> None:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    os.environ["HOME"] = "/"


def forbid_namespaces(uid: int) -> None:
    """Be where no namespaces may be made, as on hosts that deny them to ordinary users: in one that allows no others."""
    pr_set_dumpable, clone_newuser = 4, 0x10000000
    # A process that changed its uid may not even write its own maps.
    LIBC.prctl(pr_set_dumpable, 1, 0, 0, 0)
    if LIBC.unshare(clone_newuser) != 0:
        raise SystemExit("unshare failed")
    for name, text in (("setgroups", "deny"), ("uid_map", "{0} {0} 1"), ("gid_map", "{0} {0} 1")):
        Path("/proc/self", name).write_text(text.format(uid))
    Path("/proc/sys/user/max_user_namespaces").write_text("0")


def image(path: Path, orders: Dict[str, Any]) -> Path:
    """A file that passes for an ext4 image; the orders are where a boot loader would be."""
    text = "".join("{} {}\n".format(key, value) for key, value in orders.items()).encode()
    assert len(text) <= 1024, "the orders do not fit"
    superblock = bytearray(1024)
    struct.pack_into("<I", superblock, 4, IMAGE_BYTES // 4096)
    struct.pack_into("<I", superblock, 24, 2)
    struct.pack_into("<I", superblock, 40, 16)
    struct.pack_into("<H", superblock, 56, 0xEF53)
    path.write_bytes(text.ljust(1024, b"\0") + bytes(superblock) + bytes(IMAGE_BYTES - 2048))
    path.chmod(0o644)
    return path


class Watch(threading.Thread):
    """Looks at the intruder from outside: its CPU time and the processes and threads of its group."""

    def __init__(self, name: str) -> None:
        super().__init__(daemon=True)
        self.process_name = name
        self.samples: List[Dict[str, float]] = []
        self.over = threading.Event()

    def run(self) -> None:
        pid = None
        while not self.over.wait(0.1):
            pid = pid or find(self.process_name)
            try:
                fields = Path("/proc/{}/stat".format(pid)).read_text().rpartition(")")[2].split()
            except OSError:
                continue
            cpu = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
            sample = {"time": time.monotonic(), "cpu": cpu, "threads": int(fields[17])}
            sample["rss_mib"] = int(fields[21]) * 4096 / (1 << 20)
            sample["throttled"] = throttled(pid)
            self.samples.append(sample)


def throttled(pid: Any) -> int:
    """How often the process's CPU group had to wait; 0 where it has none of its own."""
    try:
        groups = Path("/proc/{}/cgroup".format(pid)).read_text().split()
        paths = [line.split(":", 2) for line in groups]
        own = [path for _, names, path in paths if "cpu" in names.split(",") or not names]
        for folder in ["/sys/fs/cgroup/cpu", "/sys/fs/cgroup/cpu,cpuacct", "/sys/fs/cgroup"]:
            for path in own:
                file = Path(folder + path) / "cpu.stat"
                if "tw-microvm" in path and file.is_file():
                    return int(dict(line.split() for line in file.read_text().splitlines())["nr_throttled"])
    except (OSError, KeyError):
        pass
    return 0


def find(name: str) -> Optional[int]:
    """The process of this name, as the kernel cuts it."""
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (entry / "comm").read_text().strip() == name[:15]:
                return int(entry.name)
        except OSError:
            continue
    return None


def main(task: Dict[str, Any]) -> Dict[str, Any]:
    # Mounts and interfaces made here end with this process. unshare(2) comes first, as threads would stay in the old namespaces.
    clone_newns, clone_newnet = 0x00020000, 0x40000000
    if task["connected"] and LIBC.unshare(clone_newnet) != 0:
        raise SystemExit("no network namespace can be made")
    if task["backend"] != "qemu":
        if LIBC.unshare(clone_newns) != 0:
            raise SystemExit("no mount namespace can be made")
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    if task["uid"] is not None:
        become(task["uid"])
    if not task["namespaces"]:
        forbid_namespaces(task["uid"])
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o755)
        return attack(task, folder)


def attack(task: Dict[str, Any], folder: Path) -> Dict[str, Any]:
    decoy = subprocess.Popen(["/bin/sleep", "300"])
    listeners = [socket.socket(socket.AF_INET), socket.socket(socket.AF_UNIX)]
    listeners[0].bind(("127.0.0.1", 0))
    listeners[1].bind("\0intruder-{}".format(os.getpid()))
    for listener in listeners:
        listener.listen(5)
    (folder / "secret").write_text("a secret of the host's\n")
    (folder / "kernel").write_bytes(b"x")
    config = dict(task["config"], default_memory_mb=128, default_disk_size_mb=64, cache_dir=str(folder / "cache"))
    if task["connected"]:
        for command in ("ip link set lo up", "ip tuntap add dev {} mode tap user {}".format(OTHERS_TAP, USER)):
            subprocess.run(command.split(), check=True)
    manager = MicroVMIsolationManager(dict(config, default_backend=VMBackend.QEMU))
    manager.start()
    try:
        victim = manager.get_vm(manager.create_vm("plugin"))
        if task["victim"] and not victim.start():
            raise SystemExit("the victim did not start: {}".format(victim.last_error))
        victims = Path(victim.get_info()["socket_path"]).parent
        orders = dict(
            task["orders"],
            decoy=decoy.pid,
            secret=folder / "secret",
            scratch=folder,
            port=listeners[0].getsockname()[1],
            abstract="intruder-{}".format(os.getpid()),
            other_disk=next((folder / "cache" / "disks").glob("*-" + victim.vm_id), victims / "disk"),
            other_socket=victims / "sock",
            runtime_dir=victims.parent,
            host_name=os.uname().nodename,
            block_device=block_device(),
            cgroup="/sys/fs/cgroup/cgroup.procs",
            tap=OWN_TAP if task["connected"] else "",
            others_tap=OTHERS_TAP if task["connected"] else "",
        )
        if task["jailed"]:
            result = jailed(task, image(folder / "orders", dict(orders, jailed=1)))
        else:
            result = bare(task, folder, image(folder / "orders", dict(orders, jailed=0)))
        answer = victim.send_command("ping") if task["victim"] else None
        result["victim_lives"] = answer == {"status": "ok", "result": "pong"}
        result["decoy_lives"] = decoy.poll() is None
        return result
    finally:
        manager.stop()
        decoy.send_signal(signal.SIGKILL)
        decoy.wait()
        for listener in listeners:
            listener.close()


def block_device() -> str:
    found = [path for path in ("/dev/vda", "/dev/sda", "/dev/nvme0n1", "/dev/loop0") if Path(path).exists()]
    return (found + ["/dev/no-disk"])[0]


def jailed(task: Dict[str, Any], orders: Path) -> Dict[str, Any]:
    """The intruder as a VMM; it never becomes a VM, so what it printed comes back with the failure."""
    backend = VMBackend(task["backend"])
    key = backend.name.lower() + "_binary"
    config = dict(task["config"], start_timeout_s=task["timeout"], default_backend=backend)
    config[key] = task["intruder"]
    if backend is not VMBackend.QEMU:
        pretend_virtualization(orders.parent)
    manager = MicroVMIsolationManager(config)
    network = VMNetworkConfig(isolated_network=False, tap_device=OWN_TAP) if task["connected"] else None
    limits = VMResourceLimits(**task["limits"])
    vm = manager.get_vm(manager.create_vm("plugin", limits, network_config=network, rootfs_path=str(orders)))
    watch = Watch(Path(task["intruder"]).name)
    watch.start()
    try:
        started = vm.start()
    finally:
        watch.over.set()
        watch.join()
        manager.stop()
    details = vm.last_error.details if vm.last_error else {}
    return {
        "started": started,
        "error": str(vm.last_error),
        "said": details.get("console_tail", ""),
        "stderr": details.get("vmm_stderr_tail", ""),
        "code": vm.last_error.code if vm.last_error else "",
        "samples": watch.samples,
    }


def pretend_virtualization(folder: Path) -> None:
    """A CPU that says it can virtualize, and a device that any user may open: the backend is chosen by that, and the
    intruder in its place runs no guest."""
    text = Path("/proc/cpuinfo").read_text()
    if not any(flag in text.split() for flag in ("vmx", "svm")):
        (folder / "cpuinfo").write_text(text.replace("\nflags\t\t:", "\nflags\t\t: svm"))
        subprocess.run(["mount", "--bind", str(folder / "cpuinfo"), "/proc/cpuinfo"], check=True)
    if Path("/dev/kvm").exists() and not os.stat("/dev/kvm").st_mode & stat.S_IROTH:
        os.mknod(str(folder / "kvm"), 0o666 | stat.S_IFCHR, os.stat("/dev/kvm").st_rdev)
        os.chmod(str(folder / "kvm"), 0o666)
        subprocess.run(["mount", "--bind", str(folder / "kvm"), "/dev/kvm"], check=True)


def bare(task: Dict[str, Any], folder: Path, orders: Path) -> Dict[str, Any]:
    """The same program with no jail around it, at things that are the test's own."""
    (folder / "disk").write_bytes(b"")
    drives = ["-drive", "id=rootfs,file={}".format(orders), "-drive", "id=disk,file={}".format(folder / "disk")]
    done = subprocess.run(
        [task["intruder"], "-kernel", str(folder / "kernel")] + drives,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        universal_newlines=True,
        timeout=task["timeout"],
    )
    return {"said": done.stdout, "stderr": done.stderr, "samples": []}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
