from __future__ import annotations

import json
import os
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from lfm_scan.errors import NoSuchBucketError, RunError
from lfm_scan.options import StorageConfig
from lfm_scan.runs.heartbeat import Heartbeat, Phase
from lfm_scan.runs.rundir import RunDirectory
from lfm_scan.runs.shard import Receipt
from lfm_scan.runs.state import State, read_state
from lfm_scan.runs.summary import Summary
from lfm_scan.storage import LocalStore, ObjectInfo
from tests.servers import S3Server

_NOW = datetime(2026, 11, 21, 7, 0, tzinfo=UTC)
_CONFIG: dict[str, Any] = {
    "run_id": "20261121T060000-0123abcd",
    "created_at": "2026-11-21T06:00:00+00:00",
    "config": {"sources": ["s3://photos/2026/"]},
}
_PLAN = {"num_rows": 23, "shard_size": 4, "files": ["plan/plan-000000.parquet"], "sha256": "0"}


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory(str(tmp_path / "run"), StorageConfig())
    directory.create_json("config.json", _CONFIG)
    return directory


def _commit(directory: RunDirectory, shard: int, seconds_ago: float) -> None:
    directory.store.create(directory.part_uri(shard), b"")
    _set_age(directory.part_uri(shard), seconds_ago)


def _set_age(path: str, seconds_ago: float) -> None:
    moment = _NOW.timestamp() - seconds_ago
    os.utime(path, (moment, moment))


def _drive(
    directory: RunDirectory,
    *,
    seconds_ago: float,
    phase: Phase = Phase.SCANNING,
    num_listed: int = 0,
    error: str = "",
    **by_status: int,
) -> str:
    """Leave what a driver would, that was last heard of so long ago, and return its id."""
    heartbeat = Heartbeat(directory)
    heartbeat.listing(num_listed)
    heartbeat.shard_done(Receipt(0, True, Summary(sum(by_status.values()), by_status=Counter(by_status))))
    heartbeat._update(phase=phase, error=error or None)
    heartbeat._store_beat()
    _set_age(heartbeat.uri, seconds_ago)
    return heartbeat._beat.driver_id


def _ids(directory: RunDirectory) -> dict[str, bool]:
    return {driver.beat.driver_id: driver.is_alive for driver in read_state(directory, _NOW).drivers}


# --- Where a run stands ---


def test_a_run_without_a_plan_is_planning_and_tells_how_many_are_listed(directory: RunDirectory) -> None:
    _drive(directory, seconds_ago=5, phase=Phase.LISTING, num_listed=12_345)

    state = read_state(directory, _NOW)

    assert state.state == State.PLANNING
    assert (state.run_id, state.created_at) == (_CONFIG["run_id"], _CONFIG["created_at"])
    assert (state.run_dir, state.sources) == (directory.uri, ("s3://photos/2026/",))
    assert (state.num_rows, state.num_rows_listed, state.num_shards) == (None, 12_345, None)
    assert (state.num_rows_done, state.num_shards_done, state.seconds_left) == (0, 0, None)


def test_a_run_in_progress_counts_parts_by_their_plan(directory: RunDirectory) -> None:
    directory.create_json("plan/index.json", _PLAN)
    for shard in (0, 2, 5):  # the last of the six has 3 rows
        _commit(directory, shard, seconds_ago=3600)
    Path(directory.path("parts/notes.txt")).touch()
    Path(directory.path("parts/part-000000006.parquet")).touch()  # not in the plan
    _drive(directory, seconds_ago=5)

    state = read_state(directory, _NOW)

    assert state.state == State.SCANNING
    assert (state.num_rows, state.num_rows_listed, state.num_rows_done) == (23, 23, 11)
    assert (state.num_shards, state.num_shards_done) == (6, 3)


def test_a_run_with_all_parts_is_merging_while_somebody_is_at_it(directory: RunDirectory) -> None:
    directory.create_json("plan/index.json", _PLAN)
    for shard in range(6):
        _commit(directory, shard, seconds_ago=60)
    driver = _drive(directory, seconds_ago=34, phase=Phase.MERGING)
    assert read_state(directory, _NOW).state == State.MERGING

    _set_age(directory.path(f"drivers/{driver}.json"), 36)
    assert read_state(directory, _NOW).state == State.STOPPED


@pytest.mark.parametrize(("seconds_ago", "is_alive"), [(-60, True), (0, True), (34.9, True), (35, False)])
def test_a_driver_is_alive_for_three_and_a_half_beats(
    directory: RunDirectory, seconds_ago: float, is_alive: bool
) -> None:
    driver = _drive(directory, seconds_ago=seconds_ago)

    assert _ids(directory) == {driver: is_alive}
    assert read_state(directory, _NOW).is_alive == is_alive


@pytest.mark.parametrize("phase", [Phase.FINISHED, Phase.STOPPED, Phase.FAILED])
def test_a_driver_that_said_goodbye_is_not_alive(directory: RunDirectory, phase: Phase) -> None:
    driver = _drive(directory, seconds_ago=0, phase=phase)

    assert _ids(directory) == {driver: False}


def test_a_run_is_stopped_when_nobody_was_ever_heard_of(directory: RunDirectory) -> None:
    assert read_state(directory, _NOW).state == State.STOPPED


def test_a_run_has_failed_if_its_last_driver_did(directory: RunDirectory) -> None:
    _drive(directory, seconds_ago=500, phase=Phase.STOPPED)
    _drive(directory, seconds_ago=100, phase=Phase.FAILED, error="the store refused")
    assert read_state(directory, _NOW).state == State.FAILED

    _drive(directory, seconds_ago=50, phase=Phase.STOPPED)
    state = read_state(directory, _NOW)
    assert state.state == State.STOPPED
    assert [driver.beat.error for driver in state.drivers] == [None, "the store refused", None]


def test_a_run_of_which_one_driver_failed_goes_on_with_the_other(directory: RunDirectory) -> None:
    directory.create_json("plan/index.json", _PLAN)
    _drive(directory, seconds_ago=20)
    _drive(directory, seconds_ago=10, phase=Phase.FAILED, error="the store refused")

    assert read_state(directory, _NOW).state == State.SCANNING


def test_failed_rows_are_those_of_all_drivers(directory: RunDirectory) -> None:
    directory.create_json("plan/index.json", _PLAN)
    _drive(directory, seconds_ago=9000, ok=5, corrupt=2, empty=1)
    _drive(directory, seconds_ago=1, ok=3, corrupt=1, timeout=4)

    state = read_state(directory, _NOW)

    assert state.num_failed == 7
    assert state.by_status == {"ok": 8, "corrupt": 3, "empty": 1, "timeout": 4}


def test_a_finished_run_tells_what_it_wrote_itself_even_without_its_parts(directory: RunDirectory) -> None:
    directory.create_json("plan/index.json", _PLAN)
    summary = Summary(23, by_status=Counter(ok=20, corrupt=3))
    directory.create_json("_SUCCESS.json", {"finished_at": "2026-11-21T06:59:00+00:00", "summary": summary.to_json()})
    _drive(directory, seconds_ago=1, phase=Phase.MERGING, ok=8, corrupt=1)

    state = read_state(directory, _NOW)

    assert (state.state, state.finished_at) == (State.FINISHED, "2026-11-21T06:59:00+00:00")
    assert (state.num_rows, state.num_rows_done, state.num_shards, state.num_shards_done) == (23, 23, 6, 6)
    assert (state.num_failed, state.by_status) == (3, {"ok": 20, "corrupt": 3})
    assert state.seconds_left is None


def test_a_run_without_inputs_is_not_divided_by(directory: RunDirectory) -> None:
    directory.create_json("plan/index.json", {**_PLAN, "num_rows": 0, "files": []})
    _drive(directory, seconds_ago=1)

    state = read_state(directory, _NOW)

    assert (state.state, state.num_rows, state.num_shards, state.rows_per_s) == (State.MERGING, 0, 0, None)


# --- How fast it goes ---


def test_the_rate_is_that_of_the_last_ten_minutes(directory: RunDirectory) -> None:
    directory.create_json("plan/index.json", _PLAN)
    for shard, seconds_ago in enumerate([9000, 601, 500, 300]):
        _commit(directory, shard, seconds_ago)
    driver = _drive(directory, seconds_ago=1)

    state = read_state(directory, _NOW)
    assert state.rows_per_s == 4 / 200  # what was committed at the start of the span was done before it
    assert state.seconds_left == (23 - 16) / (4 / 200)

    _set_age(directory.path(f"drivers/{driver}.json"), 100)
    assert read_state(directory, _NOW).seconds_left is None  # nobody brings it nearer


@pytest.mark.parametrize("ages", [[], [100], [100, 100], [700, 9000]])
def test_the_rate_is_not_guessed_from_one_moment(directory: RunDirectory, ages: list[float]) -> None:
    directory.create_json("plan/index.json", _PLAN)
    for shard, seconds_ago in enumerate(ages):
        _commit(directory, shard, seconds_ago)
    _drive(directory, seconds_ago=1)

    state = read_state(directory, _NOW)
    assert (state.rows_per_s, state.seconds_left) == (None, None)


def test_the_rate_does_not_depend_on_the_order_of_commits(directory: RunDirectory) -> None:
    directory.create_json("plan/index.json", _PLAN)
    for shard, seconds_ago in enumerate([100, 300, 200, 300, 150, 100]):
        _commit(directory, shard, seconds_ago)

    assert read_state(directory, _NOW).rows_per_s == 15 / 200


# --- What may lie there ---


def test_a_directory_that_is_no_run_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(RunError, match=r"not a run directory: it has no config\.json"):
            read_state(RunDirectory(str(path)))


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"run_id": "x", "created_at": "y", "config": []}'])
def test_a_config_of_something_else_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)

    with pytest.raises(RunError, match=r"config\.json: not "):
        read_state(RunDirectory(str(tmp_path)))


def test_a_damaged_success_file_is_named(directory: RunDirectory) -> None:
    directory.create_json("_SUCCESS.json", {"summary": {"num_rows": 1}})

    with pytest.raises(RunError, match=r"_SUCCESS\.json: not written by lfm-scan"):
        read_state(directory)


def test_what_is_no_beat_is_passed_over(directory: RunDirectory) -> None:
    driver = _drive(directory, seconds_ago=1)
    for name, data in {"a.json": b"{}", "b.json": b" " * 70_000, "c.txt": b"hello", ".d.json.1.tmp": b""}.items():
        Path(directory.path(f"drivers/{name}")).write_bytes(data)

    assert _ids(directory) == {driver: True}


def test_a_run_in_s3_is_read_as_one_on_disk(s3_server: S3Server, s3_bucket: str) -> None:
    storage = StorageConfig(endpoint_url=s3_server.endpoint_url)
    directory = RunDirectory(f"s3://{s3_bucket}/run", storage)
    with pytest.raises(RunError, match="not a run directory"):
        read_state(directory)
    with pytest.raises(NoSuchBucketError):
        read_state(RunDirectory("s3://no-such-bucket-here/run", storage))

    directory.create_json("config.json", _CONFIG)
    directory.create_json("plan/index.json", _PLAN)
    directory.store.create(directory.part_uri(5), b"")
    heartbeat = Heartbeat(directory)
    heartbeat._store_beat()
    state = read_state(directory)
    assert (state.state, state.num_rows_done, state.is_alive) == (State.SCANNING, 3, True)

    with pytest.raises(KeyboardInterrupt), heartbeat:
        raise KeyboardInterrupt
    assert read_state(directory).state == State.STOPPED


def test_a_run_of_very_many_parts_takes_no_memory_for_them(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_shards = 100_000
    directory.create_json("plan/index.json", {**_PLAN, "num_rows": 4 * num_shards})
    listed = LocalStore.list

    def very_many(self: LocalStore, uri: str) -> Iterator[ObjectInfo]:
        if not uri.endswith("parts/"):
            yield from listed(self, uri)
            return
        for shard in range(num_shards):
            yield ObjectInfo(directory.part_uri(shard), 1, f"{shard:032x}", _NOW - timedelta(seconds=shard % 500))

    monkeypatch.setattr(LocalStore, "list", very_many)
    tracemalloc.start()
    try:
        state = read_state(directory, _NOW)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert (state.num_shards_done, state.num_rows_done) == (num_shards, 4 * num_shards)
    assert peak_bytes < 2**20  # held, they would be some 30 MB


def test_the_state_is_plain_json(directory: RunDirectory) -> None:
    directory.create_json("plan/index.json", _PLAN)
    _drive(directory, seconds_ago=1, corrupt=1)

    value = json.loads(json.dumps(read_state(directory, _NOW).to_json()))

    assert (value["state"], value["num_rows"], value["by_status"]) == ("scanning", 23, {"corrupt": 1})
    assert value["sources"] == ["s3://photos/2026/"]
    [driver] = value["drivers"]
    assert (driver["phase"], driver["seen_at"], driver["is_alive"]) == ("scanning", "2026-11-21T06:59:59+00:00", True)
