from __future__ import annotations

import json
from collections import Counter
from datetime import UTC, datetime, timedelta

import pytest

from lfm_scan.options import Prices
from lfm_scan.runs.error_histogram import ErrorHistogram, ErrorKind
from lfm_scan.runs.heartbeat import Beat, Phase
from lfm_scan.runs.report import cost_of, run_report
from lfm_scan.runs.summary import Summary
from lfm_scan.runs.usage import Stage, Usage
from tests.scanning import REPOSITORY

_MOMENT = datetime(2026, 11, 21, 7, tzinfo=UTC)


def _start(driver_id: str, seconds: float, phase: Phase, num_rows: int, usage: Usage) -> Beat:
    return Beat(
        driver_id=driver_id,
        host="head",
        pid=1,
        lfm_scan_version="1",
        interval_s=10,
        started_at=_MOMENT,
        beat_at=_MOMENT + timedelta(seconds=seconds),
        phase=phase,
        phase_s={"scanning": seconds - 1, "merging": 1.0},
        num_rows=num_rows,
        usage=usage,
        held_core_s=4 * seconds,
        held_gpu_s=seconds,
    )


def _report(*starts: Beat, prices: Prices | None = None) -> dict[str, object]:
    return run_report(
        run_id="r",
        run_dir="s3://b/r",
        state=Phase.FINISHED,
        summary=Summary(30, 3000, Counter(ok=27, corrupt=3)),
        errors=ErrorHistogram((ErrorKind("corrupt", "broken", 3, (("s3://b/a", "broken"),)),)),
        starts=starts,
        prices=prices or Prices(),
        versions={"ray": "2.60"},
    )


def test_a_report_sums_what_is_known_of_all_starts() -> None:
    killed = _start("a", 10, Phase.SCANNING, 10, Usage(seconds={"score": 2.0}, core_s=3, peak_worker_bytes=9))
    last = _start("b", 30, Phase.MERGING, 20, Usage(seconds={"score": 5.0, "fetch": 1.0}, core_s=7))

    report = _report(killed, last)

    assert report["seconds"] == {"score": 7.0, "fetch": 1.0}
    assert report["phase_s"] == {"scanning": 38.0, "merging": 2.0}
    assert (report["core_s"], report["held_core_s"], report["held_gpu_s"]) == (10.0, 160.0, 40.0)
    assert report["num_rows_known"] == 30
    assert (report["wall_s"], report["rows_per_s"], report["peak_worker_bytes"]) == (40.0, 0.75, 9)
    assert [(each["driver_id"], each["is_complete"]) for each in report["starts"]] == [("a", False), ("b", False)]  # type: ignore[attr-defined]
    assert report["summary"]["num_failed"] == 3  # type: ignore[index]
    assert report["errors"]["kinds"][0]["examples"] == [{"uri": "s3://b/a", "error": "broken"}]  # type: ignore[index]
    json.dumps(report)


def test_the_cost_is_that_of_what_the_cluster_had_and_was_asked() -> None:
    prices = Prices(price_per_core_hour=0.05, price_per_gpu_hour=2.0, price_per_1000_gets=0.4, price_per_1000_puts=5.0)
    usage = Usage(requests={"GET": 900, "HEAD": 100, "PUT": 15, "LIST": 5}, fetched_bytes=2 * 10**9)

    cost = cost_of(prices, usage, held_core_s=7200, held_gpu_s=1800)

    assert cost["parts"] == pytest.approx({"cores": 0.1, "gpus": 1.0, "gets": 0.4, "puts": 0.1})
    assert cost["total"] == pytest.approx(1.6)
    assert cost["missing"] == ["bytes"]


def test_without_prices_there_is_no_cost() -> None:
    cost = cost_of(Prices(), Usage(requests={"GET": 1}), held_core_s=1, held_gpu_s=0)

    assert cost == {"parts": {}, "total": None, "missing": ["cores", "gets"]}


def test_a_start_that_took_no_time_has_no_rate() -> None:
    assert _report(_start("a", 0, Phase.MERGING, 0, Usage()))["rows_per_s"] is None


def test_the_page_explains_every_field_and_stage() -> None:
    page = (REPOSITORY / "docs" / "observability.md").read_text()
    fields = _report(_start("a", 1, Phase.FINISHED, 1, Usage())).keys()

    for name in [*fields, *Stage]:
        assert f"`{name}`" in page or f"`{name}." in page, name
