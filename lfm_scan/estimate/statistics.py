"""What a sample says of all inputs: means and shares with 90 % intervals.

A sample is drawn without replacement, so it says more the larger it is beside the whole: both intervals shrink by the
finite population correction, to nothing when the sample is the whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

LEVEL: Final = 0.9
"""Coverage of all intervals."""

_Z: Final = 1.6448536269514722
"""The standard normal distribution's quantile at (1 + LEVEL) / 2."""

_NUM_RESAMPLES: Final = 4000
_MAX_DRAWS: Final = 2_000_000
"""Values drawn at once: bounds memory for large samples."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure and where it lies with 90 % probability; both ends are the figure itself where it is exact.

    Attributes:
        value: Best estimate.
        low: Lower end, or None if the sample cannot tell.
        high: Upper end, or None if the sample cannot tell.
    """

    value: float
    low: float | None
    high: float | None

    @classmethod
    def exactly(cls, value: float) -> Interval:
        """Return a figure that is known."""
        return cls(value, value, value)

    @property
    def is_exact(self) -> bool:
        """Whether nothing is uncertain about it."""
        return self.low == self.value == self.high

    def __add__(self, other: Interval) -> Interval:
        """Return the sum, as wide as if both were off in the same direction."""
        low = None if self.low is None or other.low is None else self.low + other.low
        high = None if self.high is None or other.high is None else self.high + other.high
        return Interval(self.value + other.value, low, high)

    def scaled(self, factor: float) -> Interval:
        """Return it times a number that is at least 0."""
        low, high = (None if end is None else factor * end for end in (self.low, self.high))
        return Interval(factor * self.value, low, high)

    def at_least(self, other: Interval) -> Interval:
        """Return the larger of two figures, end by end."""
        low = None if self.low is None or other.low is None else max(self.low, other.low)
        high = None if self.high is None or other.high is None else max(self.high, other.high)
        return Interval(max(self.value, other.value), low, high)


def mean_of(values: Sequence[float], population: int, seed: int = 0) -> Interval:
    """Return the mean over all inputs, with the percentile bootstrap's interval: costs are skewed, and never below 0.

    Args:
        values: Of the sample, at least one.
        population: Inputs in all.
        seed: Of the resampling.
    """
    sample = np.asarray(values, dtype=np.float64)
    mean = float(sample.mean())
    if len(sample) == population:
        return Interval.exactly(mean)
    if len(sample) < 2:
        return Interval(mean, None, None)
    random = np.random.default_rng(seed)
    per_round = max(1, _MAX_DRAWS // len(sample))
    means = np.concatenate(
        [
            sample[random.integers(0, len(sample), (min(per_round, _NUM_RESAMPLES - done), len(sample)))].mean(axis=1)
            for done in range(0, _NUM_RESAMPLES, per_round)
        ]
    )
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    shrink = math.sqrt((population - len(sample)) / (population - 1))
    return Interval(mean, mean + shrink * (float(low) - mean), mean + shrink * (float(high) - mean))


def share_of(num_with: int, num_sampled: int, population: int) -> Interval:
    """Return the share of all inputs that have a property, with Wilson's score interval (JASA 1927).

    Args:
        num_with: Of the sample, those that have it.
        num_sampled: In the sample, at least one.
        population: Inputs in all.
    """
    share = num_with / num_sampled
    if num_sampled == population:
        return Interval.exactly(share)
    # A sample without replacement from few says as much as a larger one from infinitely many.
    size = num_sampled * (population - 1) / (population - num_sampled)
    centre = (share + _Z**2 / (2 * size)) / (1 + _Z**2 / size)
    half = _Z / (1 + _Z**2 / size) * math.sqrt(share * (1 - share) / size + _Z**2 / (4 * size**2))
    # Of the inputs themselves, some are known to have it, and some not to.
    low, high = num_with / population, 1 - (num_sampled - num_with) / population
    return Interval(share, min(share, max(low, centre - half)), max(share, min(high, centre + half)))
