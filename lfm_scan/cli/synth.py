"""How the making of pairs goes, and what came of it."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Final, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from lfm_scan.synth.generate import Listener, NetworkReport, SynthOutcome

_LINE_EVERY_S: Final = 10.0


class SynthProgress(Listener):
    """Listens to `synthesise`: a bar in a terminal, plain lines elsewhere, and a line for each network.

    Args:
        file: Where to show it, usually standard error.
    """

    def __init__(self, file: TextIO) -> None:
        self._console = Console(file=file, highlight=False, soft_wrap=True, markup=False)
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        self._task: TaskID | None = None
        self._num_photographs = 0
        self._last_line = 0.0

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._task = self._bar.add_task("Reading the photographs", total=None, numbers="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def listed(self, num_photographs: int) -> None:
        """Say how many there are."""
        self._num_photographs = num_photographs
        self._console.print(f"{num_photographs:,} photographs")
        if self._task is not None:
            self._bar.update(self._task, description="Training the networks")

    def fitted(self, report: NetworkReport) -> None:
        """Say how sharp a network draws."""
        verdict = "" if report.used else ": below --min-psnr, it draws nothing"
        self._console.print(f"{report.name}: {report.psnr:.1f} dB, detail {report.detail:.2f}{verdict}")

    def photograph_done(self, num_done: int, num_pairs: int) -> None:
        """Move the bar."""
        numbers = f"{num_done:,}/{self._num_photographs:,} photographs, {num_pairs:,} pairs"
        if self._task is not None:
            self._bar.update(
                self._task, description="Drawing", total=self._num_photographs, completed=num_done, numbers=numbers
            )
        elif time.monotonic() - self._last_line >= _LINE_EVERY_S or num_done == self._num_photographs:
            self._last_line = time.monotonic()
            self._console.print(numbers)

    def print_interrupted(self) -> None:
        """Say what an interrupted user needs to know."""
        self._console.print("Interrupted. Repeat the same command to go on.")


def print_pairs(outcome: SynthOutcome, console: Console | None = None) -> None:
    """Print what was made to standard output."""
    console = console or Console(highlight=False, soft_wrap=True, markup=False)
    others = {status: count for status, count in outcome.num_photographs.items() if status != "ok"}
    left_out = f"; left out: {', '.join(f'{count:,} {status}' for status, count in others.items())}" if others else ""
    console.print(
        f"{outcome.num_pairs:,} pairs of {outcome.num_crops:,} crops of {outcome.num_used:,} photographs{left_out}\n"
    )
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("network", "dB", "detail", "pairs"):
        table.add_column(name, justify="left" if name == "network" else "right", no_wrap=True)
    for report in outcome.networks:
        drawn = f"{report.num_pairs:,}" if report.used else "not used"
        table.add_row(report.name, f"{report.psnr:.1f}", f"{report.detail:.2f}", drawn)
    console.print(table)
    console.print(f"\nPairs       {outcome.output}")
    console.print(f"Train with  lfm-scan train {outcome.output}/manifest.parquet --output RUN --preset crop")
