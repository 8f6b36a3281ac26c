"""The package on other distributions, with their own Python and libc, on their QEMU and on ours (``make test-distributions``).

Each is a folder that ``mmdebstrap`` fills from the archive that apt is set up with here, and in which examples/basic.py and a
VM's life run as root, in namespaces of their own. ``--package`` names the folder that holds ``thirstys_waterfall``, as the wheel
installs it. Where the wheel of our QEMU is there (tests/own_qemu.py), both run once more with it beside the package, and
with ``jail="strict"``.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import List, Optional, Tuple

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    # This folder is no place to import from: it would hide packages.
    sys.path[0] = str(ROOT)

from tests import own_qemu  # noqa: E402

PACKAGES = "qemu-system-x86,python3"
DEFAULT = ["bullseye", "trixie", "sid"]
# mmdebstrap takes a minute or two, a VM's life under TCG some seconds.
MAKE_S, RUN_S = 1200, 300

LIFE = """
import platform, sys
from thirstys_waterfall.security.microvm_isolation import IsolationType, MicroVMIsolationManager, VMResourceLimits

OWN = False
config = {"default_backend": "QEMU", "raise_on_error": True, "start_timeout_s": 90, "jail": "strict" if OWN else "default"}
limits = VMResourceLimits(vcpu_count=1, memory_mb=128, disk_size_mb=64)


def say(vm, script):
    answer = vm.send_command("exec", {"program": "/bin/sh", "args": ["-c", script]})
    assert answer["status"] == "ok" and answer["result"]["exit_code"] == 0, answer
    return answer["result"]["stdout"].strip()


with MicroVMIsolationManager(config) as manager:
    manager.prepare(limits)
    first = manager.get_vm(manager.create_vm(IsolationType.SESSION, limits))
    first.start()
    info = first.get_info()
    print("{}; {}; jail: {}".format(platform.python_version(), info["vmm"], info["jail"]["mode"]))
    assert info["vmm"]["packaged"] == OWN, info["vmm"]
    assert info["start"]["origin"] == "clone", info["start"]
    print("clone")
    assert first.pause() and first.resume()
    say(first, "echo kept >/data/f; echo ram >/run/f; sync")
    print("pause, resume")
    first.snapshot("kept")
    copy = manager.get_vm(manager.create_vm(IsolationType.SESSION, template="kept"))
    copy.start()
    assert say(copy, "cat /data/f /run/f").split() == ["kept", "ram"] and say(first, "cat /run/f") == "ram"
    print("snapshot, clone of it")
    first.suspend()
    assert first.get_info()["suspended"]
    assert first.resume() and say(first, "cat /data/f /run/f").split() == ["kept", "ram"]
    print("suspend, resume")
    assert manager.delete_template("kept")
"""

# In a chroot the kernel refuses user namespaces, so the root is a mount of its own.
ENTER = """
set -e
mount --bind "$1" "$1" && cd "$1"
for folder in dev sys; do mkdir -p $folder && mount --rbind /$folder $folder; done
mkdir -p proc old package run && mount -t proc proc proc
mount --bind "$2" package && mount -t tmpfs tmpfs run && mount -t tmpfs tmpfs tmp && mount -t tmpfs -o mode=1777 tmpfs dev/shm
pivot_root . old
export PYTHONPATH=/package PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root PYTHONDONTWRITEBYTECODE=1
# MNT_DETACH is 2; a small root has no umount(8).
exec python3 -c 'import ctypes, sys; assert ctypes.CDLL(None).umount2(b"/old", 2) == 0; exec(sys.stdin.read(), {"__name__": "__main__"})'
"""


def mirror() -> Optional[str]:
    """The archive of Debian's that apt is set up with."""
    said = subprocess.run(["apt-get", "indextargets", "--format", "$(SITE)"], stdout=subprocess.PIPE, check=True).stdout.decode()
    sites = [site for site in said.split() if re.search(r"/debian/?$", site)]
    return sites[0] if sites else None


def make(suite: str, folder: Path) -> Optional[str]:
    """Fills the folder unless that was done before; answers why it could not."""
    done = folder / "made"
    if done.exists():
        return None
    archive = mirror()
    if archive is None:
        return "apt is set up with no archive of Debian's"
    shutil.rmtree(str(folder), ignore_errors=True)
    folder.mkdir(parents=True)
    # A mirror may be a snapshot that is older than its Release file allows.
    options = ["--variant=apt", "--include=" + PACKAGES, "--aptopt=Acquire::Check-Valid-Until \"false\""]
    source = "deb [trusted=yes] {} {} main".format(archive, suite)
    with open(str(folder / "log"), "wb") as log:
        command = ["mmdebstrap", *options, suite, str(folder / "root"), source]
        made = subprocess.run(command, stdout=log, stderr=log, timeout=MAKE_S)
    if made.returncode != 0:
        return "mmdebstrap failed: see {}".format(folder / "log")
    done.touch()
    return None


def run(root: Path, package: Path, code: str) -> bool:
    command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--propagation", "private"]
    command += ["sh", "-c", ENTER, "enter", str(root), str(package)]
    ended = subprocess.run(command, input=code.encode(), timeout=RUN_S)
    return ended.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suites", nargs="*", default=DEFAULT, help="Debian's names (default: {})".format(" ".join(DEFAULT)))
    parser.add_argument("--package", type=Path, default=ROOT / "python", help="the folder that holds thirstys_waterfall")
    parser.add_argument("--roots", type=Path, default=ROOT / "build" / "distributions", help="where the roots are kept")
    options = parser.parse_args()
    missing = [tool for tool in ("mmdebstrap", "unshare", "pivot_root") if shutil.which(tool) is None]
    if os.geteuid() != 0:
        missing.append("root")
    example, wheel = (ROOT / "examples" / "basic.py").read_text(), own_qemu.wheel()
    codes: List[Tuple[str, Optional[Path], str]] = [("basic.py", None, example), ("life", None, LIFE)]
    own = [("basic.py on our QEMU", wheel, example), ("life on our QEMU", wheel, LIFE.replace("OWN = False", "OWN = True"))]
    if wheel:
        codes += own
    else:
        print("our QEMU: skipped: {}".format(own_qemu.MISSING))
    passed, failed, skipped = 0, [], 0  # type: int, List[str], int
    for suite in options.suites:
        why = "needs " + ", ".join(missing) if missing else make(suite, options.roots / suite)
        if why:
            print("{}: skipped: {}".format(suite, why), flush=True)
            skipped += len(codes)
            continue
        for name, own, code in codes:
            print("{}: {}".format(suite, name), flush=True)
            # Only the packages are mounted, not this machine's other Python packages.
            with tempfile.TemporaryDirectory() as shown:
                ignore = shutil.ignore_patterns("__pycache__")
                shutil.copytree(str(options.package / "thirstys_waterfall"), shown + "/thirstys_waterfall", ignore=ignore)
                if own:
                    own_qemu.unpack(own, Path(shown))
                if run(options.roots / suite / "root", Path(shown), code):
                    passed += 1
                else:
                    failed.append("{}: {}".format(suite, name))
    for name in failed:
        print("FAILED {}".format(name))
    print("{} passed, {} failed, {} skipped".format(passed, len(failed), skipped))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
