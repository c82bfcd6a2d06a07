"""A checkpoint that tells images apart, small images, and where kernels run: a GPU, or else Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
from typing import Final

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lfm_scan.model import LFM, ArchitectureConfig, Checkpoint, CheckpointMetadata
from lfm_scan.model.checkpoint import tensors_of

ON_GPU: Final = torch.cuda.is_available()
DEVICE: Final = "cuda" if ON_GPU else "cpu"
if not ON_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when kernels are imported

needs_triton: Final = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton, which comes with torch's CUDA builds"
)
needs_gpu: Final = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")

MEAN: Final = (0.5, 0.4, 0.3)
STD: Final = (0.1, 0.2, 0.3)


def make_checkpoint(config: ArchitectureConfig | None = None) -> Checkpoint:
    """Return seeded random weights whose BatchNorms are far from the identity and whose logits are of both signs."""
    config = config or ArchitectureConfig()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = LFM(config).eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.5, 0.5)
                module.running_mean.uniform_(-0.2, 0.2)
                module.running_var.uniform_(0.3, 2)
        with torch.no_grad():
            model.head.weight.mul_(30)
    metadata = CheckpointMetadata("lfm-test", architecture=config, mean=MEAN, std=STD)
    return Checkpoint(tensors_of(model), metadata, "0" * 64)


def make_pixels(count: int, height: int = 64, width: int = 52, seed: int = 0) -> np.ndarray:
    """Return smooth images with noise: their residuals are of all sizes."""
    rng = np.random.default_rng(seed)
    waves = np.cumsum(rng.normal(0, 3, (count, height, width, 3)), axis=2) + 128
    noise = rng.normal(0, 1, (count, height, width, 3)) * rng.uniform(0, 60, (count, 1, 1, 1))
    return np.clip(waves + noise, 0, 255).astype(np.uint8)


@torch.inference_mode()
def published_logits(checkpoint: Checkpoint, pixels: np.ndarray) -> Tensor:
    """Return what the network gives for normalised pixels, in fp64."""
    normalised = torch.from_numpy((pixels / 255 - np.array(MEAN)) / np.array(STD)).permute(0, 3, 1, 2)
    model = LFM(checkpoint.model.config).double().eval()
    model.load_state_dict(checkpoint.model.state_dict())
    logits: Tensor = model(normalised)
    return logits
