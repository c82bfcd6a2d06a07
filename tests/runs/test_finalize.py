from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lfm_scan.errors import RunError
from lfm_scan.options import StorageConfig
from lfm_scan.runs import finalize
from lfm_scan.runs.finalize import group_parts, merge_group
from lfm_scan.runs.parquet import to_parquet
from lfm_scan.runs.plan import Plan, write_plan
from lfm_scan.runs.rundir import RunDirectory
from lfm_scan.schema import RESULT_SCHEMA
from lfm_scan.sources.inputs import INPUT_SCHEMA, Input

_NOW = datetime(2026, 11, 21, tzinfo=UTC)
_RUN_ID = "run-1"


def _rows(first: int, count: int, run_id: str = _RUN_ID) -> bytes:
    fixed = {"status": "ok", "assessable": True, "flagged": False, "preprocess": "crop256", "model_id": "m"}
    more = {"weights_sha256": "0", "run_id": run_id, "shard": 0, "scored_at": _NOW, "score": 0.25}
    rows = [{**fixed, **more, "uri": f"/{index:04}.png"} for index in range(first, first + count)]
    return to_parquet(pa.Table.from_pylist(rows, schema=RESULT_SCHEMA))


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    return RunDirectory(str(tmp_path), StorageConfig())


@pytest.fixture
def plan(directory: RunDirectory) -> Plan:
    """A plan of 23 inputs in 6 shards, all of them committed."""
    objects = [Input(uri=f"/{index:04}.png", size_bytes=1, last_modified=_NOW) for index in range(23)]
    plan = write_plan(directory, objects, INPUT_SCHEMA, num_workers=1, shard_size=4)
    for shard in range(plan.num_shards):
        directory.store.create(directory.part_uri(shard), _rows(shard * 4, plan.rows_of(shard)))
    return plan


def test_many_parts_become_few_sorted_files_with_every_row_once(
    directory: RunDirectory, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finalize, "_MAX_GROUP_ROWS", 10)
    monkeypatch.setattr(finalize, "_SORTED_ROWS", 3)
    groups = group_parts(plan, directory.list_parts())

    files = [merge_group(directory, _RUN_ID, group) for group in groups]

    assert pq.read_schema(directory.path(files[0].name)).equals(RESULT_SCHEMA, check_metadata=True)
    assert [group.rows for group in groups] == [(4, 4), (4, 4), (4, 3)]
    uris = [uri for file in files for uri in pq.read_table(directory.path(file.name)).column("uri").to_pylist()]
    assert uris == [f"/{index:04}.png" for index in range(23)]
    assert [file.num_rows for file in files] == [8, 8, 7]


def test_files_are_also_bounded_by_bytes(directory: RunDirectory, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {shard: replace(part, size_bytes=100) for shard, part in directory.list_parts().items()}
    monkeypatch.setattr(finalize, "_MAX_GROUP_BYTES", 399)

    assert [len(group.rows) for group in group_parts(plan, parts)] == [3, 3]


def test_merging_again_changes_nothing(directory: RunDirectory, plan: Plan) -> None:
    (group,) = group_parts(plan, directory.list_parts())
    first = merge_group(directory, _RUN_ID, group)
    before = Path(directory.path(first.name)).stat().st_mtime_ns

    assert merge_group(directory, _RUN_ID, group) == first
    assert Path(directory.path(first.name)).stat().st_mtime_ns == before


def test_a_missing_part_is_named(directory: RunDirectory, plan: Plan) -> None:
    Path(directory.part_uri(4)).unlink()

    with pytest.raises(RunError, match="1 of 6 shards are not done, the first is 4"):
        group_parts(plan, directory.list_parts())


@pytest.mark.parametrize(
    ("data", "message"), [(_rows(16, 3), "3 rows, its plan says 4"), (_rows(16, 4, run_id="run-2"), "of another run")]
)
def test_a_part_that_is_not_of_this_plan_is_refused(
    directory: RunDirectory, plan: Plan, data: bytes, message: str
) -> None:
    Path(directory.part_uri(4)).write_bytes(data)
    (group,) = group_parts(plan, directory.list_parts())

    with pytest.raises(RunError, match=message):
        merge_group(directory, _RUN_ID, group)
