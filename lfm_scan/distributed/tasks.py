"""What runs on Ray's workers: a whole shard's work, or fetching and decoding before the score and committing after it.

Imports no torch, so that a worker that only decodes starts fast and stays small.
"""

from __future__ import annotations

import contextlib
import functools
import pickle
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

import pyarrow as pa
import ray

from lfm_scan import logs
from lfm_scan.distributed.metrics import record_shard, record_usage
from lfm_scan.distributed.stopping import StopFlag
from lfm_scan.distributed.versions import check_versions, versions_here
from lfm_scan.options import ImageLimits
from lfm_scan.runs.meter import Meter
from lfm_scan.runs.plan import Plan, read_shard
from lfm_scan.runs.reuse import KnownScores
from lfm_scan.runs.shard import (
    Scorer,
    ShardJob,
    commit_shard,
    finish_rows,
    pixels_of,
    prepare_shard,
    score_pixels,
    score_shard,
)
from lfm_scan.runs.usage import Usage
from lfm_scan.scoring.isolated import IsolatedDecoder

_RECEIPTS: Final = pa.schema([("receipt", pa.binary())])

_USAGE: Final = pa.field("usage", pa.binary())
"""Travels with a shard's rows from stage to stage, in the first of them: what the stages so far took."""


@dataclass(frozen=True)
class ToDo:
    """What there is to do, for any task.

    Attributes:
        job: The run's settings.
        plan: Which inputs belong to which shard.
        known: In Ray's object store, scores of an earlier run; or None.
        stop: Tells not to begin another shard.
        versions: What the driver, which made this, runs; workers must run the same.
    """

    job: ShardJob
    plan: Plan
    known: ray.ObjectRef[pa.Table] | None
    stop: StopFlag
    versions: Mapping[str, str] = field(default_factory=versions_here)


def scan_shard(item: pa.Table, to_do: ToDo, decoder: IsolatedDecoder, scorer: Scorer) -> pa.Table:
    """Fetch, decode, score and store the shard an item names; return its receipt, none once it is time to stop."""
    if to_do.stop.is_set():
        return _RECEIPTS.empty_table()
    job, shard = to_do.job, _shard_of(item)
    with at_work(job, shard=shard):
        meter = Meter(_node(), decoder)
        planned = read_shard(job.directory, to_do.plan, shard)
        results = score_shard(job, shard, planned, decoder, scorer, known=_known(to_do), meter=meter)
        return _commit(results, job, meter, Usage())


def prepare(item: pa.Table, to_do: ToDo) -> pa.Table:
    """Fetch and decode the shard that an item names; once it is time to stop, return no rows, and so no more work."""
    check_versions(to_do.versions)
    if to_do.stop.is_set():
        return item.slice(0, 0)
    job, shard = to_do.job, _shard_of(item)
    with at_work(job, shard=shard):
        decoder = _decoder(job.preprocess, job.limits)
        meter = Meter(_node(), decoder)
        planned = read_shard(job.directory, to_do.plan, shard)
        prepared = prepare_shard(job, shard, planned, decoder, known=_known(to_do), meter=meter)
        return _with_usage(prepared, _recorded(meter))


def score(prepared: pa.Table, job: ShardJob, scorer: Scorer, gpus: float) -> pa.Table:
    """Score a decoded shard; return its rows.

    Args:
        prepared: As `prepare` returns it.
        job: The run's settings.
        scorer: Where scoring happens.
        gpus: That it has.
    """
    prepared, before = _without_usage(prepared)
    with at_work(job, shard=prepared.column("shard")[0].as_py()):
        meter = Meter(_node(), gpus=gpus)
        results = finish_rows(job, prepared, score_pixels(pixels_of(prepared), scorer, meter))
        return _with_usage(results, before + _recorded(meter))


def commit(results: pa.Table, job: ShardJob) -> pa.Table:
    """Store a shard's rows; return its receipt, pickled."""
    results, before = _without_usage(results)
    with at_work(job, shard=results.column("shard")[0].as_py()):
        return _commit(results, job, Meter(_node()), before)


def _commit(results: pa.Table, job: ShardJob, meter: Meter, before: Usage) -> pa.Table:
    receipt = commit_shard(job, results, meter)
    record_usage(receipt.usage)
    receipt = replace(receipt, usage=before + receipt.usage)
    if receipt.created:
        record_shard(receipt.summary, receipt.usage)
    return pa.table({"receipt": [pickle.dumps(receipt)]})


@contextlib.contextmanager
def at_work(job: ShardJob, **about: object) -> Iterator[None]:
    """Name the run, and what else it is about, in whatever this worker logs until the block ends."""
    logs.set_up_worker(job.log_format)
    with logs.about(run_id=job.run_id, **about):
        yield


def _recorded(meter: Meter) -> Usage:
    usage = meter.usage()
    record_usage(usage)
    return usage


def _with_usage(table: pa.Table, usage: Usage) -> pa.Table:
    column = pa.array([pickle.dumps(usage), *[None] * (len(table) - 1)], _USAGE.type)
    return table.append_column(_USAGE, column)


def _without_usage(table: pa.Table) -> tuple[pa.Table, Usage]:
    usage: Usage = pickle.loads(table.column(_USAGE.name)[0].as_py())  # noqa: S301 - made by `_with_usage`, in this run
    return table.drop_columns([_USAGE.name]), usage


def _shard_of(item: pa.Table) -> int:
    shard: int = item.column("item")[0].as_py()
    return shard


@functools.cache
def _node() -> str:
    """Return what this node is called: its host may have several."""
    return f"{socket.gethostname()} {ray.get_runtime_context().get_node_id()[:8]}"


def _known(to_do: ToDo) -> KnownScores | None:
    return None if to_do.known is None else _known_scores(to_do.known)


@functools.lru_cache(maxsize=1)
def _decoder(preprocess: str, limits: ImageLimits) -> IsolatedDecoder:
    """Return this worker's decoder: its process outlives the task."""
    return IsolatedDecoder(preprocess, limits)


@functools.lru_cache(maxsize=1)
def _known_scores(table: ray.ObjectRef[pa.Table]) -> KnownScores:
    return KnownScores(ray.get(table))
