"""What `lfm-scan status` prints. Loads neither torch nor ray."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final

from rich.console import Console
from rich.table import Table

from lfm_scan.cli.text import duration, print_json, safe, time_shares
from lfm_scan.runs.heartbeat import Phase
from lfm_scan.runs.state import Driver, RunState, State
from lfm_scan.runs.summary import is_failure
from lfm_scan.runs.usage import Usage

_MAX_DRIVERS: Final = 5
_MAX_SOURCES: Final = 3

_MEANING: Final = {
    State.PLANNING: "is [cyan]planning[/]: the sources are being listed",
    State.SCANNING: "is [cyan]scanning[/]",
    State.MERGING: "is [cyan]merging[/]: all images are done, the results are being written",
    State.FINISHED: "is [green]finished[/]",
    State.STOPPED: "has [yellow]stopped[/]: nobody works on it, repeat its command to go on",
    State.FAILED: "has [red]failed[/]: what is done is safe, repeat its command to go on",
}


def print_state(state: RunState, now: datetime | None = None, console: Console | None = None) -> None:
    """Print how a run is doing to standard output.

    Args:
        state: As `read_state` gives it.
        now: The moment that ages are told by. Default: this machine's clock.
        console: Where to print.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    now = now or datetime.now(UTC)
    console.print(f"Run {safe(state.run_id)} {_MEANING[state.state]}\n")
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    table.add_row("Done", _done(state))
    table.add_row("Failed", _failed(state))
    if state.is_alive and state.rows_per_s is not None:
        table.add_row("Rate", _rate(state))
    seconds = sum((driver.beat.usage for driver in state.drivers), Usage()).seconds
    if seconds:
        table.add_row("Time went to", time_shares(seconds))
    table.add_row("Directory", safe(state.run_dir))
    table.add_row("Sources", _sources(state))
    table.add_row("Started", safe(state.created_at))
    if state.finished_at is not None:
        table.add_row("Finished", safe(state.finished_at))
    if state.drivers:
        table.add_row("Drivers", _drivers(state, now))
    console.print(table)


def print_state_as_json(state: RunState, console: Console | None = None) -> None:
    """Print the same for programs: one JSON object with the fields of `RunState`."""
    print_json(state.to_json(), console)


def _done(state: RunState) -> str:
    if state.num_rows is None or state.num_shards is None:
        return f"nothing yet, {state.num_rows_listed:,} images are listed"
    # Rounded down: 100 % is said when all is done, and not before.
    percent = 100 * state.num_rows_done // state.num_rows if state.num_rows else 100
    return (
        f"{state.num_rows_done:,} of {state.num_rows:,} images ({percent} %), "
        f"{state.num_shards_done:,} of {state.num_shards:,} shards"
    )


def _failed(state: RunState) -> str:
    counts = sorted(((count, status) for status, count in state.by_status.items() if is_failure(status)), reverse=True)
    reasons = ", ".join(f"{count:,} {safe(status)}" for count, status in counts)
    told = "" if state.state == State.FINISHED else ", as the drivers told so far"
    return f"{state.num_failed:,}{told}" + (f": {reasons}" if reasons else "")


def _rate(state: RunState) -> str:
    text = f"{state.rows_per_s:,.1f} images/s over the last 10 minutes"
    return text if state.seconds_left is None else f"{text}, {duration(state.seconds_left)} left"


def _sources(state: RunState) -> str:
    lines = [safe(source) for source in state.sources[:_MAX_SOURCES]]
    return "\n".join(lines + _and_more(len(state.sources) - len(lines)))


def _drivers(state: RunState, now: datetime) -> str:
    """Return those at work, and of the others the latest."""
    by_interest = sorted(state.drivers, key=lambda driver: (driver.is_alive, driver.seen_at), reverse=True)
    lines = [_driver(driver, now) for driver in by_interest[:_MAX_DRIVERS]]
    return "\n".join(lines + _and_more(len(by_interest) - len(lines)))


def _driver(driver: Driver, now: datetime) -> str:
    beat = driver.beat
    age = duration(max(0.0, (now - driver.seen_at).total_seconds()))
    who = f"{safe(beat.host)}, process {beat.pid}: "
    if driver.is_alive:
        return f"{who}[green]{beat.phase}[/], {beat.num_rows:,} images done, last heard of {age} ago"
    if not beat.phase.is_over:
        return f"{who}[red]silent[/] while {beat.phase}, {beat.num_rows:,} images done, last heard of {age} ago"
    colour = {Phase.FINISHED: "green", Phase.FAILED: "red"}.get(beat.phase, "yellow")
    reason = f"\n  {safe(beat.error)}" if beat.error else ""
    return f"{who}[{colour}]{beat.phase}[/] {age} ago, {beat.num_rows:,} images done{reason}"


def _and_more(count: int) -> list[str]:
    return [f"and {count:,} more"] if count > 0 else []
