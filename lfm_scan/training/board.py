"""Figures of a training for TensorBoard, in a local folder. Needs tensorboard."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from lfm_scan.training.step import StepResult

_logger: Final = logging.getLogger(__name__)


def open_board(folder: Path, first_step: int = 0) -> Board | None:
    """Return a board, or None, with a note in the log, where tensorboard is not installed.

    Args:
        folder: Where the event files go; an interrupted training goes on in the same one.
        first_step: Steps done so far: what was written of later ones, before an interruption, is not shown any more.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - it is an extra, and slow to load
    except ImportError:
        _logger.warning("no figures for TensorBoard: tensorboard is missing (pip install 'lfm-scan[train]')")
        return None
    # purge_step is the first step that is not shown; None keeps all there is.
    return Board(SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None))


class Board:
    """Writes scalars by the number of the step. Use it as a context manager, or close it.

    Args:
        writer: Where they go.
    """

    def __init__(self, writer: SummaryWriter) -> None:
        self._writer = writer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def write_step(self, result: StepResult) -> None:
        """Write the losses, the gradient's norm and the learning rate of a step."""
        parts = {f"train/loss_{name}": value for name, value in result.parts.items()}
        self._write(
            {
                "train/loss": result.loss,
                **parts,
                "train/gradient_norm": result.gradient_norm,
                "train/learning_rate": result.learning_rate,
            },
            result.step,
        )

    def write_epoch(self, entry: Mapping[str, Any], step: int) -> None:
        """Write the figures of an epoch.

        Args:
            entry: As `draw_curves` takes it: figures by set in "by_set", means in "mean_auc" and the like.
            step: Steps done so far.
        """
        means = {f"validation/{key}": value for key, value in entry.items() if key.startswith("mean_")}
        of_sets = {
            f"{key}/{name}": figures[key]
            for name, figures in entry.get("by_set", {}).items()
            for key in ("auc", "ap", "acc", "tpr_at_1_fpr")
        }
        self._write({"epoch": entry["epoch"], **means, **of_sets}, step)
        self._writer.flush()

    def close(self) -> None:
        """Write what is still in memory."""
        self._writer.close()

    def _write(self, values: Mapping[str, float | None], step: int) -> None:
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(name, value, step)
