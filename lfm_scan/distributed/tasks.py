"""What runs on Ray's workers: a whole shard's work, or fetching and decoding before the score and committing after it.

Imports no torch, so that a worker that only decodes starts fast and stays small.
"""

from __future__ import annotations

import functools
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import pyarrow as pa
import ray

from lfm_scan.distributed.stopping import StopFlag
from lfm_scan.distributed.versions import check_versions, versions_here
from lfm_scan.options import ImageLimits
from lfm_scan.runs.plan import Plan, read_shard
from lfm_scan.runs.reuse import KnownScores
from lfm_scan.runs.shard import Decoder, Scorer, ShardJob, commit_shard, prepare_shard, score_shard
from lfm_scan.scoring.isolated import IsolatedDecoder

_RECEIPTS: Final = pa.schema([("receipt", pa.binary())])


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


def scan_shard(item: pa.Table, to_do: ToDo, decoder: Decoder, scorer: Scorer) -> pa.Table:
    """Fetch, decode, score and store the shard an item names; return its receipt, none once it is time to stop."""
    if to_do.stop.is_set():
        return _RECEIPTS.empty_table()
    job = to_do.job
    shard, planned = _planned(item, to_do)
    results = score_shard(job, shard, planned, decoder, scorer, known=_known(to_do))
    return commit(results, job)


def prepare(item: pa.Table, to_do: ToDo) -> pa.Table:
    """Fetch and decode the shard that an item names; once it is time to stop, return no rows, and so no more work."""
    check_versions(to_do.versions)
    if to_do.stop.is_set():
        return item.slice(0, 0)
    job = to_do.job
    shard, planned = _planned(item, to_do)
    return prepare_shard(job, shard, planned, _decoder(job.preprocess, job.limits), known=_known(to_do))


def commit(results: pa.Table, job: ShardJob) -> pa.Table:
    """Store a shard's rows; return its receipt, pickled."""
    return pa.table({"receipt": [pickle.dumps(commit_shard(job, results))]})


def _planned(item: pa.Table, to_do: ToDo) -> tuple[int, pa.Table]:
    """Return the shard that an item names, and its inputs."""
    shard = item.column("item")[0].as_py()
    return shard, read_shard(to_do.job.directory, to_do.plan, shard)


def _known(to_do: ToDo) -> KnownScores | None:
    return None if to_do.known is None else _known_scores(to_do.known)


@functools.lru_cache(maxsize=1)
def _decoder(preprocess: str, limits: ImageLimits) -> IsolatedDecoder:
    """Return this worker's decoder: its process outlives the task."""
    return IsolatedDecoder(preprocess, limits)


@functools.lru_cache(maxsize=1)
def _known_scores(table: ray.ObjectRef[pa.Table]) -> KnownScores:
    return KnownScores(ray.get(table))
