"""One worker's images: which rows of which batch are its own, and how they are loaded ahead of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from lfm_scan.concurrency import map_in_threads
from lfm_scan.training.augment import AugmentConfig
from lfm_scan.training.loading import (
    batches_of,
    epoch_order,
    load_examples,
    load_for_evaluation,
    rows_of,
    usable,
)
from lfm_scan.training.reading import SampleReader
from lfm_scan.training.recipe import Recipe
from lfm_scan.training.samples import Split
from lfm_scan.training.step import Batch

_EVALUATION_ROWS: Final = 64
_NUM_THREADS: Final = 2


@dataclass(frozen=True)
class Part:
    """Rows that are loaded together.

    Attributes:
        rows: Samples, in `SAMPLE_SCHEMA`.
        epoch: For which they are cropped and augmented; None for evaluation.
    """

    rows: pa.Table
    epoch: int | None


@dataclass(frozen=True, kw_only=True)
class LoadJob:
    """How samples become pixels. Small, and safe to send to workers.

    Attributes:
        recipe: Crop, flip, policy, batch size.
        augment: What else is done to them.
        reader: How to get at their files.
        seed: Of order, crops and augmentations.
    """

    recipe: Recipe
    augment: AugmentConfig
    reader: SampleReader
    seed: int

    def load(self, part: Part) -> NDArray[np.uint8]:
        """Return the pixels of some rows, (n, S, S, 3): the same wherever and whenever it is called.

        Raises:
            TrainingError: If a file cannot be read any more.
            OutageError: If a store answers nobody.
        """
        if part.epoch is None:
            return load_for_evaluation(part.rows, recipe=self.recipe, reader=self.reader)
        return load_examples(
            part.rows, recipe=self.recipe, augment=self.augment, reader=self.reader, seed=self.seed, epoch=part.epoch
        )


LoadAll: TypeAlias = Callable[[LoadJob, Iterable[Part]], Iterator[NDArray[np.uint8]]]
"""Loads parts, several at once and a bounded number ahead, and yields their pixels in order."""


def load_in_threads(job: LoadJob, parts: Iterable[Part]) -> Iterator[NDArray[np.uint8]]:
    """Load parts in threads of this process: the `LoadAll` of a training without Ray."""
    return map_in_threads(job.load, parts, num_threads=_NUM_THREADS)


class WorkerImages:
    """The `TrainingData` of one worker.

    Args:
        samples: All checked samples.
        job: How they become pixels.
        rank: Which worker this is.
        world_size: How many there are.
        load_all: Loads them.
    """

    def __init__(
        self, samples: pa.Table, job: LoadJob, rank: int = 0, world_size: int = 1, load_all: LoadAll = load_in_threads
    ) -> None:
        self._samples = samples.combine_chunks()
        self._labels = samples["label"].to_numpy()
        self._job, self._rank, self._world_size, self._load_all = job, rank, world_size, load_all
        self.num_steps = len(self._batches(0))

    def train(self, epoch: int, first_step: int) -> Iterator[Batch]:
        """Yield this worker's rows of the batch of each step.

        Raises:
            TrainingError: If an image cannot be read any more.
        """
        batches = self._batches(epoch)[first_step:]
        mine = [rows_of(batch, self._rank, self._world_size) for batch in batches]
        parts = (Part(self._samples.take(pa.array(rows)), epoch) for _, rows in mine)
        for batch, (first, rows), images in zip(batches, mine, self._load_all(self._job, parts), strict=True):
            labels = torch.from_numpy(self._labels[rows])
            yield Batch(torch.from_numpy(images).permute(0, 3, 1, 2), labels, first, len(batch))

    def validation(self) -> Iterator[NDArray[np.uint8]]:
        """Yield this worker's validation images, (n, 256, 256, 3).

        Raises:
            TrainingError: If an image cannot be read any more.
        """
        _, mine = rows_of(usable(self._samples, Split.VALIDATION), self._rank, self._world_size)
        chunks = (mine[start : start + _EVALUATION_ROWS] for start in range(0, len(mine), _EVALUATION_ROWS))
        return self._load_all(self._job, (Part(self._samples.take(pa.array(rows)), None) for rows in chunks))

    def _batches(self, epoch: int) -> list[NDArray[np.int64]]:
        return batches_of(epoch_order(self._samples, self._job.seed, epoch), self._job.recipe.batch_size)
