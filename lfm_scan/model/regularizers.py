"""What LFM adds while training: rank-based linear dropout and random-k sampling. Neither runs at inference.

Source: LFM section 3 and Algorithm 1 (arXiv 2508.17029). Paper and published code differ; both are here under
their names, so that an ablation can say which one it used.

Shape legend: B batch, C channels, H W map height and width, K values kept a channel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias, assert_never

import torch
from torch import Tensor, nn

from lfm_scan.options import Variant

Purpose = Literal["rbld", "rks"]
Draw: TypeAlias = Callable[[Purpose, torch.Size], Tensor]
"""Returns uniform numbers in [0, 1) of a shape (B, ...), for one purpose: how a caller takes chance into its hands."""


class RankLinearDropout(nn.Module):
    """Rank-based linear dropout (RBLD): strong responses are dropped more often than weak ones.

    Works on top-k values (B, C, K) in descending order; the identity in evaluation mode.

    Args:
        k: Values a channel.
        variant: "paper": probability falls linearly from `p_max` at rank 1 to `p_min` at rank k, and each
            survivor is divided by its own keep probability, so that every value keeps its expectation.
            "published": the authors' code, where a slip makes the probability `p_min` at every rank and
            survivors are divided by one minus the mean probability.
        p_min: Drop probability of the k-th largest value, in [0, 1).
        p_max: Drop probability of the largest value, in [p_min, 1).
    """

    keep_k: Tensor
    scale_k: Tensor

    def __init__(self, k: int, variant: Variant = "paper", p_min: float = 0.1, p_max: float = 0.3) -> None:
        super().__init__()
        if not 0 <= p_min <= p_max < 1:
            raise ValueError(f"RBLD needs 0 <= p_min <= p_max < 1, got {p_min} and {p_max}")
        if variant == "paper":
            drop_k = torch.linspace(p_max, p_min, k)
            scale_k = 1 / (1 - drop_k)
        elif variant == "published":
            drop_k = torch.full((k,), p_min)
            scale_k = (1 / (1 - drop_k.mean())).expand(k).clone()
        else:
            assert_never(variant)
        self.k, self.variant, self.p_min, self.p_max = k, variant, p_min, p_max
        # Not persistent: they follow from the arguments, and a checkpoint holds only what was learned.
        self.register_buffer("keep_k", 1 - drop_k, persistent=False)
        self.register_buffer("scale_k", scale_k, persistent=False)

    def forward(self, values_bck: Tensor, draw: Draw | None = None) -> Tensor:
        """Return (B, C, K); a value survives where its uniform number is below its keep probability.

        Args:
            values_bck: Top-k values in descending order.
            draw: Source of the numbers, (B, C, K). Default: torch's global generator.
        """
        if not self.training:
            return values_bck
        if draw is None:
            kept = torch.bernoulli(self.keep_k.expand_as(values_bck))
        else:
            kept = draw("rbld", values_bck.shape).to(self.keep_k.device) < self.keep_k
        return values_bck * kept.to(values_bck.dtype) * self.scale_k.to(values_bck.dtype)

    def extra_repr(self) -> str:
        """Show the variant and its probabilities."""
        return f"k={self.k}, variant={self.variant!r}, p_min={self.p_min}, p_max={self.p_max}"


def random_k_sample(x_bchw: Tensor, k: int, variant: Variant = "paper", draw: Draw | None = None) -> Tensor:
    """Draw k positions of each channel without replacement and sort their values (RKS).

    The result goes through the same head as the top-k values, for the auxiliary loss of weight alpha. Every
    image and channel draws for itself.

    Args:
        x_bchw: The projected map, (B, C, H, W).
        k: Values a channel, at most H * W.
        variant: "paper": descending, the order of top-k, so that one head reads both alike. "published":
            ascending, as the authors' code has it (where the auxiliary loss is switched off).
        draw: Source of uniform numbers, (B, C, H * W). Default: torch's global generator.

    Returns:
        (B, C, K), differentiable with respect to the map.

    Raises:
        ValueError: If the map has fewer than k positions.
    """
    flat = x_bchw.flatten(2)
    if flat.shape[-1] < k:
        raise ValueError(f"cannot draw {k} positions without replacement from a map of {flat.shape[-1]}")
    # The k largest of uniform noise are k positions drawn without replacement, for all channels in one call.
    noise = torch.rand(flat.shape, device=flat.device) if draw is None else draw("rks", flat.shape).to(flat.device)
    positions = noise.topk(k, dim=-1).indices
    return flat.gather(-1, positions).sort(dim=-1, descending=variant == "paper").values
