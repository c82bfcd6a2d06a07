"""LFM from uint8 pixels to logits in torch's own operations: what every GPU runs, and what kernels are checked against.

Shape legend: B batch, H W image or map height and width, C channels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from lfm_scan.errors import ConfigError
from lfm_scan.model import Checkpoint
from lfm_scan.model.network import Block
from lfm_scan.scoring.torch_backend import fold_batch_norm

Precision = Literal["fp32", "tf32", "bf16", "fp16"]

DTYPES: Final[dict[str, torch.dtype]] = {
    "fp32": torch.float32,
    "tf32": torch.float32,  # fp32 whose convolutions may round their factors: see `convolutions`
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
RESIDUAL_SCALE: Final = 1 / 256
"""What a whole-number residual is multiplied by: exact in every precision, and it keeps the weights near 1."""


class FoldedLFM(nn.Module):
    """LFM for inference, BatchNorm and normalisation folded into the convolutions, channels-last.

    NPR is the difference of whole numbers and exact in every precision: the mean of the normalisation cancels, and
    1 / (255 std) goes into the first convolution. The top-k values are summed in fp32. Takes (B, H, W, 3) uint8,
    returns (B,) fp32.

    Args:
        checkpoint: Weights and their normalisation.
        precision: Of weights and maps.

    Raises:
        ConfigError: If a weight is too large for the precision.
    """

    def __init__(self, checkpoint: Checkpoint, precision: Precision = "fp32") -> None:
        super().__init__()
        self.dtype = DTYPES[precision]
        folded = fold_batch_norm(checkpoint.model)
        first = folded.blocks[0]
        assert isinstance(first, Block)  # noqa: S101 - narrows the type; SNet is made of nothing else
        std = torch.tensor(checkpoint.metadata.std, dtype=torch.float64).view(1, 3, 1, 1)
        # Of a folded copy, not of the checkpoint.
        first.conv.weight.data = (first.conv.weight.double() / (RESIDUAL_SCALE * 255 * std)).float()
        self.blocks = folded.blocks.to(self.dtype)
        self.projection = folded.projection.to(self.dtype)
        self.pool = folded.pool
        self.head = folded.head
        self._limit = torch.finfo(self.dtype).max
        for name, value in self.named_parameters():
            if not value.isfinite().all():
                raise ConfigError(f"{name} is too large for precision {precision}: use bf16 or fp32")
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, pixels_bhwc: Tensor) -> Tensor:
        """Return logits (B,)."""
        values: Tensor = self.pool(self.feature_map(pixels_bhwc))
        logits: Tensor = self.head(values.flatten(1))
        return logits.squeeze(1)

    def feature_map(self, pixels_bhwc: Tensor) -> Tensor:
        """Return the projected map (B, C, H, W) in fp32."""
        x_bchw = (residual(pixels_bhwc).to(self.dtype) * RESIDUAL_SCALE).permute(0, 3, 1, 2)
        for block in self.blocks:
            assert isinstance(block, Block)  # noqa: S101
            # ReLU after the maximum gives the same on a quarter of the map. An infinity would end as NaN: it saturates.
            x_bchw = block.pool(block.conv(x_bchw)).clamp_(0, self._limit)
        projected: Tensor = self.projection(x_bchw)
        return projected.float().clamp_(-self._limit, self._limit)


def residual(pixels_bhwc: Tensor) -> Tensor:
    """Return 255 times the NPR of the pixels before normalisation: (B, H, W, 3) int16, 0 to 255.

    Raises:
        ValueError: If H or W is odd.
    """
    batch, height, width, channels = pixels_bhwc.shape
    if height % 2 or width % 2:
        raise ValueError(f"NPR needs even height and width, got {height}x{width}: crop the last row or column")
    blocks = pixels_bhwc.reshape(batch, height // 2, 2, width // 2, 2, channels).to(torch.int16)
    return (blocks - blocks[:, :, :1, :, :1]).abs().view(batch, height, width, channels)


@contextlib.contextmanager
def convolutions(precision: Precision, *, search: bool = False) -> Iterator[None]:
    """Let cuDNN's convolutions round fp32 factors to TF32 or not, as the precision says; by default torch does.

    Args:
        precision: "fp32" forbids it.
        search: Try algorithms for each new shape and keep the fastest. The choice is made by chance, and bits with it.
    """
    cudnn: Any = torch.backends.cudnn  # its attributes are made at run time
    before = cudnn.conv.fp32_precision, cudnn.benchmark
    cudnn.conv.fp32_precision, cudnn.benchmark = "ieee" if precision == "fp32" else "tf32", search
    try:
        yield
    finally:
        cudnn.conv.fp32_precision, cudnn.benchmark = before
