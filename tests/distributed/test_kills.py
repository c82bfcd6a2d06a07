"""Drivers, workers and nodes that are killed: every row once, whatever dies and when; and a rerun writes nothing."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

import lfm_scan
from lfm_scan.options import StorageConfig
from tests.faults import FaultProxy, Request
from tests.images import encoded
from tests.scanning import REPOSITORY, command
from tests.servers import S3Server

_NUM_PICTURES = 120
_SHARD_SIZE = 3
_NUM_SHARDS = 40


@dataclass(frozen=True)
class Target:
    """A bucket with images, and how to scan it.

    Attributes:
        server: The store.
        bucket: In it.
        weights: Of the model.
        env: Environment of drivers.
    """

    server: S3Server
    bucket: str
    weights: Path
    env: dict[str, str]

    def arguments(self, output: str, endpoint_url: str, *more: object) -> list[str]:
        return command(
            *("scan", f"s3://{self.bucket}/in/", "--output", self.uri(output), "--weights", self.weights),
            *("--endpoint-url", endpoint_url, "--shard-size", _SHARD_SIZE, *more),
        )

    def uri(self, output: str) -> str:
        return f"s3://{self.bucket}/{output}"

    def start(self, *arguments: object, endpoint_url: str, output: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self.arguments(output, endpoint_url, *arguments),
            env=self.env,
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def run(self, *arguments: object, output: str, endpoint_url: str | None = None) -> str:
        """Run a driver to its good end; return what it said."""
        driver = self.start(*arguments, endpoint_url=endpoint_url or self.server.endpoint_url, output=output)
        _, stderr = driver.communicate(timeout=200)
        assert driver.returncode == 0, stderr.decode()
        return stderr.decode()

    def frame(self, output: str) -> pd.DataFrame:
        return lfm_scan.read_results(self.uri(output), storage=StorageConfig(endpoint_url=self.server.endpoint_url))

    def num_parts(self, output: str) -> int:
        listed = self.server.client().list_objects_v2(Bucket=self.bucket, Prefix=f"{output}/parts/")
        return int(listed["KeyCount"])


@pytest.fixture
def target(s3_server: S3Server, s3_bucket: str, tiny_weights: Path) -> Target:
    for index in range(_NUM_PICTURES):
        s3_server.put(s3_bucket, f"in/{index:03}.png", encoded(seed=index))
    return Target(s3_server, s3_bucket, tiny_weights, {**os.environ, **s3_server.env})


@pytest.fixture
def expected(target: Target) -> dict[str, float | None]:
    results = lfm_scan.Scorer(target.weights).score(encoded(seed=index) for index in range(_NUM_PICTURES))
    return {f"s3://{target.bucket}/in/{index:03}.png": result.logit for index, result in enumerate(results)}


def _check(target: Target, output: str, expected: dict[str, float | None]) -> None:
    frame = target.frame(output)
    assert frame["uri"].is_unique
    assert dict(zip(frame["uri"], frame["logit"], strict=True)) == pytest.approx(expected, abs=1e-3)


def _is_put(text: str) -> Callable[[Request], bool]:
    return lambda request: request.method == "PUT" and text in request.path


_POINTS = {
    "while listing": (lambda request: request.method == "GET" and "prefix=in" in request.query, False),
    "before a file of the plan": (_is_put("/plan/plan-"), False),
    "before the plan's index": (_is_put("/plan/index.json"), False),
    "after the plan's index": (_is_put("/plan/index.json"), True),
    "before a part": (_is_put("/parts/part-000000004"), False),
    "after a part, its reply lost": (_is_put("/parts/part-000000004"), True),
    "before the results": (_is_put("/results/"), False),
    "after the results": (_is_put("/results/"), True),
    "before success": (_is_put("/_SUCCESS.json"), False),
    "after success": (_is_put("/_SUCCESS.json"), True),
}


def test_a_driver_killed_at_any_point_loses_nothing(
    target: Target, expected: dict[str, float | None], local_ray: None
) -> None:
    here = ("--ray-address", ray.get_runtime_context().gcs_address)
    for number, (point, (match, after)) in enumerate(_POINTS.items()):
        output = f"runs/{number}"
        with FaultProxy(target.server.endpoint_url) as proxy:
            with proxy.hold(match, after=after) as hold:
                driver = target.start(*here, endpoint_url=proxy.endpoint_url, output=output)
                hold.wait()
                driver.kill()
                driver.communicate(timeout=30)
            target.run(*here, output=output, endpoint_url=proxy.endpoint_url)
            _check(target, output, expected)
            before = len(proxy.journal)

            again = target.run(*here, output=output, endpoint_url=proxy.endpoint_url)

            assert {record.method for record in proxy.journal[before:]} <= {"GET", "HEAD"}, point
            assert not again.strip(), again


def _kill_at_parts(target: Target, output: str, driver: subprocess.Popen[bytes], num_parts: int) -> None:
    deadline = time.monotonic() + 100
    while target.num_parts(output) < num_parts and driver.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)


def test_a_driver_killed_again_and_again_loses_nothing(target: Target, expected: dict[str, float | None]) -> None:
    for num_parts in (1, 12, 24):
        driver = target.start(endpoint_url=target.server.endpoint_url, output="run")
        _kill_at_parts(target, "run", driver, num_parts)
        driver.kill()
        driver.communicate(timeout=30)
        assert driver.returncode == -signal.SIGKILL
        assert num_parts <= target.num_parts("run") < _NUM_SHARDS

    said = target.run(output="run")

    assert "images are done already" in said
    _check(target, "run", expected)


def _workers_of(driver_pid: int) -> list[psutil.Process]:
    """Return the Ray workers of a driver's own cluster that have begun to work."""
    with contextlib.suppress(psutil.NoSuchProcess):
        processes = psutil.Process(driver_pid).children(recursive=True)
        return [each for each in processes if _name(each).startswith("ray::") and "IDLE" not in _name(each)]
    return []


def _name(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def test_six_workers_killed_two_at_a_time_cost_only_time(target: Target, expected: dict[str, float | None]) -> None:
    driver = target.start(endpoint_url=target.server.endpoint_url, output="run")
    killed: list[str] = []
    for num_parts in (1, 5, 9):
        _kill_at_parts(target, "run", driver, num_parts)
        victims = _workers_of(driver.pid)
        # An actor and a task where there are both.
        victims.sort(key=lambda process: ("ScoreShard" not in _name(process), process.pid))
        for victim in (victims[0], victims[-1]):
            killed.append(_name(victim))
            victim.kill()
    _, stderr = driver.communicate(timeout=200)

    assert driver.returncode == 0, stderr.decode()
    assert len(killed) == 6
    assert any("ScoreShard" in name for name in killed)
    _check(target, "run", expected)


@pytest.fixture
def three_nodes(target: Target, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A Ray cluster of a head without CPUs and two nodes of one CPU each."""
    for name, value in target.server.env.items():
        monkeypatch.setenv(name, value)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    yield cluster
    cluster.shutdown()  # type: ignore[no-untyped-call]


def test_a_node_that_dies_costs_only_time(
    target: Target, expected: dict[str, float | None], three_nodes: Cluster
) -> None:
    driver = target.start("--ray-address", three_nodes.address, endpoint_url=target.server.endpoint_url, output="run")
    _kill_at_parts(target, "run", driver, 4)
    assert target.num_parts("run") < _NUM_SHARDS
    victim = three_nodes.list_all_nodes()[-1]  # type: ignore[no-untyped-call]
    three_nodes.remove_node(victim, allow_graceful=False)
    _, stderr = driver.communicate(timeout=250)

    assert driver.returncode == 0, stderr.decode()
    _check(target, "run", expected)
