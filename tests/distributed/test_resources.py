from __future__ import annotations

import pytest

from lfm_scan.distributed.resources import Claim, Node, lacking, shape_pipeline
from lfm_scan.errors import ConfigError
from lfm_scan.options import ComputeConfig, Precision

_GIB = 2**30
_HEAD = Node(cpus=0, memory=8 * _GIB)


@pytest.mark.parametrize("num_cpus", [1, 2, 16, 96])
def test_on_cores_alone_every_core_has_an_actor_that_does_all(num_cpus: int) -> None:
    shape = shape_pipeline(ComputeConfig(), [Node(num_cpus)], may_grow=False)

    assert (shape.device, shape.is_fused) == ("cpu", True)
    assert shape.start_actors == shape.max_actors == shape.num_workers == num_cpus
    assert shape.actor == Claim(cpus=1, memory=_GIB)


def test_a_node_takes_on_no_more_actors_than_its_memory_holds() -> None:
    nodes = [_HEAD, Node(8, memory=5.5 * _GIB), Node(4, memory=64 * _GIB)]

    assert shape_pipeline(ComputeConfig(), nodes, may_grow=False).max_actors == 5 + 4
    assert shape_pipeline(ComputeConfig(memory_per_worker=2 * _GIB), nodes, may_grow=False).max_actors == 2 + 4
    assert shape_pipeline(ComputeConfig(memory_per_worker=0), nodes, may_grow=False).max_actors == 8 + 4


def test_where_no_node_has_the_memory_one_worker_has_all_of_it() -> None:
    shape = shape_pipeline(ComputeConfig(), [_HEAD, Node(2, memory=_GIB // 2)], may_grow=False)

    assert (shape.max_actors, shape.actor.memory) == (1, _GIB // 2)


@pytest.mark.parametrize(
    ("share", "gpus_of_nodes", "num_actors"),
    [(0.25, [2], 8), (0.3, [2], 6), (1, [1, 1, 1], 3), (2, [1, 1, 1], 0), (2, [3, 4], 3)],
)
def test_gpus_are_filled_one_by_one_and_node_by_node(share: float, gpus_of_nodes: list[int], num_actors: int) -> None:
    claim = Claim(gpus=share)

    assert sum(claim.times_in(Node(16, gpus)) for gpus in gpus_of_nodes) == num_actors


def test_where_gpus_score_all_cpus_decode() -> None:
    shape = shape_pipeline(ComputeConfig(gpus_per_actor=0.25), [Node(32, 2, 64 * _GIB)], may_grow=False)

    assert (shape.device, shape.is_fused, shape.max_actors) == ("cuda", False, 8)
    assert shape.actor == Claim(gpus=0.25)
    assert shape.decode == Claim(cpus=1, memory=_GIB)
    assert shape.num_workers == 32


def test_a_cpu_is_used_where_asked_for_despite_gpus() -> None:
    assert shape_pipeline(ComputeConfig(device="cpu"), [Node(8, 4)], may_grow=False).device == "cpu"


@pytest.mark.parametrize("may_grow", [False, True])
def test_bounds_of_the_pool_are_kept(may_grow: bool) -> None:
    shape = shape_pipeline(ComputeConfig(min_actors=2, max_actors=3), [Node(8)], may_grow=may_grow)

    assert (shape.min_actors, shape.start_actors, shape.max_actors) == (2, 3, 3)
    assert shape.num_workers == 3


@pytest.mark.parametrize(
    ("compute", "node"),
    [
        (ComputeConfig(device="cuda"), Node(8)),
        (ComputeConfig(device="cuda", min_actors=3), Node(8, 2)),
        (ComputeConfig(device="cpu", min_actors=9), Node(8)),
        (ComputeConfig(device="cpu", min_actors=5), Node(8, memory=4 * _GIB)),
        (ComputeConfig(device="cuda"), Node(1, 1)),  # decoding would leave nothing for committing
    ],
)
def test_what_cannot_fit_is_refused_unless_the_cluster_may_grow(compute: ComputeConfig, node: Node) -> None:
    with pytest.raises(ConfigError, match="do not fit the cluster of "):
        shape_pipeline(compute, [node], may_grow=False)
    assert shape_pipeline(compute, [node], may_grow=True).start_actors == compute.min_actors


def test_more_actors_than_fit_are_allowed_and_not_started() -> None:
    assert shape_pipeline(ComputeConfig(max_actors=9), [Node(8)], may_grow=False).max_actors == 8
    assert shape_pipeline(ComputeConfig(max_actors=9, device="cuda"), [Node(8, 2)], may_grow=False).max_actors == 2


def test_a_cluster_that_may_grow_starts_with_what_there_is_and_is_bounded_by_the_configuration_alone() -> None:
    shape = shape_pipeline(ComputeConfig(), [_HEAD, Node(4)], may_grow=True)
    bounded = shape_pipeline(ComputeConfig(max_actors=64), [_HEAD, Node(4)], may_grow=True)

    assert (shape.start_actors, shape.max_actors, shape.num_workers) == (4, None, 4)
    assert (bounded.start_actors, bounded.max_actors, bounded.num_workers) == (4, 64, 64)


def test_a_cluster_without_workers_is_asked_for_the_least_and_planned_for_more() -> None:
    shape = shape_pipeline(ComputeConfig(min_actors=3), [_HEAD], may_grow=True)

    assert (shape.start_actors, shape.max_actors, shape.num_workers) == (3, None, 8)
    assert shape.pool_of(num_shards=1000, num_rows=100_000) == (3, 3, 1000)


def test_a_few_images_are_not_worth_many_actors() -> None:
    shape = shape_pipeline(ComputeConfig(), [Node(8)], may_grow=False)

    assert shape.pool_of(num_shards=12, num_rows=12) == (1, 1, 1)
    assert shape.pool_of(num_shards=64, num_rows=130) == (1, 3, 3)
    assert shape.pool_of(num_shards=64, num_rows=5000) == (1, 8, 8)
    assert shape.pool_of(num_shards=2, num_rows=1024) == (1, 2, 2)
    kept = shape_pipeline(ComputeConfig(min_actors=4), [Node(8)], may_grow=False)
    assert kept.pool_of(num_shards=12, num_rows=12) == (4, 4, 4)


def test_what_a_cluster_lacks_is_named() -> None:
    on_cores = shape_pipeline(ComputeConfig(), [_HEAD], may_grow=True)
    on_gpus = shape_pipeline(ComputeConfig(device="cuda"), [_HEAD], may_grow=True)

    assert lacking(on_cores, [_HEAD]) == (
        "no node for a scoring actor, which claims 1 CPU and 1 GiB, in the cluster of 0 CPUs, 0 GPUs and 8 GiB"
    )
    assert lacking(on_cores, [_HEAD, Node(1)]) is None
    assert "scoring actor, which claims 1 GPU, in" in (lacking(on_gpus, [_HEAD, Node(4)]) or "")
    assert "fetch-and-decode task, which claims 1 CPU and 1 GiB, in" in (lacking(on_gpus, [_HEAD, Node(0, 1)]) or "")
    assert lacking(on_gpus, [Node(4), Node(0, 1)]) is None


@pytest.mark.parametrize(("num_gpus", "precision", "remedy"), [(0, "fp16", "bf16"), (1, "bf16", "use fp16")])
def test_a_precision_that_the_device_has_not_is_refused(num_gpus: int, precision: Precision, remedy: str) -> None:
    with pytest.raises(ConfigError, match=f"--precision {precision} .*{remedy}"):
        shape_pipeline(ComputeConfig(precision=precision), [Node(8, num_gpus)], may_grow=False)
