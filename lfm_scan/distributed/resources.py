"""From configuration and cluster to the shape of the pipeline: one pure function, tested without a cluster."""

from __future__ import annotations

from dataclasses import dataclass

from lfm_scan.errors import ConfigError
from lfm_scan.options import ComputeConfig, check_precision


@dataclass(frozen=True)
class PipelineShape:
    """How the pipeline is laid out on the cluster.

    Attributes:
        is_fused: Whether one actor does all of a shard's work, from fetching to committing. On cores alone, handing
            pixels from process to process would only cost; to keep a GPU busy, many cores must decode for it.
        device: "cpu" or "cuda", for the actors.
        min_actors: Scoring actors kept.
        max_actors: Most scoring actors.
        cpus_per_actor: CPUs each claims.
        gpus_per_actor: GPUs each claims.
        cpus_per_decode: CPUs each fetch-and-decode task claims; fused pipelines have none.
        num_workers: Cores, or actors where there are GPUs, to keep busy: decides the size of shards.
    """

    is_fused: bool
    device: str
    min_actors: int
    max_actors: int
    cpus_per_actor: float
    gpus_per_actor: float
    cpus_per_decode: float
    num_workers: int


def shape_pipeline(compute: ComputeConfig, num_cpus: float, num_gpus: float) -> PipelineShape:
    """Lay the pipeline out.

    Args:
        compute: The user's settings.
        num_cpus: CPUs of the cluster.
        num_gpus: GPUs of the cluster.

    Raises:
        ConfigError: If what is asked for cannot fit.
    """
    if compute.device == "cuda" or (compute.device == "auto" and num_gpus > 0):
        check_precision("cuda", compute.precision)
        fitting = int(num_gpus / compute.gpus_per_actor + 1e-9)
        if fitting < compute.min_actors:
            raise ConfigError(
                f"{compute.min_actors} scoring actors of {compute.gpus_per_actor:g} GPU do not fit the "
                f"{num_gpus:g} GPUs of the cluster: lower --min-actors or --gpus-per-actor, or use --device cpu"
            )
        most = min(compute.max_actors or fitting, fitting)
        return PipelineShape(
            is_fused=False,
            device="cuda",
            min_actors=min(compute.min_actors, most),
            max_actors=most,
            cpus_per_actor=1,
            gpus_per_actor=compute.gpus_per_actor,
            cpus_per_decode=compute.cpus_per_decode,
            num_workers=max(most, int(num_cpus)),
        )
    check_precision("cpu", compute.precision)
    cores = max(1, int(num_cpus))
    most = compute.max_actors or max(cores, compute.min_actors)
    if most > cores:
        raise ConfigError(f"{most} scoring actors do not fit {cores} CPUs: lower --max-actors or --min-actors")
    return PipelineShape(
        is_fused=True,
        device="cpu",
        min_actors=compute.min_actors,
        max_actors=most,
        cpus_per_actor=1,
        gpus_per_actor=0,
        cpus_per_decode=0,
        num_workers=cores,
    )
