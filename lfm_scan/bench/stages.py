"""Each stage of a scan alone, on one core: what an image costs there.

Cores are timed by the processes' own clocks, so that other work on the machine hurts little; disks and GPUs by the
wall's.
"""

from __future__ import annotations

import hashlib
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa

from lfm_scan.bench.config import BenchConfig
from lfm_scan.bench.images import Group
from lfm_scan.estimate.measure import decode_alone, one_thread, open_scan_backend, score_alone, warm_up
from lfm_scan.imaging import ImageLimits, PreprocessPolicy, decode_bytes
from lfm_scan.imaging.preprocess import SIDE_PX
from lfm_scan.imaging.traces import find_jpeg_traces
from lfm_scan.model import Checkpoint
from lfm_scan.options import InputConfig
from lfm_scan.runs.parquet import to_parquet
from lfm_scan.runs.summary import summarize
from lfm_scan.schema import RESULT_SCHEMA
from lfm_scan.scoring.backend import Backend
from lfm_scan.scoring.isolated import IsolatedDecoder
from lfm_scan.scoring.result import sigmoid
from lfm_scan.sources.fetch import Fetcher
from lfm_scan.status import LossyEvidence, Status, Unassessable
from lfm_scan.storage import open_store

_MODEL_IMAGES: Final = {"cpu": 8, "cuda": 512}
"""Images scored in one go, by device."""

_COMMIT_ROWS: Final = 512


class Stage(StrEnum):
    """What is done with an image."""

    FETCH = "fetch"
    """Getting its bytes, from this machine's disk or from a store; the core's time, not the waiting."""
    ISOLATED = "isolated decode"
    """All from bytes to pixels, in a process of its own, as a scan does it."""
    HASH = "sha256"
    DECODE = "decode"
    TRACES = "JPEG traces"
    """Only of images that are not lossy by their own word."""
    PREPROCESS = "preprocess"
    MODEL = "model"
    COMMIT = "commit"
    """One row of a Parquet file of 512, with its share of the disk's time."""


INSIDE: Final = (Stage.HASH, Stage.DECODE, Stage.TRACES, Stage.PREPROCESS)
"""The parts of ISOLATED, measured in this process, without the cost of isolation."""


@dataclass(frozen=True, kw_only=True)
class GroupTimes:
    """What the images of a group cost.

    Attributes:
        name: Of the group.
        num_images: In it.
        num_left_out: Of it, because they do not decode.
        mean_bytes: Of a file.
        ms: Milliseconds an image by stage, medians over passes: of one core, except for a model on a GPU.
        fetch_images_per_s: By the clock, with `--fetch-threads` requests in flight from one process.
    """

    name: str
    num_images: int
    num_left_out: int
    mean_bytes: float
    ms: dict[Stage, float]
    fetch_images_per_s: float


def measure_groups(
    groups: Sequence[Group],
    config: BenchConfig,
    checkpoint: Checkpoint,
    policy: PreprocessPolicy,
    *,
    device: str,
    folder: Path,
    on_progress: Callable[[str], None] = lambda what: None,
) -> list[GroupTimes]:
    """Measure all stages for each group of images. Stages take turns, so that a busy moment hurts all alike.

    Args:
        groups: Images that decode.
        config: The user's settings.
        checkpoint: To score with.
        policy: How an image becomes 256x256.
        device: "cpu" or "cuda", for the model.
        folder: To commit to.
        on_progress: Told what is measured next.
    """
    limits = ImageLimits()
    times = []
    with one_thread(), IsolatedDecoder(policy.id, limits) as decoder:
        backend = open_scan_backend(checkpoint, device, config.compute)
        warm_up(decoder, backend)
        shared = _SharedBench(backend, device, folder)
        for group in groups:
            on_progress(group.name)
            bench = _GroupBench(group, config, policy, limits, decoder)
            measured = _until(config.seconds * len(Stage), (bench.run, shared.run))
            times.append(
                GroupTimes(
                    name=group.name,
                    num_images=len(group.files),
                    num_left_out=group.num_left_out,
                    mean_bytes=group.mean_bytes,
                    ms={stage: 1000 * statistics.median(measured[stage]) for stage in Stage},
                    fetch_images_per_s=1 / statistics.median(bench.fetch_wall_s),
                )
            )
    return times


class _GroupBench:
    """The stages that depend on the images."""

    def __init__(
        self,
        group: Group,
        config: BenchConfig,
        policy: PreprocessPolicy,
        limits: ImageLimits,
        decoder: IsolatedDecoder,
    ) -> None:
        self._group = group
        self._policy = policy
        self._limits = limits
        self._decoder = decoder
        self._fetcher = Fetcher(config.storage, InputConfig(), limits.max_image_bytes, config.compute.fetch_threads)
        self.fetch_wall_s: list[float] = []

    def run(self) -> dict[Stage, float]:
        """Return the seconds an image of one pass, by stage."""
        totals = dict.fromkeys((Stage.ISOLATED, *INSIDE), 0.0)
        for data in self._group.files:
            for stage, seconds in self._in_process(data).items():
                totals[stage] += seconds
            totals[Stage.ISOLATED] += decode_alone(self._decoder, "bench", data)[1]
        totals[Stage.FETCH] = self._fetch()
        return {stage: total / len(self._group.files) for stage, total in totals.items()}

    def _fetch(self) -> float:
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in self._fetcher.fetch(self._group.inputs):
            pass
        self.fetch_wall_s.append((time.perf_counter() - wall) / len(self._group.inputs))
        return time.process_time() - cpu

    def _in_process(self, data: bytes) -> dict[Stage, float]:
        marks = [time.process_time()]
        hashlib.sha256(data).hexdigest()
        marks.append(time.process_time())
        decoded = decode_bytes(data, self._limits, traces=False)
        marks.append(time.process_time())
        if not decoded.info.lossy:
            find_jpeg_traces(decoded.image)
        marks.append(time.process_time())
        self._policy(decoded)
        marks.append(time.process_time())
        return {stage: end - start for stage, start, end in zip(INSIDE, marks, marks[1:], strict=False)}


class _SharedBench:
    """The stages that do not depend on the images."""

    def __init__(self, backend: Backend, device: str, folder: Path) -> None:
        random = np.random.default_rng(0)
        self._backend = backend
        self._device = device
        self._pixels = random.integers(0, 256, (_MODEL_IMAGES[device], SIDE_PX, SIDE_PX, 3), np.uint8)
        self._rows = result_rows(_COMMIT_ROWS, random)
        self._folder = folder
        self._num_commits = 0

    def run(self) -> dict[Stage, float]:
        """Return the seconds an image of one pass, by stage."""
        scored_s = score_alone(self._backend, self._pixels, self._device)
        started = time.perf_counter()
        uri = str(self._folder / f"part-{self._num_commits:09d}.parquet")
        summarize(self._rows)
        open_store(uri).create(uri, to_parquet(self._rows))
        committed_s = time.perf_counter() - started
        self._num_commits += 1
        return {
            Stage.MODEL: scored_s / len(self._pixels),
            Stage.COMMIT: committed_s / len(self._rows),
        }


def result_rows(num_rows: int, random: np.random.Generator) -> pa.Table:
    """Return rows as a scan of photographs has them; digests and scores compress as badly as real ones."""
    now = datetime.now(UTC)
    rows = []
    for index in range(num_rows):
        logit = float(random.normal(0, 4))
        rows.append(
            {
                **dict.fromkeys(RESULT_SCHEMA.names),
                "uri": f"s3://bucket/photographs/{index:010}-{random.bytes(8).hex()}.jpg",
                "size_bytes": int(random.integers(10_000, 1_000_000)),
                "etag": random.bytes(16).hex(),
                "last_modified": now,
                "sha256": random.bytes(32).hex(),
                "format": "JPEG",
                "mode": "RGB",
                "width": int(random.integers(256, 4096)),
                "height": int(random.integers(256, 4096)),
                "lossy": True,
                "jpeg_quality": int(random.integers(70, 96)),
                "num_frames": 1,
                "status": str(Status.OK),
                "logit": logit,
                "score": sigmoid(logit),
                "assessable": False,
                "unassessable_reason": str(Unassessable.LOSSY),
                "flagged": False,
                "preprocess": "crop256",
                "model_id": "bench",
                "weights_sha256": "0" * 64,
                "run_id": "bench",
                "shard": 0,
                "scored_at": now,
                "lossy_evidence": str(LossyEvidence.CODEC),
            }
        )
    return pa.Table.from_pylist(rows, schema=RESULT_SCHEMA)


def _until(seconds: float, runs: Sequence[Callable[[], dict[Stage, float]]]) -> dict[Stage, list[float]]:
    """Run by turns until the time is over, at least once, after one round that does not count."""
    for run in runs:
        run()
    measured: dict[Stage, list[float]] = defaultdict(list)
    deadline = time.perf_counter() + seconds
    while not measured or time.perf_counter() < deadline:
        for run in runs:
            for stage, value in run().items():
                measured[stage].append(value)
    return measured
