"""Where this package's QEMU is."""

from pathlib import Path

__all__ = ["path"]


def path() -> Path:
    """Tell the path of the program ``qemu-system-x86_64``; its firmware lies where it looks for it."""
    return Path(__file__).resolve().parent / "bin" / "qemu-system-x86_64"
