from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterator

import numpy as np
import pytest

from lfm_scan.imaging import ImageLimits
from lfm_scan.runs.meter import Meter
from lfm_scan.runs.usage import Stage
from lfm_scan.scoring.isolated import EncodedImage, IsolatedDecoder
from lfm_scan.storage.traffic import count_retry, count_throttle
from tests.images import encoded


class Clock:
    """Goes only when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_each_second_counts_for_the_innermost_stage(clock: Clock) -> None:
    meter = Meter("node", clock=clock)

    def slow(items: list[str], seconds: float) -> Iterator[str]:
        for item in items:
            clock.now += seconds
            yield item

    # As in a shard: the decoder pulls files, whoever scores pulls pixels.
    fetched = meter.waiting(Stage.FETCH, slow(["a", "b"], 10.0))
    decoded = meter.waiting(Stage.DECODE, slow([*fetched], 1.0))
    for _ in decoded:
        with meter.doing(Stage.SCORE):
            clock.now += 0.25
        clock.now += 0.5
    usage = meter.usage()

    assert usage.seconds == {"fetch": 20.0, "decode": 2.0, "score": 0.5, "other": 1.0}
    assert usage.node_s == {"node": 23.5}


def test_an_inner_wait_is_not_counted_for_the_outer_one(clock: Clock) -> None:
    meter = Meter("node", clock=clock)

    def fetch() -> Iterator[str]:
        clock.now += 8.0
        yield "file"

    def decode() -> Iterator[str]:
        for file in meter.waiting(Stage.FETCH, fetch()):
            clock.now += 1.0
            yield file

    assert list(meter.waiting(Stage.DECODE, decode())) == ["file"]
    assert meter.usage().seconds == {"other": 0.0, "fetch": 8.0, "decode": 1.0}


def test_a_stage_that_fails_ends(clock: Clock) -> None:
    meter = Meter("node", clock=clock)

    def fail() -> None:
        with meter.doing(Stage.COMMIT):
            clock.now += 1.0
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    clock.now += 2.0

    assert meter.usage().seconds == {"other": 2.0, "commit": 1.0}


def test_batches_are_counted_by_the_next_power_of_two() -> None:
    meter = Meter("node")
    meter.scored(515, 256)
    meter.scored(1, 1)
    meter.scored(0, 256)

    assert meter.usage().batches == {256: 2, 4: 1, 1: 1}


def test_requests_made_again_count_from_the_start_of_the_meter() -> None:
    count_retry()
    meter = Meter("node")
    count_retry()
    count_throttle()

    assert (meter.usage().num_retries, meter.usage().num_throttles) == (1, 1)


def test_bytes_add_up_and_gpus_count_while_they_score(clock: Clock) -> None:
    meter = Meter("node", gpus=0.25, clock=clock)
    meter.fetched(100)
    meter.fetched(23)
    with meter.doing(Stage.SCORE):
        clock.now += 8.0
    usage = meter.usage()

    assert usage.fetched_bytes == 123
    assert usage.gpu_s == 2.0
    assert usage.peak_gpu_bytes == 0  # nothing was reserved here


def test_memory_is_that_of_the_process_and_its_decoder() -> None:
    with IsolatedDecoder("crop256", ImageLimits()) as decoder:
        meter = Meter("node", decoder)
        assert meter.usage().peak_decoder_bytes == 0  # it has not begun
        list(decoder.prepare_all([EncodedImage("a", encoded())]))
        usage = meter.usage()

        # The kernel's own figure for this process, which no other program was before.
        assert usage.peak_worker_bytes == pytest.approx(
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, rel=0.1
        )
        assert 10 * 2**20 < usage.peak_decoder_bytes < 500 * 2**20
        assert decoder.pid != os.getpid()


def test_the_time_of_cores_covers_decoders_that_have_died() -> None:
    with IsolatedDecoder("crop256", ImageLimits()) as decoder:
        meter = Meter("node", decoder)
        list(decoder.prepare_all([EncodedImage("a", encoded())]))
        before, of_child = meter.usage().core_s, decoder.cpu_s
        decoder.close()
        after = meter.usage().core_s

    assert of_child > 0.01
    assert after >= before


def test_work_of_this_process_is_time_of_cores() -> None:
    meter = Meter("node")
    began = time.process_time()
    while time.process_time() - began < 0.05:
        np.linalg.norm(np.ones(1000))

    assert meter.usage().core_s >= 0.05
