"""Writes the man page, which the wheel installs: ``make man``."""

from pathlib import Path

from thirstys_waterfall.security.microvm_isolation._cli import make_parser, man

PAGE = Path(__file__).resolve().parent.parent / "wheel" / "data" / "share" / "man" / "man1" / "microvm.1"

if __name__ == "__main__":
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(man.page(make_parser()))
