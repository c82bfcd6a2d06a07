"""A sample fetched, decoded and scored with the scan's own parts, each step timed alone."""

from __future__ import annotations

import contextlib
import io
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from PIL import Image

from lfm_scan.errors import ImageError
from lfm_scan.estimate.config import EstimateConfig
from lfm_scan.imaging import PreprocessPolicy
from lfm_scan.imaging.preprocess import SIDE_PX
from lfm_scan.model import Checkpoint
from lfm_scan.options import ComputeConfig
from lfm_scan.scoring.backend import Backend, open_backend
from lfm_scan.scoring.isolated import EncodedImage, IsolatedDecoder
from lfm_scan.scoring.prepare import Prepared
from lfm_scan.scoring.result import judge
from lfm_scan.sources.fetch import Fetcher, Outcome
from lfm_scan.sources.inputs import Input
from lfm_scan.status import Status, Unassessable

_MAX_CHUNK_BYTES: Final = 256 * 2**20
_UNKNOWN_BYTES: Final = 8 * 2**20
"""What an input counts whose size no listing tells."""

_BATCHES: Final = {"cpu": 8, "cuda": 128}
"""Images timed together, by device."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What became of one input of the sample, and what it cost.

    Attributes:
        uri: Of the input.
        status: As its row would have it.
        size_bytes: Of the file, or None if it could not be fetched.
        was_sized: Whether the listing told its size.
        unassessable: Why its score would mean nothing, or None.
        decode_s: Seconds of one core, here and in the decoder's process, for hashing, decoding and preprocessing.
        score_s: Seconds of one core, or of the GPU, for scoring; 0 for one that is not scored.
    """

    uri: str
    status: Status
    size_bytes: int | None
    was_sized: bool
    unassessable: Unassessable | None
    decode_s: float
    score_s: float


@dataclass(frozen=True)
class Sample:
    """The measured sample.

    Attributes:
        images: One for each input, in their order.
        device: Where they were scored, "cpu" or "cuda", or None if they were not.
        fetch_s: Wall time an input, with `--fetch-threads` requests in flight.
        fetch_cpu_s: Seconds of one core an input for fetching.
    """

    images: tuple[Measured, ...]
    device: str | None
    fetch_s: float
    fetch_cpu_s: float


def measure_sample(
    inputs: Sequence[Input],
    config: EstimateConfig,
    checkpoint: Checkpoint,
    policy: PreprocessPolicy,
    *,
    device: str | None,
    on_progress: Callable[[int], None] = lambda num_done: None,
) -> Sample:
    """Fetch, decode and score a sample. A bad image is an outcome, as in a scan.

    Args:
        inputs: The sample, in the order of the listing.
        config: The user's settings.
        checkpoint: To score with.
        policy: How an image becomes 256x256.
        device: Where to score, "cpu" or "cuda"; None not to.
        on_progress: Called with the number of inputs done.

    Raises:
        OutageError: If a store answers nobody.
    """
    fetcher = Fetcher(config.storage, config.inputs, config.limits.max_image_bytes, config.compute.fetch_threads)
    images: list[Measured] = []
    fetch_s = fetch_cpu_s = 0.0
    with one_thread(), IsolatedDecoder(policy.id, config.limits) as decoder:
        backend = None if device is None else open_scan_backend(checkpoint, device, config.compute)
        warm_up(decoder, backend)
        for chunk in _chunks(inputs, config.limits.max_image_bytes):
            wall, cpu = time.perf_counter(), time.process_time()
            outcomes = list(fetcher.fetch(chunk))
            fetch_s += time.perf_counter() - wall
            fetch_cpu_s += time.process_time() - cpu
            decoded: list[tuple[Prepared, float]] = []
            for each, outcome in zip(chunk, outcomes, strict=True):
                decoded.append(_decode(decoder, each, outcome))
                on_progress(len(images) + len(decoded))
            seconds = [0.0] * len(chunk)
            if backend is not None and device is not None:
                seconds = _score(backend, [prepared for prepared, _ in decoded], device)
            for each, (prepared, decode_s), score_s in zip(chunk, decoded, seconds, strict=True):
                images.append(
                    Measured(
                        uri=each.uri,
                        status=prepared.status,
                        size_bytes=prepared.size_bytes,
                        was_sized=each.size_bytes is not None,
                        unassessable=_unassessable(prepared, checkpoint, policy),
                        decode_s=decode_s,
                        score_s=score_s,
                    )
                )
    return Sample(tuple(images), device, fetch_s / max(1, len(images)), fetch_cpu_s / max(1, len(images)))


def open_scan_backend(checkpoint: Checkpoint, device: str, compute: ComputeConfig) -> Backend:
    """Return the backend that a scan with these settings would score with, for one core or one GPU."""
    return open_backend(
        checkpoint,
        device,
        backend=compute.backend if device == "cpu" else "auto",
        precision=compute.precision,
        batch_size=compute.batch_size,
        num_threads=1,
    )


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread, as a scan's actors do, until the end of the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def warm_up(decoder: IsolatedDecoder, backend: Backend | None) -> None:
    """Start the decoder's process, and let the backend choose its kernels: no image is to pay for that."""
    file = io.BytesIO()
    Image.new("RGB", (SIDE_PX, SIDE_PX)).save(file, "PNG")
    list(decoder.prepare_all([EncodedImage("warm-up", file.getvalue())]))
    if backend is not None:
        backend.logits(np.zeros((2, SIDE_PX, SIDE_PX, 3), np.uint8))


def _chunks(inputs: Sequence[Input], max_image_bytes: int) -> Iterator[list[Input]]:
    """Yield stretches of the sample that fit into memory."""
    chunk: list[Input] = []
    num_bytes = 0
    for each in inputs:
        size_bytes = min(_UNKNOWN_BYTES if each.size_bytes is None else each.size_bytes, max_image_bytes)
        if chunk and num_bytes + size_bytes > _MAX_CHUNK_BYTES:
            yield chunk
            chunk, num_bytes = [], 0
        chunk.append(each)
        num_bytes += size_bytes
    if chunk:
        yield chunk


def _decode(decoder: IsolatedDecoder, each: Input, outcome: Outcome) -> tuple[Prepared, float]:
    if isinstance(outcome, ImageError):
        return Prepared.failed(outcome), 0.0
    return decode_alone(decoder, each.uri, outcome.data)


def decode_alone(decoder: IsolatedDecoder, name: str, data: bytes) -> tuple[Prepared, float]:
    """Return the outcome for a file, and the seconds of a core that it took in both processes.

    They are counted by the processes' own clocks, so that it does not matter who else is at work on the machine.
    """
    started, used_s = time.perf_counter(), time.process_time() + decoder.cpu_s
    (prepared,) = decoder.prepare_all([EncodedImage(name, data)])
    cpu_s = time.process_time() + decoder.cpu_s - used_s
    # A decoder that died took its clock along: then by the wall's.
    return prepared, cpu_s if cpu_s > 0 else time.perf_counter() - started


def _score(backend: Backend, prepared: Sequence[Prepared], device: str) -> list[float]:
    """Return the seconds that scoring took for each, of a core or of the GPU; 0 for those without pixels."""
    seconds = [0.0] * len(prepared)
    scored = ((index, each.pixels) for index, each in enumerate(prepared) if each.pixels is not None)
    while batch := list(itertools.islice(scored, _BATCHES[device])):
        pixels = np.stack([pixels for _, pixels in batch])
        elapsed_s = score_alone(backend, pixels, device)
        for index, _ in batch:
            seconds[index] = elapsed_s / len(batch)
    return seconds


def score_alone(backend: Backend, pixels_bhwc: np.ndarray, device: str) -> float:
    """Return the seconds of a core, or of the GPU, that scoring (B, 256, 256, 3) uint8 takes."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    started = clock()
    backend.logits(pixels_bhwc)
    return clock() - started


def _unassessable(prepared: Prepared, checkpoint: Checkpoint, policy: PreprocessPolicy) -> Unassessable | None:
    """Return why a score of the image would mean nothing: whatever its value is."""
    verdict = judge(
        None if prepared.pixels is None else 0.0,
        prepared.info,
        policy=policy,
        domain=checkpoint.metadata.domain,
        threshold=0.5,
        flag_unassessable=False,
        truncated=prepared.truncated,
    )
    return verdict.unassessable_reason
