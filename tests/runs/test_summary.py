from __future__ import annotations

import json
from collections import Counter
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from lfm_scan.runs.summary import Summary, summarize
from lfm_scan.schema import RESULT_SCHEMA


def _row(status: str, score: float | None = None, reason: str | None = None, flagged: bool = False) -> dict[str, Any]:
    return {
        "uri": "/a.png",
        "size_bytes": 10,
        "status": status,
        "score": score,
        "assessable": reason is None,
        "unassessable_reason": reason,
        "flagged": flagged,
        "preprocess": "crop256",
        "model_id": "m",
        "weights_sha256": "0",
        "run_id": "r",
        "shard": 0,
        "scored_at": datetime(2026, 11, 21, tzinfo=UTC),
    }


_ROWS = [
    _row("ok", 0.05),
    _row("ok", 1.0, flagged=True),
    _row("ok", 0.99, reason="lossy"),
    _row("corrupt", reason="not_scored"),
    _row("empty", reason="not_scored"),
]


def test_counts_are_those_of_the_rows() -> None:
    summary = summarize(pa.Table.from_pylist(_ROWS, schema=RESULT_SCHEMA))

    assert summary.num_rows == 5
    assert summary.size_bytes == 50
    assert summary.by_status == Counter(ok=3, corrupt=1, empty=1)
    assert summary.unassessable == Counter(lossy=1)
    assert summary.num_flagged == 1
    assert summary.histogram == (1, 0, 0, 0, 0, 0, 0, 0, 0, 1)  # the lossy one's score means nothing


def test_an_empty_file_is_an_answer_and_a_corrupt_one_a_failure() -> None:
    assert summarize(pa.Table.from_pylist(_ROWS, schema=RESULT_SCHEMA)).num_failed == 1


def test_summaries_of_shards_add_up_to_the_summary_of_all() -> None:
    parts = [summarize(pa.Table.from_pylist([row], schema=RESULT_SCHEMA)) for row in _ROWS]

    assert sum(parts, Summary()) == summarize(pa.Table.from_pylist(_ROWS, schema=RESULT_SCHEMA))


def test_a_summary_survives_json() -> None:
    summary = summarize(pa.Table.from_pylist(_ROWS, schema=RESULT_SCHEMA))

    assert Summary.from_json(json.loads(json.dumps(summary.to_json()))) == summary
