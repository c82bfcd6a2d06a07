"""Metrics for Prometheus, recorded by the workers through Ray, which exports them with `ray_` before each name.

None is tagged by run, shard or image: time series are as many as workers, which Ray tags.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Final

import ray
from ray.util.metrics import Counter, Gauge, Histogram

from lfm_scan.runs.summary import Summary
from lfm_scan.runs.usage import Usage

_SHARD_SECONDS: Final = [0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0]
_BATCH_IMAGES: Final = [float(2**power) for power in range(11)]


class Metrics:
    """All metrics of this process."""

    def __init__(self) -> None:
        self.images = Counter("lfm_scan_images_total", "Rows committed, by status.", ("status",))
        self.shards = Counter("lfm_scan_shards_total", "Shards committed.")
        self.stage_seconds = Counter("lfm_scan_stage_seconds_total", "Seconds of workers, by stage.", ("stage",))
        self.shard_seconds = Histogram("lfm_scan_shard_seconds", "Seconds of workers, by shard.", _SHARD_SECONDS)
        self.core_seconds = Counter("lfm_scan_core_seconds_total", "Seconds of cores that workers used.")
        self.gpu_seconds = Counter("lfm_scan_gpu_seconds_total", "Seconds of GPUs while the network scored.")
        self.fetched_bytes = Counter("lfm_scan_fetched_bytes_total", "Bytes of images that arrived.")
        self.batch_images = Histogram(
            "lfm_scan_batch_images", "Images in a pass of the network, up to a power of 2.", _BATCH_IMAGES
        )
        self.requests = Counter("lfm_scan_store_requests_total", "Requests to S3, all tries counted.", ("kind",))
        self.retries = Counter("lfm_scan_store_retries_total", "Requests to stores that were sent once more.")
        self.throttles = Counter("lfm_scan_store_throttles_total", "Answers of stores that asked for fewer requests.")
        self.worker_bytes = Gauge("lfm_scan_worker_memory_bytes", "Most memory that this worker has had.")
        self.decoder_bytes = Gauge("lfm_scan_decoder_memory_bytes", "Most memory that this worker's decoder has had.")
        self.gpu_bytes = Gauge("lfm_scan_gpu_memory_bytes", "Most memory of a GPU that this worker has reserved.")


def record_usage(usage: Usage) -> None:
    """Record what some work of this process took. Does nothing where Ray does not run."""
    if not ray.is_initialized():
        return
    metrics = _metrics()
    _count_all(metrics.stage_seconds, "stage", usage.seconds)
    _count(metrics.core_seconds, usage.core_s)
    _count(metrics.gpu_seconds, usage.gpu_s)
    _count(metrics.fetched_bytes, usage.fetched_bytes)
    _count_all(metrics.requests, "kind", usage.requests)
    _count(metrics.retries, usage.num_retries)
    _count(metrics.throttles, usage.num_throttles)
    for num_images, count in usage.batches.items():
        for _ in range(count):
            metrics.batch_images.observe(num_images)
    _show(metrics.worker_bytes, usage.peak_worker_bytes)
    _show(metrics.decoder_bytes, usage.peak_decoder_bytes)
    _show(metrics.gpu_bytes, usage.peak_gpu_bytes)


def record_shard(summary: Summary, usage: Usage) -> None:
    """Record that a shard was committed.

    Args:
        summary: Counts over its rows.
        usage: What all work on it took.
    """
    if not ray.is_initialized():
        return
    metrics = _metrics()
    metrics.shards.inc()
    metrics.shard_seconds.observe(sum(usage.seconds.values()))
    _count_all(metrics.images, "status", summary.by_status)


@functools.cache
def _metrics() -> Metrics:
    return Metrics()


def _count(counter: Counter, amount: float) -> None:
    if amount > 0:  # Ray refuses to add nothing
        counter.inc(amount)


def _count_all(counter: Counter, tag: str, amounts: Mapping[str, float]) -> None:
    for name, amount in amounts.items():
        if amount > 0:
            counter.inc(amount, {tag: str(name)})


def _show(gauge: Gauge, value: float) -> None:
    if value:
        gauge.set(value)
