"""``templates``: the snapshots that VMs can be cloned from."""

import argparse
import json
import time
from typing import List

from .. import MicroVMIsolationManager, TemplateInfo
from . import table

HEAD = ["NAME", "STATE", "BACKEND", "SIZE", "CREATED"]


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print them as JSON: what list_templates() returns")


def run(options: argparse.Namespace) -> int:
    found = MicroVMIsolationManager({"raise_on_error": True}).list_templates()
    if options.json:
        print(json.dumps(found, indent=2, sort_keys=True))
        return 0
    table.show([HEAD, *map(_row, found)])
    return 0


def _row(template: TemplateInfo) -> List[str]:
    state = "damaged" if template["damaged"] else "usable" if template["usable"] else "differs"
    created = template.get("created")
    when = "-" if created is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(created))
    size = "{:.1f} MiB".format(template["disk_bytes"] / (1 << 20))
    return [template["name"], state, template.get("backend", "-"), size, when]
