"""The work of one shard: fetch and decode, score, commit. Each step is a plain function on Arrow tables."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Final

import numpy as np
import pyarrow as pa

from lfm_scan.domain import Domain
from lfm_scan.errors import ImageError, StorageError
from lfm_scan.imaging import ImageInfo, ImageLimits, PreprocessPolicy, get_policy
from lfm_scan.imaging.preprocess import SIDE_PX
from lfm_scan.options import StorageConfig
from lfm_scan.runs.parquet import from_parquet, to_parquet
from lfm_scan.runs.rundir import RunDirectory
from lfm_scan.runs.summary import Summary, summarize
from lfm_scan.schema import RESULT_SCHEMA
from lfm_scan.scoring.prepare import Prepared, image_error, prepare_bytes
from lfm_scan.scoring.result import judge
from lfm_scan.status import Status
from lfm_scan.storage import Fetched, check_size, open_store

PIXEL_BYTES: Final = SIDE_PX * SIDE_PX * 3
PREPARED_SCHEMA: Final = pa.schema(
    [RESULT_SCHEMA.field(name) for name in ("uri", "size_bytes", "etag", "last_modified", "sha256")]
    + [RESULT_SCHEMA.field(name) for name in ImageInfo.__dataclass_fields__]
    + [RESULT_SCHEMA.field(name) for name in ("status", "error", "shard")]
    + [pa.field("pixels", pa.binary(PIXEL_BYTES))]
)
"""Between decoding and scoring: the columns known by then, and 256x256x3 bytes a row (zeros if not ok)."""

_MAX_BYTES_IN_FLIGHT: Final = 256 * 2**20


@dataclass(frozen=True)
class ShardJob:
    """All that a worker needs besides the shard and the weights; small, and safe to send.

    Attributes:
        run_id: Of the run.
        directory: Where it lives.
        preprocess: Policy id.
        limits: What one image may cost.
        storage: How to reach the sources.
        fetch_threads: Requests in flight.
        threshold: Scores above it are flagged.
        flag_unassessable: Flag by score alone.
        model_id: Of the checkpoint.
        weights_sha256: Of the checkpoint's file.
        domain: Where its scores mean something.
    """

    run_id: str
    directory: RunDirectory
    preprocess: str
    limits: ImageLimits
    storage: StorageConfig
    fetch_threads: int
    threshold: float
    flag_unassessable: bool
    model_id: str
    weights_sha256: str
    domain: Domain

    @property
    def policy(self) -> PreprocessPolicy:
        """The preprocess policy."""
        return get_policy(self.preprocess)


@dataclass(frozen=True)
class Receipt:
    """What became of a shard.

    Attributes:
        shard: Its number.
        created: Whether this commit wrote the part; False if it was there already.
        summary: Counts over the rows of the part as stored.
    """

    shard: int
    created: bool
    summary: Summary


def prepare_shard(job: ShardJob, shard: int, planned: pa.Table) -> pa.Table:
    """Fetch and decode the inputs of a shard.

    Args:
        job: The run's settings.
        shard: Its number.
        planned: Its inputs, with the columns of the plan.

    Returns:
        One row an input in the same order, with `PREPARED_SCHEMA`. A bad image is a row with its status.
    """
    inputs = planned.to_pylist()
    pixels = np.zeros((len(inputs), SIDE_PX, SIDE_PX, 3), dtype=np.uint8)
    rows = []
    for index, (row, fetched) in enumerate(zip(inputs, _fetch_all(job, inputs), strict=True)):
        if isinstance(fetched, ImageError):
            prepared = Prepared.failed(fetched)
            facts = row
        else:
            prepared = prepare_bytes(fetched.data, job.policy, job.limits)
            facts = asdict(fetched.info)
        if prepared.pixels is not None:
            pixels[index] = prepared.pixels
        rows.append(
            {
                **facts,
                **asdict(prepared.info),
                "uri": row["uri"],
                "sha256": prepared.sha256,
                "status": prepared.status,
                "error": prepared.error,
                "shard": shard,
            }
        )
    facts_table = pa.Table.from_pylist(rows, schema=PREPARED_SCHEMA.remove(PREPARED_SCHEMA.get_field_index("pixels")))
    column = pa.FixedSizeBinaryArray.from_buffers(pa.binary(PIXEL_BYTES), len(rows), [None, pa.py_buffer(pixels)])
    return facts_table.append_column(PREPARED_SCHEMA.field("pixels"), column)


def pixels_of(prepared: pa.Table) -> np.ndarray:
    """Return the pixels of the rows that are ok, (N, 256, 256, 3) uint8; without a copy if all of them are."""
    column = prepared.column("pixels").combine_chunks()
    if isinstance(column, pa.ChunkedArray):
        column = column.chunk(0) if column.num_chunks else pa.array([], type=column.type)
    data = np.frombuffer(column.buffers()[1], dtype=np.uint8) if len(column) else np.empty(0, dtype=np.uint8)
    start = column.offset * PIXEL_BYTES
    pixels = data[start : start + len(column) * PIXEL_BYTES].reshape(-1, SIDE_PX, SIDE_PX, 3)
    is_ok = np.array([status == Status.OK for status in prepared.column("status").to_pylist()], dtype=bool)
    return pixels if is_ok.all() else pixels[is_ok]


def finish_rows(job: ShardJob, prepared: pa.Table, logits: Iterable[float]) -> pa.Table:
    """Return the result rows of a shard.

    Args:
        job: The run's settings.
        prepared: With `PREPARED_SCHEMA`.
        logits: One for each row that is ok, in order.

    Returns:
        A table with `RESULT_SCHEMA`.
    """
    scored_at = datetime.now(UTC)
    remaining = iter(logits)
    policy = job.policy
    rows: list[dict[str, Any]] = []
    for row in prepared.drop_columns(["pixels"]).to_pylist():
        logit = float(next(remaining)) if row["status"] == Status.OK else None
        info = ImageInfo(**{name: row[name] for name in ImageInfo.__dataclass_fields__})
        verdict = judge(
            logit,
            info,
            policy=policy,
            domain=job.domain,
            threshold=job.threshold,
            flag_unassessable=job.flag_unassessable,
        )
        rows.append(
            {
                **row,
                **asdict(verdict),
                "logit": logit,
                "preprocess": job.preprocess,
                "model_id": job.model_id,
                "weights_sha256": job.weights_sha256,
                "run_id": job.run_id,
                "scored_at": scored_at,
            }
        )
    return pa.Table.from_pylist(rows, schema=RESULT_SCHEMA)


def commit_shard(job: ShardJob, results: pa.Table) -> Receipt:
    """Store a shard's rows as its part: one conditional put of bytes already complete in memory.

    Raises:
        StorageError: If the store does not take it.
    """
    shard = results.column("shard")[0].as_py()
    uri = job.directory.part_uri(shard)
    outcome = job.directory.store.create(uri, to_parquet(results))
    if not outcome.created:
        # Another worker or driver was first. Its rows count, so the receipt speaks of them.
        results = from_parquet(job.directory.store.get(uri).data, RESULT_SCHEMA)
    return Receipt(shard, outcome.created, summarize(results))


def _fetch_all(job: ShardJob, inputs: list[dict[str, Any]]) -> Iterator[Fetched | ImageError]:
    """Yield each input's bytes in order, with a bounded number of requests and bytes in flight."""
    waiting: deque[tuple[int, Future[Fetched | ImageError]]] = deque()
    bytes_in_flight = 0
    remaining = iter(inputs)
    upcoming = next(remaining, None)
    with ThreadPoolExecutor(job.fetch_threads, thread_name_prefix="fetch") as pool:
        while upcoming is not None or waiting:
            while upcoming is not None and len(waiting) < 2 * job.fetch_threads:
                size_bytes = min(upcoming["size_bytes"] or 0, job.limits.max_image_bytes)
                if waiting and bytes_in_flight + size_bytes > _MAX_BYTES_IN_FLIGHT:
                    break
                future = pool.submit(_fetch, job, upcoming["uri"], upcoming["size_bytes"])
                waiting.append((size_bytes, future))
                bytes_in_flight += size_bytes
                upcoming = next(remaining, None)
            size_bytes, done = waiting.popleft()
            bytes_in_flight -= size_bytes
            yield done.result()


def _fetch(job: ShardJob, uri: str, listed_bytes: int | None) -> Fetched | ImageError:
    max_bytes = job.limits.max_image_bytes
    try:
        check_size(listed_bytes, max_bytes)  # saves the request
        return open_store(uri, job.storage).get(uri, max_bytes)
    except StorageError as exc:
        return image_error(exc)
