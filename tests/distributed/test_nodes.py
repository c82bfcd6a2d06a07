"""Clusters of several nodes: raylets of their own on this machine, some with GPUs that Ray only believes in."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray.util
from ray._private.state import GlobalState
from ray.cluster_utils import Cluster

from lfm_scan.storage.s3_client import forget_clients
from tests.distributed.probe import Notes, Settings
from tests.distributed.target import Target, make_target
from tests.scanning import REPOSITORY
from tests.servers import S3Server, free_port
from tests.waiting import wait_until

_NUM_PICTURES = 120
_SHARD_SIZE = 3
_NUM_SHARDS = 40


@pytest.fixture(scope="module")
def target(s3_server: S3Server, tiny_weights: Path) -> Iterator[Target]:
    """Images in a bucket that the nodes, once started, may use."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.env.items():
            patch.setenv(name, value)
        forget_clients()  # clients keep the credentials they were made with
        bucket = f"test-{uuid.uuid4().hex[:16]}"
        s3_server.client().create_bucket(Bucket=bucket)
        yield make_target(s3_server, bucket, tiny_weights, _NUM_PICTURES, _SHARD_SIZE)
    forget_clients()


@pytest.fixture(scope="module")
def expected(target: Target) -> dict[str, float]:
    return target.expected_logits()


@pytest.fixture(scope="module")
def cluster(target: Target) -> Iterator[Cluster]:
    """A head without CPUs, two nodes of one CPU each, and one of two GPUs."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    cluster.add_node(num_cpus=1)
    cluster.add_node(num_cpus=0, num_gpus=2)
    cluster.wait_for_nodes()
    yield cluster
    cluster.shutdown()  # type: ignore[no-untyped-call]


def _start(
    target: Target, cluster: Cluster, notes: Path, settings: Settings, *arguments: object
) -> subprocess.Popen[bytes]:
    """Start a scan to `notes.name` whose stages write down where they run."""
    command = target.arguments(notes.name, target.server.endpoint_url, "--ray-address", cluster.address, *arguments)
    probe = [sys.executable, "-m", "tests.distributed.probe", str(notes), json.dumps(asdict(settings))]
    return subprocess.Popen(
        [*probe, *command[command.index("scan") :]],
        env={**os.environ, **target.server.env},
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def _wait_until(is_so: Callable[[], bool], driver: subprocess.Popen[bytes]) -> None:
    """Return once something is so, or the driver has ended."""
    wait_until(lambda: is_so() or driver.poll() is not None)


def _finish(driver: subprocess.Popen[bytes]) -> str:
    """Wait for a good end; return what the driver said."""
    _, stderr = driver.communicate(timeout=500)
    assert driver.returncode == 0, stderr.decode()
    return stderr.decode()


def test_cpu_nodes_decode_gpu_nodes_score_and_the_pool_grows_and_shrinks(
    target: Target, expected: dict[str, float], cluster: Cluster, tmp_path: Path
) -> None:
    _, *cpu_nodes, gpu_node = _nodes_in_order(cluster)
    settings = Settings(gpus_score=True, actors=2, last_shard=_NUM_SHARDS - 1)
    driver = _start(target, cluster, tmp_path, settings, "--max-actors", 2)
    notes, state = Notes(tmp_path), _state_of(cluster)
    _finish(driver)

    sizes = notes.pool_sizes("score actor", state.actor_table(None))
    assert sizes[:3] == [1, 2, 1]  # before the end: the last shard was held until then
    assert max(sizes) == 2
    assert notes.nodes_of("prepare") == set(cpu_nodes)
    assert notes.nodes_of("score") == {gpu_node}
    assert notes.nodes_of("commit") <= set(cpu_nodes)
    target.check(tmp_path.name, expected)


def test_a_node_added_midway_is_used_and_one_that_dies_costs_only_time(
    target: Target, expected: dict[str, float], cluster: Cluster, tmp_path: Path
) -> None:
    _, first, second, _ = _nodes_in_order(cluster)
    driver = _start(target, cluster, tmp_path, Settings(actors=3, halfway=_NUM_SHARDS // 2), "--device", "cpu")
    notes = Notes(tmp_path)
    _wait_until(lambda: notes.nodes_of("scan") == {first, second}, driver)
    added = cluster.add_node(num_cpus=1)
    _wait_until(lambda: added.node_id in notes.nodes_of("scan"), driver)
    num_parts = target.num_parts(tmp_path.name)
    (victim,) = (node for node in cluster.worker_nodes if node.node_id == second)
    cluster.remove_node(victim, allow_graceful=False)
    notes.go_on()
    _finish(driver)

    assert num_parts <= _NUM_SHARDS // 2
    assert notes.nodes_of("scan") == {first, second, added.node_id}
    target.check(tmp_path.name, expected)


def test_a_scan_that_no_node_comes_for_names_it_and_leaves_nothing_behind(target: Target, cluster: Cluster) -> None:
    driver = target.start(
        *("--ray-address", cluster.address, "--device", "cuda", "--gpus-per-actor", 4, "--cpus-per-decode", 3),
        *("--stall-timeout", 4),
        endpoint_url=target.server.endpoint_url,
        output="in-vain",
    )
    _, stderr = driver.communicate(timeout=500)

    *_, said = stderr.decode().splitlines()
    assert driver.returncode == 1
    stalled = re.match(
        r"error: stopped: no shard was finished for (\d+) s \(--stall-timeout\), 40 of 40 are left", said
    )
    assert stalled is not None, said
    assert int(stalled[1]) >= 4
    assert "There is no node for a scoring actor, which claims 4 GPU, in the cluster of 2 CPUs, 2 GPUs and " in said
    assert "Traceback" not in stderr.decode()


_AUTOSCALER = {
    "cluster_name": "test",
    "max_workers": 2,
    "provider": {
        "type": "fake_multinode",
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
    },
    "available_node_types": {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "cpu": {"resources": {"CPU": 1, "object_store_memory": 150 * 2**20}, "node_config": {}, "max_workers": 1},
        "gpu": {"resources": {"GPU": 1, "object_store_memory": 150 * 2**20}, "node_config": {}, "max_workers": 1},
    },
    "head_node_type": "ray.head.default",
    "upscaling_speed": 1.0,
    "idle_timeout_minutes": 5,
}
_NO_COMMANDS = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")


@pytest.fixture
def empty_cluster(target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head without CPUs whose autoscaler starts a node with a CPU and one with a GPU, once somebody asks."""
    monkeypatch.setenv("RAY_FAKE_CLUSTER", "1")
    monkeypatch.setenv("AUTOSCALER_UPDATE_INTERVAL_S", "1")
    port = free_port()
    settings: dict[str, Any] = {**_AUTOSCALER, **{f"{name}_commands": [] for name in _NO_COMMANDS}}
    settings["provider"]["gcs_address"] = f"{ray.util.get_node_ip_address()}:{port}"  # type: ignore[no-untyped-call]
    path = tmp_path / "autoscaler.json"
    path.write_text(json.dumps(settings | {"auth": {}, "docker": {}, "file_mounts": {}, "cluster_synced_files": []}))
    head = {"num_cpus": 0, "include_dashboard": False, "gcs_server_port": port, "autoscaling_config": str(path)}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    head_node: Any = cluster.head_node
    (monitor,) = head_node.all_processes["monitor"]
    try:
        yield cluster
    finally:
        started = psutil.Process(monitor.process.pid).children(recursive=True)
        cluster.shutdown()  # type: ignore[no-untyped-call]
        for process in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def test_a_cluster_without_nodes_is_asked_for_them_and_waited_for(
    target: Target, expected: dict[str, float], empty_cluster: Cluster, tmp_path: Path
) -> None:
    folder = tmp_path / "from-zero"
    folder.mkdir()
    driver = _start(target, empty_cluster, folder, Settings(gpus_score=True), "--include", "000*.png")
    said = _finish(driver)
    notes = Notes(folder)

    assert (
        "Waiting for nodes: there is no node for a scoring actor, which claims 1 GPU, in the cluster of 0 CPUs" in said
    )
    (decoded,), (scored,) = notes.nodes_of("prepare"), notes.nodes_of("score")
    assert len({decoded, scored, *_nodes_in_order(empty_cluster)}) == 3
    target.check(folder.name, {uri: logit for uri, logit in expected.items() if "/in/000" in uri})


def _state_of(cluster: Cluster) -> Any:  # noqa: ANN401 - Ray gives it no types
    """Return Ray's tables, for a process that is no driver."""
    raylet: Any = ray._raylet
    state: Any = GlobalState()  # type: ignore[no-untyped-call]
    options = raylet.GcsClientOptions.create(
        cluster.address, None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=False
    )
    state._initialize_global_state(options)
    return state


def _nodes_in_order(cluster: Cluster) -> list[str]:
    """Return the ids of the head, the nodes with CPUs and those with GPUs."""
    nodes: list[Any] = cluster.list_all_nodes()  # type: ignore[no-untyped-call]
    return [node.node_id for node in sorted(nodes, key=lambda node: (not node.head, node._ray_params.num_gpus))]
