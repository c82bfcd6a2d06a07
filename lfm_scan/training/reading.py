"""From samples to their files, for the check and for the training alike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pyarrow as pa

from lfm_scan.errors import ImageError
from lfm_scan.options import ImageLimits, InputConfig, StorageConfig
from lfm_scan.sources.fetch import Fetcher
from lfm_scan.sources.inputs import INPUT_SCHEMA, Input, from_table
from lfm_scan.status import Status


@dataclass(frozen=True, kw_only=True)
class SampleReader:
    """How to get at the bytes of samples. Cheap, and can be pickled.

    Attributes:
        limits: What one image may cost.
        storage: How to reach stores.
        inputs: How containers were read when the samples were gathered.
        num_threads: Requests in flight.
    """

    limits: ImageLimits = field(default_factory=ImageLimits)
    storage: StorageConfig = field(default_factory=StorageConfig)
    inputs: InputConfig = field(default_factory=InputConfig)
    num_threads: int = 8

    def read(self, samples: pa.Table) -> Iterator[tuple[int, bytes | ImageError]]:
        """Yield the row of each sample and its file, or why there is none.

        They come in the order in which they lie in their containers, so that neighbours are read together, however the
        rows were shuffled.

        Args:
            samples: Rows of `SAMPLE_SCHEMA`.

        Raises:
            OutageError: If a store answers nobody.
        """
        inputs = [_planned(each) for each in from_table(samples.select(INPUT_SCHEMA.names))]
        order = sorted(range(len(inputs)), key=lambda row: _place_of(inputs[row]))
        fetcher = Fetcher(self.storage, self.inputs, self.limits.max_image_bytes, self.num_threads)
        for row, outcome in zip(order, fetcher.fetch([inputs[row] for row in order]), strict=True):
            yield row, outcome if isinstance(outcome, ImageError) else outcome.data


def _place_of(planned: Input) -> tuple[str, str, int]:
    return planned.kind, planned.where, planned.position or 0


def _planned(sample: Input) -> Input:
    """Return a usable sample as the input it was planned as: there None is what "ok" is in the samples."""
    return replace(sample, status=None, error=None) if sample.status == Status.OK else sample
