from __future__ import annotations

import io
import json
import logging

import pytest

from lfm_scan import logs

_LOGGER = logging.getLogger("lfm_scan.scoring.isolated")


def _lines(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_an_event_is_one_object_on_one_line() -> None:
    stream = io.StringIO()
    with logs.written_to(stream, "json"), logs.about(run_id="r", shard=7):
        logs.event("shard_done", num_rows=3, uri="a\nb\udcff")
    (line,) = _lines(stream)

    assert line.pop("time")
    assert line == {
        "level": "info",
        "event": "shard_done",
        "run_id": "r",
        "shard": 7,
        "num_rows": 3,
        "uri": "a\nb\udcff",
    }


def test_a_plain_log_line_names_what_it_is_about() -> None:
    as_json, as_text = io.StringIO(), io.StringIO()
    with logs.written_to(as_json, "json"), logs.written_to(as_text, "text"), logs.about(run_id="r", shard=7):
        _LOGGER.warning("%s: crashed:\nthe decoder died", "s3://b/a.png")
    (line,) = _lines(as_json)

    assert (line["level"], line["event"], line["shard"]) == ("warning", "log", 7)
    assert line["message"] == "s3://b/a.png: crashed: the decoder died"
    assert line["logger"] == "lfm_scan.scoring.isolated"
    assert as_text.getvalue().endswith(
        " WARNING run_id=r shard=7 lfm_scan.scoring.isolated: s3://b/a.png: crashed: the decoder died\n"
    )


def test_what_a_line_is_about_ends_with_the_block() -> None:
    stream = io.StringIO()
    with logs.written_to(stream, "json"):
        with logs.about(run_id="r"):
            with logs.about(shard=1):
                logs.event("inside")
            logs.event("after")
        logs.event("outside")

    assert [(line.get("run_id"), line.get("shard")) for line in _lines(stream)] == [
        ("r", 1),
        ("r", None),
        (None, None),
    ]


def test_nothing_is_left_of_a_block() -> None:
    logger = logging.getLogger("lfm_scan")
    before = (logger.level, logger.propagate, list(logger.handlers))
    with logs.written_to(io.StringIO(), "json"):
        assert logs.is_structured()

    assert (logger.level, logger.propagate, list(logger.handlers)) == before
    assert not logs.is_structured()


def test_an_exception_is_named_and_credentials_are_not() -> None:
    stream = io.StringIO()
    with logs.written_to(stream, "json"):
        try:
            raise OSError("https://me:secret@host/ refused")
        except OSError:
            _LOGGER.exception("cannot go on")
    (line,) = _lines(stream)

    assert line["message"] == "cannot go on: OSError('https://***@host/ refused')"


def test_a_long_text_is_cut() -> None:
    assert len(logs.one_line("x" * 10_000)) == 500


def test_a_worker_writes_as_the_run_it_works_for_asks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = logging.getLogger("lfm_scan")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", True)
    for log_format in ("text", "json", "json", "text"):
        logs.set_up_worker(log_format)
        with logs.about(run_id="r"):
            _LOGGER.warning("crashed")

    lines = capsys.readouterr().err.splitlines()
    assert [line.startswith("{") for line in lines] == [False, True, True, False]
    assert all("run_id" in line and "crashed" in line for line in lines)
