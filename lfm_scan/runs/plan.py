"""The plan: which input belongs to which shard. Made once by listing the sources, then the truth for every resume."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final

import pyarrow as pa

from lfm_scan.errors import RunError
from lfm_scan.runs import rundir
from lfm_scan.runs.parquet import from_parquet, to_parquet
from lfm_scan.runs.rundir import RunDirectory
from lfm_scan.sources.inputs import Input, to_table

_DEFAULT_SHARD_SIZE: Final = 512
"""Decoded to 256x256x3, 96 MiB: one block of Ray's object store."""

_SHARDS_PER_WORKER: Final = 8
"""Enough that the last shards do not leave most workers idle, and that progress moves."""

_MAX_HELD_BACK: Final = 131_072
"""Inputs in memory, some 60 MB, before the size of shards is settled."""

SHARDS_PER_FILE: Final = 16
"""Shards that one plan file holds."""

_PROGRESS_EVERY: Final = 1000


@dataclass(frozen=True)
class Plan:
    """What `plan/index.json` says.

    Attributes:
        num_rows: Inputs in all.
        shard_size: Inputs a shard; the last one may have fewer.
        files: Names of the plan files, each of 16 shards, in order.
        sha256: Over the hashes of all plan files: names what was planned.
    """

    num_rows: int
    shard_size: int
    files: tuple[str, ...]
    sha256: str

    @property
    def num_shards(self) -> int:
        """Shards in all."""
        return -(-self.num_rows // self.shard_size)

    def rows_of(self, shard: int) -> int:
        """Return how many inputs a shard has."""
        return min(self.shard_size, self.num_rows - shard * self.shard_size)


def choose_shard_size(num_rows: int, num_workers: int) -> int:
    """Return how many images a shard should have: few enough that every worker gets several shards.

    Args:
        num_rows: Inputs in all; of more than are held back, it makes no difference how many more.
        num_workers: Cores, or GPUs, that will work on them.
    """
    if num_rows >= _enough(num_workers):
        return _DEFAULT_SHARD_SIZE
    return min(_DEFAULT_SHARD_SIZE, max(1, -(-num_rows // (num_workers * _SHARDS_PER_WORKER))))


def _enough(num_workers: int) -> int:
    """Return how many inputs must be known to settle the size of shards."""
    return min(_DEFAULT_SHARD_SIZE * num_workers * _SHARDS_PER_WORKER, _MAX_HELD_BACK)


def write_plan(
    directory: RunDirectory,
    inputs: Iterable[Input],
    schema: pa.Schema,
    *,
    num_workers: int,
    shard_size: int | None = None,
    on_progress: Callable[[int], None] = lambda num_rows: None,
    may_be_empty: bool = False,
) -> Plan:
    """Assign every input to a shard and write the plan; the index comes last.

    Memory is bounded: the inputs are held back only until it is clear how large shards may be.

    Args:
        directory: Of the run.
        inputs: In the order they are to be worked on.
        schema: As `input_schema` gives it.
        num_workers: Cores, or GPUs, that will work on them.
        shard_size: Images a shard, or None to choose.
        on_progress: Called with the number of inputs found so far.
        may_be_empty: Whether no input at all is a run without work rather than a mistake.

    Raises:
        RunError: If there is nothing to plan.
        StorageError: If a source cannot be listed, or the plan cannot be written.
    """
    stream = _counted(inputs, on_progress)
    if shard_size is None:
        head = list(itertools.islice(stream, _enough(num_workers)))
        shard_size = choose_shard_size(len(head), num_workers)
        stream = itertools.chain(head, stream)
        del head
    num_rows, digest = 0, hashlib.sha256()
    files: list[str] = []
    for chunk in _chunks(stream, shard_size * SHARDS_PER_FILE):
        data = to_parquet(to_table(chunk, schema))
        content = hashlib.sha256(data).hexdigest()
        digest.update(content.encode())
        # Named by content: two drivers that plan at once can only write the same file twice.
        name = f"plan/plan-{len(files):06d}-{content[:16]}.parquet"
        directory.store.create(directory.path(name), data)
        files.append(name)
        num_rows += len(chunk)
    if not num_rows and not may_be_empty:
        raise RunError("nothing to scan: the sources hold no files, or the filters leave none")
    plan = Plan(num_rows, shard_size, tuple(files), digest.hexdigest())
    outcome = directory.create_json(rundir.PLAN_INDEX, asdict(plan))
    if outcome.created:
        return plan
    existing = read_plan(directory)
    if existing is None:
        raise RunError(f"{directory.path(rundir.PLAN_INDEX)}: written and gone again: something removes files there")
    return existing  # another driver was first; its plan counts


def read_plan(directory: RunDirectory) -> Plan | None:
    """Return the plan of a run, or None if planning did not finish.

    Raises:
        RunError: If the index cannot be used.
    """
    index: dict[str, Any] | None = directory.read_json(rundir.PLAN_INDEX)
    if index is None:
        return None
    try:
        return Plan(**{**index, "files": tuple(index["files"])})
    except (KeyError, TypeError) as exc:
        raise RunError(f"{directory.path(rundir.PLAN_INDEX)}: not a plan this program can use: {exc}") from exc


def read_shard(directory: RunDirectory, plan: Plan, shard: int) -> pa.Table:
    """Return the inputs of one shard, with the columns that the plan was written with.

    Raises:
        RunError: If the plan file does not hold them.
        StorageError: If it cannot be read.
    """
    table = _read_plan_file(directory, plan.files[shard // SHARDS_PER_FILE])
    rows = table.slice(shard % SHARDS_PER_FILE * plan.shard_size, plan.rows_of(shard))
    if len(rows) != plan.rows_of(shard):
        raise RunError(f"{directory.uri}: shard {shard} has {len(rows)} inputs, its plan says {plan.rows_of(shard)}")
    return rows


@functools.lru_cache(maxsize=2)
def _read_plan_file(directory: RunDirectory, name: str) -> pa.Table:
    return from_parquet(directory.store.get(directory.path(name)).data)


def _counted(inputs: Iterable[Input], on_progress: Callable[[int], None]) -> Iterator[Input]:
    count = 0
    for count, each in enumerate(inputs, start=1):
        if count % _PROGRESS_EVERY == 0:
            on_progress(count)
        yield each
    on_progress(count)


def _chunks(inputs: Iterator[Input], size: int) -> Iterator[list[Input]]:
    while chunk := list(itertools.islice(inputs, size)):
        yield chunk
