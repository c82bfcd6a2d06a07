from __future__ import annotations

import hashlib
import pickle

import pyarrow as pa

from lfm_scan.imaging import ImageInfo
from lfm_scan.runs.reuse import SCORE_COLUMNS, KnownScore, KnownScores, index_scores
from lfm_scan.schema import RESULT_SCHEMA

_SCHEMA = pa.schema([RESULT_SCHEMA.field(name) for name in SCORE_COLUMNS])


def _digest(index: int) -> str:
    return hashlib.sha256(str(index).encode()).hexdigest()


def _results(rows: list[dict[str, object]]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=_SCHEMA)


def test_every_score_is_found_by_its_bytes_and_no_other() -> None:
    rows: list[dict[str, object]] = [
        {"sha256": _digest(index), "logit": index / 7, "format": "PNG", "width": index, "lossy": False}
        for index in range(2000)
    ]
    table = index_scores(_results(rows))
    known = KnownScores(pickle.loads(pickle.dumps(table.slice(0))))

    assert len(known) == 2000
    for index in range(2000):
        assert known.get(_digest(index)) == KnownScore(index / 7, ImageInfo(format="PNG", width=index, lossy=False))
    assert all(known.get(_digest(index)) is None for index in range(2000, 4000))


def test_rows_without_a_score_and_bytes_seen_twice_are_left_out() -> None:
    known = KnownScores(
        index_scores(
            _results(
                [
                    {"sha256": _digest(0), "logit": 1.0},
                    {"sha256": _digest(1), "logit": None},
                    {"sha256": None, "logit": None},
                    {"sha256": _digest(0), "logit": 1.0},
                ]
            )
        )
    )

    assert len(known) == 1
    assert known.get(_digest(0)) == KnownScore(1.0, ImageInfo())
    assert known.get(_digest(1)) is None


def test_digests_that_begin_alike_are_told_apart() -> None:
    first, second = "ab" * 31 + "00", "ab" * 31 + "01"
    known = KnownScores(index_scores(_results([{"sha256": second, "logit": 2.0}, {"sha256": first, "logit": 1.0}])))

    assert known.get(first) == KnownScore(1.0, ImageInfo())
    assert known.get(second) == KnownScore(2.0, ImageInfo())
    assert known.get("ab" * 31 + "02") is None


def test_a_run_without_scores_knows_none() -> None:
    assert KnownScores(index_scores(_results([]))).get(_digest(0)) is None
