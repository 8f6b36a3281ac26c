"""The wheel with our own QEMU, for tests that want it: ``make qemu-wheel`` builds it, ``MICROVM_TEST_QEMU_WHEEL`` names another."""

import os
import zipfile
from pathlib import Path
from typing import Optional

ROOT = Path(__file__).resolve().parent.parent
MODULE = "thirstys_waterfall_microvm_qemu"
MISSING = "needs the wheel of our QEMU: make qemu-wheel builds it, MICROVM_TEST_QEMU_WHEEL names it"


def wheel() -> Optional[Path]:
    """The wheel, where there is one."""
    named = os.environ.get("MICROVM_TEST_QEMU_WHEEL")
    found = [Path(named)] if named else sorted((ROOT / "build" / "qemu-wheel").glob("*.whl"))
    return found[0].resolve() if found and found[0].is_file() else None


def unpack(wheel: Path, folder: Path) -> Path:
    """Put the module into a folder, with the modes that pip gives; answers with the path of the program."""
    with zipfile.ZipFile(str(wheel)) as files:
        for entry in files.infolist():
            made = Path(files.extract(entry, str(folder)))
            made.chmod(0o755 if made.is_dir() or entry.external_attr >> 16 & 0o111 else 0o644)
    for part in (folder / MODULE).rglob("*"):
        if part.is_dir():
            part.chmod(0o755)
    (folder / MODULE).chmod(0o755)
    return folder / MODULE / "bin" / "qemu-system-x86_64"
