"""How a training goes, and what it ended with."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.table import Table

from lfm_scan.cli.text import duration, printable
from lfm_scan.config import absolute
from lfm_scan.distributed.train import Event, TrainListener, TrainOutcome
from lfm_scan.logs import one_line
from lfm_scan.training.config import TrainConfig
from lfm_scan.training.prepare import Checked, Training

_LINE_EVERY_S: Final = 10.0


class TrainProgress(TrainListener):
    """Listens to a training: a bar for the epoch in a terminal, plain lines elsewhere, and a line for each epoch.

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
            console=self._console,
            transient=True,
        )
        self._task: TaskID | None = None
        self._training: Training | None = None
        self._last_line = 0.0

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._task = self._bar.add_task("Starting", total=None, numbers="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._task is not None:  # else it would print an empty line
            self._bar.stop()

    def opened(self, training: Training) -> None:
        """Say which training this is."""
        self._training = training
        metadata = training.directory.metadata
        self._console.print(f"Training {metadata.model_id} in {training.directory.directory.uri}")
        if self._task is not None:
            self._bar.update(self._task, description="Checking the images")

    def checked(self, checked: Checked) -> None:
        """Say what there is to learn from."""
        for line in (*checked.report.lines(), *checked.leaks.lines()):
            self._console.print(printable(line))

    def progressed(self, event: Event) -> None:
        """Move the bar, or print a line for an epoch."""
        if event["kind"] == "epoch":
            self._console.print(_epoch_line(event))
            return
        left_s = (event["num_steps"] - event["step"]) * event["images_per_step"] / max(event["images_per_s"], 1e-9)
        numbers = (
            f"step {event['step']:,}/{event['num_steps']:,}, loss {event['loss']:.4f}, "
            f"{event['images_per_s']:.1f} images/s, epoch ends in {duration(left_s)}"
        )
        if self._task is not None:
            self._bar.update(
                self._task,
                description=f"Epoch {event['epoch']}",
                total=event["num_steps"],
                completed=event["step"],
                numbers=numbers,
            )
        elif time.monotonic() - self._last_line >= _LINE_EVERY_S:
            self._last_line = time.monotonic()
            self._console.print(f"Epoch {event['epoch']}: {numbers}")

    def print_interrupted(self) -> None:
        """Say what an interrupted user needs to know."""
        self._console.print("Interrupted. Repeat the same command to go on from the last saved state.")


@dataclass
class TrainEnding:
    """How a training ended; filled in as it goes.

    Attributes:
        config: Of the training.
        exit_code: Of the command.
        outcome: If it came to its end.
        error: If it failed.
    """

    config: TrainConfig
    exit_code: int = 0
    outcome: TrainOutcome | None = None
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return what a program wants to know as JSON values; None where the training did not come so far."""
        told: dict[str, Any] = {
            "state": "failed" if self.error is not None else "stopped",
            "exit_code": self.exit_code,
            "error": None if self.error is None else one_line(self.error),
            "run_dir": absolute(self.config.output).rstrip("/"),
        }
        if self.outcome is None:
            return {**told, "model_id": None, "epoch": None, "best_epoch": None, "mean_auc": None, "checkpoint": None}
        position = self.outcome.position
        return {
            **told,
            "state": "finished",
            "model_id": self.outcome.model_id,
            "epoch": position.epoch,
            "best_epoch": position.best_epoch,
            "mean_auc": position.history[position.best_epoch - 1]["mean_auc"],
            "checkpoint": self.outcome.best_checkpoint,
        }


def print_training(outcome: TrainOutcome, console: Console | None = None) -> None:
    """Print the summary of a finished training to standard output."""
    console = console or Console(highlight=False, soft_wrap=True, markup=False)
    position = outcome.position
    if outcome.already_finished:
        console.print(f"The training of {outcome.model_id} was finished before. Nothing was done.")
    best = position.history[position.best_epoch - 1]
    console.print(f"Epoch {position.best_epoch} of {position.epoch} was the best:\n")
    console.print(_figures(best))
    console.print(f"\nCheckpoint  {outcome.best_checkpoint}")
    console.print(f"Scan with   lfm-scan scan SOURCE --output RUN --weights {outcome.best_checkpoint}")


def _epoch_line(event: Mapping[str, Any]) -> str:
    figures = " ".join(
        f"{name} {_share(event[key])}" for name, key in (("AUC", "mean_auc"), ("AP", "mean_ap"), ("ACC", "mean_acc"))
    )
    best = ", best so far" if event["is_best"] else ""
    return f"Epoch {event['epoch']}: loss {event['loss']:.4f}; means over sets {figures}{best}"


def _figures(entry: Mapping[str, Any]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("set", "real", "fake", "real kept", "fake found", "ACC", "AP", "AUC", "TPR@1%FPR"):
        table.add_column(name, justify="left" if name == "set" else "right", no_wrap=True)
    for name, row in (*entry["by_set"].items(), ("pooled", entry["pooled"])):
        keys = ("real_kept", "generated_found", "acc", "ap", "auc", "tpr_at_1_fpr")
        table.add_row(name, f"{row['num_real']:,}", f"{row['num_generated']:,}", *(_share(row[key]) for key in keys))
    return table


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
