"""How a scan goes: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any, Final, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.text import Text

from lfm_scan.cli.text import duration
from lfm_scan.distributed.scan import Listener
from lfm_scan.runs.plan import Plan
from lfm_scan.runs.run import Run
from lfm_scan.runs.shard import Receipt

_LINE_EVERY_S: Final = 5.0
_LINE_AFTER: Final = 0.05
_MAX_SILENCE_S: Final = 60.0
"""In the log of a job: a line every five seconds at first, then after a twentieth of its time, at last every minute."""


class ScanProgress(Listener):
    """Listens to a scan and shows images done, failed, images/s and the time left.

    Args:
        file: Where to show it, usually standard error; None to show nothing.
    """

    def __init__(self, file: TextIO | None) -> None:
        self._console = Console(file=file, highlight=False, soft_wrap=True, quiet=file is None)
        self._bar = Progress(
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            _CountColumn(),
            console=self._console,
            transient=True,
        )
        self._task: TaskID | None = None
        self._run_id = ""
        self._run_dir = ""
        self._num_rows = 0
        self._num_done = 0
        self._num_done_before = 0
        self._num_failed = 0
        self._started = time.monotonic()
        self._last_line = 0.0

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._task = self._bar.add_task("Starting", total=None)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._task is not None:  # else it would print an empty line
            self._bar.stop()

    def opened(self, run: Run) -> None:
        """Say which run this is."""
        self._run_id, self._run_dir = run.run_id, run.directory.uri
        metadata = run.checkpoint.metadata
        self._console.print(f"Run {run.run_id} in {run.directory.uri}", markup=False)
        self._console.print(
            f"Model {metadata.model_id} ({run.checkpoint.sha256[:12]}), preprocess {run.job.preprocess}", markup=False
        )

    def waiting(self, lacking: str) -> None:
        """Say for what kind of node the scan will wait."""
        self._console.print(f"Waiting for nodes: there is {lacking}", markup=False)

    def listing(self, num_rows: int) -> None:
        """Say how many inputs are listed so far."""
        self._show(f"Listing: {num_rows:,} files")

    def planned(self, plan: Plan, num_rows_done: int) -> None:
        """Set the bar's length."""
        self._num_rows, self._num_done = plan.num_rows, num_rows_done
        self._num_done_before = num_rows_done
        self._started = time.monotonic()
        if num_rows_done:
            self._console.print(f"Going on: {num_rows_done:,} of {plan.num_rows:,} images are done already")
        if self._task is not None:
            self._bar.update(
                self._task,
                description="Scanning",
                total=plan.num_rows,
                completed=num_rows_done,
                listener=self,
            )
        else:
            self._console.print(f"Scanning {plan.num_rows:,} images in {plan.num_shards:,} shards")

    def shard_done(self, receipt: Receipt) -> None:
        """Move the bar."""
        self._num_done += receipt.summary.num_rows
        self._num_failed += receipt.summary.num_failed
        if self._task is not None:
            self._bar.update(self._task, completed=self._num_done)
            return
        now = time.monotonic()
        every_s = min(max(_LINE_EVERY_S, _LINE_AFTER * (now - self._started)), _MAX_SILENCE_S)
        if now - self._last_line >= every_s or self._num_done == self._num_rows:
            self._last_line = now
            self._console.print(self.describe())

    def finalizing(self) -> None:
        """Say that the scan is over and the results are being merged."""
        self._show("Merging the results")

    def so_far(self) -> dict[str, Any]:
        """Return which run it is and how far it is as JSON values; None where it did not come so far."""
        return {
            "run_id": self._run_id or None,
            "run_dir": self._run_dir or None,
            "num_rows": self._num_rows or None,
            "num_rows_done": self._num_done,
        }

    def print_interrupted(self) -> None:
        """Say what an interrupted user needs to know."""
        if self._num_rows:
            done = f"{self._num_done:,} of {self._num_rows:,} images are done and safe in {self._run_dir}"
        else:
            done = "Nothing was scored yet"
        self._console.print(f"Interrupted. {done}. Repeat the same command to go on.", markup=False)

    def describe(self) -> str:
        """Return the state of the scan in one line."""
        elapsed_s = max(time.monotonic() - self._started, 1e-9)
        rate = (self._num_done - self._num_done_before) / elapsed_s
        share = self._num_done / self._num_rows if self._num_rows else 0
        text = f"{self._num_done:,}/{self._num_rows:,} images ({share:.0%}), {self._num_failed:,} failed"
        if not rate:
            return text
        return f"{text}, {rate:.1f} images/s, {duration((self._num_rows - self._num_done) / rate)} left"

    def _show(self, text: str) -> None:
        if self._task is not None:
            self._bar.update(self._task, description=text)
        elif time.monotonic() - self._last_line >= _LINE_EVERY_S:
            self._last_line = time.monotonic()
            self._console.print(text)


class _CountColumn(ProgressColumn):
    """The numbers beside the bar."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        listener = task.fields.get("listener")
        text = listener.describe() if isinstance(listener, ScanProgress) else ""
        return Text(text, no_wrap=True, overflow="ellipsis")
