"""How a bench goes, and what it measured."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Final, TextIO

from rich.console import Console
from rich.table import Table

from lfm_scan.bench.bench import Bench, advice, bottleneck, core_ms, shares
from lfm_scan.bench.pipeline import ScanTimes
from lfm_scan.bench.stages import INSIDE, GroupTimes, Stage
from lfm_scan.cli.text import byte_size
from lfm_scan.config import ScanConfig
from lfm_scan.distributed.scan import Listener, scan
from lfm_scan.runs.shard import Receipt

_ORDER: Final = (Stage.FETCH, Stage.ISOLATED, *INSIDE, Stage.MODEL, Stage.COMMIT)
_SEEN_MS: Final = 0.005
"""Less than this reads as nothing."""


class BenchProgress:
    """Says what is measured next.

    Args:
        file: Where to say it, usually standard error.
    """

    def __init__(self, file: TextIO) -> None:
        self._console = Console(file=file, highlight=False, soft_wrap=True, markup=False)

    def __call__(self, what: str) -> None:
        """Say it."""
        self._console.print(f"Measuring {what}")


class _Clock(Listener):
    """Notes when a scan has committed how much."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._num_done = 0
        self.marks: list[tuple[float, int]] = []

    def shard_done(self, receipt: Receipt) -> None:
        self._num_done += receipt.summary.num_rows
        self.marks.append((time.perf_counter() - self._started, self._num_done))


def time_scan(config: ScanConfig, *, debug: bool = False) -> ScanTimes:
    """Scan, and note when how much was done."""
    clock = _Clock()
    outcome = scan(config, clock, debug=debug)
    return ScanTimes(outcome.elapsed_s, tuple(clock.marks))


def print_bench(found: Bench, console: Console | None = None) -> None:
    """Print what was measured to standard output."""
    console = console or Console(highlight=False, markup=False)
    console.print(
        f"{found.cores} cores ({found.processor}); model {found.model_id} on {found.device}, "
        f"preprocess {found.preprocess}\n"
    )
    console.print(_stages(found))
    console.print()
    for line in (_all_cores(found), _pipeline(found)):
        console.print(line)
    for times in found.groups:
        console.print(f"\n{times.name}, {_facts(times)}", style="bold")
        console.print(_bottleneck(times, found))
        console.print(f"To go faster: {advice(times, found.device, found.cores)}.")


def write_json(found: Bench, path: Path) -> None:
    """Write what was measured for programs."""
    path.write_text(json.dumps(found.to_json(), indent=1) + "\n", encoding="utf-8")


def _stages(found: Bench) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("\n\nstage", no_wrap=True)
    for times in found.groups:
        *words, last = times.name.split(" ")
        for name in (f"{' '.join(words)}\n{last}\nms/image", "\nimages/s\na core", "\n\nshare"):
            table.add_column(name, justify="right", no_wrap=True)
    for stage in _ORDER:
        cells = [cell for times in found.groups for cell in _cells(stage, times, found.device)]
        table.add_row(f"  of it {stage}" if stage in INSIDE else _name(stage, found.device), *cells)
    sums = [core_ms(times, found.device) for times in found.groups]
    table.add_row("a core's time", *(cell for ms in sums for cell in (_ms(ms), _rate(1000 / ms), "")), style="bold")
    return table


def _name(stage: Stage, device: str) -> str:
    return f"{stage}, on the GPU" if stage is Stage.MODEL and device == "cuda" else str(stage)


def _cells(stage: Stage, times: GroupTimes, device: str) -> tuple[str, str, str]:
    ms = times.ms[stage]
    share = shares(times, device).get(stage)
    return (
        _ms(ms) if ms >= _SEEN_MS else "-",
        _rate(1000 / ms) if ms >= _SEEN_MS else "-",
        "" if share is None else f"{share:.0%}",
    )


def _all_cores(found: Bench) -> str:
    if found.device == "cuda":
        return f"The GPU scores {_rate(found.model_images_per_s)} images/s, with copies to it."
    alone = statistics.median(times.ms[Stage.MODEL] for times in found.groups)
    return (
        f"The model on {found.cores} cores at once: {_rate(found.model_images_per_s)} images/s, "
        f"{found.model_images_per_s * alone / 1000:.1f} times one core alone."
    )


def _pipeline(found: Bench) -> str:
    pipeline = found.pipeline
    text = f"A scan of {pipeline.num_images:,} images ({pipeline.group}): {pipeline.elapsed_s:.1f} s"
    if pipeline.images_per_s is None or pipeline.start_up_s is None:
        return f"{text}, too short to tell its rate."
    share = "" if pipeline.share_of_stages is None else f", {pipeline.share_of_stages:.0%} of what the stages allow"
    return (
        f"{text}; {_rate(pipeline.images_per_s)} images/s once it runs{share}, and {pipeline.start_up_s:.1f} s to "
        "start and end."
    )


def _facts(times: GroupTimes) -> str:
    left_out = f", {times.num_left_out:,} more left out that do not decode" if times.num_left_out else ""
    return f"{times.num_images:,} files of {byte_size(times.mean_bytes)}{left_out}"


def _bottleneck(times: GroupTimes, found: Bench) -> str:
    match bottleneck(times, found.device, found.cores):
        case "store":
            return f"Held back by the store: {_rate(times.fetch_images_per_s)} images/s in each process that fetches."
        case "gpu":
            return "Held back by the GPU: the cores feed it faster than it scores."
        case stage:
            return (
                f"Held back by the {stage} stage: {shares(times, found.device)[Stage(stage)]:.0%} of the cores' time."
            )


def _ms(ms: float) -> str:
    return f"{ms:.2f}" if ms < 10 else f"{ms:,.1f}" if ms < 1000 else f"{ms:,.0f}"


def _rate(images_per_s: float) -> str:
    return f"{images_per_s:.1f}" if images_per_s < 100 else f"{images_per_s:,.0f}"
