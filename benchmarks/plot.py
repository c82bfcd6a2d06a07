"""Draw docs/performance.svg from the benchmarks' results.

python -m benchmarks.plot
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.report import RESULTS

_ROOT: Final = Path(__file__).resolve().parents[1]
_OURS, _OTHERS, _LIMIT = "#2563eb", "#9ca3af", "#111827"
_NAMES: Final = {
    "loop": "plain loop",
    "ray": "Ray as documented",
    "daft": "Daft",
    "bare": "bare processes",
    "scan": "lfm-scan",
}
_GROUPS: Final = {"actors": "actors", "ray": "Ray", "driver": "driver", "decoders": "decoders"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=_ROOT / "docs" / "performance.svg")
    options = parser.parse_args(arguments)
    mpl.rcParams.update({"svg.hashsalt": "lfm-scan", "font.size": 9, "axes.spines.top": False})
    mpl.rcParams["axes.spines.right"] = False
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    axes = figure.subplots(2, 2)
    _model(axes[0, 0], _read("cpu_model"))
    _end_to_end(axes[0, 1], _read("end_to_end"))
    _scaling(axes[1, 0], _read("scaling"))
    _memory(axes[1, 1], _read("memory"))
    figure.savefig(options.out, metadata={"Date": None})  # the same results give the same file
    print(f"drawn to {options.out}")


def _read(name: str) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return report


def _model(axes: Axes, report: dict[str, Any]) -> None:
    rows = [row for row in report["speed"] if row["processes"] > 1]
    names = [row["side"] for row in rows]
    colours = [_OURS if name.startswith("openvino") else _OTHERS for name in names]
    _bars(axes, names, [row["images_per_s"] for row in rows], colours)
    axes.set_title("The model alone: images/s on 2 cores", loc="left")


def _end_to_end(axes: Axes, report: dict[str, Any]) -> None:
    sides = report["sides"]
    colours = {"scan": _OURS, "bare": _LIMIT}
    names = [_NAMES[side] for side in sides]
    rates = [found["steady_images_per_s"] for found in sides.values()]
    _bars(axes, names, rates, [colours.get(side, _OTHERS) for side in sides])
    axes.set_title(f"{report['configuration']['images']:,} JPEG files to scores: images/s, steady", loc="left")


def _scaling(axes: Axes, report: dict[str, Any]) -> None:
    sides = report["sides"]
    names = [
        f"{row['number']} {'CPU' if row['kind'] == 'cpus' else 'node'}{'s' * (row['number'] > 1)}" for row in sides
    ]
    _bars(axes, names, [row["images_per_s"] for row in sides], [_OURS] * len(sides))
    axes.set_title("A scan's images/s; nodes have one CPU, the machine two", loc="left")


def _memory(axes: Axes, report: dict[str, Any]) -> None:
    looks = report["looks"]
    minutes = [look["at_s"] / 60 for look in looks]
    axes.stackplot(
        minutes,
        [[look[group] for look in looks] for group in _GROUPS],
        labels=list(_GROUPS.values()),
        colors=["#1d4ed8", "#60a5fa", "#93c5fd", "#d1d5db"],
    )
    axes.set_xlabel("minutes")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=4, frameon=False)
    axes.set_title(f"Memory over {report['configuration']['images']:,} images, MiB", loc="left")


def _bars(axes: Axes, names: Sequence[str], values: Sequence[float], colours: Sequence[str]) -> None:
    bars = axes.barh(range(len(names)), values, color=colours)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.bar_label(bars, [f"{value:.0f}" for value in values], padding=3)
    axes.margins(x=0.1)


if __name__ == "__main__":
    main()
