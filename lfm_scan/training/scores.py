"""What is measured after each epoch, per set and format: a pooled figure can rise with no detection at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lfm_scan.domain import Domain
from lfm_scan.evaluation.metrics import MeanMetrics, Metrics, mean_metrics, measure, measure_groups
from lfm_scan.imaging import get_policy

_DOMAIN_AUC: Final = 0.9
"""Mean AUC over the sets from which a kind of image counts as one the checkpoint can tell."""


@dataclass(frozen=True)
class Scores:
    """Figures of the validation images.

    Attributes:
        pooled: Of all of them.
        by_set: Of each set.
        by_format: Of each file format, over all sets.
        means: Over the sets with both classes.
        lossy: Over the same sets, of the images that a lossy codec saved.
        resampled: Over the same sets, of the images that the policy resized.
    """

    pooled: Metrics
    by_set: Mapping[str, Metrics]
    by_format: Mapping[str, Metrics]
    means: MeanMetrics
    lossy: MeanMetrics
    resampled: MeanMetrics

    @property
    def domain(self) -> Domain:
        """What these figures show the checkpoint to handle: what was not measured is not part of it."""
        return Domain(lossy=_is_told(self.lossy), resampled=_is_told(self.resampled))

    def value_of(self, metric: str) -> float | None:
        """Return the figure that a metric's name means, or None if it cannot be measured."""
        if metric == "pooled_auc":
            return self.pooled.auc
        value: float | None = getattr(self.means, metric)
        return value

    def to_json(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        return {
            "pooled": asdict(self.pooled),
            "by_set": {name: asdict(figures) for name, figures in self.by_set.items()},
            "by_format": {name: asdict(figures) for name, figures in self.by_format.items()},
            "lossy": asdict(self.lossy),
            "resampled": asdict(self.resampled),
            **asdict(self.means),
        }


@dataclass(frozen=True)
class Validation:
    """What the validation images are.

    Attributes:
        labels: (N,), 0 is real and 1 is generated.
        sets: Of each image.
        formats: Of each image's file.
        lossy: (N,), whether a lossy codec saved it.
        resampled: (N,), whether the policy resizes it.
    """

    labels: NDArray[np.int8]
    sets: tuple[str, ...]
    formats: tuple[str, ...]
    lossy: NDArray[np.bool_]
    resampled: NDArray[np.bool_]

    @classmethod
    def of(cls, samples: pa.Table, preprocess: str) -> Self:
        """Return what samples (in `SAMPLE_SCHEMA`) are, and what a policy does to them."""
        resamples = get_policy(preprocess).resamples
        sizes = zip(samples["width"].to_pylist(), samples["height"].to_pylist(), strict=True)
        return cls(
            samples["label"].to_numpy(),
            tuple(samples["set"].to_pylist()),
            tuple(name or "unknown" for name in samples["format"].to_pylist()),
            np.array([bool(lossy) for lossy in samples["lossy"].to_pylist()], dtype=bool),
            np.array([resamples(*size) for size in sizes], dtype=bool),
        )

    def measure(self, logits: NDArray[np.float32]) -> Scores:
        """Return the figures for the logits (N,) of the images, in order."""
        by_set = measure_groups(logits, self.labels, self.sets)
        return Scores(
            pooled=measure(logits, self.labels),
            by_set=by_set,
            by_format=measure_groups(logits, self.labels, self.formats),
            means=mean_metrics(by_set),
            lossy=self._means_of(logits, self.lossy),
            resampled=self._means_of(logits, self.resampled),
        )

    def _means_of(self, logits: NDArray[np.float32], chosen: NDArray[np.bool_]) -> MeanMetrics:
        sets = [name for name, is_chosen in zip(self.sets, chosen, strict=True) if is_chosen]
        return mean_metrics(measure_groups(logits[chosen], self.labels[chosen], sets))


def _is_told(means: MeanMetrics) -> bool:
    return means.mean_auc is not None and means.mean_auc >= _DOMAIN_AUC
