"""Figures as a table for people, JSON for machines and a chart for documents."""

import json
import math
import platform
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence
from xml.sax.saxutils import escape

BAR_HEIGHT, GAP, LABEL_WIDTH, CHART_WIDTH = 18, 6, 330, 420


def percentile(values: Sequence[float], share: float) -> float:
    """The nearest-rank percentile."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


class Row:
    """One figure: its samples, and the bare VMM's or other row that it is held against."""

    def __init__(self, name: str, unit: str, samples: Sequence[float], against: Optional[str] = None) -> None:
        self.name, self.unit, self.samples, self.against = name, unit, list(samples), against

    def at(self, share: float) -> float:
        return percentile(self.samples, share)

    def as_json(self) -> Dict[str, Any]:
        figures = {"p{:.0f}".format(100 * share): self.at(share) for share in (0.5, 0.95, 0.99)}
        return dict(figures, name=self.name, unit=self.unit, n=len(self.samples), against=self.against, samples=self.samples)


class Report:
    """The figures of one run on one accelerator."""

    def __init__(self, program: str, accelerator: str, settings: Dict[str, Any]) -> None:
        self.program, self.accelerator, self.settings = program, accelerator, settings
        self.rows: List[Row] = []

    def add(self, name: str, unit: str, samples: Sequence[float], against: Optional[str] = None) -> None:
        self.rows.append(Row(name, unit, samples, against))

    def ratio(self, row: Row) -> Optional[float]:
        bare = next((other for other in self.rows if other.name == row.against), None)
        return None if bare is None or not bare.at(0.5) else row.at(0.5) / bare.at(0.5)

    def table(self) -> str:
        settings = ", ".join("{} {}".format(name.replace("_", " "), value) for name, value in self.settings.items())
        lines = ["{} on {}; {}".format(self.program, self.accelerator, settings)]
        width = max(len(row.name) for row in self.rows)
        lines.append("{:<{}}  {:>5} {:>5} {:>9} {:>9} {:>9}   p50 against".format("", width, "unit", "n", "p50", "p95", "p99"))
        for row in self.rows:
            ratio = self.ratio(row)
            against = "" if ratio is None else "{:.2f} x {}".format(ratio, row.against)
            figures = " ".join("{:>9.2f}".format(row.at(share)) for share in (0.5, 0.95, 0.99))
            lines.append("{:<{}}  {:>5} {:>5} {}   {}".format(row.name, width, row.unit, len(row.samples), figures, against).rstrip())
        return "\n".join(lines)

    def json(self) -> str:
        whole = {
            "program": self.program,
            "accelerator": self.accelerator,
            "settings": self.settings,
            "host": {"kernel": platform.release(), "machine": platform.machine(), "python": platform.python_version()},
            "rows": [row.as_json() for row in self.rows],
        }
        return json.dumps(whole, indent=1)

    def svg(self) -> str:
        """Horizontal bars from 0 to p50, with a whisker to p95, on a logarithmic scale: the milliseconds, if there are any."""
        units = [row.unit for row in self.rows]
        unit = "ms" if "ms" in units else units[0]
        rows = [row for row in self.rows if row.unit == unit]
        low = 10 ** math.floor(math.log10(min(max(row.at(0.5), 1e-3) for row in rows)))
        high = max(row.at(0.95) for row in rows)
        span = math.log10(high / low) or 1.0

        def x(value: float) -> float:
            return LABEL_WIDTH + CHART_WIDTH * max(0.0, math.log10(max(value, low) / low)) / span

        height = len(rows) * (BAR_HEIGHT + GAP) + 60
        title = "QEMU on {}: {}, p50 (whisker: p95), logarithmic".format(self.accelerator, unit)
        parts = [
            '<svg xmlns="http://www.w3.org/2000/svg" width="{}" height="{}" font-family="sans-serif" font-size="12">'.format(
                LABEL_WIDTH + CHART_WIDTH + 90, height
            ),
            '<rect width="100%" height="100%" fill="white"/>',
            '<text x="10" y="20" font-size="14">{}</text>'.format(escape(title)),
        ]
        for power in range(int(math.log10(low)), math.ceil(math.log10(high)) + 1):
            at = x(10.0**power)
            parts.append('<line x1="{0:.1f}" y1="32" x2="{0:.1f}" y2="{1}" stroke="#ddd"/>'.format(at, height - 18))
            parts.append('<text x="{:.1f}" y="{}" text-anchor="middle" fill="#666">{:g}</text>'.format(at, height - 4, 10.0**power))
        for index, row in enumerate(rows):
            y = 36 + index * (BAR_HEIGHT + GAP)
            colour = "#9aa5b1" if row.name.startswith("bare") else "#2f6fab"
            middle = y + BAR_HEIGHT / 2
            parts += [
                '<text x="{}" y="{:.1f}" text-anchor="end">{}</text>'.format(LABEL_WIDTH - 8, middle + 4, escape(row.name)),
                '<rect x="{}" y="{}" width="{:.1f}" height="{}" fill="{}"/>'.format(
                    LABEL_WIDTH, y, x(row.at(0.5)) - LABEL_WIDTH, BAR_HEIGHT, colour
                ),
                '<line x1="{:.1f}" y1="{m}" x2="{:.1f}" y2="{m}" stroke="#333"/>'.format(x(row.at(0.5)), x(row.at(0.95)), m=middle),
                '<text x="{:.1f}" y="{:.1f}">{:.4g}</text>'.format(x(row.at(0.95)) + 6, middle + 4, row.at(0.5)),
            ]
        return "\n".join(parts + ["</svg>", ""])

    def write(self, json_path: Optional[str], svg_path: Optional[str]) -> None:
        if json_path:
            Path(json_path).write_text(self.json())
        if svg_path:
            Path(svg_path).write_text(self.svg())
