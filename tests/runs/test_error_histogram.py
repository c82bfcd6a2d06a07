from __future__ import annotations

import json

import pyarrow as pa
import pytest

from lfm_scan.runs import error_histogram
from lfm_scan.runs.error_histogram import ErrorHistogram, ErrorKind, histogram_of


def _table(*rows: tuple[str, str, str | None]) -> pa.Table:
    uris, statuses, errors = zip(*rows, strict=True) if rows else ((), (), ())
    return pa.table(
        {
            "uri": pa.array(uris, pa.string()),
            "status": pa.array(statuses, pa.string()),
            "error": pa.array(errors, pa.string()),
        }
    )


def test_messages_that_differ_in_names_and_numbers_are_of_one_kind() -> None:
    found = histogram_of(
        _table(
            ("s3://b/1.png", "missing", "s3://b/1.png: not found"),
            ("s3://b/a 2.png", "missing", "s3://b/a 2.png: not found"),
            ("s3://b/3.png", "too_large", "70,000,000 bytes, the limit is 67,108,864"),
            ("s3://b/4.png", "too_large", "70,000,001 bytes, the limit is 67,108,864"),
            ("s3://b/5.png", "ok", None),
            ("s3://b/6.png", "ok", "scored although the end of the file is missing (--score-truncated)"),
            ("/d/7.png", "corrupt", "cannot identify <_io.BytesIO object at 0x7f01c2> in /tmp/x/y"),
        )
    )

    assert [(each.status, each.kind, each.num_rows) for each in found.kinds] == [
        ("missing", "…: not found", 2),
        ("too_large", "# bytes, the limit is #", 2),
        ("corrupt", "cannot identify <_io.BytesIO object at #> in …", 1),
    ]
    assert found.kinds[0].examples == (
        ("s3://b/1.png", "s3://b/1.png: not found"),
        ("s3://b/a 2.png", "s3://b/a 2.png: not found"),
    )


def test_three_examples_of_a_kind_are_kept() -> None:
    found = histogram_of(_table(*((f"/d/{index}", "missing", f"/d/{index}: not found") for index in range(9))))

    assert found.kinds[0].num_rows == 9
    assert [uri for uri, _ in found.kinds[0].examples] == ["/d/0", "/d/1", "/d/2"]


def test_histograms_add_up() -> None:
    one = histogram_of(_table(("/a", "missing", "not found"), ("/b", "empty", "0 bytes")))
    other = histogram_of(_table(("/c", "empty", "0 bytes"), ("/d", "denied", "refused")))

    total = one + other

    assert [(each.status, each.num_rows) for each in total.kinds] == [("empty", 2), ("denied", 1), ("missing", 1)]
    assert [uri for uri, _ in total.kinds[0].examples] == ["/b", "/c"]
    assert total.num_other == 0


def test_the_kinds_are_bounded_and_the_rest_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(error_histogram, "_MAX_KINDS", 2)
    monkeypatch.setattr(error_histogram, "_MAX_KINDS_AT_ONCE", 3)
    words = ["bad", "bad", "bad", "worse", "worse", "odd", "strange"]

    found = histogram_of(_table(*(("/a", "error", word) for word in words)))
    doubled = found + found

    assert [(each.kind, each.num_rows) for each in found.kinds] == [("bad", 3), ("worse", 2)]
    assert found.num_other == 2
    assert ([each.num_rows for each in doubled.kinds], doubled.num_other) == ([6, 4], 4)


def test_no_credentials_of_a_url_get_in() -> None:
    message = "https://me:secret@host/a.png?X-Amz-Signature=abcdef: not found"

    found = histogram_of(_table(("https://host/a.png", "missing", message)))

    assert "secret" not in json.dumps(found.to_json())
    assert "abcdef" not in json.dumps(found.to_json())


def test_a_histogram_survives_json() -> None:
    found = histogram_of(_table(("/a", "missing", "not found"), ("/b", "empty", None)))

    assert ErrorHistogram.from_json(json.loads(json.dumps(found.to_json()))) == found
    assert found.kinds[0] == ErrorKind("empty", "", 1, (("/b", ""),))
