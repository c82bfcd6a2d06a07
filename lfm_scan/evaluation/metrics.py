"""How well logits tell generated images from real ones: ACC, AP, AUC, and TPR at 1 % FPR. numpy only.

A logit above 0 calls an image generated. Figures across sets mislead: sets differ in how high all of their logits are,
so a pooled AUC can rise with no detection at all. Choose a checkpoint by `mean_metrics`, the mean over sets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

_PERCENT: Final = 100


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Figures of one set of images, shares in [0, 1]; None where the images that a figure is about are missing.

    Attributes:
        num_real: Real images.
        num_generated: Generated images.
        acc: Share called what they are.
        ap: Average precision, generated being positive: the sum of (R_n - R_(n-1)) P_n over distinct logits.
        auc: Chance that a generated image has a higher logit than a real one; a tie counts half.
        tpr_at_1_fpr: Largest share of generated images found by a threshold that calls at most 1 % of the real ones
            generated.
        real_kept: Share of the real images called real.
        generated_found: Share of the generated images called generated.
    """

    num_real: int
    num_generated: int
    acc: float | None
    ap: float | None
    auc: float | None
    tpr_at_1_fpr: float | None
    real_kept: float | None
    generated_found: float | None


@dataclass(frozen=True, kw_only=True)
class MeanMetrics:
    """Means over the sets that have both classes, each set counting the same; None if there is no such set.

    Attributes:
        num_sets: Sets that have both classes.
        mean_acc: Of ACC.
        mean_ap: Of AP.
        mean_auc: Of AUC.
        mean_tpr_at_1_fpr: Of TPR at 1 % FPR.
    """

    num_sets: int
    mean_acc: float | None
    mean_ap: float | None
    mean_auc: float | None
    mean_tpr_at_1_fpr: float | None


def measure(logits: ArrayLike, labels: ArrayLike) -> Metrics:
    """Return the figures of images.

    Args:
        logits: (N,), finite; above 0 means generated.
        labels: (N,), 0 is real and 1 is generated.

    Raises:
        ValueError: If the shapes differ, a logit is not finite, or a label is neither 0 nor 1.
    """
    scores, is_generated = _checked(logits, labels)
    called = scores > 0
    num_generated = int(is_generated.sum())
    num_real = len(scores) - num_generated
    found = int((called & is_generated).sum())
    kept = int((~called & ~is_generated).sum())
    both = num_real > 0 and num_generated > 0
    true_positives, false_positives = _count_by_threshold(scores, is_generated)
    return Metrics(
        num_real=num_real,
        num_generated=num_generated,
        acc=_share(found + kept, len(scores)),
        ap=_average_precision(true_positives, false_positives) if both else None,
        auc=_area(true_positives, false_positives) if both else None,
        tpr_at_1_fpr=_tpr_at_1_fpr(true_positives, false_positives) if both else None,
        real_kept=_share(kept, num_real),
        generated_found=_share(found, num_generated),
    )


def measure_groups(logits: ArrayLike, labels: ArrayLike, groups: Sequence[str]) -> dict[str, Metrics]:
    """Return the figures of each group, by name in alphabetical order.

    Args:
        logits: As for `measure`.
        labels: As for `measure`.
        groups: (N,), the set or format of each image.

    Raises:
        ValueError: As `measure` does, or if there are not as many groups as logits.
    """
    scores, is_generated = _checked(logits, labels)
    if len(groups) != len(scores):
        raise ValueError(f"{len(groups)} groups for {len(scores)} logits: give one for each")
    names, index_of = np.unique(np.asarray(groups, dtype=np.str_), return_inverse=True)
    return {
        str(name): measure(scores[index_of == index], is_generated[index_of == index])
        for index, name in enumerate(names)
    }


def mean_metrics(groups: Mapping[str, Metrics]) -> MeanMetrics:
    """Return the means over the groups that have both classes."""
    both = [metrics for metrics in groups.values() if metrics.num_real and metrics.num_generated]
    return MeanMetrics(
        num_sets=len(both),
        mean_acc=_mean([metrics.acc for metrics in both]),
        mean_ap=_mean([metrics.ap for metrics in both]),
        mean_auc=_mean([metrics.auc for metrics in both]),
        mean_tpr_at_1_fpr=_mean([metrics.tpr_at_1_fpr for metrics in both]),
    )


def _checked(logits: ArrayLike, labels: ArrayLike) -> tuple[NDArray[np.floating], NDArray[np.bool_]]:
    scores, classes = np.asarray(logits), np.asarray(labels)
    if scores.ndim != 1 or scores.shape != classes.shape:
        raise ValueError(f"logits {scores.shape} and labels {classes.shape} must both be (N,)")
    if not np.isfinite(scores).all():
        raise ValueError(f"{int((~np.isfinite(scores)).sum())} of {len(scores)} logits are not finite numbers")
    if not np.isin(classes, (0, 1)).all():
        raise ValueError("a label is neither 0 (real) nor 1 (generated)")
    return scores, classes == 1


def _count_by_threshold(
    scores: NDArray[np.floating], is_generated: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return how many generated and how many real images are at or above each distinct score, highest first."""
    order = np.argsort(-scores, kind="stable")
    is_last_of_ties = np.append(np.diff(scores[order]) != 0, True)[: len(scores)]
    true_positives = np.cumsum(is_generated[order], dtype=np.int64)[is_last_of_ties]
    false_positives = np.cumsum(~is_generated[order], dtype=np.int64)[is_last_of_ties]
    return true_positives, false_positives


def _average_precision(true_positives: NDArray[np.int64], false_positives: NDArray[np.int64]) -> float:
    gained = np.diff(true_positives, prepend=0)
    return float((gained * true_positives / (true_positives + false_positives)).sum() / true_positives[-1])


def _area(true_positives: NDArray[np.int64], false_positives: NDArray[np.int64]) -> float:
    # Twice the number of pairs in the right order, a tie being half a pair: whole numbers, so it is exact.
    before = true_positives - np.diff(true_positives, prepend=0)
    twice = int((np.diff(false_positives, prepend=0) * (before + true_positives)).sum())
    return twice / (2 * int(true_positives[-1]) * int(false_positives[-1]))


def _tpr_at_1_fpr(true_positives: NDArray[np.int64], false_positives: NDArray[np.int64]) -> float:
    is_allowed = _PERCENT * false_positives <= false_positives[-1]
    return float(true_positives[is_allowed].max(initial=0) / true_positives[-1])


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _mean(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None
