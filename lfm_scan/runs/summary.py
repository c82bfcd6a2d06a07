"""Counts over result rows, and their sum over shards: what the end of a run tells its user."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import pyarrow as pa

from lfm_scan.status import Status, Unassessable

HISTOGRAM_BINS: Final = 10
"""Of equal width over scores 0 to 1."""

# What a user would call a failure: the image exists, is of a kind we read, and has no score.
_NOT_FAILURES: Final = frozenset({Status.OK, Status.UNSUPPORTED, Status.TOO_SMALL, Status.EMPTY})


def is_failure(status: str) -> bool:
    """Tell whether an image with this status should have had a score and has none."""
    return status not in _NOT_FAILURES


@dataclass(frozen=True)
class Summary:
    """Counts over rows. Summaries add up.

    Attributes:
        num_rows: Rows, one an input.
        size_bytes: Of the inputs, where known.
        by_status: Rows by status.
        unassessable: Scored rows outside the checkpoint's domain, by reason.
        num_flagged: Rows flagged.
        histogram: Scored and assessable rows by score, 10 bins over [0, 1].
    """

    num_rows: int = 0
    size_bytes: int = 0
    by_status: Counter[str] = field(default_factory=Counter)
    unassessable: Counter[str] = field(default_factory=Counter)
    num_flagged: int = 0
    histogram: tuple[int, ...] = (0,) * HISTOGRAM_BINS

    def __add__(self, other: Summary) -> Summary:
        return Summary(
            self.num_rows + other.num_rows,
            self.size_bytes + other.size_bytes,
            self.by_status + other.by_status,
            self.unassessable + other.unassessable,
            self.num_flagged + other.num_flagged,
            tuple(mine + theirs for mine, theirs in zip(self.histogram, other.histogram, strict=True)),
        )

    @property
    def num_scored(self) -> int:
        """Rows with a score."""
        return self.by_status[Status.OK]

    @property
    def num_unassessable(self) -> int:
        """Rows with a score that means nothing for the image."""
        return self.unassessable.total()

    @property
    def num_failed(self) -> int:
        """Images that should have had a score and have none.

        Files that are empty, of a kind the program does not read, or too small are answers, not failures.
        """
        return sum(count for status, count in self.by_status.items() if is_failure(status))

    def to_json(self) -> dict[str, Any]:
        """Return the counts as JSON values."""
        return {
            "num_rows": self.num_rows,
            "size_bytes": self.size_bytes,
            "by_status": dict(self.by_status),
            "unassessable": dict(self.unassessable),
            "num_flagged": self.num_flagged,
            "histogram": list(self.histogram),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Summary:
        """Return the summary that `to_json` gave."""
        return cls(
            **{
                **value,
                "by_status": Counter(value["by_status"]),
                "unassessable": Counter(value["unassessable"]),
                "histogram": tuple(value["histogram"]),
            }
        )


def summarize(results: pa.Table) -> Summary:
    """Return the counts over rows with the columns of `RESULT_SCHEMA`."""
    statuses = results.column("status").to_pylist()
    reasons = results.column("unassessable_reason").to_pylist()
    scores = np.array(
        [
            score
            for score, assessable in zip(
                results.column("score").to_pylist(), results.column("assessable").to_pylist(), strict=True
            )
            if assessable and score is not None
        ]
    )
    histogram, _ = np.histogram(scores, bins=HISTOGRAM_BINS, range=(0, 1))
    return Summary(
        num_rows=len(results),
        size_bytes=sum(size for size in results.column("size_bytes").to_pylist() if size is not None),
        by_status=Counter(statuses),
        unassessable=Counter(reason for reason in reasons if reason not in (None, Unassessable.NOT_SCORED)),
        num_flagged=sum(results.column("flagged").to_pylist()),
        histogram=tuple(int(count) for count in histogram),
    )
