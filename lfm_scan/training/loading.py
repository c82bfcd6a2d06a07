"""From samples to batches of pixels: pure functions of seed, epoch and step.

Ray tasks, threads and a resumed run therefore see the same images, bit for bit, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lfm_scan.errors import ImageError, TrainingError
from lfm_scan.imaging import DecodedImage, decode_bytes, get_policy
from lfm_scan.imaging.preprocess import SIDE_PX
from lfm_scan.status import Status
from lfm_scan.training.augment import AugmentConfig, draw_augmentation
from lfm_scan.training.reading import SampleReader
from lfm_scan.training.recipe import Recipe
from lfm_scan.training.samples import Split


def usable(samples: pa.Table, split: Split) -> NDArray[np.int64]:
    """Return the rows of a split that the check found usable, in their order, (n,)."""
    splits, statuses = (samples.column(name).to_numpy() for name in ("split", "status"))
    return np.flatnonzero((splits == split) & (statuses == Status.OK)).astype(np.int64)


def epoch_order(samples: pa.Table, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the usable training rows in the order of an epoch, members of a pair side by side, (n,).

    Args:
        samples: Rows of `SAMPLE_SCHEMA`, checked.
        seed: Of the training.
        epoch: From 0.
    """
    rows = usable(samples, Split.TRAIN)
    numbers: dict[tuple[str, str], int] = {}
    pairs, uris = (samples.column(name).to_pylist() for name in ("pair", "uri"))
    # A pair may be called as an image is; the first member says which of the two it is.
    keys = (("uri", uris[row]) if pairs[row] is None else ("pair", pairs[row]) for row in rows)
    groups = np.fromiter((numbers.setdefault(key, len(numbers)) for key in keys), np.int64, len(rows))
    places = np.random.default_rng((seed % 2**64, epoch)).permutation(len(numbers))
    return rows[np.argsort(places[groups], kind="stable")]


def batches_of(order: NDArray[np.int64], batch_size: int) -> list[NDArray[np.int64]]:
    """Return an epoch's global batches, each (batch_size,); rows beyond the last whole one wait for another epoch.

    Raises:
        TrainingError: If there are too few rows for one batch.
    """
    if len(order) < batch_size:
        raise TrainingError(
            f"{len(order):,} usable training images do not fill one batch of {batch_size:,}: lower --train-batch-size, "
            "or give more images"
        )
    return list(order[: len(order) // batch_size * batch_size].reshape(-1, batch_size))


def rows_of(batch: NDArray[np.int64], rank: int, world_size: int) -> tuple[int, NDArray[np.int64]]:
    """Return a worker's part of a batch, and where in the batch it begins.

    The parts are contiguous, and their sizes differ by one at most; with more workers than rows some are empty.

    Args:
        batch: Rows of all workers, (n,).
        rank: Of the worker, from 0.
        world_size: Number of workers.
    """
    first, end = (len(batch) * number // world_size for number in (rank, rank + 1))
    return first, batch[first:end]


def load_examples(
    samples: pa.Table, *, recipe: Recipe, augment: AugmentConfig, reader: SampleReader, seed: int, epoch: int
) -> NDArray[np.uint8]:
    """Return crops of images for a step of the training, (n, crop_px, crop_px, 3) RGB.

    Args:
        samples: Rows of `SAMPLE_SCHEMA`, each found usable.
        recipe: Which crop.
        augment: What is done to the images.
        reader: How to get at them.
        seed: Of the training.
        epoch: From 0.

    Raises:
        TrainingError: If one cannot be read or decoded any more.
        OutageError: If a store answers nobody.
    """
    pairs, uris = (samples.column(name).to_pylist() for name in ("pair", "uri"))
    crops = np.empty((samples.num_rows, recipe.crop_px, recipe.crop_px, 3), np.uint8)
    for row, decoded in _decode(samples, reader):
        group = uris[row] if pairs[row] is None else pairs[row]
        plan = draw_augmentation(augment, recipe, seed, epoch, group)
        try:
            crops[row] = plan.apply(decoded.image, recipe)
        except ValueError as exc:
            raise _lost(uris[row], exc) from exc
    return crops


def load_for_evaluation(samples: pa.Table, *, recipe: Recipe, reader: SampleReader) -> NDArray[np.uint8]:
    """Return images as the scanner would show them to the network, (n, 256, 256, 3) RGB.

    Args:
        samples: Rows of `SAMPLE_SCHEMA`, each found usable.
        recipe: Which preprocess policy.
        reader: How to get at them.

    Raises:
        TrainingError: If one cannot be read or decoded any more.
        OutageError: If a store answers nobody.
    """
    policy = get_policy(recipe.preprocess)
    images = np.empty((samples.num_rows, SIDE_PX, SIDE_PX, 3), np.uint8)
    for row, decoded in _decode(samples, reader):
        try:
            images[row] = policy(decoded)
        except ImageError as exc:
            raise _lost(samples["uri"][row].as_py(), exc) from exc
    return images


def _decode(samples: pa.Table, reader: SampleReader) -> Iterator[tuple[int, DecodedImage]]:
    for row, file in reader.read(samples):
        try:
            if isinstance(file, ImageError):
                raise file
            # What was written of it before the training is known; the search for traces takes longer than the decode.
            yield row, decode_bytes(file, reader.limits, traces=False)
        except ImageError as exc:
            raise _lost(samples["uri"][row].as_py(), exc) from exc


def _lost(uri: str, reason: Exception) -> TrainingError:
    return TrainingError(
        f"{uri}: could be used when it was checked and cannot be read any more ({reason}): put it back and start the "
        "command again, it goes on from its last checkpoint; or train anew without it"
    )
