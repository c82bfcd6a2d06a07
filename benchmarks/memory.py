"""Does the memory of a scan grow with the number of images?

    python -m benchmarks.memory [--images 20000] [FOLDER ...]

Runs `lfm-scan scan` and looks at all its processes every few seconds: the driver, the actors that scan, their decoders,
and Ray's own. What counts is proportional set size, in which shared pages are shared out. "drift" compares the median
of the last quarter of the time in which images were scored with that of the second quarter.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from benchmarks.images import FOLDERS, write_jpegs
from benchmarks.report import RESULTS, machine, versions, write

_ROOT: Final = Path(__file__).resolve().parents[1]
_EVERY_S: Final = 2.0
_GROUPS: Final = ("driver", "actors", "decoders", "ray")
_PACKAGES: Final = ("lfm-scan", "torch", "openvino", "ray", "pyarrow", "numpy", "pillow")


@dataclass(frozen=True)
class Look:
    """What was seen at one moment.

    Attributes:
        at_s: Seconds since the start.
        num_parts: Shards done.
        mib: Memory of each group of processes.
    """

    at_s: float
    num_parts: int
    mib: dict[str, float]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path, default=FOLDERS)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--smoke", action="store_true", help="a few images: does it still run?")
    parser.add_argument("--out", type=Path, default=RESULTS / "memory.json")
    options = parser.parse_args(arguments)
    num_images = 24 if options.smoke else options.images
    with tempfile.TemporaryDirectory() as scratch:
        write_jpegs(Path(scratch) / "images", options.folders, num_images)
        looks = _watch(Path(scratch) / "images", Path(scratch) / "run", 0.1 if options.smoke else _EVERY_S)
    grown = drift(looks)
    highest = {group: round(max(look.mib[group] for look in looks), 1) for group in (*_GROUPS, "all")}
    report = {
        "machine": machine(),
        "versions": versions(_PACKAGES),
        "configuration": {"images": num_images, "every_s": _EVERY_S},
        "drift": grown,
        "highest_mib": highest,
        "looks": [{"at_s": round(look.at_s, 1), "parts": look.num_parts, **look.mib} for look in looks],
    }
    for group, mib in highest.items():
        print(f"{group:9} highest {mib:8.1f} MiB   drift {grown.get(group, 0):+7.1%}")
    write(options.out, report)


def drift(looks: Sequence[Look]) -> dict[str, float]:
    """Return by how much each group grew from the second to the last quarter of the time in which shards were done."""
    busy = [look for look in looks if 0 < look.num_parts < looks[-1].num_parts]
    if len(busy) < 8:
        return {}
    quarter = len(busy) // 4
    found = {}
    for group in (*_GROUPS, "all"):
        early = statistics.median(look.mib[group] for look in busy[quarter : 2 * quarter])
        late = statistics.median(look.mib[group] for look in busy[-quarter:])
        found[group] = round(late / early - 1, 4) if early else 0.0
    return found


def _watch(images: Path, run_dir: Path, every_s: float) -> list[Look]:
    began = time.monotonic()
    command = [sys.executable, "-m", "lfm_scan", "scan", str(images), "--output", str(run_dir)]
    looks = []
    with subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.DEVNULL) as scan:  # noqa: S603
        while scan.poll() is None:
            num_parts = sum(1 for _ in (run_dir / "parts").glob("part-*"))
            looks.append(Look(time.monotonic() - began, num_parts, _memory(psutil.Process(scan.pid))))
            time.sleep(every_s)
    if scan.returncode:
        raise SystemExit(f"the scan ended with code {scan.returncode}")
    return looks


def _memory(driver: psutil.Process) -> dict[str, float]:
    found: Counter[str] = Counter(dict.fromkeys(_GROUPS, 0))
    with contextlib.suppress(psutil.Error):
        for process in (driver, *driver.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                found[_group_of(process, driver)] += process.memory_full_info().pss
    mib = {group: round(found[group] / 2**20, 1) for group in _GROUPS}
    return {**mib, "all": round(sum(mib.values()), 1)}


def _group_of(process: psutil.Process, driver: psutil.Process) -> str:
    if process.pid == driver.pid:
        return "driver"
    command = " ".join(process.cmdline())
    if "decoder_child" in command:
        return "decoders"
    return "actors" if "ScanShard" in command else "ray"


if __name__ == "__main__":
    main()
