"""The lab's guest: Debian's own kernel, and an initramfs with the modules that a virtualization host has."""

import gzip
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Dict, List, Optional

from . import debian

HERE = Path(__file__).resolve().parent
PACKAGE = "linux-image-amd64"
MODULES = (
    # The disk of this guest is the host's own root.
    "virtio_pci 9pnet_virtio 9p overlay virtio_console virtio_rng "
    # A host of VMs needs these.
    "kvm_amd vhost_vsock tun veth bridge ifb "
    # A connected VM needs these on its host; libcrc32c loads the first one by an alias.
    "crc32c_generic nf_tables nft_chain_nat nft_ct nft_masq nft_nat nft_connlimit nft_reject_inet nft_limit nft_log nft_fib_inet "
    "nft_hash nf_conntrack sch_tbf sch_ingress sch_fq_codel cls_u32 cls_matchall act_mirred"
).split()


def kernel(cache: Path, suite: Optional[str] = None) -> Path:
    """The folder with Debian's kernel package: this release's, or that of another suite."""
    options = debian.suite(cache, suite) if suite else []
    listed = subprocess.run(["apt-cache", *options, "depends", PACKAGE], stdout=subprocess.PIPE, universal_newlines=True, check=True)
    found = re.search(r"Depends: (linux-image-\S+)", listed.stdout)
    if found is None:
        raise RuntimeError("apt knows no {}: run apt-get update".format(PACKAGE))
    return debian.unpacked(cache, found.group(1), [found.group(1)], options)


def vmlinuz(folder: Path) -> Path:
    return next(folder.glob("boot/vmlinuz-*"))


def module_order(folder: Path) -> List[Path]:
    """The modules and all that they depend on, each after what it needs; those that are not there are left out."""
    files: Dict[str, Path] = {path.stem.replace("-", "_"): path for path in folder.glob("lib/modules/*/kernel/**/*.ko")}
    ordered: Dict[str, Path] = {}

    def add(name: str) -> None:
        path = files.get(name)
        if path is None or name in ordered:
            return
        needed = re.search(rb"\0depends=([^\0]*)\0", path.read_bytes())
        for other in needed.group(1).decode().split(",") if needed else []:
            add(other.replace("-", "_"))
        ordered[name] = path

    for name in MODULES:
        add(name)
    return list(ordered.values())


def initramfs(folder: Path, target: Path) -> None:
    """Busybox, the modules in their order, and the first script."""
    busybox = shutil.which("busybox")
    if busybox is None:
        raise RuntimeError("busybox was not found: apt-get install busybox-static")
    tree = target.with_suffix(".tree")
    shutil.rmtree(str(tree), ignore_errors=True)
    for name in ("bin", "modules"):
        (tree / name).mkdir(parents=True)
    shutil.copy(busybox, str(tree / "bin" / "busybox"))
    shutil.copy(str(HERE / "init.sh"), str(tree / "init"))
    os.chmod(str(tree / "init"), 0o755)
    modules = module_order(folder)
    for module in modules:
        shutil.copy(str(module), str(tree / "modules" / module.name))
    (tree / "modules" / "order").write_text("".join(module.name + "\n" for module in modules))
    names = "\n".join(str(path.relative_to(tree)) for path in sorted(tree.rglob("*")))
    packed = subprocess.run(
        ["cpio", "--quiet", "-o", "-H", "newc"], cwd=str(tree), input=names.encode(), stdout=subprocess.PIPE, check=True
    )
    with gzip.open(str(target), "wb", compresslevel=1) as file:
        file.write(packed.stdout)
    shutil.rmtree(str(tree))
