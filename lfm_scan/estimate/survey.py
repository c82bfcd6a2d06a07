"""All inputs counted as a scan would list them, and a sample of them: one pass, in bounded memory."""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from lfm_scan.estimate.config import EstimateConfig
from lfm_scan.options import StorageConfig
from lfm_scan.runs.earlier import EarlierRun, is_unchanged_since
from lfm_scan.sources.inputs import Input, Kind
from lfm_scan.sources.listing import check_sources
from lfm_scan.sources.select import carried_types_of, list_inputs
from lfm_scan.sources.tar import spans
from lfm_scan.storage.s3_client import open_client

T = TypeVar("T")

_PROGRESS_EVERY: Final = 1000
_NEIGHBOURS: Final = 512
"""Inputs looked at together, as many as a shard has in a large run."""

_OPERATIONS: Final = {"ListObjectsV2": "LIST", "HeadObject": "HEAD", "GetObject": "GET"}


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What listing the sources gave.

    Attributes:
        num_inputs: Inputs in all.
        size_bytes: Of those whose size the listing tells, all together.
        num_unsized: Inputs whose size it does not tell: rows of Parquet files, most lines of manifests.
        fetch_bytes: Of `size_bytes`, those of inputs that a scan reads; not of such as are too large.
        num_gets: Requests for the bytes of objects and of stretches of archives.
        num_by_ranges: Inputs in compressed archives and Parquet files, whose requests depend on how those are laid out.
        sample: Some of the inputs, chosen with equal probability, in the order of the listing.
        seconds: Wall time that listing took.
        requests: Requests to S3 that listing took, by LIST, HEAD and GET.
    """

    num_inputs: int
    size_bytes: int
    num_unsized: int
    fetch_bytes: int
    num_gets: int
    num_by_ranges: int
    sample: tuple[Input, ...]
    seconds: float
    requests: Counter[str]


def survey(config: EstimateConfig, on_progress: Callable[[int], None] = lambda num_inputs: None) -> Survey:
    """List the sources to the end and choose a sample.

    Args:
        config: Sources, filters, and the size of the sample.
        on_progress: Called with the number of inputs found so far.

    Raises:
        ConfigError: If a column to carry cannot be had.
        StorageError: If a source cannot be listed.
        SourceError: If a manifest or an inventory cannot be used.
    """
    started = time.perf_counter()
    with _counted_requests(config) as requests:
        check_sources(config.sources, config.storage)
        carried_types_of(config.sources, config.inputs, config.storage)  # a scan asks for them too
        counts = _Counts(config.limits.max_image_bytes)
        sample = reservoir(counts.watch(_inputs(config), on_progress), config.sample, config.seed)
    return Survey(
        num_inputs=counts.num_inputs,
        size_bytes=counts.size_bytes,
        num_unsized=counts.num_unsized,
        fetch_bytes=counts.fetch_bytes,
        num_gets=counts.num_gets,
        num_by_ranges=counts.num_by_ranges,
        sample=tuple(sample),
        seconds=time.perf_counter() - started,
        requests=requests,
    )


def reservoir(items: Iterable[T], size: int, seed: int) -> list[T]:
    """Return so many items, or all if there are fewer, in their order: each with the same probability.

    Algorithm R (Vitter, ACM TOMS 1985): one pass, and no more than the sample in memory.
    """
    chance = random.Random(seed)  # noqa: S311 - no secret
    kept: list[tuple[int, T]] = []
    for index, item in enumerate(items):
        if index < size:
            kept.append((index, item))
        elif (place := chance.randrange(index + 1)) < size:
            kept[place] = (index, item)
    return [item for _, item in sorted(kept, key=lambda pair: pair[0])]


class _Counts:
    """Counts inputs as they pass."""

    def __init__(self, max_image_bytes: int) -> None:
        self._max_image_bytes = max_image_bytes
        self.num_inputs = self.size_bytes = self.num_unsized = self.fetch_bytes = 0
        self.num_gets = self.num_by_ranges = 0

    def watch(self, inputs: Iterator[Input], on_progress: Callable[[int], None]) -> Iterator[Input]:
        """Yield the inputs, counted."""
        while neighbours := list(itertools.islice(inputs, _NEIGHBOURS)):
            for each in neighbours:
                self._count(each)
            self.num_gets += _num_spans(each for each in neighbours if self._is_read(each))
            yield from neighbours
            if self.num_inputs % _PROGRESS_EVERY < _NEIGHBOURS:
                on_progress(self.num_inputs)
        on_progress(self.num_inputs)

    def _count(self, each: Input) -> None:
        self.num_inputs += 1
        is_read = self._is_read(each)
        if each.size_bytes is not None:
            self.size_bytes += each.size_bytes
            self.fetch_bytes += each.size_bytes if is_read else 0
        else:
            self.num_unsized += 1
        self.num_gets += is_read and each.kind is Kind.OBJECT
        self.num_by_ranges += is_read and each.kind in (Kind.TAR_GZ, Kind.PARQUET)

    def _is_read(self, each: Input) -> bool:
        return each.status is None and (each.size_bytes is None or each.size_bytes <= self._max_image_bytes)


def _num_spans(inputs: Iterable[Input]) -> int:
    """Return how many requests neighbours in uncompressed archives take."""
    members = (each for each in inputs if each.kind is Kind.TAR)
    return sum(len(spans(list(group))) for _, group in itertools.groupby(members, key=lambda each: each.where))


def _inputs(config: EstimateConfig) -> Iterator[Input]:
    inputs = list_inputs(config.sources, config.inputs, config.storage)
    if config.inputs.since is None:
        return inputs
    since = EarlierRun.open(config.inputs.since, config.storage, "--since")
    return itertools.filterfalse(is_unchanged_since(since), inputs)


@contextlib.contextmanager
def _counted_requests(config: EstimateConfig) -> Iterator[Counter[str]]:
    """Count the requests that this process sends to S3 until the end of the block, tries included."""
    counts: Counter[str] = Counter()
    lock = threading.Lock()

    def count(event_name: str, **_: object) -> None:
        operation = _OPERATIONS.get(event_name.rpartition(".")[2])
        if operation is not None:
            with lock:
                counts[operation] += 1

    with contextlib.ExitStack() as undo:
        if any(source.startswith("s3://") for source in config.sources):
            for client in _clients(config.storage):
                client.meta.events.register("before-send.s3", count)
                undo.callback(client.meta.events.unregister, "before-send.s3", count)
        yield counts


def _clients(storage: StorageConfig) -> list[Any]:
    return [open_client(storage, patient=patient).boto for patient in (False, True)]
