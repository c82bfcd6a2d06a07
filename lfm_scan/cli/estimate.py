"""How an estimate goes, and what it says."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Final, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.table import Table

from lfm_scan.cli.text import byte_size, duration, money, safe
from lfm_scan.estimate.estimate import Estimate, Listener
from lfm_scan.estimate.statistics import LEVEL, Interval

_LINE_EVERY_S: Final = 5.0
_FEW: Final = 0.5
"""A smaller share of images that can be assessed is worth a warning before anybody pays for the others."""

_WHAT: Final = {"cores": "the cores", "gpus": "the GPUs", "store": "the store"}


class EstimateProgress(Listener):
    """Listens to an estimate: a bar in a terminal, plain lines elsewhere.

    Args:
        file: Where to show it, usually standard error.
    """

    def __init__(self, file: TextIO) -> None:
        self._console = Console(file=file, highlight=False, soft_wrap=True, markup=False)
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            console=self._console,
            transient=True,
        )
        self._task: TaskID | None = None
        self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._task = self._bar.add_task("Starting", total=None)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def listing(self, num_inputs: int) -> None:
        """Say how many inputs are listed so far."""
        self._show(f"Listing: {num_inputs:,} files", None, None)

    def measuring(self, num_done: int, num_sampled: int) -> None:
        """Move the bar."""
        self._show(f"Measuring {num_done:,}/{num_sampled:,}", num_done, num_sampled)

    def _show(self, text: str, num_done: int | None, total: int | None) -> None:
        if self._task is not None:
            self._bar.update(self._task, description=text, completed=num_done, total=total)
        elif time.monotonic() - self._last_line >= _LINE_EVERY_S:
            self._last_line = time.monotonic()
            self._console.print(text)


def print_estimate(found: Estimate, console: Console | None = None) -> None:
    """Print an estimate to standard output."""
    console = console or Console(highlight=False)
    sources = ", ".join(safe(source) for source in found.sources)
    console.print(f"Estimate for {sources}")
    measured = "all of them" if found.num_sampled == found.num_inputs else f"a sample of {found.num_sampled:,}"
    console.print(
        f"{found.num_inputs:,} images counted, {measured} measured here; in brackets, where a figure lies with "
        f"{_percent(LEVEL)} probability\n"
    )
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, text in _rows(found):
        table.add_row(name, text)
    console.print(table)


def write_json(found: Estimate, path: Path) -> None:
    """Write an estimate for programs."""
    path.write_text(
        json.dumps(found.to_json(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8", errors="surrogateescape"
    )


def _rows(found: Estimate) -> list[tuple[str, str]]:
    rows = [("Bytes", _bytes(found)), ("Status", _shares(found.shares.by_status)), ("Can tell", _assessable(found))]
    if found.shares.unassessable:
        rows.append(("Cannot tell", _shares(found.shares.unassessable)))
    rows += [
        ("Failing", _share(found.shares.failing)),
        ("Time", _wall(found)),
        ("Core-hours", f"{_interval(found.work.core_hours, _hours)} of work: {_per_image(found)}"),
    ]
    if found.machines.gpus:
        rows.append(("GPU-hours", _gpu_hours(found)))
    return [*rows, ("Requests", _requests(found)), ("Cost", _cost(found))]


def _bytes(found: Estimate) -> str:
    text = _interval(found.size_bytes, byte_size)
    if not found.num_unsized:
        return f"{text}, as listed"
    return f"{text}; the listing does not tell the size of {found.num_unsized:,} inputs"


def _assessable(found: Estimate) -> str:
    share = found.shares.assessable
    text = f"{_share(share)} of the images have a score that means something"
    if share.value >= _FEW:
        return text
    return f"[yellow]only {text} for this checkpoint[/]: the others are paid for, scored and not flagged"


def _wall(found: Estimate) -> str:
    machines, work = found.machines, found.work
    gpus = f" and {machines.gpus:,} GPUs" if machines.gpus else ""
    on = f"on {machines.cores:,} cores{gpus}"
    if work.wall_s is not None:
        return f"{_interval(work.wall_s, duration)} {on}, besides starting Ray; {_WHAT[work.limited_by]} set the pace"
    least = (
        ""
        if work.feed_wall_s is None
        else f"; {_WHAT[work.limited_by]} alone take {_interval(work.feed_wall_s, duration)}"
    )
    return f"not known {on} without a GPU's rate (--gpu-images-per-s){least}"


def _per_image(found: Estimate) -> str:
    work = found.work
    score = "" if work.score_ms is None else f", score {work.score_ms:.1f}"
    return f"fetch {work.fetch_ms:.1f}, decode {work.decode_ms:.1f}{score} ms an image"


def _gpu_hours(found: Estimate) -> str:
    machines, work = found.machines, found.work
    needed = f"{work.gpu_images_per_s_needed or 0:,.0f} images/s each keep up with cores and store"
    if work.gpu_hours is None or machines.gpu_images_per_s is None:
        return f"not known: give --gpu-images-per-s, or run this where a GPU is; {needed}"
    source = "measured here" if machines.gpu_rate_is_measured else "as given"
    rate = f"{machines.gpu_images_per_s:,.0f} images/s each, {source}"
    return f"{_interval(work.gpu_hours, _hours)} of work, at {rate}; {needed}"


def _requests(found: Estimate) -> str:
    requests = found.requests
    listed = ", ".join(f"{count:,} {name}" for name, count in sorted(requests.listing.items(), reverse=True))
    lines = [
        f"{requests.image_gets:,} GET for images",
        f"{listed or 'none'} to list the sources, counted just now",
        f"{requests.run.num_puts:,} PUT, {requests.run.num_gets:,} GET, {requests.run.num_lists:,} LIST for the run "
        f"directory, of {requests.run.num_shards:,} shards",
    ]
    if requests.num_by_ranges:
        lines.insert(
            1, f"and those for {requests.num_by_ranges:,} inputs in Parquet files or compressed archives, not predicted"
        )
    return "\n".join(lines)


def _cost(found: Estimate) -> str:
    cost = found.cost
    if cost.total is None:
        return "no prices given (--price-per-core-hour and others)"
    parts = ", ".join(f"{name} {money(part.value)}" for name, part in cost.parts.items())
    missing = f"; without {', '.join(cost.missing)}" if cost.missing else ""
    return f"{_interval(cost.total, money)}: {parts}{missing}"


def _shares(shares: dict[str, Interval]) -> str:
    return ", ".join(f"{name} {_share(share)}" for name, share in shares.items())


def _share(share: Interval) -> str:
    return _interval(share, _percent)


def _interval(figure: Interval, text: Callable[[float], str]) -> str:
    """Return a figure, and its interval unless that reads the same."""
    value = text(figure.value)
    if figure.low is None or figure.high is None:
        return f"{value} (one image says nothing of how they differ)"
    low, high = text(figure.low), text(figure.high)
    return value if low == value == high else f"{value} ({low} to {high})"


def _percent(share: float) -> str:
    percent = 100 * share
    # Never 0 or 100 % of what is more or less than that.
    return f"{percent:.1f} %" if 0 < percent < 1 or 99 < percent < 100 else f"{percent:.0f} %"


def _hours(hours: float) -> str:
    if hours < 0.01:
        return "below 0.01"
    return f"{hours:,.2f}" if hours < 10 else f"{hours:,.0f}"
