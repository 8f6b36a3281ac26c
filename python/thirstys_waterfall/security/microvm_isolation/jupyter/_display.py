"""How managers and VMs are shown. What a guest or another process may have said stands in no page but escaped."""

import time
from html import escape
from typing import Any, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple

from .. import AttachedVM, MicroVMError, MicroVMInstance, MicroVMIsolationManager, VMInfo, VMSummary
from .._cli.stats import BARS
from .._cli.vms import age
from .._vm import VM

Cells = Sequence[object]
HEAD = ("VM", "type", "state", "grade", "memory", "CPU", "up", "labels")
WIDTH = 12
# A template that is there takes less; what is shown for less only flickers.
PATIENCE_S = 0.5
MIME = "text/html"
SHOWN: "Dict[type, Any]"


class VMTable:
    """The VMs of all processes of this user, as ``%microvm ps`` shows them.

    Attributes:
        vms: What ``running_vms()`` returned.
    """

    def __init__(self, vms: List[VMSummary]) -> None:
        self.vms = vms

    def __repr__(self) -> str:
        return "\n".join("{}  {}".format(vm["vm_id"], vm.get("state", "no answer")) for vm in self.vms) or "no VMs"

    def _repr_html_(self) -> str:
        return _table(HEAD, map(_summary_row, self.vms))


class Progress:
    """A bar for a template in the making, which the notebook shows while it lasts."""

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self._handle: Any = None
        self._stage, self._fraction = "", 0.0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._handle is not None:
            self._stage, self._fraction = "a template is made: cells start in less time now", 1.0
            self._handle.update(self)

    def __call__(self, stage: str, fraction: float) -> None:
        from IPython.display import display

        self._stage, self._fraction = stage, fraction
        if self._handle is not None:
            self._handle.update(self)
        elif stage != "done":
            self._handle = display(self, display_id=True)

    def __repr__(self) -> str:
        return "{:4.0%} {}".format(self._fraction, self._stage)

    def _repr_html_(self) -> str:
        return '<progress max="100" value="{:.0f}"></progress> {}'.format(100 * self._fraction, escape(self._stage))


def register(shell: Any) -> None:
    for kind, show in SHOWN.items():
        shell.display_formatter.formatters[MIME].for_type(kind, show)


def unregister(shell: Any) -> None:
    for kind in SHOWN:
        shell.display_formatter.formatters[MIME].pop(kind, None)


def manager_html(manager: MicroVMIsolationManager) -> Optional[str]:
    """A table of its VMs, with the quota below."""
    try:
        infos, usage = manager.get_all_vms_info(), manager.get_resource_usage()
    except MicroVMError:
        return None
    rows = [_info_row(infos[vm_id]) for vm_id in infos]
    parts = []
    for what, reserved, left in (
        ("memory", usage["memory_allocated_mb"], usage["memory_available_mb"]),
        ("vCPUs", usage["vcpus_allocated"], usage["vcpus_available"]),
    ):
        parts.append("{} {} {} of {}".format(what, _bar(reserved, reserved + left), reserved, reserved + left))
    return _table(HEAD, rows) + "<p>{}</p>".format(escape("quota: " + ", ".join(parts)))


def vm_html(vm: Any) -> Optional[str]:
    """A card; ``None``, which shows the text alone, when its owner does not answer."""
    try:
        info: VMInfo = (vm.instance if isinstance(vm, VM) else vm).get_info()
    except MicroVMError:
        return None
    used, history = info["health_metrics"], info["health"]["history"]
    limits, jail = info["resource_limits"], info["jail"] or {}
    memory = used["memory_usage_mb"]
    layers = sorted(name for name, layer in jail.items() if isinstance(layer, dict) and layer.get("given"))
    cpus = limits["vcpu_count"]
    rows: List[Tuple[str, object]] = [
        ("state", "suspended" if info["suspended"] else info["state"]),
        ("boundary", "{} ({}, {})".format(info["isolation_grade"] or "-", info["backend"], info["accelerator"] or "-")),
        ("jail", ", ".join(layers) or "-"),
        ("memory", "{} {} of {} MiB".format(_bar(memory, limits["memory_mb"]), memory, limits["memory_mb"])),
        ("CPU", "{} {:.1f} % of one".format(_chart(history, cpus), used["cpu_usage_percent"])),
        ("network", "none" if info["network_config"]["isolated"] else info["network_config"]["ip_address"] or "yes"),
        ("health", info["health"]["status"]),
        ("up", age(used["uptime_seconds"])),
    ]
    if info["labels"]:
        rows.append(("labels", _labels(info["labels"])))
    if info["last_error"]:
        rows.append(("last error", info["last_error"]["message"]))
    return _table((info["vm_id"], ""), rows)


def _summary_row(vm: VMSummary) -> Cells:
    if vm["error"] is not None:
        return (vm["vm_id"], "-", "no answer", "-", "-", "-", "-", "-")
    memory = "{} MiB".format(vm["memory_mb"])
    grade = vm["isolation_grade"] or "-"
    return (vm["vm_id"], vm["isolation_type"], vm["state"], grade, memory, "-", age(vm["uptime_seconds"]), _labels(vm["labels"]))


def _info_row(info: VMInfo) -> Cells:
    used, limits = info["health_metrics"], info["resource_limits"]
    memory = "{} {} of {} MiB".format(_bar(used["memory_usage_mb"], limits["memory_mb"]), used["memory_usage_mb"], limits["memory_mb"])
    cpu = "{} {:.1f} %".format(_chart(info["health"]["history"], limits["vcpu_count"]), used["cpu_usage_percent"])
    state = "suspended" if info["suspended"] else info["state"]
    return (info["vm_id"], info["isolation_type"], state, info["isolation_grade"] or "-", memory, cpu, age(used["uptime_seconds"]), _labels(info["labels"]))


def _table(head: Cells, rows: Iterable[Cells]) -> str:
    """The one place where text becomes markup."""

    def row(cells: Cells, tag: str) -> str:
        style = ' style="text-align:left"'
        return "<tr>{}</tr>".format("".join("<{0}{1}>{2}</{0}>".format(tag, style, escape(str(cell))) for cell in cells))

    return "<table><thead>{}</thead><tbody>{}</tbody></table>".format(row(head, "th"), "".join(row(cells, "td") for cells in rows))


def _labels(labels: Mapping[str, str]) -> str:
    return ", ".join("{}={}".format(name, value) for name, value in sorted(labels.items()))


def _bar(part: float, whole: float) -> str:
    filled = round(WIDTH * min(1.0, part / whole)) if whole > 0 else 0
    return "█" * filled + "░" * (WIDTH - filled)


def _chart(history: Sequence[Mapping[str, Any]], cpus: int) -> str:
    """The CPU time of the last heartbeats as a sparkline."""
    shares = [record["cpu_usage_percent"] / (100.0 * cpus) for record in history[-WIDTH:]]
    return "".join(BARS[max(0, min(len(BARS) - 1, int(share * len(BARS))))] for share in shares)


SHOWN = {
    MicroVMIsolationManager: manager_html,
    MicroVMInstance: vm_html,
    VM: vm_html,
    AttachedVM: vm_html,
}
