"""The Ray Data pipeline: shard numbers in, receipts out.

    on cores alone   shard -> fetch, decode, score, commit (one actor a core)                     -> receipts
    with GPUs        shard -> fetch, decode (tasks, any CPU) -> score (actor pool) -> commit (tasks) -> receipts

A shard is one unit of work from end to end, so a worker that dies costs its shard, and a commit is one put. The driver
sees only receipts of a few hundred bytes.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar, cast

import pyarrow as pa
import ray
import ray.data

from lfm_scan.concurrency import map_ahead
from lfm_scan.distributed.resources import Claim, PipelineShape
from lfm_scan.distributed.tasks import ToDo, at_work, commit, prepare, scan_shard, score
from lfm_scan.distributed.versions import check_versions
from lfm_scan.errors import RunError
from lfm_scan.options import ComputeConfig
from lfm_scan.runs.shard import Receipt, Scorer
from lfm_scan.scoring.isolated import IsolatedDecoder

A = TypeVar("A")
B = TypeVar("B")

_SHARDS_PER_WAVE: Final = 5_000
"""Shards one Ray Data execution takes on, 2.5 million images: bounds the driver's memory and the time to a start."""

_COMMIT_CPUS: Final = 0.01
"""Committing waits for the store. It claims something, so that it stays off a head node without CPUs."""

_MAX_COMMITS: Final = 99
"""At once. Without a bound Ray Data would keep a third of all CPUs for committing; these take less than one, which
decoding leaves free."""


@dataclass(frozen=True)
class Work:
    """What a pipeline needs besides the shards.

    Attributes:
        to_do: What its tasks need to know.
        weights: The checkpoint's file.
        shape: How the pipeline is laid out.
        compute: How the network is run.
    """

    to_do: ToDo
    weights: bytes
    shape: PipelineShape
    compute: ComputeConfig


class ScanShard:
    """An actor for a core: does all of a shard's work. Its decoder is a process of its own and works ahead."""

    def __init__(self, work: Work) -> None:
        check_versions(work.to_do.versions)
        self._to_do = work.to_do
        self._decoder = IsolatedDecoder(work.to_do.job.preprocess, work.to_do.job.limits)
        self._decoder.start()  # while this process loads the network
        self._backend = _open_backend(work)

    def __call__(self, item: pa.Table) -> pa.Table:
        """Scan the shard that an item names; return its receipt."""
        return scan_shard(item, self._to_do, self._decoder, self._backend)


class ScoreShard:
    """An actor for a GPU: holds the network, takes decoded shards, returns result rows."""

    def __init__(self, work: Work) -> None:
        check_versions(work.to_do.versions)
        self._job = work.to_do.job
        self._gpus = work.shape.actor.gpus if work.shape.device == "cuda" else 0.0
        self._backend = _open_backend(work)

    def __call__(self, row: pa.Table) -> pa.Table:
        """Score the shard in a row."""
        return score(from_row(row), self._job, self._backend, self._gpus)


def prepare_row(item: pa.Table, to_do: ToDo) -> pa.Table:
    """Fetch and decode the shard that an item names, into a row; into none once it is time to stop."""
    return to_row(prepare(item, to_do))


def to_row(shard: pa.Table) -> pa.Table:
    """Return a shard as a table of one row, without a copy; a shard without rows as none.

    On GPUs Ray Data deals out nothing but batches of so many rows. As a row, a shard can be neither cut nor mixed.
    """
    if not len(shard):
        return shard
    (batch,) = shard.combine_chunks().to_batches()
    return pa.table({"shard": pa.ListArray.from_arrays([0, len(batch)], batch.to_struct_array())})


def from_row(row: pa.Table) -> pa.Table:
    """Return the shard in a row, without a copy."""
    (cell,) = row.column("shard").chunks
    return pa.Table.from_batches([pa.RecordBatch.from_struct_array(cell.flatten())])


def _open_backend(work: Work) -> Scorer:
    # Late: it loads torch, and a decoder that was started before uses the time.
    from lfm_scan.model import load_checkpoint  # noqa: PLC0415
    from lfm_scan.scoring.backend import open_backend  # noqa: PLC0415

    with at_work(work.to_do.job):
        return open_backend(
            load_checkpoint(work.weights),
            work.shape.device,
            backend=work.compute.backend if work.shape.device == "cpu" else "auto",
            precision=work.compute.precision,
            batch_size=work.compute.batch_size,
            num_threads=1,  # one actor a core: more threads each would only get in one another's way
            threshold=work.to_do.job.threshold,
        )


def run_pipeline(work: Work, shards: Sequence[int]) -> Iterator[Receipt]:
    """Score and commit shards; yield a receipt as each is done, in any order.

    Raises:
        ray.exceptions.RayError: If a task fails for a reason that is not one image's.
    """
    for start in range(0, len(shards), _SHARDS_PER_WAVE):
        if work.to_do.stop.is_set():
            return
        yield from _run_wave(work, shards[start : start + _SHARDS_PER_WAVE])


def _run_wave(work: Work, shards: Sequence[int]) -> Iterator[Receipt]:
    # Not `range`: its read tasks claim a whole CPU each, which actors on all cores never leave.
    items = ray.data.from_items(list(shards), override_num_blocks=len(shards))
    callbacks: list[Any] = items.context.custom_execution_callback_classes
    callbacks.append(_ends_with(work.to_do.stop.name))
    stages = _fused if work.shape.is_fused else _staged
    # Without prefetch_batches=0 a receipt is held back until the next one comes.
    receipts = stages(work, items, sum(map(work.to_do.plan.rows_of, shards)))
    for batch in receipts.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        for receipt in cast("pa.Table", batch)["receipt"].to_pylist():
            yield pickle.loads(receipt)  # noqa: S301 - made by `commit`, in this run


def give_up(work: Work) -> None:
    """End a pipeline though shards are begun or wait for nodes: cancel its tasks and take back its requests for nodes.

    By itself Ray Data would do so only when the process ends, and connect to Ray again for it.
    """
    _given_up.add(work.to_do.stop.name)


_given_up: Final[set[str]] = set()
"""Names of the stop flags of pipelines that were given up, or have ended."""


class _Callback:
    """What Ray Data calls while it runs a pipeline."""

    name = ""

    def on_execution_step(self, executor: object) -> None:
        """End the execution if its pipeline was given up."""
        if self.name in _given_up:
            raise RunError("the pipeline was given up")

    def before_execution_starts(self, executor: object) -> None:
        """Do nothing."""

    def after_execution_succeeds(self, executor: object) -> None:
        """Do nothing."""

    def after_execution_fails(self, executor: object, error: Exception) -> None:
        """Do nothing."""


def _ends_with(name: str) -> type[_Callback]:
    """Return a callback, which Ray Data makes without arguments, for the pipeline with a stop flag."""
    return type("_Callback", (_Callback,), {"name": name})


def _fused(work: Work, items: ray.data.Dataset, num_rows: int) -> ray.data.Dataset:
    return items.map_batches(
        ScanShard,
        fn_constructor_args=(work,),
        batch_size=1,
        batch_format="pyarrow",
        compute=_pool(work.shape, items.num_blocks(), num_rows),
        **_claimed(work.shape.actor),
    )


def _staged(work: Work, items: ray.data.Dataset, num_rows: int) -> ray.data.Dataset:
    job, shape = work.to_do.job, work.shape
    return (
        items.map_batches(
            prepare_row,  # type: ignore[arg-type]  # Ray's types know no further arguments
            fn_args=(work.to_do,),
            batch_size=1,
            batch_format="pyarrow",
            **_claimed(shape.decode),
        )
        .map_batches(
            ScoreShard,
            fn_constructor_args=(work,),
            batch_size=1,
            batch_format="pyarrow",
            zero_copy_batch=True,
            compute=_pool(shape, items.num_blocks(), num_rows),
            **_claimed(shape.actor),
        )
        .map_batches(
            commit,  # type: ignore[arg-type]
            fn_args=(job,),
            batch_size=None,
            batch_format="pyarrow",
            zero_copy_batch=True,
            compute=ray.data.TaskPoolStrategy(min(_MAX_COMMITS, items.num_blocks())),
            num_cpus=_COMMIT_CPUS,
        )
    )


def _pool(shape: PipelineShape, num_shards: int, num_rows: int) -> ray.data.ActorPoolStrategy:
    least, first, most = shape.pool_of(num_shards, num_rows)
    return ray.data.ActorPoolStrategy(min_size=least, initial_size=first, max_size=most)


def _claimed(claim: Claim) -> dict[str, Any]:
    return {"num_cpus": claim.cpus, "num_gpus": claim.gpus, "memory": claim.memory}


def map_on_cluster(function: Callable[[A], B], items: Iterable[A], /) -> Iterator[B]:
    """Apply a function in Ray tasks: the `OrderedMap` of a cluster."""

    def call(item: A) -> B:  # Ray takes functions, `function` may be any callable
        return function(item)

    task = ray.remote(num_cpus=1)(call)

    def num_ahead() -> int:  # asked again and again: the cluster may grow
        return 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))  # type: ignore[no-untyped-call]

    def result_of(reference: ray.ObjectRef[B]) -> B:
        return ray.get(reference)

    return map_ahead(task.remote, result_of, items, num_ahead)
