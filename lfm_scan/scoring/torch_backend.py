"""LFM in torch: what runs on any device torch knows, and what other runtimes are compared with."""

from __future__ import annotations

import copy
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn

from lfm_scan.model import LFM, Checkpoint
from lfm_scan.model.network import Block

_CUDA_BATCH: Final = 128


class TorchBackend:
    """LFM in torch, prepared for inference: BatchNorm folded into the convolutions, channels-last.

    Args:
        checkpoint: Weights and their normalisation.
        device: "cpu", or "cuda" for the first visible GPU; see `resolve_device`.
        batch_size: Images a forward pass on a GPU. Default: 128. A CPU always takes one at a time: layer1's map, 16.6
            MB an image, then stays in the cache, and no bit of a logit depends on the neighbours in a batch.
    """

    def __init__(self, checkpoint: Checkpoint, device: str = "cpu", batch_size: int | None = None) -> None:
        self.device = torch.device(device)
        self.batch_size = 1 if self.device.type == "cpu" else batch_size or _CUDA_BATCH
        model = fold_batch_norm(checkpoint.model)
        self._model = model.to(device=self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._mean = torch.tensor(checkpoint.metadata.mean, device=self.device).view(3, 1, 1)
        self._std = torch.tensor(checkpoint.metadata.std, device=self.device).view(3, 1, 1)

    @torch.inference_mode()
    def logits(self, pixels_bhwc: np.ndarray) -> np.ndarray:
        """Return one logit an image.

        Args:
            pixels_bhwc: (B, 256, 256, 3) uint8 RGB; B may be 0 or more than the batch size.

        Returns:
            (B,) float32.
        """
        images = torch.from_numpy(pixels_bhwc)
        parts = [self._forward(batch) for batch in torch.split(images, self.batch_size)] if len(images) else []
        return torch.cat(parts).numpy() if parts else np.empty(0, dtype=np.float32)

    def _forward(self, batch_bhwc: Tensor) -> Tensor:
        # A permuted NHWC tensor already is channels-last: no copy until the conversion to float.
        x_bchw = batch_bhwc.to(self.device).permute(0, 3, 1, 2).float().div_(255)
        logits: Tensor = self._model(x_bchw.sub_(self._mean).div_(self._std))
        return logits.cpu()


def fold_batch_norm(model: LFM) -> LFM:
    """Return a copy of the network for inference with each BatchNorm folded into its convolution."""
    folded = copy.deepcopy(model).eval()
    for block in folded.blocks:
        assert isinstance(block, Block)  # noqa: S101 - narrows the type; SNet is made of nothing else
        assert isinstance(block.norm, nn.BatchNorm2d)  # noqa: S101
        block.conv = nn.utils.fusion.fuse_conv_bn_eval(block.conv, block.norm)
        block.norm = nn.Identity()
    return folded.requires_grad_(False)
