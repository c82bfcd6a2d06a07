"""The memory benchmark still runs, and tells growth from noise."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import memory
from benchmarks.memory import Look


def _looks(mib: list[float]) -> list[Look]:
    groups = ("driver", "actors", "decoders", "ray", "all")
    return [Look(float(index), index, dict.fromkeys(groups, value)) for index, value in enumerate(mib)]


def test_drift_is_growth_from_the_second_to_the_last_quarter() -> None:
    # Before the first shard and after the last one nothing counts: 8 looks do, 2 a quarter.
    looks = _looks([1, 50, 50, 100, 100, 105, 105, 120, 120, 7])

    assert memory.drift(looks)["all"] == 0.2


def test_a_scan_of_seconds_has_no_drift_to_tell() -> None:
    assert memory.drift(_looks([1, 2, 3, 4])) == {}


def test_the_smoke_run_sees_all_kinds_of_processes(tmp_path: Path) -> None:
    out = tmp_path / "memory.json"
    memory.main(["--smoke", "--out", str(out)])

    highest = json.loads(out.read_text())["highest_mib"]
    assert all(highest[group] > 1 for group in ("driver", "actors", "decoders", "ray"))
