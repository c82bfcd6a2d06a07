"""The benchmark of a distant store still runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import latency
from tests.servers import S3Server


def test_the_smoke_run_fetches_directly_and_through_the_delay(
    tmp_path: Path, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)  # put back afterwards
    out = tmp_path / "latency.json"
    latency.main(["--smoke", "--delay-ms", "300", "--out", str(out)])

    sides = json.loads(out.read_text())["sides"]
    assert [side["in_flight"] for side in sides] == [1, 4, 16, 64]
    one = sides[0]
    assert 0 < one["delayed_per_s"] < one["limit_per_s"]  # no faster than its delay allows
    assert one["direct_per_s"] > one["delayed_per_s"]
