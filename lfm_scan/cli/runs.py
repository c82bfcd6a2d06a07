"""What `lfm-scan runs` prints. Loads neither torch nor ray."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final

from rich.console import Console
from rich.table import Table

from lfm_scan.cli.text import duration, print_json, safe
from lfm_scan.runs.catalogue import MAX_FOLDERS, Catalogue
from lfm_scan.runs.state import RunState, State

_WIDTH: Final = 2000
"""Wider than any line: a name that is cut off is of no use, and terminals wrap."""

_COLOUR: Final = {
    State.PLANNING: "cyan",
    State.SCANNING: "cyan",
    State.MERGING: "cyan",
    State.FINISHED: "green",
    State.STOPPED: "yellow",
    State.FAILED: "red",
}


def print_runs(found: Catalogue, now: datetime | None = None, console: Console | None = None) -> None:
    """Print a line for each run to standard output.

    Args:
        found: As `find_runs` gives it.
        now: The moment that ages are told by. Default: this machine's clock.
        console: Where to print.
    """
    console = console or Console(highlight=False, soft_wrap=True, width=_WIDTH)
    now = now or datetime.now(UTC)
    if found.runs:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        for name in ("Run", "State", "Done", "Images", "Failed", "Flagged", "Rate", "Started", "Last heard of"):
            table.add_column(
                name, justify="right" if name in ("Done", "Images", "Failed", "Flagged") else "left", no_wrap=True
            )
        for run in found.runs:
            table.add_row(_name(run, found.prefix), *_figures(run), *_moments(run, now))
        console.print(table)
    else:
        console.print(f"No runs in {safe(found.prefix)}")
    for line in _remarks(found):
        console.print(line)


def print_runs_as_json(found: Catalogue, console: Console | None = None) -> None:
    """Print the same for programs: one JSON object with the fields of `Catalogue`."""
    print_json(found.to_json(), console)


def _name(run: RunState, prefix: str) -> str:
    return safe(run.run_dir.removeprefix(prefix).strip("/") or run.run_dir)


def _figures(run: RunState) -> tuple[str, ...]:
    colour = _COLOUR[run.state]
    if run.num_rows is None:
        done, images = "-", f"{run.num_rows_listed:,} listed"
    else:
        done = f"{100 * run.num_rows_done // run.num_rows if run.num_rows else 100} %"
        images = f"{run.num_rows:,}"
    flagged = "-" if run.num_flagged is None else f"{run.num_flagged:,}"
    rate = f"{run.rows_per_s:,.1f}/s" if run.is_alive and run.rows_per_s is not None else "-"
    return f"[{colour}]{run.state}[/]", done, images, f"{run.num_failed:,}", flagged, rate


def _moments(run: RunState, now: datetime) -> tuple[str, str]:
    heard = max((driver.seen_at for driver in run.drivers), default=None)
    age = "never" if heard is None else f"{duration(max(0.0, (now - heard).total_seconds()))} ago"
    return safe(run.created_at), f"{age}, [green]alive[/]" if run.is_alive else age


def _remarks(found: Catalogue) -> list[str]:
    lines = [f"[red]Unreadable[/] {safe(uri)}: {safe(error)}" for uri, error in found.unreadable]
    counts = {"trainings": found.num_trainings, "folders that are no runs": found.num_others}
    left_out = [f"{what} {count:,}" for what, count in counts.items() if count]
    if left_out:
        lines.append(f"Not shown  {', '.join(left_out)}")
    if not found.is_complete:
        lines.append(f"There are more folders than the {MAX_FOLDERS:,} that were looked into: give a longer prefix")
    return lines
