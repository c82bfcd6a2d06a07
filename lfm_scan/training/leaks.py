"""Does the file tell the label? Format, size or quality must not: a network learns them before it learns anything else.

The field's best-known mistakes were photographs in JPEG against generated images in PNG. For each attribute of a file
this measures its mutual information with the label, in bits: what knowing the attribute tells of the label. Attributes
with many values tell much by chance, so the mean over shuffled labels is subtracted, and what shuffled labels reach as
well counts as nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lfm_scan.errors import TrainingError
from lfm_scan.training.loading import usable
from lfm_scan.training.samples import GENERATED, REAL, Split

ATTRIBUTES: Final = ("format", "size", "quantization", "jpeg_quality", "lossy", "bytes_per_pixel")
"""What is compared with the label.

Size is width x height. Bytes per pixel, in bins of equal counts, stand for the quality of lossy files that do not tell
it. Of a lossless file they follow from its pixels, which the network may look at, and of a JPEG the tables say more.
"""

POOLED: Final = None
"""The scope of a figure over all sets."""

_OF_UNTOLD_QUALITY: Final = frozenset({"WEBP", "AVIF", "TIFF"})
_NUM_BINS: Final = 8
_NUM_SHUFFLES: Final = 99
_SEED: Final = 0
_MAX_VALUES: Final = 3
_NAMES: Final = {REAL: "real", GENERATED: "generated"}


@dataclass(frozen=True, slots=True)
class Leak:
    """What one attribute tells of the label.

    Attributes:
        attribute: One of `ATTRIBUTES`.
        set: The set it was measured in, or None for all together.
        num_samples: It was measured on.
        bits: Mutual information with the label, corrected for chance.
        share: Of the label's entropy, 0 to 1; 1 is a label that the attribute tells for sure.
        example: The value that tells most, and of which class it is how often.
    """

    attribute: str
    set: str | None
    num_samples: int
    bits: float
    share: float
    example: str


@dataclass(frozen=True, slots=True)
class LeakReport:
    """What files tell of labels.

    Attributes:
        leaks: One for each attribute, over all sets and in each set that has both classes.
        values: By attribute and name of the class, the commonest values and the share of that class's images with each.
    """

    leaks: tuple[Leak, ...]
    values: dict[str, dict[str, list[tuple[str, float]]]]

    @property
    def worst(self) -> Leak | None:
        """The one with the largest share, if there is any."""
        return max(self.leaks, key=lambda leak: leak.share, default=None)

    def lines(self) -> list[str]:
        """Return it as lines of text: by attribute what it tells, and its commonest values in each class."""
        rows = [("attribute", "tells", "most in a set", *_NAMES.values())]
        for attribute in ATTRIBUTES:
            of_it = [leak for leak in self.leaks if leak.attribute == attribute]
            pooled = next((f"{leak.share:.0%}" for leak in of_it if leak.set is POOLED), "-")
            most = max((leak for leak in of_it if leak.set is not POOLED), key=lambda leak: leak.share, default=None)
            in_a_set = "-" if most is None else f"{most.share:.0%} {most.set}" if most.share else "0%"
            rows.append((attribute, pooled, in_a_set, *(self._commonest(attribute, name) for name in _NAMES.values())))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, (*widths, 0), strict=True)) for row in rows]

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {"leaks": [asdict(leak) for leak in self.leaks], "values": self.values}

    def _commonest(self, attribute: str, name: str) -> str:
        return ", ".join(f"{value} {share:.0%}" for value, share in self.values[attribute][name]) or "-"


def find_leaks(samples: pa.Table) -> LeakReport:
    """Return what the files of the usable training images tell of their labels.

    Over all sets each attribute counts, also those of sets with one class; within a set, only where it has both.

    Args:
        samples: Rows of `SAMPLE_SCHEMA`, checked.
    """
    training = samples.take(pa.array(usable(samples, Split.TRAIN)))
    labels = training.column("label").to_numpy().astype(np.int64)
    scopes = list(_scopes(training, labels))
    leaks = []
    values: dict[str, dict[str, list[tuple[str, float]]]] = {}
    for attribute in ATTRIBUTES:
        texts = _texts(training, attribute)
        values[attribute] = {name: _shares(texts[labels == label]) for label, name in _NAMES.items()}
        leaks += [_measure(attribute, scope, texts[rows], labels[rows]) for scope, rows in scopes]
    return LeakReport(tuple(leaks), values)


def refuse_leaks(report: LeakReport, max_share: float) -> None:
    """Refuse data whose files tell too much of their labels.

    Args:
        report: Of the training images.
        max_share: Of the label's entropy that an attribute may tell, 0 to 1.

    Raises:
        TrainingError: If one tells more.
    """
    worst = report.worst
    if worst is None or worst.share <= max_share:
        return
    where = "over all sets" if worst.set is POOLED else f"in set {worst.set}"
    raise TrainingError(
        f"{worst.attribute} tells {worst.share:.0%} of the label {where}, the limit is {max_share:.0%} (--max-leak): "
        f"{worst.example}. A network would learn that instead of what generators leave behind. Save both classes alike "
        "(format, size, quality), leave out the set by --exclude, or raise --max-leak if it is meant to be so"
    )


def mutual_information(values: NDArray[np.int64], labels: NDArray[np.int64]) -> float:
    """Return the mutual information of two variables in bits, from the counts of their values.

    Args:
        values: From 0, (n,).
        labels: 0 and 1, (n,).
    """
    joint = np.bincount(2 * values + labels, minlength=2 * (int(values.max()) + 1)).reshape(-1, 2) / len(values)
    independent = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    occurs = joint > 0
    return float((joint[occurs] * np.log2(joint[occurs] / independent[occurs])).sum())


def _scopes(training: pa.Table, labels: NDArray[np.int64]) -> Iterator[tuple[str | None, NDArray[np.int64]]]:
    """Yield the rows to measure on, where both classes are."""
    names, numbers = np.unique(np.array(training.column("set").to_pylist(), dtype=object), return_inverse=True)
    everything = np.arange(len(labels))
    if 0 < labels.sum() < len(labels):
        yield POOLED, everything
    for number, name in enumerate(names):
        rows = everything[numbers == number]
        if 0 < labels[rows].sum() < len(rows):
            yield str(name), rows


def _texts(training: pa.Table, attribute: str) -> NDArray[np.object_]:
    """Return an attribute's values as readers know them, (n,)."""
    match attribute:
        case "size":
            pairs = zip(training["width"].to_pylist(), training["height"].to_pylist(), strict=True)
            texts = [f"{width}x{height}" for width, height in pairs]
        case "bytes_per_pixel":
            return _binned(training)
        case _:
            texts = ["none" if value is None else str(value).lower() for value in training[attribute].to_pylist()]
    return np.array(texts, dtype=object)


def _binned(training: pa.Table) -> NDArray[np.object_]:
    """Return between which quantiles the bytes per pixel lie of the files that they say something of."""
    is_lossy, formats = training["lossy"].to_pylist(), training["format"].to_pylist()
    which = [lossy and fmt in _OF_UNTOLD_QUALITY for lossy, fmt in zip(is_lossy, formats, strict=True)]
    texts = np.full(len(which), "none", dtype=object)
    rows = np.flatnonzero(which)
    if len(rows):
        num_bytes, width, height = (training[name].to_numpy()[rows] for name in ("num_bytes", "width", "height"))
        ratios = num_bytes / (width.astype(np.float64) * height)
        edges = np.unique(np.quantile(ratios, np.arange(1, _NUM_BINS) / _NUM_BINS))
        names = [f"below {edges[0]:.3g}", *(f"from {edge:.3g}" for edge in edges)]
        texts[rows] = [names[place] for place in np.searchsorted(edges, ratios, side="right")]
    return texts


def _measure(attribute: str, scope: str | None, texts: NDArray[np.object_], labels: NDArray[np.int64]) -> Leak:
    names, values = np.unique(texts, return_inverse=True)
    raw = mutual_information(values, labels)
    generator = np.random.default_rng(_SEED)
    by_chance = [mutual_information(values, generator.permutation(labels)) for _ in range(_NUM_SHUFFLES)]
    bits = raw - float(np.mean(by_chance)) if raw > max(by_chance) else 0.0
    share = bits / mutual_information(labels, labels)
    return Leak(attribute, scope, len(labels), bits, share, _example(attribute, names, values, labels))


def _example(attribute: str, names: NDArray[np.object_], values: NDArray[np.int64], labels: NDArray[np.int64]) -> str:
    """Return in words the value that most images deviate by from an even share of generated ones."""
    counts = np.bincount(values)
    generated = np.bincount(values, weights=labels)
    surplus = generated - counts * labels.mean()
    best = int(np.abs(surplus).argmax())
    label = GENERATED if surplus[best] > 0 else REAL
    of_class = generated[best] if label == GENERATED else counts[best] - generated[best]
    return (
        f"{of_class:.0f} of {counts[best]} images with {attribute} {names[best]} are {_NAMES[label]}, "
        f"{(labels == label).mean():.0%} of all are"
    )


def _shares(texts: NDArray[np.object_]) -> list[tuple[str, float]]:
    names, counts = np.unique(texts, return_counts=True)
    return [(str(names[at]), float(counts[at] / len(texts))) for at in np.argsort(-counts, kind="stable")[:_MAX_VALUES]]
