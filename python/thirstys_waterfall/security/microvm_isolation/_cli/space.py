"""``df`` and ``prune``: what lies in the cache, and what of it may go."""

import argparse
import json
import os
from typing import Dict, List, Tuple, Union

from .. import MicroVMError, MicroVMIsolationManager, TemplateInfo, doctor
from . import table
from .fail import complain

HEAD = ["TYPE", "COUNT", "SIZE"]
# st_blocks counts these (stat(2)); disks and memories have holes.
BLOCK_BYTES = 512
MIB = 1 << 20


def configure_df(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON: the type, the count and the bytes of each row")


def configure_prune(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-a", "--all", action="store_true", help="delete all snapshots, not only those that no VM can be cloned from")
    parser.add_argument("-f", "--force", action="store_true", help="ask nothing")
    parser.set_defaults(usage=parser.error)


def df(options: argparse.Namespace) -> int:
    """A row for each folder of the cache: disks, snapshots, suspended VMs, templates."""
    found: List[Dict[str, Union[str, int]]] = []
    for name, path in sorted(_folders(doctor()["cache_dir"])):
        sizes = [_bytes_of(entry) for entry in _entries(path) if not _is_lock(entry)]
        found.append({"type": name, "count": len(sizes), "bytes": sum(sizes)})
    if options.json:
        print(json.dumps(found, indent=2, sort_keys=True))
    else:
        table.show([HEAD, *[[str(row["type"]), str(row["count"]), _size(int(row["bytes"]))] for row in found]])
    return 0


def prune(options: argparse.Namespace) -> int:
    """Removes what ended processes left, and the snapshots that are of no use; prints the names of those."""
    code = 0
    # Its start removes what has no owner any more.
    with MicroVMIsolationManager({"raise_on_error": True}) as manager:
        going = [one for one in manager.list_templates() if options.all or not one["usable"]]
        if going and not options.force and not _is_agreed(options, going):
            return 1
        for one in going:
            try:
                manager.delete_template(one["name"])
                print(one["name"], flush=True)
            except MicroVMError as error:
                complain(error)
                code = 1
    return code


def _is_agreed(options: argparse.Namespace, going: List[TemplateInfo]) -> bool:
    if not os.isatty(0):
        options.usage("it asks before it deletes snapshots, and stdin is no terminal: give -f")
    names = ", ".join(one["name"] for one in going)
    print("{} in snapshots: {}".format(_size(sum(one["disk_bytes"] for one in going)), names))
    try:
        return input("Delete them? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


def _folders(cache: str) -> List[Tuple[str, str]]:
    return [(entry.name, entry.path) for entry in _entries(cache) if entry.is_dir(follow_symlinks=False)]


def _entries(folder: str) -> List["os.DirEntry[str]"]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except FileNotFoundError:
        # A VM may end meanwhile, and without a first VM there is no cache.
        return []


def _is_lock(entry: "os.DirEntry[str]") -> bool:
    return entry.name.endswith(".lock") or entry.name.startswith(".lock-")


def _bytes_of(entry: "os.DirEntry[str]") -> int:
    if entry.is_dir(follow_symlinks=False):
        return sum(map(_bytes_of, _entries(entry.path)))
    try:
        return entry.stat(follow_symlinks=False).st_blocks * BLOCK_BYTES
    except FileNotFoundError:
        return 0


def _size(count: int) -> str:
    return "{:.1f} MiB".format(count / MIB)
