from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from lfm_scan.errors import RunError
from lfm_scan.options import StorageConfig
from lfm_scan.runs.plan import Plan, choose_shard_size, read_plan, read_shard, write_plan
from lfm_scan.runs.rundir import RunDirectory
from lfm_scan.sources.inputs import INPUT_SCHEMA, Input

_NOW = datetime(2026, 11, 21, tzinfo=UTC)


def _objects(count: int) -> list[Input]:
    return [Input(uri=f"/images/{index:06}.png", size_bytes=index, last_modified=_NOW) for index in range(count)]


def _directory(path: Path) -> RunDirectory:
    return RunDirectory(str(path), StorageConfig())


@pytest.mark.parametrize(
    ("num_rows", "num_workers", "expected"), [(1, 2, 1), (20, 2, 2), (20, 64, 1), (1058, 2, 67), (10**6, 2, 512)]
)
def test_shards_keep_every_worker_busy_whatever_the_size(num_rows: int, num_workers: int, expected: int) -> None:
    size = choose_shard_size(num_rows, num_workers)

    assert size == expected
    assert -(-num_rows // size) >= min(num_rows, num_workers)


@pytest.mark.parametrize("count", [1, 16, 17, 100, 1000])
def test_every_input_is_in_exactly_one_shard_and_in_order(tmp_path: Path, count: int) -> None:
    directory = _directory(tmp_path)
    plan = write_plan(directory, _objects(count), INPUT_SCHEMA, num_workers=2, shard_size=7)

    shards = [read_shard(directory, plan, shard) for shard in range(plan.num_shards)]

    assert [row["uri"] for shard in shards for row in shard.to_pylist()] == [found.uri for found in _objects(count)]
    assert [len(shard) for shard in shards] == [plan.rows_of(shard) for shard in range(plan.num_shards)]
    assert read_plan(directory) == plan


def test_a_plan_is_not_there_until_its_index_is(tmp_path: Path) -> None:
    directory = _directory(tmp_path)

    def broken_listing() -> Iterator[Input]:
        yield from _objects(500)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_plan(directory, broken_listing(), INPUT_SCHEMA, num_workers=1, shard_size=7)

    assert list((tmp_path / "plan").iterdir())
    assert read_plan(directory) is None
    assert write_plan(directory, _objects(500), INPUT_SCHEMA, num_workers=1, shard_size=7).num_rows == 500


def test_the_plan_of_the_driver_that_was_first_counts(tmp_path: Path) -> None:
    directory = _directory(tmp_path)
    first = write_plan(directory, _objects(10), INPUT_SCHEMA, num_workers=1)

    assert write_plan(directory, _objects(30), INPUT_SCHEMA, num_workers=1) == first


def test_the_plan_hash_names_what_was_planned(tmp_path: Path) -> None:
    one = write_plan(_directory(tmp_path / "1"), _objects(10), INPUT_SCHEMA, num_workers=1)
    same = write_plan(_directory(tmp_path / "2"), _objects(10), INPUT_SCHEMA, num_workers=1)
    other = write_plan(_directory(tmp_path / "3"), _objects(11), INPUT_SCHEMA, num_workers=1)

    assert one.sha256 == same.sha256 != other.sha256


def test_nothing_to_plan_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="hold no files"):
        write_plan(_directory(tmp_path), [], INPUT_SCHEMA, num_workers=1)


def test_the_last_shard_has_what_is_left() -> None:
    plan = Plan(num_rows=10, shard_size=4, files=("x",), sha256="0")

    assert [plan.rows_of(shard) for shard in range(plan.num_shards)] == [4, 4, 2]
