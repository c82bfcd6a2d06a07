"""CUDA graphs: a forward pass of a fixed shape, recorded once and launched as one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class GraphedNetwork:
    """Replays a forward pass for batches of one shape.

    Args:
        network: From (B, H, W, 3) uint8 to (B,) on the current GPU, with no work on the host that depends on values.
        shape: Of the batches, (B, H, W, 3).
        device: The GPU.

    Raises:
        torch.OutOfMemoryError: If the batch does not fit.
    """

    def __init__(self, network: Callable[[Tensor], Tensor], shape: torch.Size, device: torch.device) -> None:
        self._pixels = torch.zeros(shape, dtype=torch.uint8, device=device)
        # Libraries choose algorithms and Triton compiles in the first pass; neither may happen while recording.
        # A batch that does not fit fails here, where nothing is half recorded.
        network(self._pixels)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._logits = network(self._pixels)

    @property
    def shape(self) -> torch.Size:
        """Of the batches it takes."""
        return self._pixels.shape

    def __call__(self, pixels_bhwc: Tensor) -> Tensor:
        """Return logits (B,), a tensor of the caller's own."""
        self._pixels.copy_(pixels_bhwc, non_blocking=True)
        self._graph.replay()
        return self._logits.clone()
