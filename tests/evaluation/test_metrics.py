"""Metrics against their definitions, by brute force over pairs and thresholds."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from lfm_scan.evaluation.metrics import MeanMetrics, Metrics, mean_metrics, measure, measure_groups


def brute_force(logits: list[float], labels: list[int]) -> tuple[float, float, float]:
    """Return AP, AUC and TPR at 1 % FPR from the definitions, one pair and one threshold at a time."""
    generated = [logit for logit, label in zip(logits, labels, strict=True) if label == 1]
    real = [logit for logit, label in zip(logits, labels, strict=True) if label == 0]
    wins = sum(1.0 if one > other else 0.5 if one == other else 0.0 for one in generated for other in real)
    average_precision, recall_before, best = 0.0, 0.0, 0.0
    for threshold in sorted(set(logits), reverse=True):
        true_positives = sum(logit >= threshold for logit in generated)
        false_positives = sum(logit >= threshold for logit in real)
        recall = true_positives / len(generated)
        average_precision += (recall - recall_before) * true_positives / (true_positives + false_positives)
        recall_before = recall
        if false_positives / len(real) <= 0.01:
            best = max(best, recall)
    return average_precision, wins / (len(generated) * len(real)), best


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("num_levels", [2, 7, 10_000], ids=["coarse", "ties", "distinct"])
def test_figures_are_those_of_the_definitions(seed: int, num_levels: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, 250)
    logits = np.round((rng.normal(size=250) + labels * seed / 2) * num_levels / 5) / num_levels * 5
    found = measure(logits.astype(np.float32), labels)
    expected = brute_force(logits.astype(np.float32).tolist(), labels.tolist())
    assert (found.ap, found.auc, found.tpr_at_1_fpr) == pytest.approx(expected, abs=1e-12)
    is_right = [(logit > 0) == (label == 1) for logit, label in zip(logits, labels, strict=True)]
    assert found.acc == pytest.approx(np.mean(is_right))
    assert found.real_kept == pytest.approx(
        np.mean([right for right, label in zip(is_right, labels, strict=True) if not label])
    )
    assert found.generated_found == pytest.approx(
        np.mean([right for right, label in zip(is_right, labels, strict=True) if label])
    )
    assert found.num_real + found.num_generated == 250
    assert found.num_generated == labels.sum()


def test_a_worked_example() -> None:
    # scikit-learn's own: average_precision_score([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8]) is 0.83, roc_auc_score 0.75.
    found = measure([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1])
    assert found.ap == pytest.approx(5 / 6)
    assert (found.auc, found.tpr_at_1_fpr) == (0.75, 0.5)
    assert (found.num_real, found.num_generated) == (2, 2)
    assert (found.acc, found.real_kept, found.generated_found) == (0.5, 0.0, 1.0)


def test_a_logit_of_zero_calls_an_image_real() -> None:
    found = measure([0.0, 0.0], [0, 1])
    assert (found.acc, found.real_kept, found.generated_found) == (0.5, 1.0, 0.0)


def test_logits_that_are_all_alike_say_nothing() -> None:
    found = measure([5.0] * 10, [0] * 6 + [1] * 4)
    assert (found.auc, found.ap, found.tpr_at_1_fpr) == (0.5, 0.4, 0.0)


@pytest.mark.parametrize(("num_real", "tpr"), [(99, 0.5), (100, 1.0), (199, 1.0)])
def test_one_real_image_above_the_threshold_is_allowed_in_a_hundred(num_real: int, tpr: float) -> None:
    # One real image above one of the two generated ones.
    logits = [2.0, 3.0, 1.0] + [-1.0] * (num_real - 1)
    assert measure(logits, [0, 1, 1] + [0] * (num_real - 1)).tpr_at_1_fpr == tpr


@pytest.mark.parametrize(
    ("logits", "labels", "expected"),
    [
        ([-1.0, 2.0], [0, 0], {"num_real": 2, "acc": 0.5, "real_kept": 0.5}),
        ([-1.0, 2.0], [1, 1], {"num_generated": 2, "acc": 0.5, "generated_found": 0.5}),
        ([], [], {}),
    ],
)
def test_what_needs_a_missing_class_is_none(logits: list[float], labels: list[int], expected: dict[str, Any]) -> None:
    none = dict.fromkeys(field.name for field in dataclasses.fields(Metrics))
    counts = {"num_real": 0, "num_generated": 0}
    assert dataclasses.asdict(measure(logits, labels)) == {**none, **counts, **expected}


def test_groups_are_measured_alone_and_a_pooled_figure_can_deceive() -> None:
    # Within each set the detector guesses; the sets' levels differ, as do their shares of generated images.
    logits = [5.0, 5.0, 5.0, 5.0, -5.0, -5.0, -5.0, -5.0, 1.0]
    labels = [1, 1, 1, 0, 1, 0, 0, 0, 0]
    groups = ["b"] * 4 + ["a"] * 4 + ["photographs"]
    found = measure_groups(logits, labels, groups)
    assert list(found) == ["a", "b", "photographs"]
    assert (found["a"].auc, found["b"].auc, found["photographs"].auc) == (0.5, 0.5, None)
    assert (found["a"].num_generated, found["b"].num_generated) == (1, 3)
    pooled = measure(logits, labels)
    assert pooled.auc is not None
    assert pooled.auc > 0.7
    mean = mean_metrics(found)
    assert mean == MeanMetrics(num_sets=2, mean_acc=0.75, mean_ap=0.5, mean_auc=0.5, mean_tpr_at_1_fpr=0.0)


def test_the_mean_counts_each_set_once_whatever_its_size() -> None:
    logits = [1.0, -1.0] + [1.0, -1.0] * 50
    labels = [1, 0] + [0, 1] * 50
    mean = mean_metrics(measure_groups(logits, labels, ["small"] * 2 + ["large"] * 100))
    assert (mean.mean_auc, mean.mean_acc) == (0.5, 0.5)


def test_without_a_set_of_both_classes_there_is_no_mean() -> None:
    mean = mean_metrics(measure_groups([1.0, -1.0], [0, 1], ["one", "other"]))
    assert mean == MeanMetrics(num_sets=0, mean_acc=None, mean_ap=None, mean_auc=None, mean_tpr_at_1_fpr=None)


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        ([1.0], [0, 1], r"logits \(1,\) and labels \(2,\) must both be \(N,\)"),
        ([float("nan"), 1.0], [0, 1], "1 of 2 logits are not finite numbers"),
        ([1.0, 1.0], [0, 2], "a label is neither 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(logits: list[float], labels: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure(logits, labels)


def test_a_group_is_missing() -> None:
    with pytest.raises(ValueError, match="1 groups for 2 logits"):
        measure_groups([1.0, 2.0], [0, 1], ["one"])
