"""How a scan's rate grows with cores and with Ray nodes.

    python -m benchmarks.scaling [--images 600] [--rounds 3] [FOLDER ...]

"cpus" is one local Ray of so many CPUs. "nodes" is a local cluster of so many raylets of one CPU each, beside a head
without any, all on this machine: it shows what nodes cost, not what they bring where there are fewer cores than nodes.
Rates are from the first shard's end to the last's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.images import FOLDERS, write_jpegs
from benchmarks.report import RESULTS, machine, versions, write
from benchmarks.steady import scan_steadily
from lfm_scan.config import ScanConfig

_ROOT: Final = Path(__file__).resolve().parents[1]
_SIDES: Final = (("cpus", 1), ("cpus", 2), ("nodes", 1), ("nodes", 2), ("nodes", 3))
_PACKAGES: Final = ("lfm-scan", "torch", "openvino", "ray", "pyarrow", "numpy", "pillow")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path, default=FOLDERS)
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="a few images on two nodes: does it still run?")
    parser.add_argument("--out", type=Path, default=RESULTS / "scaling.json")
    parser.add_argument("--one", nargs=3, metavar=("KIND", "NUMBER", "OUTPUT"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        kind, number, output = options.one
        print(json.dumps(_measure(kind, int(number), options.folders[0], output)))
        return
    num_images, rounds = (24, 1) if options.smoke else (options.images, options.rounds)
    sides = _SIDES[3:4] if options.smoke else _SIDES
    rates: dict[tuple[str, int], list[float]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as scratch:
        images = Path(scratch) / "images"
        write_jpegs(images, options.folders, num_images)
        for turn in range(rounds):
            for kind, number in sides[turn % len(sides) :] + sides[: turn % len(sides)]:
                one = [kind, str(number), str(Path(scratch) / f"{kind}-{number}-{turn}")]
                command = [sys.executable, "-m", "benchmarks.scaling", str(images), "--one", *one]
                done = subprocess.run(command, cwd=_ROOT, stdout=subprocess.PIPE, check=True, text=True)  # noqa: S603
                rates[kind, number].append(json.loads(done.stdout.splitlines()[-1]))
                print(f"round {turn + 1}: {kind} {number}: {rates[kind, number][-1]:6.1f} images/s", flush=True)
    rows = [_summary(kind, number, rates) for kind, number in sides]
    configuration = {"images": num_images, "rounds": rounds}
    report = {"machine": machine(), "versions": versions(_PACKAGES), "configuration": configuration, "sides": rows}
    print(f"\n{'':8} {'images/s':>9} {'times one':>10}")
    for row in rows:
        print(f"{row['kind']:6} {row['number']} {row['images_per_s']:9.1f} {row['times_one']:10.2f}")
    write(options.out, report)


def _summary(kind: str, number: int, rates: dict[tuple[str, int], list[float]]) -> dict[str, Any]:
    mine = rates[kind, number]
    ratios = [rate / one for rate, one in zip(mine, rates.get((kind, 1), mine), strict=True) if one]
    return {
        "kind": kind,
        "number": number,
        "images_per_s": round(statistics.median(mine), 2),
        "times_one": round(statistics.median(ratios), 2) if ratios else 0.0,
        "runs": [round(rate, 2) for rate in mine],
    }


def _measure(kind: str, number: int, images: Path, output: str) -> float:
    """Scan on a Ray of this size, and return images a second."""
    import ray  # noqa: PLC0415 - a process of its own
    from ray.cluster_utils import Cluster  # noqa: PLC0415

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    with contextlib.ExitStack() as until_done:
        if kind == "cpus":
            ray.init(address="local", num_cpus=number, include_dashboard=False, **quiet)
        else:
            cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
            until_done.callback(cluster.shutdown)
            for _ in range(number):
                cluster.add_node(num_cpus=1)
            ray.init(address=cluster.address, **quiet)
        until_done.callback(ray.shutdown)
        return scan_steadily(ScanConfig((str(images),), output=output))


if __name__ == "__main__":
    main()
