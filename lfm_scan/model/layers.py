"""The fixed and pooling layers of LFM.

Sources: NPR is Tan et al., "Rethinking the Up-Sampling Operations in CNN-based Generative Network for
Generalizable Deepfake Detection" (CVPR 2024); top-k pooling is LFM section 3 (BMVC 2025, arXiv 2508.17029), and
the other poolings are the ones its Table VI compares with.

Shape legend: B batch, C channels, H W map height and width, K values kept a channel, F features of the head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lfm_scan.model.architecture import ATTENTION_SIDE


class NPR(nn.Module):
    """Neighbouring-pixel residual: how far each pixel is from the top-left one of its 2x2 block.

    Fixed, no parameters. Input and output (B, C, H, W), float; output is at least 0, and is 0 at every
    position with even row and even column.

    Raises:
        ValueError: If H or W is odd. A preprocess policy must deliver even sizes; the layer does not guess.
    """

    def forward(self, x_bchw: Tensor) -> Tensor:
        """Return |x - up(down(x))|."""
        height, width = x_bchw.shape[-2:]
        if height % 2 or width % 2:
            raise ValueError(f"NPR needs even height and width, got {height}x{width}: crop the last row or column")
        corner = x_bchw[..., ::2, ::2]
        return (x_bchw - corner.repeat_interleave(2, dim=-2).repeat_interleave(2, dim=-1)).abs()


class TopKPool(nn.Module):
    """Per channel, the k largest values of the map in descending order (TKP, LFM section 3).

    The order is part of the contract: the linear head has one weight for each rank.
    """

    def __init__(self, k: int) -> None:
        super().__init__()
        if k < 1:
            raise ValueError(f"top-k pooling needs k >= 1, got {k}")
        self.k = k

    def forward(self, x_bchw: Tensor) -> Tensor:
        """Return (B, C, K).

        Raises:
            ValueError: If the map has fewer than k positions.
        """
        positions = x_bchw.shape[-2] * x_bchw.shape[-1]
        if positions < self.k:
            raise ValueError(f"a map of {positions} positions cannot give its {self.k} largest: use a larger image")
        return x_bchw.flatten(2).topk(self.k, dim=-1, sorted=True).values

    def extra_repr(self) -> str:
        """Show k."""
        return f"k={self.k}"


class GlobalAvgPool(nn.Module):
    """Mean of each channel (GAP): (B, C, H, W) to (B, C, 1)."""

    def forward(self, x_bchw: Tensor) -> Tensor:
        """Return (B, C, 1)."""
        return x_bchw.flatten(2).mean(dim=-1, keepdim=True)


class GlobalMaxPool(nn.Module):
    """Maximum of each channel (GMP): (B, C, H, W) to (B, C, 1)."""

    def forward(self, x_bchw: Tensor) -> Tensor:
        """Return (B, C, 1)."""
        return x_bchw.flatten(2).amax(dim=-1, keepdim=True)


class SpatialAttentionPool(nn.Module):
    """CBAM's spatial attention, then the mean of the weighted map: (B, C, H, W) to (B, C, 1).

    Source: Woo et al., "CBAM: Convolutional Block Attention Module" (ECCV 2018), section 3, 7x7 kernel.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, kernel_size=ATTENTION_SIDE, padding=ATTENTION_SIDE // 2, bias=False)

    def forward(self, x_bchw: Tensor) -> Tensor:
        """Return (B, C, 1)."""
        summary = torch.cat([x_bchw.mean(dim=1, keepdim=True), x_bchw.amax(dim=1, keepdim=True)], dim=1)
        weighted = x_bchw * torch.sigmoid(self.conv(summary))
        return weighted.flatten(2).mean(dim=-1, keepdim=True)
