"""The command line: ``doctor`` says what this host can run and what is missing, ``bench`` what a VM costs."""

import argparse
import json
from typing import Any, Dict, List, Optional, Sequence

from . import _bench, _native

PROGRAM = "python -m thirstys_waterfall.security.microvm_isolation"


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run one command and return its exit code.

    ``doctor``: 0 when at least QEMU can run a VM here, 1 when not. ``bench``: 0 when all could be measured. Bad usage: 2.
    """
    parser = argparse.ArgumentParser(prog=PROGRAM, description="MicroVM isolation for browser components")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    doctor = commands.add_parser("doctor", help="say what this host can run and what is missing")
    doctor.add_argument("--json", action="store_true", help="print the report as JSON")
    _bench.configure(commands.add_parser("bench", help="measure VMs beside the bare VMM"))
    options = parser.parse_args(arguments)
    if options.command == "bench":
        return _bench.run(options)
    if options.command != "doctor":
        parser.print_help()
        return 2
    report = _native.doctor()
    if options.json:
        print(json.dumps(report, indent=2, sort_keys=True))
    else:
        print("\n".join(render(report)))
    return 0 if _qemu_usable(report) else 1


def render(report: Dict[str, Any]) -> List[str]:
    """The report as lines of text."""
    lines: List[str] = []
    for title, key in (("Platform", "platform"), ("Privileges", "privileges")):
        lines += [title] + _facts(report.get(key, {})) + [""]
    kvm = report.get("kvm", {})
    lines.append("KVM")
    lines.append("  /dev/kvm: {}".format("usable" if kvm.get("usable") else "not usable"))
    lines += _why(kvm) + ["", "Backends"]
    for backend in report.get("backends", []):
        lines += _backend(backend)
    lines += ["", "Network"] + _facts(report.get("network", {}))
    lines += ["", "Jail"]
    for name, layer in sorted(report.get("jail", {}).items()):
        head = "given" if layer.get("given") else "MISSING"
        lines.append("  {}: {}: {}".format(name.replace("_", " "), head, layer.get("how")))
    lines += ["", "Guest image"] + _facts(report.get("guest_image", {}))
    lines += ["", "Runtime directory", "  {}".format(report.get("runtime_dir")), ""]
    problems = report.get("problems", [])
    lines.append("Problems" if problems else "No problems found.")
    for problem in problems:
        lines.append("  - {}".format(problem.get("what")))
        if problem.get("remedy"):
            lines.append("    remedy: {}".format(problem["remedy"]))
    return lines


def _backend(backend: Dict[str, Any]) -> List[str]:
    # One that cannot run here may be installed all the same.
    found = " ".join(filter(None, [backend.get("path"), backend.get("version")]))
    if not backend.get("available"):
        found = ", ".join(filter(None, ["not available", found]))
        return ["  {}: {}".format(backend.get("backend"), found)] + _why(backend, "    ")
    head = "  {}: {}".format(backend.get("backend"), found)
    grade = "    accelerator {}, isolation grade {}".format(backend.get("accelerator"), backend.get("isolation_grade"))
    return [head, grade] + _why(backend, "    ")


def _why(item: Dict[str, Any], indent: str = "  ") -> List[str]:
    return ["{}{}: {}".format(indent, key, item[key]) for key in ("reason", "remedy") if item.get(key)]


def _facts(facts: Dict[str, Any]) -> List[str]:
    return ["  {}: {}".format(name.replace("_", " "), _plain(value)) for name, value in facts.items()]


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(str(item) for item in value) or "none"
    if value is None:
        return "none"
    return str(value)


def _qemu_usable(report: Dict[str, Any]) -> bool:
    return any(b.get("backend") == "qemu" and b.get("available") for b in report.get("backends", []))
