"""The rate of a scan once it runs: what large scans run at, whatever starting takes."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from lfm_scan.config import ScanConfig


def scan_steadily(config: ScanConfig) -> float:
    """Scan, and return images a second from the first shard's end to the last's."""
    from lfm_scan.distributed.scan import Listener, scan  # noqa: PLC0415 - loads Ray
    from lfm_scan.runs.shard import Receipt  # noqa: PLC0415

    done: list[tuple[int, float]] = []

    class Marks(Listener):
        def shard_done(self, receipt: Receipt) -> None:
            done.append((receipt.summary.num_rows, time.monotonic()))

    scan(config, Marks())
    return rate(cumulated(done))


def rate(marks: Sequence[tuple[int, float]]) -> float:
    """Return images a second between the first mark (images so far, moment) and the last; 0 if there is but one."""
    (first, began), (last, ended) = marks[0], marks[-1]
    return (last - first) / (ended - began) if ended > began else 0.0


def cumulated(done: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return marks of images so far, of (images, moment) in any order."""
    ordered = sorted(done, key=lambda mark: mark[1])
    totals = np.cumsum([rows for rows, _ in ordered]).tolist()
    return [(total, moment) for total, (_, moment) in zip(totals, ordered, strict=True)]
