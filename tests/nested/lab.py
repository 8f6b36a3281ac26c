"""Runs a command on a host with KVM: a guest under TCG whose CPU has (emulated) SVM, on this machine's own root.

``python3 -m tests.nested.lab [--timeout S] [--keep FOLDER] [--kernel SUITE] [--no-kvm] -- COMMAND...``

The guest sees this machine's files, read-only below a layer in its memory; what the command writes to ``/run/lab`` is
found in FOLDER. It ends with the command's exit status, or with 124 when the time is over, or 125 when the guest ended
without one. Needs QEMU, busybox-static, cpio, and root (to share all files).
"""

import argparse
import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import List, Optional, Sequence

from . import debian, guest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CACHE = Path(os.environ.get("MICROVM_NESTED_CACHE", str(ROOT / "build" / "nested")))
QEMU = "qemu-system-x86_64"
# The first release that was not seen to hang.
RELIABLE = 10
TIMED_OUT = 124
NO_STATUS = 125
# `mitigations=off` and the clock spare emulated work; without `la57` page tables have a level less.
CMDLINE = "console=ttyS0 quiet mitigations=off tsc=reliable nokaslr audit=0 panic=-1"
CPU = "max,-la57"
WITHOUT_KVM = CPU + ",-svm"


def release(program: str) -> int:
    """The first number of a QEMU's version."""
    told = subprocess.run([program, "--version"], stdout=subprocess.PIPE, universal_newlines=True, check=True).stdout
    found = re.search(r"version (\d+)\.", told)
    if found is None:
        raise RuntimeError("{} tells no version: {!r}".format(program, told))
    return int(found.group(1))


def emulator() -> List[str]:
    """The QEMU that emulates the host, with what it must be told: the one named, or one that does not hang.

    QEMU 7.2 now and then delivers its guest's hypervisor no interrupt any more: where the one in PATH is older than 10, this
    release's backports are looked into.
    """
    named = os.environ.get("MICROVM_NESTED_QEMU")
    if named:
        return [named]
    if release(QEMU) >= RELIABLE:
        return [QEMU]
    try:
        newer = CACHE / "qemu"
        if not newer.is_dir():
            debian.unpacked(CACHE, "qemu", ["qemu-system-x86", "qemu-system-data"], debian.backports(CACHE))
        call = [str(newer / "usr" / "bin" / QEMU), "-L", str(newer / "usr" / "share" / "qemu"), "-L", "/usr/share/seabios"]
        release(call[0])
        return call
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        print("lab: no newer QEMU than the one in PATH: {}".format(error), file=sys.stderr)
        return [QEMU]


def qemu(folder: Path, kernel: Path, initramfs: Path, cpus: int, memory_mib: int, cpu: str = CPU) -> List[str]:
    shares: List[str] = []
    for tag, path, options in (("root", "/", ",readonly=on,multidevs=remap"), ("lab", str(folder), "")):
        shares += ["-fsdev", "local,id={},path={},security_model=none{}".format(tag, path, options)]
        shares += ["-device", "virtio-9p-pci,fsdev={0},mount_tag={0}".format(tag)]
    return [
        *emulator(),
        *("-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", cpu),
        *("-smp", str(cpus), "-m", str(memory_mib), "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-kernel", str(kernel), "-initrd", str(initramfs), "-append", CMDLINE),
        *("-serial", "file:{}".format(folder / "console.log")),
        *("-chardev", "stdio,id=out,signal=off", "-device", "virtio-serial-pci", "-device", "virtconsole,chardev=out"),
        *("-device", "virtio-rng-pci"),
        *shares,
    ]


def write_command(folder: Path, command: Sequence[str]) -> None:
    """The command, in this folder, with what of the environment is meant for the tests."""
    lines = ["export {}={}\n".format(name, shlex.quote(value)) for name, value in os.environ.items() if name.startswith("MICROVM_")]
    lines.append("cd {} && exec {}\n".format(shlex.quote(str(ROOT)), " ".join(map(shlex.quote, command))))
    (folder / "command.sh").write_text("".join(lines))
    shutil.copy(str(HERE / "main.sh"), str(folder / "main.sh"))


def run(
    command: Sequence[str],
    timeout_s: float,
    folder: Path,
    cpus: int = 1,
    memory_mib: int = 6144,
    suite: Optional[str] = None,
    has_kvm: bool = True,
) -> int:
    """Boot the kernel of a suite of Debian's, run, and say how it ended. Nothing is left running."""
    CACHE.mkdir(parents=True, exist_ok=True)
    unpacked = guest.kernel(CACHE, suite)
    status = folder / "status"
    if status.exists():
        status.unlink()
    initramfs = folder / "initramfs.gz"
    guest.initramfs(unpacked, initramfs)
    write_command(folder, command)
    call = qemu(folder, guest.vmlinuz(unpacked), initramfs, cpus, memory_mib, CPU if has_kvm else WITHOUT_KVM)
    process = subprocess.Popen(call, stdin=subprocess.DEVNULL)
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        print("lab: not done within {} s".format(timeout_s), file=sys.stderr)
        return TIMED_OUT
    finally:
        process.kill()
        process.wait()
    if not status.is_file():
        tail = (folder / "console.log").read_text(errors="replace").splitlines()[-20:]
        print("lab: the guest ended without a status; its console ends:\n" + "\n".join(tail), file=sys.stderr)
        return NO_STATUS
    return int(status.read_text())


def main(arguments: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for all of it")
    parser.add_argument("--keep", type=Path, help="where the results go; absent: nowhere")
    parser.add_argument("--cpus", type=int, default=1)
    parser.add_argument("--memory", type=int, default=6144, help="MiB")
    parser.add_argument("--kernel", metavar="SUITE", help="whose kernel is booted; absent: this release's")
    parser.add_argument("--no-kvm", action="store_true", help="a CPU without SVM")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args(arguments)
    with contextlib.ExitStack() as stack:
        folder = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="microvm-lab-")))
        folder.mkdir(parents=True, exist_ok=True)
        machine = (options.cpus, options.memory, options.kernel, not options.no_kvm)
        return run(options.command, options.timeout, folder.resolve(), *machine)


if __name__ == "__main__":
    sys.exit(main())
