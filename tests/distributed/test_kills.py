"""Drivers and workers that are killed: every row once, whatever dies and when; and a rerun writes nothing."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.distributed.target import Target, make_target
from tests.faults import FaultProxy, Request
from tests.servers import S3Server

_NUM_PICTURES = 120
_SHARD_SIZE = 3
_NUM_SHARDS = 40


@pytest.fixture
def target(s3_server: S3Server, s3_bucket: str, tiny_weights: Path) -> Target:
    return make_target(s3_server, s3_bucket, tiny_weights, _NUM_PICTURES, _SHARD_SIZE)


@pytest.fixture
def expected(target: Target) -> dict[str, float]:
    return target.expected_logits()


def _is_put(text: str) -> Callable[[Request], bool]:
    return lambda request: request.method == "PUT" and text in request.path


_LAST_PART = _is_put(f"/parts/part-{_NUM_SHARDS - 1:09}")
_POINTS = {
    "while planning": (_is_put("/plan/index.json"), False),
    "before a part": (_is_put("/parts/part-000000004"), False),
    "after a part, its reply lost": (_is_put("/parts/part-000000004"), True),
    "while merging": (_is_put("/results/"), False),
    "before success": (_is_put("/_SUCCESS.json"), False),
}
_MORE_POINTS = {
    "while listing": (lambda request: request.method == "GET" and "prefix=in" in request.query, False),
    "before a file of the plan": (_is_put("/plan/plan-"), False),
    "after the plan's index": (_is_put("/plan/index.json"), True),
    "after the results": (_is_put("/results/"), True),
    "after success": (_is_put("/_SUCCESS.json"), True),
}


@pytest.mark.parametrize(
    "points", [_POINTS, pytest.param(_MORE_POINTS, marks=pytest.mark.soak)], ids=["points", "more"]
)
def test_a_driver_killed_at_any_point_loses_nothing(
    points: dict[str, tuple[Callable[[Request], bool], bool]],
    target: Target,
    expected: dict[str, float],
    joined_ray: None,
) -> None:
    for number, (point, (match, after)) in enumerate(points.items()):
        output = f"runs/{number}"
        with FaultProxy(target.server.endpoint_url) as proxy:
            with proxy.hold(match, after=after) as hold:
                driver = target.start(endpoint_url=proxy.endpoint_url, output=output)
                hold.wait()
                driver.kill()
                driver.communicate(timeout=100)
            target.run(output=output, endpoint_url=proxy.endpoint_url)
            target.check(output, expected)
            if after:
                before = len(proxy.journal)
                again = target.run(output=output, endpoint_url=proxy.endpoint_url)
                assert {record.method for record in proxy.journal[before:]} <= {"GET", "HEAD"}, point
                assert not again.strip(), again


@pytest.mark.usefixtures("joined_ray")
def test_a_driver_killed_again_and_again_loses_nothing(target: Target, expected: dict[str, float]) -> None:
    with FaultProxy(target.server.endpoint_url) as proxy, proxy.hold(_LAST_PART):  # or a run could end before its time
        for num_parts in (1, 12, 24):
            driver = target.start(endpoint_url=proxy.endpoint_url, output="run")
            target.wait_for_parts("run", driver, num_parts)
            driver.kill()
            driver.communicate(timeout=100)
            assert driver.returncode == -signal.SIGKILL
            assert num_parts <= target.num_parts("run") < _NUM_SHARDS

    said = target.run(output="run")

    assert "images are done already" in said
    target.check("run", expected)


def _workers_of(driver_pid: int) -> list[psutil.Process]:
    """Return the Ray workers of a driver's own cluster that have begun to work, the eldest first."""
    with contextlib.suppress(psutil.NoSuchProcess):
        processes = psutil.Process(driver_pid).children(recursive=True)
        workers = [each for each in processes if re.match(r"ray::(?!IDLE|\w*Agent)", _name(each))]
        return sorted(workers, key=psutil.Process.create_time)  # Ray itself ends with its agents
    return []


def _name(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def test_six_workers_killed_two_at_a_time_cost_only_time(target: Target, expected: dict[str, float]) -> None:
    killed: list[str] = []
    with FaultProxy(target.server.endpoint_url) as proxy:
        with proxy.hold(_LAST_PART):
            driver = target.start(endpoint_url=proxy.endpoint_url, output="run")
            for num_parts in (1, 5, 9):
                target.wait_for_parts("run", driver, num_parts)
                killed += _kill_two_workers_of(driver)
        _, stderr = driver.communicate(timeout=500)

    assert driver.returncode == 0, stderr.decode()
    assert len(killed) == 6
    assert any("ScanShard" in name for name in killed)
    target.check("run", expected)


def _kill_two_workers_of(driver: subprocess.Popen[bytes]) -> list[str]:
    """Kill an actor that scans, if there is one, and whatever else there is; return what they were."""
    killed: list[str] = []
    while len(killed) < 2:
        assert driver.poll() is None, driver.communicate()[1].decode()
        workers = sorted(_workers_of(driver.pid), key=lambda process: "ScanShard" not in _name(process))
        if len(workers) < 2 - len(killed):
            time.sleep(0.02)
            continue
        victim = workers[-1 if killed else 0]
        name = _name(victim)
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended by itself: another one then
            victim.kill()
            killed.append(name)
    return killed
