"""What decides which weights fit: the sizes of SNet and of the head (BMVC 2025, arXiv 2508.17029, Tables V to VII).

Imports no torch: a scan on a CPU reads checkpoints without it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Final

from lfm_scan.options import Pooling

BLOCK_CHANNELS: Final = (64, 128, 256, 512, 512, 512, 512)
NUM_POOLED_BLOCKS: Final = 3
PROJECTION_CHANNELS: Final = 64
NORM_EPS: Final = 1e-5
"""Added to BatchNorm's variances."""

ATTENTION_SIDE: Final = 7
"""Of the kernel of CBAM's spatial attention."""

_POOLINGS: Final = ("gap", "gmp", "cbam", "tkp")
_NORM_VALUES: Final = ("weight", "bias", "running_mean", "running_var")


@dataclass(frozen=True)
class ArchitectureConfig:
    """What must be equal for a state dict to fit.

    Attributes:
        depth: Convolutions in SNet, counting the 1x1 projection: 4 to 8 (Table V). 5 is the paper's model. The
            first three blocks halve the map; blocks past the fourth repeat its 512 channels at the same stride.
        pooling: How the map becomes features (Table VI).
        k: Values a channel that top-k pooling keeps, 1 to 256 (Table VII). Ignored by the other poolings.
    """

    depth: int = 5
    pooling: Pooling = "tkp"
    k: int = 16

    def __post_init__(self) -> None:
        if not 4 <= self.depth <= 8:
            raise ValueError(f"SNet depth must be 4 to 8, got {self.depth}")
        if self.pooling not in _POOLINGS:
            raise ValueError(f"pooling must be one of {', '.join(_POOLINGS)}, got {self.pooling!r}")
        if not 1 <= self.k <= 256:
            raise ValueError(f"k must be 1 to 256, got {self.k}")

    @property
    def values_per_channel(self) -> int:
        """Features the head sees for each projected channel."""
        return self.k if self.pooling == "tkp" else 1

    @property
    def channels(self) -> tuple[int, ...]:
        """Of the input and of each block's output."""
        return (3, *BLOCK_CHANNELS[: self.depth - 1])

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor of the network's state dict, by name and in its order."""
        shapes: dict[str, tuple[int, ...]] = {}
        for index, (before, after) in enumerate(itertools.pairwise(self.channels)):
            shapes[f"blocks.{index}.conv.weight"] = (after, before, 2, 2)
            shapes[f"blocks.{index}.conv.bias"] = (after,)
            shapes |= {f"blocks.{index}.norm.{name}": (after,) for name in _NORM_VALUES}
            shapes[f"blocks.{index}.norm.num_batches_tracked"] = ()
        shapes["projection.weight"] = (PROJECTION_CHANNELS, self.channels[-1], 1, 1)
        if self.pooling == "cbam":
            shapes["pool.conv.weight"] = (1, 2, ATTENTION_SIDE, ATTENTION_SIDE)
        shapes["head.weight"] = (1, PROJECTION_CHANNELS * self.values_per_channel)
        shapes["head.bias"] = (1,)
        return shapes
