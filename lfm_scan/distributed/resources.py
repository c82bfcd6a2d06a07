"""From configuration and cluster to the shape of the pipeline: one pure function, tested without a cluster.

What the driver's own machine has plays no part in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import ray

from lfm_scan.errors import ConfigError
from lfm_scan.options import ComputeConfig, check_precision

_WORKERS_TO_COME: Final = 8
"""How many a cluster without any is taken to get, where the configuration does not say."""

_ROWS_WORTH_AN_ACTOR: Final = {"cpu": 64, "cuda": 4096}
"""Images that an actor should have to score at least: starting it takes as long as scoring some of them."""

_ROUNDING: Final = 1e-9


@dataclass(frozen=True)
class Node:
    """What a node of the cluster offers, in use or not.

    Attributes:
        cpus: As Ray counts them.
        gpus: As Ray counts them.
        memory: For Ray's processes, without the object store, in bytes.
    """

    cpus: float
    gpus: float = 0
    memory: float = float("inf")


@dataclass(frozen=True)
class Claim:
    """What an actor or a task claims of its node.

    Attributes:
        cpus: CPUs.
        gpus: GPUs; a fraction lies on one GPU.
        memory: In bytes.
    """

    cpus: float = 0
    gpus: float = 0
    memory: int = 0

    def times_in(self, node: Node) -> int:
        """Return how many of it a node that does nothing else can take on."""
        pairs = ((node.cpus, self.cpus), (self._whole(node.gpus), self.gpus), (node.memory, self.memory))
        return int(min(has / claimed for has, claimed in pairs if claimed) + _ROUNDING)

    def _whole(self, gpus: float) -> float:
        """Return how much of some GPUs fractions can fill: three tenths fill nine tenths of each."""
        if self.gpus >= 1:
            return gpus
        return int(gpus) * int(1 / self.gpus + _ROUNDING) * self.gpus if self.gpus else 0

    def __str__(self) -> str:
        parts = (
            f"{self.cpus:g} CPU" if self.cpus else "",
            f"{self.gpus:g} GPU" if self.gpus else "",
            f"{self.memory / 2**30:.3g} GiB" if self.memory else "",
        )
        return " and ".join(filter(None, parts))


@dataclass(frozen=True)
class PipelineShape:
    """How the pipeline is laid out on the cluster.

    Attributes:
        is_fused: Whether one actor does all of a shard's work, from fetching to committing. On cores alone, handing
            pixels from process to process would only cost; to keep a GPU busy, many cores must decode for it.
        device: "cpu" or "cuda", for the actors.
        min_actors: Scoring actors kept.
        start_actors: Scoring actors to start with.
        max_actors: Most scoring actors; None on a cluster that may grow without bound.
        actor: What each scoring actor claims.
        decode: What each fetch-and-decode task claims; nothing in a fused pipeline, which has none.
        num_workers: Cores, or actors where there are GPUs, to keep busy: decides the size of shards.
    """

    is_fused: bool
    device: str
    min_actors: int
    start_actors: int
    max_actors: int | None
    actor: Claim
    decode: Claim
    num_workers: int

    def pool_of(self, num_shards: int, num_rows: int) -> tuple[int, int, int]:
        """Return the least, the first and the most actors to score so many shards with so many images."""
        useful = -(-num_rows // _ROWS_WORTH_AN_ACTOR[self.device])
        most = max(1, min(num_shards, max(useful, self.min_actors)))
        most = min(most, self.max_actors or most)
        least = min(self.min_actors, most)
        return least, max(least, min(self.start_actors, most)), most


def cluster_nodes() -> list[Node]:
    """Return the nodes of the cluster that this process is connected to."""
    found = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    return [Node(each.get("CPU", 0), each.get("GPU", 0), each.get("memory", 0)) for each in found]


def shape_pipeline(compute: ComputeConfig, nodes: Sequence[Node], *, may_grow: bool) -> PipelineShape:
    """Lay the pipeline out.

    Args:
        compute: The user's settings.
        nodes: Of the cluster.
        may_grow: Whether the cluster may get more nodes. If so, what fits none of those there are is waited for.

    Raises:
        ConfigError: If what is asked for cannot fit.
    """
    on_gpus = compute.device == "cuda" or (compute.device == "auto" and any(node.gpus > 0 for node in nodes))
    check_precision("cuda" if on_gpus else "cpu", compute.precision)
    return _on_gpus(compute, nodes, may_grow) if on_gpus else _on_cores(compute, nodes, may_grow)


def _on_cores(compute: ComputeConfig, nodes: Sequence[Node], may_grow: bool) -> PipelineShape:
    actor = Claim(cpus=1, memory=memory_claim(compute.memory_per_worker, nodes))
    fitting = sum(map(actor.times_in, nodes))
    first, most = _bounds(compute, nodes, actor, fitting, may_grow)
    return PipelineShape(
        is_fused=True,
        device="cpu",
        min_actors=compute.min_actors,
        start_actors=first,
        max_actors=most,
        actor=actor,
        decode=Claim(),
        num_workers=most or max(fitting or _WORKERS_TO_COME, compute.min_actors),
    )


def _on_gpus(compute: ComputeConfig, nodes: Sequence[Node], may_grow: bool) -> PipelineShape:
    # Scoring claims no CPUs and no memory: Ray Data keeps what a stage might claim at its largest from the others,
    # and decoding needs it more.
    actor = Claim(gpus=compute.gpus_per_actor)
    decode = Claim(cpus=compute.cpus_per_decode, memory=memory_claim(compute.memory_per_worker, nodes))
    num_cpus = sum(node.cpus for node in nodes)
    if not may_grow and (num_cpus <= decode.cpus or not any(map(decode.times_in, nodes))):
        raise ConfigError(
            f"fetching and decoding do not fit {_described(nodes)}: each task claims {decode}, and committing a little "
            "of a CPU besides; lower --cpus-per-decode, or use --device cpu"
        )
    first, most = _bounds(compute, nodes, actor, sum(map(actor.times_in, nodes)), may_grow)
    return PipelineShape(
        is_fused=False,
        device="cuda",
        min_actors=compute.min_actors,
        start_actors=first,
        max_actors=most,
        actor=actor,
        decode=decode,
        num_workers=max(most or first, int(num_cpus) or _WORKERS_TO_COME),
    )


def _bounds(
    compute: ComputeConfig, nodes: Sequence[Node], actor: Claim, fitting: int, may_grow: bool
) -> tuple[int, int | None]:
    """Return with how many actors to start, and the most.

    Raises:
        ConfigError: If the least do not fit a cluster that stays as it is.
    """
    most = compute.max_actors
    if not may_grow:
        if fitting < compute.min_actors:
            remedy = "--gpus-per-actor, or use --device cpu" if actor.gpus else "--memory-per-worker"
            raise ConfigError(
                f"{compute.min_actors} scoring actors of {actor} do not fit {_described(nodes)}: lower --min-actors or "
                f"{remedy}"
            )
        most = min(most or fitting, fitting)
    first = max(fitting, compute.min_actors)
    return min(first, most or first), most


def memory_claim(wanted: int, nodes: Sequence[Node]) -> int:
    """Return what a worker claims that wants so many bytes: all of a node where none has as much."""
    largest = max((node.memory for node in nodes if node.cpus), default=float("inf"))
    return int(min(wanted, largest))


def lacking(shape: PipelineShape, nodes: Sequence[Node]) -> str | None:
    """Return what a cluster lacks to work at all, in words; None if it lacks nothing."""
    for who, claim in (("scoring actor", shape.actor), ("fetch-and-decode task", shape.decode)):
        if claim != Claim() and not any(map(claim.times_in, nodes)):
            return f"no node for a {who}, which claims {claim}, in {_described(nodes)}"
    return None


def _described(nodes: Sequence[Node]) -> str:
    cpus, gpus, memory = (sum(getattr(node, name) for node in nodes) for name in ("cpus", "gpus", "memory"))
    return f"the cluster of {cpus:g} CPUs, {gpus:g} GPUs and {memory / 2**30:.3g} GiB"
