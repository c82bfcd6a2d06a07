"""Random networks, and their logits by definition."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from torch import nn

from lfm_scan.model import LFM, ArchitectureConfig, Checkpoint, CheckpointMetadata
from lfm_scan.model.checkpoint import tensors_of

MEAN: Final = (0.5, 0.4, 0.3)
STD: Final = (0.1, 0.2, 0.3)


def random_checkpoint(architecture: ArchitectureConfig | None = None) -> Checkpoint:
    """Return a network whose BatchNorms are far from the identity and whose logits spread like a trained one's."""
    architecture = architecture or ArchitectureConfig()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = LFM(architecture).eval()
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)  # keeps the size of values from layer to layer
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.5, 0.5)
                module.running_mean.uniform_(-0.2, 0.2)
                module.running_var.uniform_(0.3, 2)
        nn.init.normal_(model.head.weight, std=0.5)
    return Checkpoint(tensors_of(model), CheckpointMetadata("lfm-test", architecture, mean=MEAN, std=STD), "0" * 64)


def random_pixels(num_images: int) -> np.ndarray:
    """Return images that differ in contrast, with blocks and edges: noise alone scores nearly alike."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (num_images, 256, 256, 3)) * np.linspace(0.1, 1, num_images)[:, None, None, None]
    return images.astype(np.uint8)


@torch.inference_mode()
def logits_by_definition(checkpoint: Checkpoint, pixels_bhwc: np.ndarray) -> np.ndarray:
    """Return what the plain network gives for normalised pixels, one image at a time."""
    metadata = checkpoint.metadata
    normalised = (pixels_bhwc / 255 - np.array(metadata.mean)) / np.array(metadata.std)
    images = torch.from_numpy(normalised.transpose(0, 3, 1, 2)).float()
    return np.array([checkpoint.model(image[None]).item() for image in images], dtype=np.float32)
