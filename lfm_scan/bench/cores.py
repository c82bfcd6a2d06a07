"""The model on all cores at once: they share caches, memory and clock, so that N cores are not N times one."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np

from lfm_scan.bench.config import BenchConfig
from lfm_scan.estimate.measure import one_thread, open_scan_backend, score_alone
from lfm_scan.imaging.preprocess import SIDE_PX
from lfm_scan.model import load_checkpoint

_NUM_IMAGES = 8
_START_TIMEOUT_S = 300

_barrier: Any = None


def model_rate(config: BenchConfig, weights: bytes, num_processes: int) -> float:
    """Return the images a second that so many processes of one thread score together, each on a core of its own.

    Args:
        config: How long to measure, and with which backend.
        weights: The checkpoint's file.
        num_processes: Started for this, each with a network of its own.

    Raises:
        RuntimeError: If one of them cannot be started or dies.
    """
    context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads and locks
    with ProcessPoolExecutor(
        num_processes, mp_context=context, initializer=_keep, initargs=(context.Barrier(num_processes),)
    ) as pool:
        counts = [pool.submit(_score_for, config, weights) for _ in range(num_processes)]
        return sum(count.result() for count in concurrent.futures.as_completed(counts))


def _keep(barrier: object) -> None:
    globals()["_barrier"] = barrier


def _score_for(config: BenchConfig, weights: bytes) -> float:
    """Score for the time given, from when all others are ready; return the images a second of a core's own time."""
    with one_thread():
        backend = open_scan_backend(load_checkpoint(weights), "cpu", config.compute)
        pixels = np.random.default_rng(0).integers(0, 256, (_NUM_IMAGES, SIDE_PX, SIDE_PX, 3), np.uint8)
        backend.logits(pixels)
        # Nobody gets two of these calls: whoever has one waits here until all have one.
        _barrier.wait(_START_TIMEOUT_S)
        started, seconds, count = time.perf_counter(), 0.0, 0
        while time.perf_counter() - started < config.seconds or not count:
            seconds += score_alone(backend, pixels, "cpu")
            count += len(pixels)
        return count / seconds
