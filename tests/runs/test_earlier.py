"""What an earlier run knows, from run directories made by hand: no scan is run here."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lfm_scan.config import ScanConfig
from lfm_scan.errors import ConfigError
from lfm_scan.options import InputConfig, StorageConfig
from lfm_scan.runs import rundir
from lfm_scan.runs.earlier import EarlierRun, failed_inputs, is_unchanged_since, schema_of
from lfm_scan.runs.parquet import to_parquet
from lfm_scan.runs.plan import write_plan
from lfm_scan.runs.run import ensure_plan, open_run
from lfm_scan.runs.rundir import RunDirectory
from lfm_scan.sources.inputs import Input, input_schema, to_table
from lfm_scan.sources.select import carried_types_of, list_inputs
from lfm_scan.status import Status

_NOW = datetime(2026, 11, 21, 7, 30, 0, 250_000, UTC)
_SEEN = pa.schema(
    [
        pa.field("uri", pa.string()),
        pa.field("size_bytes", pa.int64()),
        pa.field("etag", pa.string()),
        pa.field("last_modified", pa.timestamp("us", tz="UTC")),
        pa.field("status", pa.string()),
    ]
)


def _run(
    path: Path,
    inputs: Sequence[Input],
    statuses: Sequence[Status] | None = None,
    *,
    selection: dict[str, Any] | None = None,
    types: dict[str, pa.DataType] | None = None,
) -> EarlierRun:
    """Make a finished run of inputs that ended so, in shards of two."""
    directory = RunDirectory(str(path))
    plan = write_plan(directory, inputs, input_schema(types or {}), num_workers=1, shard_size=2)
    facts = to_table(inputs, input_schema({})).select([name for name in _SEEN.names if name != "status"])
    rows = facts.append_column("status", pa.array([str(each) for each in statuses or [Status.OK] * len(inputs)]))
    for shard in range(plan.num_shards):
        directory.store.create(directory.part_uri(shard), to_parquet(rows.slice(2 * shard, 2)))
    directory.store.create(directory.result_uri(0), to_parquet(rows.cast(_SEEN)))
    directory.create_json(
        rundir.SUCCESS,
        {
            "run_id": "1",
            "fingerprint": {"inputs": selection or {}},
            "results": [{"name": directory.result_uri(0).removeprefix(directory.uri + "/")}],
        },
    )
    return EarlierRun.open(str(path), StorageConfig(), "--since")


def _tar(path: Path, names: Sequence[str], broken: str | None = None) -> None:
    with tarfile.open(path, "w") as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 700
            archive.addfile(member, io.BytesIO(name.encode().ljust(700)))
    if broken is not None:
        whole = path.read_bytes()
        path.write_bytes(whole[: whole.index(broken.encode().ljust(700)) + 100])


def test_every_object_is_found_again_whatever_its_hash_ends_in(tmp_path: Path) -> None:
    inputs = [Input(uri=f"s3://b/{index}", size_bytes=1, etag="e", last_modified=_NOW) for index in range(2000)]
    is_unchanged = is_unchanged_since(_run(tmp_path, inputs))

    assert all(is_unchanged(each) for each in inputs)
    assert not any(is_unchanged(replace(each, etag="f")) for each in inputs)


def test_what_the_source_tells_nothing_of_may_have_changed(tmp_path: Path) -> None:
    missing = Input(uri="s3://b/named-by-a-manifest")
    is_unchanged = is_unchanged_since(_run(tmp_path, [missing], [Status.MISSING]))

    assert not is_unchanged(missing)


def test_rows_of_a_parquet_file_without_an_etag_are_known_by_its_time(tmp_path: Path) -> None:
    read = Input(uri="/t.parquet#row=0", size_bytes=123, last_modified=_NOW)
    is_unchanged = is_unchanged_since(_run(tmp_path, [read]))

    assert is_unchanged(replace(read, size_bytes=None))
    assert not is_unchanged(replace(read, size_bytes=None, last_modified=datetime(2026, 11, 22, tzinfo=UTC)))


def test_an_archive_that_broke_off_gives_what_was_not_planned_before(tmp_path: Path) -> None:
    archive = tmp_path / "x.tar"
    _tar(archive, ["a.png", "b.png", "c.png", "d.png"], broken="c.png")
    planned = list(list_inputs([str(archive)], InputConfig(), StorageConfig()))
    _tar(archive, ["a.png", "b.png", "c.png", "d.png"])
    run = _run(tmp_path / "run", planned, [Status.OK, Status.TIMEOUT, Status.TIMEOUT])

    again = [each.uri.removeprefix(str(archive)) for each in failed_inputs(run, InputConfig(), StorageConfig())]

    assert again == ["#b.png", "#c.png", "#d.png"]


def test_an_archive_that_still_cannot_be_read_is_a_row_again(tmp_path: Path) -> None:
    gone = Input(uri=str(tmp_path / "gone.tar"), status=Status.DENIED, error="denied")
    run = _run(tmp_path / "run", [gone, Input(uri="/a.png")], [Status.DENIED, Status.ERROR])

    again = list(failed_inputs(run, InputConfig(), StorageConfig()))

    assert [(each.uri, each.status) for each in again] == [(gone.uri, Status.MISSING), ("/a.png", None)]


def test_filters_hold_for_a_retry_too(tmp_path: Path) -> None:
    run = _run(tmp_path, [Input(uri="/a.png"), Input(uri="/b.jpg")], [Status.ERROR, Status.ERROR])

    again = failed_inputs(run, InputConfig(suffix=(".jpg",)), StorageConfig())

    assert [each.uri for each in again] == ["/b.jpg"]


def test_a_retry_reads_archives_and_tables_as_the_earlier_run_did(tmp_path: Path, tiny_weights: Path) -> None:
    archive = tmp_path / "x.tar"
    config = InputConfig(carry=("error",), include=("*.png",))
    _tar(archive, ["1.png", "1.error", "2.jpg"])
    failed = Input(uri=str(archive), status=Status.TIMEOUT, error="timeout")
    types = carried_types_of([str(archive)], config, StorageConfig())
    selection = {"carry": ["error"], "include": ["*.png"], "image_column": "photo"}
    _run(tmp_path / "run", [failed], [Status.TIMEOUT], selection=selection, types=types)
    retry = ScanConfig(
        output=str(tmp_path / "retry"),
        weights=str(tiny_weights),
        inputs=InputConfig(retry_failed=str(tmp_path / "run")),
    )

    run = open_run(retry)
    ensure_plan(run, 1)
    (tmp_path / "run").rename(tmp_path / "gone")

    assert run.job.inputs.image_column == "photo"
    assert open_run(retry).job.inputs == run.job.inputs  # also when the earlier run is gone
    planned = pq.read_table(next((tmp_path / "retry/plan").glob("*.parquet")))
    assert planned["uri"].to_pylist() == [f"{archive}#1.png"]
    assert planned["carried:input_error"].to_pylist() == ["1.error".ljust(700)]


def test_a_retry_cannot_carry_other_columns(tmp_path: Path, tiny_weights: Path) -> None:
    _run(tmp_path / "run", [Input(uri="/a.png")], [Status.ERROR])
    inputs = InputConfig(retry_failed=str(tmp_path / "run"), carry=("id",))

    with pytest.raises(ConfigError, match="the columns are those that the earlier run carried"):
        open_run(ScanConfig(output=str(tmp_path / "retry"), weights=str(tiny_weights), inputs=inputs))


def test_a_run_without_inputs_has_a_schema(tmp_path: Path) -> None:
    directory = RunDirectory(str(tmp_path))
    write_plan(directory, [], input_schema({}), num_workers=1, may_be_empty=True)
    directory.create_json(rundir.SUCCESS, {"run_id": "1", "fingerprint": {}, "results": []})
    run = EarlierRun.open(str(tmp_path), StorageConfig(), "--since")

    assert schema_of(run) == input_schema({})
    assert not is_unchanged_since(run)(Input(uri="/a", last_modified=_NOW))
