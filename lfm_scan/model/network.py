"""SNet and LFM (BMVC 2025, arXiv 2508.17029, section 3 and Table V).

Shape legend: B batch, C channels, H W image or map height and width, K values kept a channel.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from lfm_scan.model.architecture import NORM_EPS, NUM_POOLED_BLOCKS, PROJECTION_CHANNELS, ArchitectureConfig
from lfm_scan.model.layers import NPR, GlobalAvgPool, GlobalMaxPool, SpatialAttentionPool, TopKPool
from lfm_scan.model.regularizers import Draw, RankLinearDropout, random_k_sample
from lfm_scan.options import Variant


class Block(nn.Module):
    """Conv 2x2 stride 1 without padding, BatchNorm, ReLU, and a 2x2 max-pool where the map shrinks."""

    def __init__(self, in_channels: int, out_channels: int, pool: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=2)
        self.norm: nn.Module = nn.BatchNorm2d(out_channels, eps=NORM_EPS)
        self.pool = nn.MaxPool2d(2) if pool else nn.Identity()

    def forward(self, x_bchw: Tensor) -> Tensor:
        """Return the block's map."""
        out: Tensor = self.pool(torch.relu(self.norm(self.conv(x_bchw))))
        return out


class LFM(nn.Module):
    """Local Focus Mechanism: NPR, SNet, projection, pooling, one linear head.

    The forward pass takes images (B, 3, H, W), normalised by the checkpoint's mean and standard deviation, H and
    W even and at least 48 for the default architecture, and returns logits (B,): raw, positive means generated.
    The score, their sigmoid, is taken by the scorer and nowhere else.

    Args:
        config: The architecture.
        rbld: Variant of rank-based linear dropout used in training mode, or None. Needs top-k pooling.
    """

    def __init__(self, config: ArchitectureConfig | None = None, rbld: Variant | None = None) -> None:
        super().__init__()
        config = config or ArchitectureConfig()
        if rbld is not None and config.pooling != "tkp":
            raise ValueError(f"RBLD drops by rank and needs tkp pooling, not {config.pooling}")
        self.config = config
        self.npr = NPR()
        self.blocks = nn.Sequential(
            *(
                Block(before, after, pool=index < NUM_POOLED_BLOCKS)
                for index, (before, after) in enumerate(itertools.pairwise(config.channels))
            )
        )
        self.projection = nn.Conv2d(config.channels[-1], PROJECTION_CHANNELS, kernel_size=1, bias=False)
        self.pool = _build_pool(config)
        self.rbld = nn.Identity() if rbld is None else RankLinearDropout(config.k, rbld)
        self.head = nn.Linear(PROJECTION_CHANNELS * config.values_per_channel, 1)

    def forward(self, images_bchw: Tensor) -> Tensor:
        """Return logits (B,)."""
        return self.classify(self.rbld(self.pool(self.feature_map(images_bchw))))

    def forward_train(
        self, images_bchw: Tensor, rks: Variant | None = "paper", draw: Draw | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the logits of the main loss and of the auxiliary one, both (B,), from one pass over the map.

        Args:
            images_bchw: As for `forward`.
            rks: Variant of random-k sampling, or None for no auxiliary logits. Needs top-k pooling.
            draw: Source of chance for RBLD and RKS. Default: torch's global generator.

        Raises:
            ValueError: If `rks` is given and the pooling is not top-k.
        """
        return self.classify_train(self.feature_map(images_bchw), rks, draw)

    def classify_train(
        self, map_bchw: Tensor, rks: Variant | None = "paper", draw: Draw | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return what `forward_train` does, from a map (B, 64, H', W') that may have been made at lower precision.

        Raises:
            ValueError: If `rks` is given and the pooling is not top-k.
        """
        values = self.pool(map_bchw)
        dropped = self.rbld(values, draw) if isinstance(self.rbld, RankLinearDropout) else values
        logits = self.classify(dropped)
        if rks is None:
            return logits, None
        if self.config.pooling != "tkp":
            raise ValueError(f"RKS shares the head of tkp pooling and cannot be used with {self.config.pooling}")
        return logits, self.classify(random_k_sample(map_bchw, self.config.k, rks, draw))

    def feature_map(self, images_bchw: Tensor) -> Tensor:
        """Return the projected map (B, 64, H', W'); for 256x256 and depth 5, 30x30."""
        out: Tensor = self.projection(self.blocks(self.npr(images_bchw)))
        return out

    def classify(self, values_bck: Tensor) -> Tensor:
        """Return logits (B,) from pooled values (B, C, K): bias plus the sum of weight times value."""
        out: Tensor = self.head(values_bck.flatten(1)).squeeze(1)
        return out


def _build_pool(config: ArchitectureConfig) -> nn.Module:
    match config.pooling:
        case "tkp":
            return TopKPool(config.k)
        case "gap":
            return GlobalAvgPool()
        case "gmp":
            return GlobalMaxPool()
        case "cbam":
            return SpatialAttentionPool()
