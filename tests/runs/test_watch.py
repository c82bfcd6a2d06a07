from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lfm_scan.errors import FailureRateError, StallError
from lfm_scan.options import StorageConfig
from lfm_scan.runs.plan import Plan, write_plan
from lfm_scan.runs.rundir import RunDirectory
from lfm_scan.runs.shard import Failure, Receipt
from lfm_scan.runs.summary import Summary
from lfm_scan.runs.watch import Watch
from lfm_scan.sources.inputs import INPUT_SCHEMA, Input


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def _watch(directory: RunDirectory, plan: Plan, clock: Clock, **settings: float) -> Watch:
    config = SimpleNamespace(**{"max_failure_rate": 1.0, "stall_timeout": 60.0, **settings})
    run: Any = SimpleNamespace(directory=directory, config=config)
    return Watch(run, plan, range(plan.num_shards), clock)


def _receipt(shard: int, num_rows: int, num_failed: int) -> Receipt:
    statuses = Counter(ok=num_rows - num_failed, denied=num_failed)
    failures = tuple(Failure(f"s3://b/{shard}-{index}.png", "denied", "no key") for index in range(min(3, num_failed)))
    return Receipt(shard, True, Summary(num_rows=num_rows, by_status=statuses), failures)


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    return RunDirectory(str(tmp_path), StorageConfig())


def _plan(directory: RunDirectory, num_rows: int, shard_size: int) -> Plan:
    inputs = (Input(uri=f"s3://b/{index}.png") for index in range(num_rows))
    return write_plan(directory, inputs, INPUT_SCHEMA, num_workers=1, shard_size=shard_size)


def test_a_run_stops_at_the_rate_so_far_and_names_examples(directory: RunDirectory) -> None:
    watch = _watch(directory, _plan(directory, 5000, 500), Clock(), max_failure_rate=0.1)
    watch.shard_done(_receipt(0, 500, 100))  # too few rows yet to say anything
    watch.shard_done(_receipt(1, 500, 0))
    watch.shard_done(_receipt(2, 500, 50))

    with pytest.raises(FailureRateError, match=r"201 of 2,000 images failed.*s3://b/0-0.png: denied: no key"):
        watch.shard_done(_receipt(3, 500, 51))


def test_a_small_run_ends_before_it_would_be_stopped(directory: RunDirectory) -> None:
    watch = _watch(directory, _plan(directory, 999, 333), Clock(), max_failure_rate=0.1)

    for shard in range(3):
        watch.shard_done(_receipt(shard, 333, 333))


def test_a_run_that_may_fail_wholly_never_stops(directory: RunDirectory) -> None:
    watch = _watch(directory, _plan(directory, 20, 10), Clock())

    watch.shard_done(_receipt(0, 10, 10))
    watch.shard_done(_receipt(1, 10, 10))


def test_a_run_that_stands_still_says_where(directory: RunDirectory) -> None:
    clock = Clock()
    watch = _watch(directory, _plan(directory, 100, 10), clock)
    clock.now = 59.0
    watch.check_progress()
    watch.shard_done(_receipt(1, 10, 0))
    clock.now = 118.0
    watch.check_progress()

    clock.now = 119.0
    with pytest.raises(StallError, match=r"for 60 s.*9 of 10 are left.*shard 0, s3://b/0.png to s3://b/9.png; shard 2"):
        watch.check_progress()


def test_a_run_that_waits_for_nodes_says_for_which(directory: RunDirectory) -> None:
    clock = Clock()
    watch = _watch(directory, _plan(directory, 100, 10), clock)

    clock.now = 60.0
    with pytest.raises(
        StallError, match=r"10 of 10 are left\. There is no node for a scoring actor\. The first of them"
    ):
        watch.check_progress(lambda: "no node for a scoring actor")
