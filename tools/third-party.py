"""Writes the licences of the crates that are linked into what the wheel carries, each text once, to stdout.

``cargo metadata`` on stdin. Where a crate may be had under MIT, the text of Apache's licence is left out.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any, Dict, List

OURS = {"microvm-isolation", "microvm-jail", "microvm-zygote", "microvm-janitor", "microvm-usernet", "microvm-agent", "microvm-tools"}
TEXTS = ("licen[cs]e*", "LICEN[CS]E*", "COPYING*", "NOTICE*", "jemalloc/COPYING")


def linked(metadata: Dict[str, Any]) -> List[Dict[str, Any]]:
    """Every crate of others that ends up in a binary of ours."""
    packages = {package["id"]: package for package in metadata["packages"]}
    nodes = {node["id"]: node for node in metadata["resolve"]["nodes"]}
    left, found = [member for member in metadata["workspace_members"] if packages[member]["name"] in OURS], set()
    while left:
        package = left.pop()
        # A procedural macro runs in the compiler and is not part of the binary.
        if package not in found and not any("proc-macro" in target["kind"] for target in packages[package]["targets"]):
            found.add(package)
            normal = (dep["pkg"] for dep in nodes[package]["deps"] if any(kind["kind"] is None for kind in dep["dep_kinds"]))
            left.extend(normal)
    others = (packages[package] for package in found if packages[package]["source"])
    return sorted(others, key=lambda package: (package["name"], package["version"]))


def texts(package: Dict[str, Any]) -> List[str]:
    folder = Path(package["manifest_path"]).parent
    files = sorted({file for pattern in TEXTS for file in folder.glob(pattern) if file.is_file()})
    if any("MIT" in file.name.upper() for file in files):
        files = [file for file in files if "APACHE" not in file.name.upper()]
    return ["\n".join(line.rstrip() for line in file.read_text().strip().splitlines()) for file in files]


def main() -> None:
    crates = linked(json.load(sys.stdin))
    users = defaultdict(list)
    print("Crates that are linked into the programs of this package; the texts of their licences follow.\n")
    for crate in crates:
        name = "{name} {version}".format(**crate)
        print("- {}: {} ({})".format(name, crate["license"], crate["repository"] or ", ".join(crate["authors"])))
        for text in texts(crate):
            users[text].append(name)
    for text, names in users.items():
        print("\n{}\n{}\n\n{}".format("=" * 100, ", ".join(names), text))


if __name__ == "__main__":
    main()
