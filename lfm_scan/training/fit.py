"""The training itself: epochs of steps, figures after each, and a state to go on from. The same code in every worker.

Every worker takes the same decisions: what one of them measures, all of them hear of. The first writes.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol, TypeAlias

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from lfm_scan.errors import TrainingError
from lfm_scan.training.board import Board, open_board
from lfm_scan.training.records import Position, TrainingDirectory
from lfm_scan.training.scores import Scores, Validation
from lfm_scan.training.step import Batch, Trainer

Report: TypeAlias = Callable[[Mapping[str, Any]], None]

_REPORT_EVERY_S: Final = 1.0


class TrainingData(Protocol):
    """This worker's part of the images, in an order that depends on nothing but the settings."""

    @property
    def num_steps(self) -> int:
        """Steps an epoch."""
        ...

    def train(self, epoch: int, first_step: int) -> Iterator[Batch]:
        """Yield this worker's rows of the batch of each step of an epoch, beginning with one of them."""
        ...

    def validation(self) -> Iterator[NDArray[np.uint8]]:
        """Yield this worker's validation images, (n, 256, 256, 3), in order."""
        ...


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """When to measure, save and stop.

    Attributes:
        epochs: Most epochs.
        metric: What is to rise; "loss" is to fall.
        patience: Epochs without a rise after which to stop, or None.
        checkpoint_every: Steps after which the state is saved, besides the end of each epoch.
    """

    epochs: int
    metric: str
    patience: int | None
    checkpoint_every: int


@dataclass
class Fit:
    """One worker's part of a training.

    Attributes:
        trainer: Takes the steps.
        data: This worker's images.
        validation: What the validation images are.
        directory: Where states and checkpoints go.
        settings: When to stop.
        report: Called with what happened, in the first worker only.
        board_folder: Local folder for TensorBoard's files, which are copied to the run directory after each epoch.
    """

    trainer: Trainer
    data: TrainingData
    validation: Validation
    directory: TrainingDirectory
    settings: FitSettings
    report: Report
    board_folder: Path
    _board: Board | None = field(default=None, init=False)
    _last_report_s: float = field(default=0.0, init=False)

    def run(self) -> Position:
        """Train to the end, from wherever the last state was saved, and return where it ended.

        Raises:
            TrainingError: If the loss is not a number, or an image that passed the check cannot be read any more.
            StorageError: If a state or a checkpoint cannot be written.
        """
        position = self._resume()
        if _is_first():
            self._board = open_board(self.board_folder, self.trainer.num_steps)
        with contextlib.nullcontext() if self._board is None else self._board:
            while not self._is_over(position):
                position = self._finish_epoch(position, self._train_epoch(position))
        return position

    def _resume(self) -> Position:
        found = self.directory.read_state()
        if found is None:
            return Position()
        position, state = found
        self.trainer.load_state(state)
        return position

    def _is_over(self, position: Position) -> bool:
        if position.epoch >= self.settings.epochs:
            return True
        patience = self.settings.patience
        return patience is not None and position.epoch - position.best_epoch > patience and position.epoch > patience

    def _train_epoch(self, position: Position) -> list[float]:
        """Take the remaining steps of an epoch; return the losses of all its steps."""
        losses = list(position.losses)
        started = time.monotonic()
        num_images = 0
        batches = self.data.train(position.epoch, len(losses))
        for batch in batches:
            result = self.trainer.step(batch)
            losses.append(result.loss)
            if self._board is not None:
                self._board.write_step(result)
            num_images += batch.total
            images_per_s = num_images / max(time.monotonic() - started, 1e-9)
            self._report_step(position.epoch, losses, batch.total, images_per_s)
            if len(losses) % self.settings.checkpoint_every == 0 and len(losses) < self.data.num_steps:
                self._save(position.within(losses))
        if len(losses) != self.data.num_steps:
            raise TrainingError(
                f"epoch {position.epoch + 1} gave {len(losses)} of {self.data.num_steps} batches: its images are not "
                "those that were checked"
            )
        return losses

    def _finish_epoch(self, position: Position, losses: list[float]) -> Position:
        entry: dict[str, Any] = {
            "epoch": position.epoch + 1,
            "steps": len(losses),
            "loss": float(np.mean(losses)),
            "learning_rate": self.trainer.learning_rate,
        }
        self.trainer.end_epoch()
        scores = self._measure()
        entry.update(scores.to_json())
        value = -entry["loss"] if self.settings.metric == "loss" else scores.value_of(self.settings.metric)
        ended = position.after(entry, value)
        if _is_first():
            if ended.best_epoch == ended.epoch:
                self.directory.write_checkpoint("best", self.trainer.model(), ended, scores.domain)
            self.directory.write_checkpoint("last", self.trainer.model(), ended, scores.domain)
            self.directory.write_history(ended)
            if self._board is not None:
                self._board.write_epoch(entry, self.trainer.num_steps)
                self.directory.write_board(self.board_folder)
        self._save(ended)
        if _is_first():
            self.report({"kind": "epoch", "is_best": ended.best_epoch == ended.epoch, **entry})
        return ended

    def _measure(self) -> Scores:
        """Return the figures of the validation images, measured by all workers together."""
        mine = [self.trainer.evaluate(_as_tensor(images)).cpu().numpy() for images in self.data.validation()]
        logits = _gather(np.concatenate(mine) if mine else np.zeros(0, np.float32))
        return self.validation.measure(logits)

    def _save(self, position: Position) -> None:
        """Save where the training is, in the first worker: the others wait for it at their next step."""
        if _is_first():
            self.directory.write_state(position, self.trainer.state())

    def _report_step(self, epoch: int, losses: list[float], num_images: int, images_per_s: float) -> None:
        now = time.monotonic()
        if not _is_first() or (now - self._last_report_s < _REPORT_EVERY_S and len(losses) < self.data.num_steps):
            return
        self._last_report_s = now
        self.report(
            {
                "kind": "step",
                "epoch": epoch + 1,
                "step": len(losses),
                "num_steps": self.data.num_steps,
                "loss": losses[-1],
                "images_per_step": num_images,
                "images_per_s": images_per_s,
            }
        )


def rank_and_world() -> tuple[int, int]:
    """Return which worker this is and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _is_first() -> bool:
    return rank_and_world()[0] == 0


def _gather(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the values of all workers, in the order of the workers."""
    if rank_and_world()[1] == 1:
        return values
    parts: list[Any] = [None] * rank_and_world()[1]
    dist.all_gather_object(parts, values)  # arrays of this program's own making
    return np.concatenate(parts)


def _as_tensor(images_bhwc: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(images_bhwc).permute(0, 3, 1, 2)
