"""What a scan prints when it is done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lfm_scan.cli.progress import ScanProgress
from lfm_scan.cli.text import byte_size, money, time_shares
from lfm_scan.config import ScanConfig
from lfm_scan.distributed.scan import ScanOutcome
from lfm_scan.logs import one_line
from lfm_scan.runs.summary import HISTOGRAM_BINS, Summary
from lfm_scan.status import Status, Unassessable
from lfm_scan.storage import is_remote, join

_BAR_WIDTH: Final = 36

_WHAT_TO_KNOW = {
    Unassessable.LOSSY: "saved by a lossy codec, which hides what this checkpoint looks for",
    Unassessable.RESAMPLED: "resized by the preprocess policy, which moves the score; try --preprocess crop256",
}


@dataclass
class Ending:
    """How a scan ended, and how far it came; filled in as it goes.

    Attributes:
        exit_code: Of the command.
        progress: What it showed, once it began.
        outcome: If it came to its end.
        error: If it failed.
    """

    exit_code: int = 0
    progress: ScanProgress | None = None
    outcome: ScanOutcome | None = None
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return what a program wants to know as JSON values; None where the scan did not come so far."""
        so_far: dict[str, Any] = {} if self.progress is None else self.progress.so_far()
        outcome, summary = self.outcome, None
        if outcome is not None:
            summary = outcome.summary
            so_far = {
                "run_id": outcome.run_id,
                "run_dir": outcome.run_dir,
                "num_rows": summary.num_rows,
                "num_rows_done": summary.num_rows,
            }
        return {
            "state": self._state,
            "exit_code": self.exit_code,
            "error": None if self.error is None else one_line(self.error),
            **so_far,
            "num_scored": None if summary is None else summary.num_scored,
            "num_failed": None if summary is None else summary.num_failed,
            "num_flagged": None if summary is None else summary.num_flagged,
            "by_status": None if summary is None else dict(summary.by_status),
            "results": None if outcome is None else join(outcome.run_dir, "results"),
        }

    @property
    def _state(self) -> str:
        if self.outcome is not None:
            return "finished"
        return "failed" if self.error is not None else "stopped"


def print_outcome(outcome: ScanOutcome, config: ScanConfig, console: Console | None = None) -> None:
    """Print the summary of a finished scan to standard output."""
    console = console or Console(highlight=False, soft_wrap=True)
    summary = outcome.summary
    console.print(_headline(outcome))
    console.print()
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    table.add_row("Status", _statuses(summary))
    table.add_row("Flagged", _flagged(summary, config))
    if summary.num_unassessable:
        table.add_row("Cannot tell", _unassessable(summary, config))
    if outcome.report is not None and outcome.report["seconds"]:
        table.add_row("Time went to", time_shares(outcome.report["seconds"]))
    if outcome.report is not None and outcome.report["cost"]["parts"]:
        table.add_row("Cost", _cost(outcome.report["cost"]))
    console.print(table)
    if any(summary.histogram):
        console.print("\n[bold]Scores[/bold] of the images it can tell, 0 real to 1 generated")
        _print_histogram(summary, console)
    console.print()
    results = join(outcome.run_dir, "results")
    console.print(f"[bold]Results[/bold]  {escape(results)}")
    console.print(f"[bold]Read[/bold]     {escape(_how_to_read(results, config))}")


def _headline(outcome: ScanOutcome) -> str:
    summary = outcome.summary
    size = f"{summary.num_rows:,} files, {byte_size(summary.size_bytes)}"
    if outcome.already_finished:
        return f"Run {outcome.run_id} was finished before: {size}. Nothing was done."
    done_now = summary.num_rows - outcome.num_rows_resumed
    rate = done_now / outcome.elapsed_s if outcome.elapsed_s else 0
    resumed = f", {outcome.num_rows_resumed:,} of them before" if outcome.num_rows_resumed else ""
    return f"Scanned {size}{resumed}, in {outcome.elapsed_s:.1f} s with start-up ({rate:.1f} files/s)."


def _statuses(summary: Summary) -> str:
    ordered = [status for status in Status if summary.by_status[status]]
    return "  ".join(
        f"[{'green' if status == Status.OK else 'yellow'}]{status}[/] {summary.by_status[status]:,}"
        for status in ordered
    )


def _flagged(summary: Summary, config: ScanConfig) -> str:
    assessable = summary.num_scored - summary.num_unassessable
    text = f"[bold red]{summary.num_flagged:,}[/]" if summary.num_flagged else "[bold]0[/]"
    if config.flag_unassessable:
        return f"{text} of {summary.num_scored:,} scored images score above {config.threshold:g}"
    return f"{text} of {assessable:,} images it can tell score above {config.threshold:g}"


def _unassessable(summary: Summary, config: ScanConfig) -> str:
    lines = [f"{summary.num_unassessable:,} images lie outside what the checkpoint was shown to tell apart:"]
    for reason in Unassessable:
        if summary.unassessable[reason]:
            known = _WHAT_TO_KNOW[reason]
            lines.append(f"{summary.unassessable[reason]:,} {reason}: {known}")
    lines.append(
        "flagged by score alone, as you asked (--flag-unassessable)"
        if config.flag_unassessable
        else "they keep their score and are not flagged"
    )
    return "\n".join(lines)


def _cost(cost: Mapping[str, Any]) -> str:
    parts = ", ".join(f"{name} {money(amount)}" for name, amount in cost["parts"].items())
    missing = f"; without {', '.join(cost['missing'])}" if cost["missing"] else ""
    return f"{money(cost['total'])}: {parts}{missing}"


def _print_histogram(summary: Summary, console: Console) -> None:
    largest = max(summary.histogram)
    for index, count in enumerate(summary.histogram):
        low, high = index / HISTOGRAM_BINS, (index + 1) / HISTOGRAM_BINS
        # At least a sliver for a bin that is not empty.
        filled = max(1, round(count / largest * _BAR_WIDTH)) if count else 0
        colour = "red" if low >= 0.5 else "green"
        console.print(f"  {low:.1f}-{high:.1f}  [{colour}]{'█' * filled:<{_BAR_WIDTH}}[/]  {count:,}")


def _how_to_read(results: str, config: ScanConfig) -> str:
    options = ""
    if is_remote(results) and config.storage.endpoint_url:
        options = f', storage_options={{"endpoint_url": "{config.storage.endpoint_url}"}}'
    return f'pandas.read_parquet("{results}", filters=[("flagged", "==", True)]{options})'
