from __future__ import annotations

import pytest

from lfm_scan.distributed.resources import shape_pipeline
from lfm_scan.errors import ConfigError
from lfm_scan.options import ComputeConfig, Precision


@pytest.mark.parametrize("num_cpus", [1, 2, 16, 96])
def test_on_cores_alone_every_core_has_an_actor_that_does_all(num_cpus: int) -> None:
    shape = shape_pipeline(ComputeConfig(), num_cpus, num_gpus=0)

    assert (shape.device, shape.is_fused) == ("cpu", True)
    assert shape.max_actors == num_cpus
    assert shape.max_actors * shape.cpus_per_actor <= num_cpus


def test_gpus_are_filled_by_fractions() -> None:
    shape = shape_pipeline(ComputeConfig(gpus_per_actor=0.25), num_cpus=32, num_gpus=2)

    assert (shape.device, shape.max_actors, shape.gpus_per_actor) == ("cuda", 8, 0.25)
    assert not shape.is_fused
    # With the pool at its largest, decode tasks still fit: otherwise the pipeline would wait for ever.
    assert shape.max_actors * shape.cpus_per_actor + shape.cpus_per_decode <= 32


def test_a_cpu_is_used_where_asked_for_despite_gpus() -> None:
    assert shape_pipeline(ComputeConfig(device="cpu"), num_cpus=8, num_gpus=4).device == "cpu"


def test_bounds_of_the_pool_are_kept() -> None:
    shape = shape_pipeline(ComputeConfig(min_actors=2, max_actors=3), num_cpus=8, num_gpus=0)

    assert (shape.min_actors, shape.max_actors) == (2, 3)


@pytest.mark.parametrize(
    ("compute", "num_gpus"),
    [
        (ComputeConfig(device="cuda"), 0),
        (ComputeConfig(device="cuda", min_actors=3), 2),
        (ComputeConfig(device="cpu", max_actors=9), 0),
        (ComputeConfig(device="cpu", min_actors=9), 0),
    ],
)
def test_a_pool_that_cannot_fit_is_refused(compute: ComputeConfig, num_gpus: int) -> None:
    with pytest.raises(ConfigError, match="do not fit"):
        shape_pipeline(compute, num_cpus=8, num_gpus=num_gpus)


@pytest.mark.parametrize(("num_gpus", "precision", "remedy"), [(0, "fp16", "bf16"), (1, "bf16", "use fp16")])
def test_a_precision_that_the_device_has_not_is_refused(num_gpus: int, precision: Precision, remedy: str) -> None:
    with pytest.raises(ConfigError, match=f"--precision {precision} .*{remedy}"):
        shape_pipeline(ComputeConfig(precision=precision), num_cpus=8, num_gpus=num_gpus)
