"""What an earlier run knows: which objects it has seen, which inputs failed, what scores it gave."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lfm_scan.errors import ConfigError, OutageError, RunError, StorageError
from lfm_scan.options import InputConfig, StorageConfig
from lfm_scan.runs import rundir
from lfm_scan.runs.parquet import from_parquet
from lfm_scan.runs.plan import Plan, read_plan, read_shard
from lfm_scan.runs.reuse import SCORE_COLUMNS, index_scores
from lfm_scan.runs.rundir import RunDirectory
from lfm_scan.schema import RESULT_SCHEMA
from lfm_scan.scoring.prepare import image_error
from lfm_scan.sources.containers import Container, container_named
from lfm_scan.sources.filters import make_filter
from lfm_scan.sources.inputs import INPUT_SCHEMA, Input, Kind, from_table
from lfm_scan.sources.select import inputs_in
from lfm_scan.status import Status
from lfm_scan.storage import open_store

_MAY_CHANGE: Final = frozenset({Status.MISSING, Status.DENIED, Status.TIMEOUT, Status.CRASHED, Status.ERROR})
"""What another try may end otherwise: not the file, but how it could be had."""

_SEEN_COLUMNS: Final = ("uri", "size_bytes", "etag", "last_modified")
_KEY_BYTES: Final = 16
_CELL: Final = "#row="
"""In the URIs of a Parquet file's rows, whose sizes are known only once they are read."""

_DECIDES_SCORES: Final = (
    "schema_version",
    "weights_sha256",
    "preprocess",
    "precision",
    "max_image_bytes",
    "max_image_pixels",
    "min_side_px",
)
"""Of a fingerprint: what makes the score of the same bytes the same."""


@dataclass(frozen=True)
class EarlierRun:
    """A finished run.

    Attributes:
        directory: Where it lives.
        run_id: Its id.
        fingerprint: What decided its rows.
        result_names: Its result files, relative to the directory.
        plan: Its plan.
    """

    directory: RunDirectory
    run_id: str
    fingerprint: dict[str, Any]
    result_names: tuple[str, ...]
    plan: Plan

    @classmethod
    def open(cls, uri: str, storage: StorageConfig, flag: str) -> EarlierRun:
        """Open the run that a flag names.

        Raises:
            RunError: If it is none, or has not finished.
            StorageError: If it cannot be read.
        """
        directory = RunDirectory.at(uri, storage)
        success = directory.read_json(rundir.SUCCESS)
        plan = read_plan(directory)
        if success is None or plan is None:
            what = "has not finished; repeat its command first" if plan else "is no run directory"
            raise RunError(f"{flag} {directory.uri}: {what}")
        names = tuple(entry["name"] for entry in success["results"])
        return cls(directory, success["run_id"], success["fingerprint"], names, plan)

    @property
    def selection(self) -> dict[str, Any]:
        """The fields of its `InputConfig` that were no defaults."""
        return selection_in(self.fingerprint)

    def results(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Yield its results, file by file."""
        for name in self.result_names:
            data = self.directory.store.get(self.directory.path(name)).data
            yield pq.read_table(io.BytesIO(data), columns=list(columns))


def selection_in(fingerprint: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of the `InputConfig` in a run's fingerprint that were no defaults."""
    saved = fingerprint.get("inputs")
    fields = saved.items() if isinstance(saved, dict) else ()
    known = InputConfig.__dataclass_fields__
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields if name in known}


def is_unchanged_since(run: EarlierRun) -> Callable[[Input], bool]:
    """Return a test for whether a run has seen an object as it is now: same URI, and same ETag, or size and time.

    It holds 16 bytes a row of that run: 128 bits of a hash, so that no two objects are taken for each other. An object
    of which the source tells neither ETag nor time, such as one that a manifest names, may have changed.
    """
    seen = np.zeros(run.plan.num_rows, dtype=f"S{_KEY_BYTES}")
    num_seen = 0
    for table in run.results(_SEEN_COLUMNS):
        rows = zip(*(table.column(name).to_pylist() for name in _SEEN_COLUMNS), strict=True)
        seen[num_seen : num_seen + len(table)] = [_key(*row) for row in rows]
        num_seen += len(table)
    seen.sort()

    def is_unchanged(planned: Input) -> bool:
        if planned.etag is None and planned.last_modified is None:
            return False
        key = _key(planned.uri, planned.size_bytes, planned.etag, planned.last_modified)
        position = int(np.searchsorted(seen, np.bytes_(key)))
        # NumPy takes zero bytes off the end of what it hands out.
        return position < len(seen) and bytes(seen[position]).ljust(_KEY_BYTES, b"\0") == key

    return is_unchanged


def failed_inputs(run: EarlierRun, config: InputConfig, storage: StorageConfig) -> Iterator[Input]:
    """Yield the inputs of a run whose status another try may change, as they were planned.

    Of an archive or table that could not be read then, or not to its end, comes what that run had not planned.

    Args:
        run: The earlier one.
        config: Which inputs to take, and what the earlier run was told of its archives and tables.
        storage: How to reach stores.

    Raises:
        RunError: If the run's parts and its plan do not belong together.
        SourceError: If a table has no column to use any more.
        StorageError: If the run cannot be read, or a store answers nobody.
    """
    wanted = make_filter(config)
    inputs = _failed_inputs(run, config, storage)
    return inputs if wanted is None else filter(wanted, inputs)


def _failed_inputs(run: EarlierRun, config: InputConfig, storage: StorageConfig) -> Iterator[Input]:
    container: str | None = None  # whose inputs come now
    planned_in_it: set[str] = set()
    for shard in range(run.plan.num_shards):
        uri = run.directory.part_uri(shard)
        part = from_parquet(run.directory.store.get(uri).data).select(["uri", "status"]).to_pylist()
        inputs = from_table(read_shard(run.directory, run.plan, shard))
        if [row["uri"] for row in part] != [each.uri for each in inputs]:
            raise RunError(f"{uri}: its rows are not those that its plan names")
        for row, planned in zip(part, inputs, strict=True):
            if planned.kind is not Kind.OBJECT:
                if planned.where != container:
                    container, planned_in_it = planned.where, set()
                planned_in_it.add(planned.uri)
            if row["status"] not in _MAY_CHANGE:
                continue
            kind = container_named(planned.uri)
            if planned.status is None or kind is None:
                yield planned
            else:
                known = planned_in_it if planned.uri == container else ()
                yield from (each for each in _read_again(kind, planned, config, storage) if each.uri not in known)


def _read_again(kind: Container, planned: Input, config: InputConfig, storage: StorageConfig) -> Iterator[Input]:
    """Yield the inputs in a container, or the one that says why there are none."""
    try:
        found = open_store(planned.uri, storage).head(planned.uri)
    except OutageError:
        raise
    except StorageError as exc:
        error = image_error(exc)
        yield replace(planned, status=error.status, error=error.message)
    else:
        yield from inputs_in(kind, found, config, storage)


def schema_of(run: EarlierRun) -> pa.Schema:
    """Return the columns of a run's plan."""
    return read_shard(run.directory, run.plan, 0).schema if run.plan.num_shards else INPUT_SCHEMA


def check_same_scores(run: EarlierRun, fingerprint: dict[str, Any]) -> None:
    """Make sure that a run would give the same bytes the same score.

    Raises:
        ConfigError: If another model, policy or limit was used.
    """
    differing = [
        f"{name} was {run.fingerprint.get(name)!r}, now {fingerprint[name]!r}"
        for name in _DECIDES_SCORES
        if run.fingerprint.get(name) != fingerprint[name]
    ]
    if differing:
        raise ConfigError(f"--reuse {run.directory.uri}: its scores are of another kind: {'; '.join(differing)}")


def scores_of(run: EarlierRun) -> pa.Table:
    """Return a run's scores, ready for `KnownScores`: some 60 bytes a row."""
    tables = [
        # A row that is ok and has an error was scored although its file has no end: not a score to pass on.
        table.filter(pc.field("error").is_null()).drop_columns(["error"])
        for table in run.results([*SCORE_COLUMNS, "error"])
    ]
    return index_scores(pa.concat_tables(tables)) if tables else index_scores(RESULT_SCHEMA.empty_table())


def _key(uri: str, size_bytes: int | None, etag: str | None, last_modified: datetime | None) -> bytes:
    if _CELL in uri:
        size_bytes = None
    version = etag if etag is not None else f"{size_bytes} {last_modified and last_modified.isoformat()}"
    return hashlib.blake2b(f"{uri}\0{version}".encode(), digest_size=_KEY_BYTES).digest()
