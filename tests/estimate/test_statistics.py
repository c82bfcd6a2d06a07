from __future__ import annotations

import math
import statistics

import numpy as np
import pytest

from lfm_scan.estimate.statistics import LEVEL, Interval, mean_of, share_of

_MANY = 10**12


def test_the_interval_of_a_mean_is_the_normal_distributions_where_that_holds() -> None:
    values = np.random.default_rng(1).normal(50, 8, 1000)

    found = mean_of(list(values), _MANY)

    half = statistics.NormalDist().inv_cdf((1 + LEVEL) / 2) * float(values.std()) / math.sqrt(len(values))
    assert found.value == pytest.approx(float(values.mean()))
    assert found.low is not None
    assert found.high is not None
    assert found.value - found.low == pytest.approx(half, rel=0.1)
    assert found.high - found.value == pytest.approx(half, rel=0.1)


def test_the_interval_shrinks_by_what_the_sample_is_of_the_whole() -> None:
    values = list(np.random.default_rng(2).lognormal(0, 1, 75))
    wide, narrow = mean_of(values, _MANY), mean_of(values, 100)

    assert wide.high is not None
    assert narrow.high is not None
    assert (narrow.high - narrow.value) / (wide.high - wide.value) == pytest.approx(math.sqrt(25 / 99))


def test_nine_of_ten_intervals_hold_the_mean_of_skewed_costs() -> None:
    random = np.random.default_rng(3)
    everything = random.lognormal(0, 1, 3000)
    samples = [random.choice(everything, 100, replace=False) for _ in range(300)]

    intervals = [mean_of(list(sample), len(everything)) for sample in samples]
    num_holding = sum((each.low or 0) <= everything.mean() <= (each.high or 0) for each in intervals)

    assert 0.82 <= num_holding / len(samples) <= 0.95


def test_a_large_sample_is_resampled_in_pieces_and_means_the_same() -> None:
    values = list(np.random.default_rng(4).normal(10, 1, 3000))  # too large for one piece

    found = mean_of(values, _MANY)

    half = 1.645 / math.sqrt(3000)
    assert found.low == pytest.approx(statistics.fmean(values) - half, abs=0.2 * half)


def test_all_measured_is_exact_and_one_alone_says_nothing_of_the_spread() -> None:
    assert mean_of([1.0, 3.0], 2) == Interval.exactly(2.0)
    assert mean_of([4.0], 1) == Interval.exactly(4.0)
    assert mean_of([4.0], 9) == Interval(4.0, None, None)


@pytest.mark.parametrize(("num_with", "num_sampled"), [(0, 10), (1, 10), (5, 10), (97, 100), (200, 200)])
def test_a_share_is_within_wilsons_interval(num_with: int, num_sampled: int) -> None:
    found = share_of(num_with, num_sampled, _MANY)

    # Wilson: the shares p from which the observed one is no further than z standard errors of p itself.
    z = statistics.NormalDist().inv_cdf((1 + LEVEL) / 2)
    share = num_with / num_sampled
    possible = [
        p for p in np.linspace(0, 1, 100_001) if abs(p - share) <= z * math.sqrt(p * (1 - p) / num_sampled) + 1e-12
    ]
    assert found.value == share
    assert found.low == pytest.approx(min(possible), abs=2e-5)
    assert found.high == pytest.approx(max(possible), abs=2e-5)


def test_a_share_allows_for_what_was_seen() -> None:
    found = share_of(3, 5, 6)  # the sixth has it, or has not

    assert found.low == pytest.approx(3 / 6)
    assert found.high == pytest.approx(4 / 6)
    assert share_of(3, 6, 6) == Interval.exactly(0.5)


def test_intervals_add_and_scale_end_by_end() -> None:
    one, other = Interval(2.0, 1.0, 4.0), Interval(10.0, 5.0, 20.0)

    assert one + other == Interval(12.0, 6.0, 24.0)
    assert one.scaled(3) == Interval(6.0, 3.0, 12.0)
    assert one.at_least(Interval(3.0, 0.5, 3.5)) == Interval(3.0, 1.0, 4.0)
    assert (one + Interval(1.0, None, None)).high is None
    assert Interval.exactly(2.0).is_exact
    assert not one.is_exact
