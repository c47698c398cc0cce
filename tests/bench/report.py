"""
What a run prints and keeps: the machine, a table for each load, and plots.

Of what a run has kept, `python -m bench.report FILE` prints the same again.
"""

import argparse
import json
import os
import platform
import ssl
import subprocess
import sys
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from bench.contestants import OURS, PEERS, Contestant
from bench.lab import ROOT, run
from bench.loads import Load, named
from bench.values import Results, read_results


def machine(chosen: list[Contestant], *, rps: bool) -> dict[str, Any]:
    """
    Say what the numbers were measured on.
    """
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    product = subprocess.run(describe, capture_output=True, text=True, check=False).stdout.strip()
    cpu = [x for x in Path("/proc/cpuinfo").read_text().split("\n") if x.startswith("model name")]
    versions = {x.name: x.version() for x in chosen if x.peer}
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "kernel": platform.release(),
        "cpus": os.cpu_count(),
        "cpu": cpu[0].partition(": ")[2] if cpu else platform.machine(),
        "congestion_control": run("sysctl", "-n", "net.ipv4.tcp_congestion_control").strip(),
        "rps": "on" if rps else "off",
        "openssl": ssl.OPENSSL_VERSION,
        "python": platform.python_version(),
        "versions": {"sniroute": product or "unknown", **versions},
    }


def number(value: float | None) -> str:
    """
    Three or more significant digits.
    """
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def table(results: Results, load: Load) -> str:
    """
    Lay out one load: medians with their range, ratios, what it cost, and what else was seen.
    """
    of = results.samples[load.name]
    best = results.best(load.name, PEERS, lower=load.lower, measure="value")
    bases = [x for x in ("direct", best) if x in of]
    extras = list(next(iter(of.values()))[0].extra)
    costs = [load.cpu] if load.cpu else []
    rows = [["", "median", "min", "max", *(f"/{x}" for x in bases), *costs, *extras]]
    for name, samples in of.items():
        values = [x.value for x in samples]
        row = [median(values), min(values), max(values)]
        row += [results.ratio(load.name, name, base) or 0 for base in bases]
        row += [median(x.cpu for x in samples) * load.scale for _ in costs]
        row += [median(x.extra[key] for x in samples) for key in extras]
        rows.append([name, *map(number, row)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(x.rjust(w) if i else x.ljust(w) for i, (x, w) in enumerate(zip(row, widths)))  # noqa: B905
        for row in rows
    ]
    return "\n".join([f"{load.name}: {load.title}" + " (less is better)" * load.lower, *lines])


def show(kept: dict[str, Any]) -> None:
    """
    Print what a run has kept.
    """
    results = read_results(kept)
    for key, value in kept["machine"].items():
        shown = "; ".join(map(": ".join, value.items())) if isinstance(value, dict) else value
        print(f"{key}: {shown}")
    print(f"background: {results.background:.2f} CPUs busy before the first round")
    print(f"measured for {kept['seconds']} s; ratios are medians of the rounds' ratios")
    for load in measured(results):
        print("\n" + table(results, load))
    said = [f"error: {x}" for x in results.errors]
    said += [f"below the floor: {x}" for x in kept["below_floors"]]
    print("\n" * bool(said), *said, sep="\n", end="\n" * bool(said))


def measured(results: Results) -> list[Load]:
    """
    Name the loads that there are results of, in their order.
    """
    return [x for x in named(list(results.samples)) if results.samples[x.name]]


# --- plots ------------------------------------------------------------------------------

_STYLE = """
text { font: 13px sans-serif; fill: #57606a } .title { font-weight: 600 }
.bar { fill: #8c959f } .ours { fill: #1f6feb } .limit { fill: #d0d7de }
.range { stroke: #57606a; stroke-width: 1.5 }
"""
_LEFT, _WIDTH, _ROW, _TOP = 130, 460, 24, 40


def plot(results: Results, load: Load) -> str:
    """
    Draw one load as an SVG: a bar for each median, a line from the least to the most.
    """
    of = results.samples[load.name]
    most = max(x.value for samples in of.values() for x in samples) or 1
    title = load.title + ", less is better" * load.lower
    height = _TOP + _ROW * len(of) + 8
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="700" height="{height}" role="img">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style>",
        f'<text class="title" x="8" y="22">{escape(title)}</text>',
    ]
    for row, (name, samples) in enumerate(of.items()):
        values = [x.value for x in samples]
        middle = median(values)
        low, mid, high = (_LEFT + _WIDTH * x / most for x in (min(values), middle, max(values)))
        y = _TOP + _ROW * row
        kind = "limit" if name == "direct" else "ours" if name in OURS else "bar"
        parts += [
            f'<text x="{_LEFT - 8}" y="{y + 14}" text-anchor="end">{escape(name)}</text>',
            f'<rect class="{kind}" x="{_LEFT}" y="{y + 2}" width="{mid - _LEFT:.1f}" height="16"/>',
            f'<line class="range" x1="{low:.1f}" y1="{y + 10}" x2="{high:.1f}" y2="{y + 10}"/>',
            f'<text x="{high + 8:.1f}" y="{y + 14}">{number(middle)}</text>',
        ]
    return "\n".join([*parts, "</svg>\n"])


def draw(results: Results, folder: Path) -> None:
    """
    Draw every load into *folder*.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for load in measured(results):
        (folder / f"{load.name}.svg").write_text(plot(results, load))


def main(argv: list[str]) -> int:
    """
    Print, and draw, what an earlier run has kept.
    """
    parser = argparse.ArgumentParser("bench.report", description=(__doc__ or "").split(":")[0])
    parser.add_argument("file", type=Path, help="what --json has written")
    parser.add_argument("--plots", type=Path, help="draw an SVG of each load into this folder")
    args = parser.parse_args(argv)
    kept = json.loads(args.file.read_text())
    show(kept)
    if args.plots:
        draw(read_results(kept), args.plots)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
