"""The work of one shard: fetch and decode, score, commit. Each step is a plain function on Arrow tables."""

from __future__ import annotations

import hashlib
import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, Protocol

import numpy as np
import pyarrow as pa

from lfm_scan.domain import Domain
from lfm_scan.errors import ImageError
from lfm_scan.imaging import ImageInfo, ImageLimits, PreprocessPolicy, get_policy
from lfm_scan.imaging.preprocess import SIDE_PX
from lfm_scan.options import InputConfig, LogFormat, StorageConfig
from lfm_scan.runs.error_histogram import ErrorHistogram, histogram_of
from lfm_scan.runs.meter import Meter
from lfm_scan.runs.parquet import from_parquet, to_parquet
from lfm_scan.runs.reuse import KnownScores
from lfm_scan.runs.rundir import RunDirectory
from lfm_scan.runs.summary import Summary, is_failure, summarize
from lfm_scan.runs.usage import Stage, Usage
from lfm_scan.schema import RESULT_SCHEMA, result_schema
from lfm_scan.scoring.isolated import EncodedImage
from lfm_scan.scoring.prepare import Prepared
from lfm_scan.scoring.result import judge
from lfm_scan.sources.fetch import Fetcher
from lfm_scan.sources.inputs import CARRIED, Input, carried_fields, from_table
from lfm_scan.status import Status
from lfm_scan.storage import Fetched

PIXEL_BYTES: Final = SIDE_PX * SIDE_PX * 3

_INFO: Final = tuple(ImageInfo.__dataclass_fields__)
_FACTS: Final = pa.schema(
    [RESULT_SCHEMA.field(name) for name in ("uri", "size_bytes", "etag", "last_modified", "sha256")]
    + [RESULT_SCHEMA.field(name) for name in _INFO]
    + [RESULT_SCHEMA.field(name) for name in ("status", "error", "shard")]
    + [pa.field("logit", pa.float64()), pa.field("same_as", pa.int32())]
)
"""Known before scoring: columns of the results; `logit` where an earlier run gives it; `same_as`, the index of the row
with the very same bytes that stands for this one."""

_PIXELS: Final = pa.field("pixels", pa.binary(PIXEL_BYTES))


class Decoder(Protocol):
    """Decodes and preprocesses files, one after the other."""

    def prepare_all(self, images: Iterable[EncodedImage]) -> Iterator[Prepared]:
        """Yield the outcome for each file, in order."""
        ...


class Scorer(Protocol):
    """Scores preprocessed pixels."""

    @property
    def batch_size(self) -> int:
        """Images it takes at once."""
        ...

    def logits(self, pixels_bhwc: np.ndarray) -> np.ndarray:
        """Return logits (B,) of pixels (B, 256, 256, 3) uint8."""
        ...


@dataclass(frozen=True)
class ShardJob:
    """All that a worker needs besides the shard and the weights; small, and safe to send.

    Attributes:
        run_id: Of the run.
        directory: Where it lives.
        preprocess: Policy id.
        limits: What one image may cost.
        inputs: How the sources were read.
        storage: How to reach the sources.
        fetch_threads: Requests in flight.
        threshold: Scores above it are flagged.
        flag_unassessable: Flag by score alone.
        model_id: Of the checkpoint.
        weights_sha256: Of the checkpoint's file.
        domain: Where its scores mean something.
        log_format: How workers write their logs.
    """

    run_id: str
    directory: RunDirectory
    preprocess: str
    limits: ImageLimits
    inputs: InputConfig
    storage: StorageConfig
    fetch_threads: int
    threshold: float
    flag_unassessable: bool
    model_id: str
    weights_sha256: str
    domain: Domain
    log_format: LogFormat = "text"

    @property
    def policy(self) -> PreprocessPolicy:
        """The preprocess policy."""
        return get_policy(self.preprocess)

    @property
    def fetcher(self) -> Fetcher:
        """What fetches the inputs."""
        return Fetcher(self.storage, self.inputs, self.limits.max_image_bytes, self.fetch_threads)


@dataclass(frozen=True)
class Failure:
    """One input that failed, to name as an example."""

    uri: str
    status: str
    error: str


@dataclass(frozen=True)
class Receipt:
    """What became of a shard.

    Attributes:
        shard: Its number.
        created: Whether this commit wrote the part; False if it was there already.
        summary: Counts over the rows of the part as stored.
        failures: The first few inputs that failed.
        errors: Kinds of errors among the rows of the part.
        usage: What the shard took.
    """

    shard: int
    created: bool
    summary: Summary
    failures: tuple[Failure, ...] = ()
    errors: ErrorHistogram = field(default_factory=ErrorHistogram)
    usage: Usage = field(default_factory=Usage)


def score_shard(
    job: ShardJob,
    shard: int,
    planned: pa.Table,
    decoder: Decoder,
    scorer: Scorer,
    *,
    known: KnownScores | None = None,
    meter: Meter | None = None,
) -> pa.Table:
    """Fetch, decode and score the inputs of a shard; identical bytes once.

    While one image is scored, the next is decoded.

    Args:
        job: The run's settings.
        shard: Its number.
        planned: Its inputs, with the columns of the plan.
        decoder: Where decoding happens.
        scorer: Where scoring happens.
        known: Scores of an earlier run, by the bytes' sha256.
        meter: Measures the work.

    Returns:
        One row an input in the same order, with the columns of `result_schema`.

    Raises:
        OutageError: If a store answers nobody: that is no image's fault.
    """
    meter = meter or Meter()
    rows = _planned_facts(planned, shard)
    decoded = _decode(job, planned, rows, decoder, meter, known=known)
    with_pixels = ((row, pixels) for row, pixels in decoded if pixels is not None)
    while batch := list(itertools.islice(with_pixels, scorer.batch_size)):
        logits = score_pixels(np.stack([pixels for _, pixels in batch]), scorer, meter)
        for (row, _), logit in zip(batch, logits, strict=True):
            row["logit"] = float(logit)
    return finish_rows(job, _facts_table(rows, planned), ())


def score_pixels(pixels_bhwc: np.ndarray, scorer: Scorer, meter: Meter) -> np.ndarray:
    """Return logits (B,) of pixels (B, 256, 256, 3) uint8, measured."""
    with meter.doing(Stage.SCORE):
        logits = scorer.logits(pixels_bhwc)
    meter.scored(len(pixels_bhwc), scorer.batch_size)
    return logits


def prepare_shard(
    job: ShardJob,
    shard: int,
    planned: pa.Table,
    decoder: Decoder,
    *,
    known: KnownScores | None = None,
    meter: Meter | None = None,
) -> pa.Table:
    """Fetch and decode the inputs of a shard, for another machine to score; identical bytes once.

    Args:
        job: The run's settings.
        shard: Its number.
        planned: Its inputs, with the columns of the plan.
        decoder: Where decoding happens.
        known: Scores of an earlier run, by the bytes' sha256.
        meter: Measures the work.

    Returns:
        One row an input in the same order: facts, what the plan carries, and `pixels`, 256x256x3 bytes, zeros where
        there is nothing to score. A bad image is a row with its status.

    Raises:
        OutageError: If a store answers nobody: that is no image's fault.
    """
    rows = _planned_facts(planned, shard)
    block = np.zeros((len(rows), SIDE_PX, SIDE_PX, 3), dtype=np.uint8)
    for _ in _decode(job, planned, rows, decoder, meter or Meter(), known=known, block=block):
        pass
    column = pa.FixedSizeBinaryArray.from_buffers(_PIXELS.type, len(rows), [None, pa.py_buffer(block)])
    return _facts_table(rows, planned).append_column(_PIXELS, column)


def _decode(
    job: ShardJob,
    planned: pa.Table,
    rows: list[dict[str, Any]],
    decoder: Decoder,
    meter: Meter,
    *,
    known: KnownScores | None,
    block: np.ndarray | None = None,
) -> Iterator[tuple[dict[str, Any], np.ndarray | None]]:
    """Fetch and decode; fill in the rows, and yield each decoded one with its pixels, (256, 256, 3), or None.

    With a block, (N, 256, 256, 3), the pixels are those of the row's place in it.
    """
    inputs = from_table(planned)
    in_decoder: deque[dict[str, Any]] = deque()

    def to_decode() -> Iterator[EncodedImage]:
        for index, fetched in _new_bytes(job, inputs, rows, known, meter):
            in_decoder.append(rows[index])
            out = None if block is None else block[index]
            yield EncodedImage(inputs[index].uri, fetched.data, rows[index]["sha256"], out=out)

    for prepared in meter.waiting(Stage.DECODE, decoder.prepare_all(to_decode())):
        row = in_decoder.popleft()
        row.update(_told_by_bytes(prepared))
        yield row, prepared.pixels


def _facts_table(rows: list[dict[str, Any]], planned: pa.Table) -> pa.Table:
    """Return what is known of all inputs, once what was decoded is filled in, and the columns that are carried."""
    for row in rows:
        if row["same_as"] is not None:
            first = rows[row["same_as"]]
            row.update({name: first[name] for name in (*_INFO, "status", "error", "logit")})
    table = pa.Table.from_pylist(rows, schema=_FACTS)
    for each in planned.schema:
        if each.name.startswith(CARRIED):
            table = table.append_column(each, planned.column(each.name))
    return table


def _new_bytes(
    job: ShardJob, inputs: list[Input], rows: list[dict[str, Any]], known: KnownScores | None, meter: Meter
) -> Iterator[tuple[int, Fetched]]:
    """Fetch the inputs; fill in the rows of those that need no decoding, and yield the others with their index."""
    first_with: dict[str, int] = {}
    for index, outcome in enumerate(meter.waiting(Stage.FETCH, job.fetcher.fetch(inputs))):
        row = rows[index]
        if isinstance(outcome, ImageError):
            row.update(_told_by_bytes(Prepared.failed(outcome)))
            continue
        meter.fetched(len(outcome.data))
        sha256 = hashlib.sha256(outcome.data).hexdigest()
        row.update(asdict(outcome.info), uri=inputs[index].uri, size_bytes=len(outcome.data), sha256=sha256)
        if sha256 in first_with:
            row["same_as"] = first_with[sha256]
            continue
        first_with[sha256] = index
        score = known.get(sha256) if known is not None else None
        if score is not None:
            row.update(asdict(score.info), status=Status.OK, logit=score.logit)
        else:
            yield index, outcome


def pixels_of(prepared: pa.Table) -> np.ndarray:
    """Return the pixels of the rows to score, (N, 256, 256, 3) uint8; without a copy if that is all of them."""
    column = prepared.column("pixels").combine_chunks()
    if isinstance(column, pa.ChunkedArray):
        column = column.chunk(0) if column.num_chunks else pa.array([], type=column.type)
    data = np.frombuffer(column.buffers()[1], dtype=np.uint8) if len(column) else np.empty(0, dtype=np.uint8)
    start = column.offset * PIXEL_BYTES
    pixels = data[start : start + len(column) * PIXEL_BYTES].reshape(-1, SIDE_PX, SIDE_PX, 3)
    wanted = np.array([_is_to_score(row) for row in _facts(prepared)], dtype=bool)
    return pixels if wanted.all() else pixels[wanted]


def finish_rows(job: ShardJob, prepared: pa.Table, logits: Iterable[float]) -> pa.Table:
    """Return the result rows of a shard.

    Args:
        job: The run's settings.
        prepared: As `prepare_shard` returns it.
        logits: One for each row to score, in order.

    Returns:
        A table with the columns of `result_schema`.
    """
    scored_at = datetime.now(UTC)
    remaining = iter(logits)
    policy = job.policy
    facts = _facts(prepared)
    for row in facts:
        if _is_to_score(row):
            row["logit"] = float(next(remaining))
        elif row["same_as"] is not None:
            row["logit"] = facts[row["same_as"]]["logit"]
    rows: list[dict[str, Any]] = []
    for row in facts:
        verdict = judge(
            row["logit"],
            ImageInfo(**{name: row[name] for name in _INFO}),
            policy=policy,
            domain=job.domain,
            threshold=job.threshold,
            flag_unassessable=job.flag_unassessable,
            truncated=row["status"] == Status.OK and row["error"] is not None,  # all that a scored row can report
        )
        rows.append(
            {
                **row,
                **asdict(verdict),
                "preprocess": job.preprocess,
                "model_id": job.model_id,
                "weights_sha256": job.weights_sha256,
                "run_id": job.run_id,
                "scored_at": scored_at,
            }
        )
    table = pa.Table.from_pylist(rows, schema=RESULT_SCHEMA)
    for each in carried_fields(prepared.schema):
        table = table.append_column(each, prepared.column(CARRIED + each.name))
    return table.cast(result_schema(carried_fields(prepared.schema)))


def commit_shard(job: ShardJob, results: pa.Table, meter: Meter | None = None) -> Receipt:
    """Store a shard's rows as its part: one conditional put of bytes already complete in memory.

    Args:
        job: The run's settings.
        results: The rows, with the columns of `result_schema`.
        meter: Measures the work; what it has measured is the receipt's.

    Raises:
        StorageError: If the store does not take it.
    """
    meter = meter or Meter()
    shard = results.column("shard")[0].as_py()
    uri = job.directory.part_uri(shard)
    with meter.doing(Stage.COMMIT):
        outcome = job.directory.store.create(uri, to_parquet(results))
        if not outcome.created:
            # Another worker or driver was first. Its rows count, so the receipt speaks of them.
            results = from_parquet(job.directory.store.get(uri).data)
    return Receipt(shard, outcome.created, summarize(results), _failures(results), histogram_of(results), meter.usage())


def _failures(results: pa.Table, most: int = 3) -> tuple[Failure, ...]:
    columns = (results.column(name).to_pylist() for name in ("uri", "status", "error"))
    failed = (row for row in zip(*columns, strict=True) if is_failure(row[1]))
    return tuple(Failure(uri, status, error or "") for uri, status, error in itertools.islice(failed, most))


def _planned_facts(planned: pa.Table, shard: int) -> list[dict[str, Any]]:
    """Return the rows as the plan knows them."""
    return [
        {
            **dict.fromkeys(_FACTS.names),
            "uri": each.uri,
            "size_bytes": each.size_bytes,
            "etag": each.etag,
            "last_modified": each.last_modified,
            "shard": shard,
        }
        for each in from_table(planned)
    ]


def _told_by_bytes(prepared: Prepared) -> dict[str, Any]:
    return {**asdict(prepared.info), "status": prepared.status, "error": prepared.error}


def _facts(prepared: pa.Table) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = prepared.select(_FACTS.names).to_pylist()
    return rows


def _is_to_score(row: dict[str, Any]) -> bool:
    return row["status"] == Status.OK and row["logit"] is None and row["same_as"] is None
