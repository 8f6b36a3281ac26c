"""``doctor``: what this host can run and what is missing."""

import argparse
import json
import logging
from typing import Any, List, Mapping

from .. import _native


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="start no VM: the verdict is what shows without")
    parser.add_argument("--json", action="store_true", help="print the report as JSON: what doctor(start=True) returns")


def run(options: argparse.Namespace) -> int:
    """Prints the report; 0 when a VM can start here, 1 when not."""
    # The report says the same, with the remedy.
    logging.disable(logging.WARNING)
    report = _native.doctor(start=not options.quick)
    if options.json:
        print(json.dumps(report, indent=2, sort_keys=True))
    else:
        print("\n".join(render(report)))
    return 0 if report["verdict"]["starts"] else 1


def render(report: Mapping[str, Any]) -> List[str]:
    """The report as lines of text: the verdict, what to do, and what was found out."""
    verdict = report["verdict"]
    lines = [verdict["text"]]
    if verdict["backend"]:
        lines.append("  with {}: {}".format(verdict["backend"], verdict["backend_reason"]))
    lines.append("")
    lines += _findings("Problems", report.get("problems", [])) or ["No problems found."]
    hints = _findings("Not needed, but possible", report.get("hints", []))
    lines += ([""] + hints if hints else []) + [""]
    if report.get("starts"):
        lines += ["Started"] + [_start(start) for start in report["starts"]] + [""]
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
    lines += ["", "Folders"] + _facts({name: report.get(name) for name in ("runtime_dir", "cache_dir")})
    return lines


def _start(start: Mapping[str, Any]) -> str:
    kind = "connected VM" if start["connected"] else "isolated VM"
    if start["error"]:
        return "  {} {}: failed: {}".format(start["backend"] or "the best backend", kind, start["error"])
    how = "{}, {}".format(start["accelerator"], start["isolation_grade"])
    return "  {} {}: answered after {:.1f} s ({})".format(start["backend"], kind, start["seconds"], how)


def _findings(title: str, findings: List[Mapping[str, Any]]) -> List[str]:
    lines = [title] if findings else []
    for finding in findings:
        lines.append("  - {}".format(finding.get("what")))
        if finding.get("remedy"):
            lines.append("    remedy: {}".format(finding["remedy"]))
    return lines


def _backend(backend: Mapping[str, Any]) -> List[str]:
    # A backend that cannot run on this host may be installed.
    package = "(of the package thirstys-waterfall-microvm-qemu)" if backend.get("packaged") else None
    found = " ".join(filter(None, [backend.get("path"), backend.get("version"), package]))
    if not backend.get("available"):
        found = ", ".join(filter(None, ["not available", found]))
        return ["  {}: {}".format(backend.get("backend"), found)] + _why(backend, "    ")
    head = "  {}: {}".format(backend.get("backend"), found)
    grade = "    accelerator {}, isolation grade {}".format(backend.get("accelerator"), backend.get("isolation_grade"))
    lacks = ["    lacks {}: {}".format(name.replace("_", " "), why) for name, why in (backend.get("lacks_layers") or {}).items()]
    snapshots = [] if backend.get("snapshots") else ["    its VMs cannot be snapshotted or suspended"]
    return [head, grade] + _why(backend, "    ") + snapshots + lacks


def _why(item: Mapping[str, Any], indent: str = "  ") -> List[str]:
    return ["{}{}: {}".format(indent, key, item[key]) for key in ("reason", "remedy") if item.get(key)]


def _facts(facts: Mapping[str, Any]) -> List[str]:
    return ["  {}: {}".format(name.replace("_", " "), _plain(value)) for name, value in facts.items()]


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(str(item) for item in value) or "none"
    if value is None:
        return "none"
    return str(value)
