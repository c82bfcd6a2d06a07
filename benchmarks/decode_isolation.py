"""What it costs to decode in a process of its own: files a second, and CPU seconds, against the same in one process.

    python benchmarks/decode_isolation.py [--rounds 9] [FOLDER ...]

Both sides hash, decode and preprocess the same files into rows of an array, in rounds by turns; medians count, and the
child has started before. "wall" uses what a second core gives: hashing and handing over while the other decodes. "cpu"
is what matters where every core is busy anyway.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import PIL

from lfm_scan.imaging import ImageLimits, get_policy
from lfm_scan.imaging.preprocess import SIDE_PX
from lfm_scan.scoring.isolated import EncodedImage, IsolatedDecoder
from lfm_scan.scoring.prepare import prepare_bytes
from lfm_scan.status import Status

_ROOT: Final = Path(__file__).resolve().parents[1]
_FOLDERS: Final = (_ROOT / "examples" / "images", _ROOT.parent / "shared" / "data" / "dev")
_RESULTS: Final = _ROOT / "benchmarks" / "results" / "decode_isolation.json"
_POLICY: Final = "resize256"
_MAX_FILES: Final = 300
_SUFFIXES: Final = {"jpeg": (".jpg", ".jpeg"), "png": (".png",)}


@dataclass(frozen=True)
class Cost:
    """Seconds of one round."""

    wall_s: float
    cpu_s: float


def main() -> None:
    """Measure, print the ratios and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path, default=[path for path in _FOLDERS if path.is_dir()])
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    results = [_measure(kind, options.folders, options.rounds) for kind in _SUFFIXES]
    report = {
        "machine": {"cpu": _cpu_name(), "cores": os.cpu_count(), "kernel": ".".join(platform.release().split(".")[:2])},
        "versions": {"python": platform.python_version(), "pillow": PIL.__version__, "numpy": np.__version__},
        "configuration": {"policy": _POLICY, "rounds": options.rounds, "max_files": _MAX_FILES},
        "results": results,
    }
    _RESULTS.parent.mkdir(exist_ok=True)
    _RESULTS.write_text(json.dumps(report, indent=2) + "\n")


def _measure(kind: str, folders: list[Path], rounds: int) -> dict[str, Any]:
    files = _files(kind, folders)
    policy, limits = get_policy(_POLICY), ImageLimits()
    rows = np.zeros((len(files), SIDE_PX, SIDE_PX, 3), np.uint8)

    def in_process() -> None:
        for data, row in zip(files, rows, strict=True):
            pixels = prepare_bytes(data, policy, limits).pixels
            assert pixels is not None  # noqa: S101
            row[...] = pixels

    with IsolatedDecoder(_POLICY, limits) as decoder:

        def isolated() -> None:
            images = (EncodedImage("", data, out=row) for data, row in zip(files, rows, strict=True))
            assert all(prepared.status == Status.OK for prepared in decoder.prepare_all(images))  # noqa: S101

        in_process()
        isolated()  # its child has started
        pid = _only_child()
        costs = [(_cost(in_process, None), _cost(isolated, pid)) for _ in range(rounds)]
    start_s = statistics.median(_start_cost(files[0]) for _ in range(rounds))
    alone, apart = (
        Cost(statistics.median(cost.wall_s for cost in side), statistics.median(cost.cpu_s for cost in side))
        for side in zip(*costs, strict=True)
    )
    wall_ratio, cpu_ratio = apart.wall_s / alone.wall_s, apart.cpu_s / alone.cpu_s
    print(
        f"{kind}: {len(files)} files of {sum(map(len, files)) // len(files):,} bytes; in process "
        f"{len(files) / alone.wall_s:.0f}/s, isolated {len(files) / apart.wall_s:.0f}/s; isolated costs "
        f"{wall_ratio:.3f} of the time and {cpu_ratio:.3f} of the CPU time; a child starts in {start_s:.3f} s"
    )
    return {
        "kind": kind,
        "num_files": len(files),
        "mean_bytes": sum(map(len, files)) // len(files),
        "in_process": {"wall_s": alone.wall_s, "cpu_s": alone.cpu_s},
        "isolated": {"wall_s": apart.wall_s, "cpu_s": apart.cpu_s},
        "wall_ratio": wall_ratio,
        "cpu_ratio": cpu_ratio,
        "start_s": start_s,
    }


def _files(kind: str, folders: list[Path]) -> list[bytes]:
    """Return files of a kind, spread evenly over what the folders hold."""
    paths = sorted(path for folder in folders for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES[kind])
    contents = [path.read_bytes() for path in paths[:: max(1, len(paths) // _MAX_FILES)]]
    policy, limits = get_policy(_POLICY), ImageLimits()
    return [data for data in contents if prepare_bytes(data, policy, limits).status == Status.OK]


def _cost(work: Callable[[], None], child: int | None) -> Cost:
    def cpu_s() -> float:
        # The kernel's name for the CPU clock of another process, as clock_getcpuclockid(3) makes it.
        return time.process_time() + (0 if child is None else time.clock_gettime(~child << 3 | 2))

    cpu, wall = cpu_s(), time.perf_counter()
    work()
    return Cost(time.perf_counter() - wall, cpu_s() - cpu)


def _start_cost(data: bytes) -> float:
    start = time.perf_counter()
    with IsolatedDecoder(_POLICY, ImageLimits()) as decoder:
        list(decoder.prepare_all([EncodedImage("", data)]))
        return time.perf_counter() - start


def _only_child() -> int:
    [pid] = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return int(pid)


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
