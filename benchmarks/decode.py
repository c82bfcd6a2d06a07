"""What decoding costs, by format and size: with it, how many cores keep a GPU busy.

    python -m benchmarks.decode [--rounds 5]

One core does what a scan's decoder does with a file: hash it, decode it, crop or resize it, and, of lossless files,
look for the traces of a former JPEG. Files are made, about as hard to code as photographs; the cells of the table are
measured by turns, and medians count. CPU time is taken, so other programs on the machine hardly matter.
"""

from __future__ import annotations

import argparse
import io
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.report import RESULTS, machine, versions, write
from lfm_scan.bench.images import made_photograph
from lfm_scan.imaging import ImageLimits, get_policy
from lfm_scan.scoring.prepare import prepare_bytes
from lfm_scan.status import Status

_SIZES: Final = ((256, 256), (512, 512), (1024, 768), (1600, 1200), (4000, 3000))
_FORMATS: Final[dict[str, dict[str, Any]]] = {"JPEG": {"quality": 90}, "WEBP": {"quality": 80}, "PNG": {}}
_POLICIES: Final = ("crop256", "resize256")
_LEAST_S: Final = 0.2
"""A cell is measured at least so long in each round."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="two small sizes, one round: does it still run?")
    parser.add_argument("--out", type=Path, default=RESULTS / "decode.json")
    options = parser.parse_args(arguments)
    sizes, rounds = (_SIZES[:2], 1) if options.smoke else (_SIZES, options.rounds)
    files = {(fmt, size): _file(fmt, size) for size in sizes for fmt in _FORMATS}
    runs: dict[tuple[str, tuple[int, int], str], list[float]] = {}
    for _ in range(rounds):
        for (fmt, size), data in files.items():
            for policy in _POLICIES:
                runs.setdefault((fmt, size, policy), []).append(_cpu_ms(data, policy))
    rows: list[dict[str, Any]] = [
        {
            "format": fmt,
            "width": size[0],
            "height": size[1],
            "policy": policy,
            "file_bytes": len(files[fmt, size]),
            "cpu_ms": round(statistics.median(found), 3),
        }
        for (fmt, size, policy), found in runs.items()
    ]
    report = {
        "machine": machine(),
        "versions": versions(("lfm-scan", "pillow", "numpy")),
        "configuration": {"rounds": rounds},
        "cells": rows,
    }
    print(f"{'':24} {'policy':10} {'CPU ms':>8} {'images/s a core':>16}")
    for row in rows:
        name = f"{row['format']} {row['width']}x{row['height']}"
        print(f"{name:24} {row['policy']:10} {row['cpu_ms']:8.2f} {1000 / row['cpu_ms']:16.0f}")
    write(options.out, report)


def _file(fmt: str, size: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    made_photograph(*size, seed=0).save(file, fmt, **_FORMATS[fmt])
    return file.getvalue()


def _cpu_ms(data: bytes, policy_id: str) -> float:
    policy, limits = get_policy(policy_id), ImageLimits()
    count, began = 0, time.process_time()
    while (spent := time.process_time() - began) < _LEAST_S or not count:
        if prepare_bytes(data, policy, limits).status != Status.OK:
            raise SystemExit("a file that was made here cannot be decoded")
        count += 1
    return 1000 * spent / count


if __name__ == "__main__":
    main()
