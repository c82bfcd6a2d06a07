"""Shapes of the pipeline that no configuration asks for."""

from __future__ import annotations

from collections.abc import Sequence

from lfm_scan.distributed.resources import Claim, Node, PipelineShape
from lfm_scan.options import ComputeConfig


def staged_on_cpus(compute: ComputeConfig, nodes: Sequence[Node], *, may_grow: bool) -> PipelineShape:
    """Lay a pipeline out as for GPUs, without one; stands in for `shape_pipeline`."""
    assert compute.device == "auto"
    assert sum(node.gpus for node in nodes) == 0
    assert may_grow
    return PipelineShape(
        is_fused=False,
        device="cpu",
        min_actors=1,
        start_actors=1,
        max_actors=1,
        actor=Claim(cpus=0.9),
        decode=Claim(cpus=1),
        num_workers=2,
    )
