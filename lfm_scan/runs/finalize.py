"""The end of a run: merge the parts into a few large files, then write `_SUCCESS.json`.

Every step gives the same result when it is done again: the groups follow from the parts, which never change.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from lfm_scan.errors import RunError
from lfm_scan.runs import rundir
from lfm_scan.runs.error_histogram import ErrorHistogram, histogram_of
from lfm_scan.runs.parquet import from_parquet, to_parquet
from lfm_scan.runs.plan import Plan
from lfm_scan.runs.run import Run
from lfm_scan.runs.rundir import RunDirectory
from lfm_scan.runs.summary import Summary, summarize
from lfm_scan.storage import ObjectInfo

_MAX_GROUP_BYTES: Final = 256 * 2**20
_MAX_GROUP_ROWS: Final = 2_000_000
"""About 150 MB of Parquet and 1.5 GB of memory while it is merged."""

_READ_THREADS: Final = 16
_SORTED_ROWS: Final = 1024
"""Rows in each piece of a sorted table."""


@dataclass(frozen=True)
class Group:
    """Consecutive shards that become one file.

    Attributes:
        index: Of the file.
        first_shard: The first one.
        rows: Rows of each shard, by the plan.
    """

    index: int
    first_shard: int
    rows: tuple[int, ...]


@dataclass(frozen=True)
class MergedFile:
    """One file of the results.

    Attributes:
        name: Relative to the run directory.
        num_rows: In it.
        size_bytes: Of the file.
        etag: The store's, if it has any.
        summary: Counts over its rows.
        errors: Kinds of errors among them.
    """

    name: str
    num_rows: int
    size_bytes: int
    etag: str | None
    summary: Summary
    errors: ErrorHistogram


def group_parts(plan: Plan, parts: dict[int, ObjectInfo]) -> list[Group]:
    """Return which shards go into which file.

    Raises:
        RunError: If a shard has no part.
    """
    missing = [shard for shard in range(plan.num_shards) if shard not in parts]
    if missing:
        raise RunError(f"{len(missing)} of {plan.num_shards} shards are not done, the first is {missing[0]}")
    return list(_group(plan, parts))


def _group(plan: Plan, parts: dict[int, ObjectInfo]) -> Iterator[Group]:
    index, first, size_bytes = 0, 0, 0
    rows: list[int] = []
    for shard in range(plan.num_shards):
        part_bytes = parts[shard].size_bytes or 0
        full = size_bytes + part_bytes > _MAX_GROUP_BYTES or sum(rows) + plan.rows_of(shard) > _MAX_GROUP_ROWS
        if rows and full:
            yield Group(index, first, tuple(rows))
            index, first, size_bytes, rows = index + 1, shard, 0, []
        rows.append(plan.rows_of(shard))
        size_bytes += part_bytes
    if rows:
        yield Group(index, first, tuple(rows))


def merge_group(directory: RunDirectory, run_id: str, group: Group) -> MergedFile:
    """Write one file of the results: the rows of its parts, sorted by URI.

    Raises:
        RunError: If a part is not of this run, or has another number of rows than its plan.
        StorageError: If the store fails.
    """
    shards = range(group.first_shard, group.first_shard + len(group.rows))
    with ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="merge") as pool:
        tables = list(pool.map(lambda shard: _read_part(directory, run_id, shard), shards))
    for shard, table, expected in zip(shards, tables, group.rows, strict=True):
        if len(table) != expected:
            raise RunError(f"{directory.part_uri(shard)}: {len(table)} rows, its plan says {expected}")
    merged = _sorted(pa.concat_tables(tables))
    uri = directory.result_uri(group.index)
    outcome = directory.store.create(uri, to_parquet(merged))
    return MergedFile(
        uri.removeprefix(directory.uri + "/"),
        len(merged),
        outcome.size_bytes,
        outcome.etag,
        summarize(merged),
        histogram_of(merged),
    )


def _sorted(table: pa.Table) -> pa.Table:
    """Return rows in the order of their URIs, in pieces: a piece of an Arrow string column ends at 2 GiB of text."""
    wide = [pa.large_string() if pa.types.is_string(field.type) else field.type for field in table.schema]
    fields = [field.with_type(kind) for field, kind in zip(table.schema, wide, strict=True)]
    whole = table.cast(pa.schema(fields, metadata=table.schema.metadata)).combine_chunks()
    order = pc.sort_indices(whole, sort_keys=[("uri", "ascending")])
    pieces = [whole.take(order.slice(start, _SORTED_ROWS)) for start in range(0, len(order), _SORTED_ROWS)]
    return pa.concat_tables([piece.cast(table.schema) for piece in pieces])


def summary_of(run: Run, plan: Plan, files: Iterable[MergedFile]) -> Summary:
    """Return the counts over all rows of a run.

    Raises:
        RunError: If rows are missing or too many.
    """
    summary = sum((file.summary for file in files), Summary())
    if summary.num_rows != plan.num_rows:
        raise RunError(f"{run.directory.uri}: {summary.num_rows:,} rows for {plan.num_rows:,} inputs")
    return summary


def write_success(run: Run, plan: Plan, parts: dict[int, ObjectInfo], files: Sequence[MergedFile]) -> None:
    """Write `_SUCCESS.json`, the last act of a run.

    Raises:
        RunError: If rows are missing or too many.
    """
    merged = sorted(files, key=lambda file: file.name)
    summary = summary_of(run, plan, merged)
    run.directory.create_json(
        rundir.SUCCESS,
        {
            "run_id": run.run_id,
            "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "fingerprint": run.fingerprint,
            "plan_sha256": plan.sha256,
            "summary": summary.to_json(),
            "results": [
                {"name": file.name, "rows": file.num_rows, "bytes": file.size_bytes, "etag": file.etag}
                for file in merged
            ],
            "parts": [_describe_part(plan, shard, parts[shard]) for shard in range(plan.num_shards)],
        },
    )


def _describe_part(plan: Plan, shard: int, part: ObjectInfo) -> dict[str, Any]:
    return {"shard": shard, "rows": plan.rows_of(shard), "bytes": part.size_bytes, "etag": part.etag}


def _read_part(directory: RunDirectory, run_id: str, shard: int) -> pa.Table:
    uri = directory.part_uri(shard)
    table = from_parquet(directory.store.get(uri).data)
    if table.column("run_id").unique().to_pylist() != [run_id]:
        raise RunError(f"{uri}: of another run than {run_id}; use a new --output")
    return table
