"""LFM from uint8 pixels to logits in the kernels of `kernels`: packing of weights, launches, and their block sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Final

import torch
from torch import Tensor, nn

from lfm_scan.errors import ConfigError
from lfm_scan.model import ArchitectureConfig, Checkpoint
from lfm_scan.model.network import Block
from lfm_scan.scoring.cuda import kernels
from lfm_scan.scoring.cuda.folded import DTYPES, FoldedLFM, Precision

_PLUS: Final = ((0, 1), (1, 0), (1, 1), (1, 2), (2, 1))
"""Pixels of a pooling window's 3x3 whose NPR is not 0, in the kernel's order."""
_WINDOW: Final = ((0, 0), (0, 1), (1, 0), (1, 1))
_NUM_VALUES: Final = 16  # 15 and a zero: the least depth of a product on tensor cores
_TOPK_BLOCK_CHANNELS: Final = 8
_TOPK_WARPS: Final = 8


@dataclass(frozen=True)
class Launch:
    """How one kernel is cut into programs.

    Attributes:
        block_m: Rows a program; pooled rows where the kernel pools.
        block_n: Output channels at a time. Not of layer1, which takes all.
        block_k: Input channels at a time. Not of layer1.
        quad: See `kernels.conv_pool`.
        num_warps: Warps a program.
        num_stages: Steps of the product whose loads are on their way at once.
    """

    block_m: int
    block_n: int = 128
    block_k: int = 64
    quad: bool = False
    num_warps: int = 8
    num_stages: int = 3


@dataclass(frozen=True)
class Launches:
    """How each layer's kernel is cut into programs."""

    layer1: Launch = field(default_factory=lambda: Launch(128, num_warps=4))
    layer2: Launch = field(default_factory=lambda: Launch(32))
    layer3: Launch = field(default_factory=lambda: Launch(32))
    layer4: Launch = field(default_factory=lambda: Launch(128))


_POOLED_CANDIDATES: Final = (
    Launch(32),
    Launch(32, num_stages=4),
    Launch(32, num_warps=4),
    Launch(64),
    Launch(64, block_n=64, quad=True),
    Launch(64, block_n=64, quad=True, num_warps=4, num_stages=2),
    Launch(128, block_n=64, quad=True, num_stages=2),
    Launch(64, block_n=128, quad=True, num_stages=2),
)
CANDIDATES: Final[dict[str, tuple[Launch, ...]]] = {
    "layer1": (Launch(64, num_warps=4), Launch(128, num_warps=4), Launch(128), Launch(256)),
    "layer2": _POOLED_CANDIDATES,
    "layer3": _POOLED_CANDIDATES,
    "layer4": (
        Launch(128),
        Launch(128, num_stages=4),
        Launch(128, block_n=64, num_warps=4),
        Launch(64, num_warps=4, num_stages=4),
        Launch(128, block_n=256, num_stages=2),
    ),
}
"""What `tune` tries."""


class FusedLFM(nn.Module):
    """LFM for inference in five kernels. Takes (B, H, W, 3) uint8 on a GPU, returns (B,) fp32.

    A logit does not depend on the other images of a batch, nor on how many they are.

    Args:
        checkpoint: Weights and their normalisation; of the paper's architecture, see `is_fusible`.
        precision: "fp16" or "bf16", of factors and maps; sums are fp32.
        launches: Block sizes. Default: what suits an H100 and its relatives.

    Raises:
        ConfigError: If the architecture or the precision has no kernels, or a weight is too large for the precision.
    """

    def __init__(self, checkpoint: Checkpoint, precision: Precision = "fp16", launches: Launches | None = None) -> None:
        super().__init__()
        self.dtype = DTYPES[precision]
        if not is_fusible(checkpoint.model.config, precision):
            raise ConfigError(
                f"no kernels for precision {precision} and {checkpoint.model.config}: they are for fp16 and bf16, "
                "depth 5 and tkp pooling; use the torch network"
            )
        self.launches = launches or Launches()
        self.bias1: Tensor
        self.projection: Tensor
        self.head: Tensor
        self._limit = torch.finfo(self.dtype).max
        self._k = checkpoint.model.config.k
        folded = FoldedLFM(checkpoint, "fp32")
        blocks = [block for block in folded.blocks if isinstance(block, Block)]
        pack = (_pack_first, _pack_taps, _pack_taps, _pack_taps)
        for index, (block, pack_weight) in enumerate(zip(blocks, pack, strict=True), 1):
            assert block.conv.bias is not None  # noqa: S101 - narrows the type; folding makes one
            self._keep(f"weight{index}", pack_weight(block.conv.weight).to(self.dtype))
            self._keep(f"bias{index}", block.conv.bias)
        self._keep("projection", folded.projection.weight.flatten(1).T.to(self.dtype))
        self._keep("head", folded.head.weight.view(-1, self._k))
        self._head_bias = float(folded.head.bias)

    def _keep(self, name: str, value: Tensor) -> None:
        if not value.isfinite().all():
            raise ConfigError(f"{name} is too large for precision {self.dtype}: use bf16 or fp32")
        self.register_buffer(name, value.detach().contiguous().clone())

    def forward(self, pixels_bhwc: Tensor) -> Tensor:
        """Return logits (B,).

        Raises:
            ValueError: If H or W is odd, or the map has fewer than k positions.
        """
        return self.topk_head(self.feature_map(pixels_bhwc))

    def feature_map(self, pixels_bhwc: Tensor) -> Tensor:
        """Return the projected map (B, H', W', C), fp32.

        Raises:
            ValueError: If H or W is odd.
        """
        _, height, width, _ = pixels_bhwc.shape
        if height % 2 or width % 2:
            raise ValueError(f"NPR needs even height and width, got {height}x{width}: crop the last row or column")
        return self.conv_project(self.conv_pool(self.conv_pool(self.npr_conv_pool(pixels_bhwc), 2), 3))

    def npr_conv_pool(self, pixels_bhwc: Tensor) -> Tensor:
        """Return layer1's pooled map (B, H', W', 64)."""
        pixels_bhwc = pixels_bhwc.contiguous()
        batch, height, width, _ = pixels_bhwc.shape
        channels = self.bias1.shape[0]
        out = self._empty(pixels_bhwc, batch, (height - 1) // 2, (width - 1) // 2, channels)
        launch = self.launches.layer1
        rows = out.shape[:-1].numel()
        kernels.npr_conv_pool[_cdiv(rows, launch.block_m),](
            pixels_bhwc,
            self.weight1,
            self.bias1,
            out,
            rows,
            HEIGHT=height,
            WIDTH=width,
            CHANNELS=channels,
            LIMIT=self._limit,
            BLOCK_M=launch.block_m,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )
        return out

    def conv_pool(self, x_bhwc: Tensor, layer: int) -> Tensor:
        """Return the pooled map (B, H', W', C) of layer 2 or 3."""
        batch, height, width, in_channels = x_bhwc.shape
        bias: Tensor = getattr(self, f"bias{layer}")
        channels = bias.shape[0]
        out = self._empty(x_bhwc, batch, (height - 1) // 2, (width - 1) // 2, channels)
        launch: Launch = getattr(self.launches, f"layer{layer}")
        rows = out.shape[:-1].numel()
        kernels.conv_pool[_cdiv(rows, launch.block_m) * (channels // launch.block_n),](
            x_bhwc,
            getattr(self, f"weight{layer}"),
            bias,
            out,
            rows,
            HEIGHT=height,
            WIDTH=width,
            IN_CHANNELS=in_channels,
            OUT_CHANNELS=channels,
            LIMIT=self._limit,
            BLOCK_M=launch.block_m,
            BLOCK_N=launch.block_n,
            BLOCK_K=launch.block_k,
            QUAD=launch.quad,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )
        return out

    def conv_project(self, x_bhwc: Tensor) -> Tensor:
        """Return the projected map (B, H', W', 64), fp32."""
        batch, height, width, in_channels = x_bhwc.shape
        mid_channels, channels = self.projection.shape
        out = x_bhwc.new_empty((batch, height - 1, width - 1, channels), dtype=torch.float32)
        launch = self.launches.layer4
        rows = out.shape[:-1].numel()
        kernels.conv_project[_cdiv(rows, launch.block_m),](
            x_bhwc,
            self.weight4,
            self.bias4,
            self.projection,
            out,
            rows,
            HEIGHT=height,
            WIDTH=width,
            IN_CHANNELS=in_channels,
            MID_CHANNELS=mid_channels,
            OUT_CHANNELS=channels,
            LIMIT=self._limit,
            BLOCK_M=launch.block_m,
            BLOCK_N=launch.block_n,
            BLOCK_K=launch.block_k,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )
        return out

    def topk_head(self, map_bhwc: Tensor) -> Tensor:
        """Return logits (B,) from the projected map.

        Raises:
            ValueError: If the map has fewer than k positions.
        """
        batch, height, width, channels = map_bhwc.shape
        positions = height * width
        if positions < self._k:
            raise ValueError(f"a map of {positions} positions cannot give its {self._k} largest: use a larger image")
        logits = map_bhwc.new_empty(batch)
        kernels.topk_head[batch,](
            map_bhwc,
            self.head,
            logits,
            self._head_bias,
            POSITIONS=positions,
            CHANNELS=channels,
            K=self._k,
            BLOCK_P=1 << (positions - 1).bit_length(),
            BLOCK_C=_TOPK_BLOCK_CHANNELS,
            num_warps=_TOPK_WARPS,
        )
        return logits

    def _empty(self, like: Tensor, *shape: int) -> Tensor:
        return like.new_empty(shape, dtype=self.dtype)


@dataclass(frozen=True)
class Trial:
    """One candidate of one layer: milliseconds a batch, or why it cannot run."""

    layer: str
    launch: Launch
    ms: float | None
    error: str | None = None


def is_fusible(config: ArchitectureConfig, precision: Precision) -> bool:
    """Tell whether there are kernels for this: the paper's architecture, with any k, in 16 bits."""
    return config.depth == 5 and config.pooling == "tkp" and precision in ("fp16", "bf16")


def tune(
    network: FusedLFM,
    pixels_bhwc: Tensor,
    time_ms: Callable[[Callable[[], Tensor]], float],
    out_of_time: Callable[[], bool] = lambda: False,
) -> Iterator[Trial]:
    """Try every candidate of every layer, and leave the network with the fastest of those that give the right map.

    Args:
        network: On a GPU. What it is set to now is the reference.
        pixels_bhwc: A batch of real images.
        time_ms: Returns the time of a call on the device.
        out_of_time: Asked before each trial; when true, the rest is left as it is.

    Yields:
        What each trial gave.
    """
    x_bhwc = pixels_bhwc
    for layer, candidates in CANDIDATES.items():

        def run(layer: str = layer, x_bhwc: Tensor = x_bhwc) -> Tensor:
            return _run_layer(network, layer, x_bhwc)

        expected = run()
        best: tuple[float, Launches] | None = None
        before = network.launches
        for launch in candidates:
            if out_of_time():
                break
            network.launches = replace(before, **{layer: launch})
            trial = _try(layer, launch, run, expected, time_ms)
            yield trial
            if trial.ms is not None and (best is None or trial.ms < best[0]):
                best = (trial.ms, network.launches)
        network.launches = before if best is None else best[1]
        x_bhwc = expected


def _try(
    layer: str,
    launch: Launch,
    run: Callable[[], Tensor],
    expected: Tensor,
    time_ms: Callable[[Callable[[], Tensor]], float],
) -> Trial:
    try:
        found = run()
        # Another order of the same sums: the last bit of a map value may differ.
        if not torch.allclose(found.float(), expected.float(), rtol=0.02, atol=0.02 * float(expected.float().std())):
            return Trial(layer, launch, None, "gives another map")
        return Trial(layer, launch, time_ms(run))
    except Exception as exc:  # noqa: BLE001 - Triton's compilers and drivers raise anything; a trial is not the end
        return Trial(layer, launch, None, f"{type(exc).__name__}: {str(exc).splitlines()[0] if str(exc) else ''}")


def _run_layer(network: FusedLFM, layer: str, x_bhwc: Tensor) -> Tensor:
    match layer:
        case "layer1":
            return network.npr_conv_pool(x_bhwc)
        case "layer4":
            return network.conv_project(x_bhwc)
        case _:
            return network.conv_pool(x_bhwc, int(layer[-1]))


def _pack_first(weight: Tensor) -> Tensor:
    """Return (4, 16, C) for `kernels.npr_conv_pool` from (C, 3, 2, 2)."""
    packed = weight.new_zeros(len(_WINDOW), _NUM_VALUES, weight.shape[0])
    for output, (top, left) in enumerate(_WINDOW):
        for pixel, (y, x) in enumerate(_PLUS):
            if y - top in (0, 1) and x - left in (0, 1):
                packed[output, 3 * pixel : 3 * pixel + 3] = weight[:, :, y - top, x - left].T
    return packed


def _pack_taps(weight: Tensor) -> Tensor:
    """Return (4 * C_in, C_out), tap by tap, from (C_out, C_in, 2, 2)."""
    return weight.permute(2, 3, 1, 0).reshape(-1, weight.shape[0])


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
