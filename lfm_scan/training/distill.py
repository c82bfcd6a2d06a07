"""Learning from a teacher: its projected map, where the evidence lies, and its logit.

Where the teacher is wrong about an image only the label counts. Losses are per image, (B,), so that a batch can be
spread over workers and passes.

Shape legend: B batch, C channels of the projected map, H W its height and width, K values kept a channel.
"""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from lfm_scan.model.network import LFM
from lfm_scan.training.norm import global_moments

LOGIT_SCALE: Final = 15.0
"""Teacher logits reach 70; logits are compared after tanh(logit / LOGIT_SCALE)."""

_MIN_SPREAD: Final = 1e-3


@dataclass(frozen=True)
class Targets:
    """What the teacher says about some images.

    Attributes:
        map_bchw: Its projected map, float32.
        values_bck: Its pooled values.
        logits: Its logits (B,); where it is wrong, plus or minus LOGIT_SCALE as the label has it.
        is_right: Whether it is right about each image, (B,) bool.
    """

    map_bchw: Tensor
    values_bck: Tensor
    logits: Tensor
    is_right: Tensor


class Teacher:
    """A frozen network in evaluation mode.

    Attributes:
        model: The network, a copy of its own.
        spread_c: Standard deviation of each channel of its map, the unit of the map loss; 0 until measured.

    Args:
        model: Takes images normalised as the student does.
        device: Where it runs.
    """

    def __init__(self, model: LFM, device: torch.device) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.spread_c = torch.zeros(self.model.projection.out_channels, device=device)

    @property
    def sha256(self) -> str:
        """Digest of its weights, hexadecimal."""
        digest = hashlib.sha256()
        for name, value in sorted(self.model.state_dict().items()):
            digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @torch.no_grad()
    def targets(self, map_bchw: Tensor, labels: Tensor) -> Targets:
        """Return what to learn.

        Args:
            map_bchw: What `model.feature_map` makes of the images, float32.
            labels: (B,) float32, 1 is generated.
        """
        values = self.model.pool(map_bchw)
        logits = self.model.classify(values)
        is_right = (logits > 0) == (labels > 0.5)
        return Targets(map_bchw, values, torch.where(is_right, logits, LOGIT_SCALE * (2 * labels - 1)), is_right)

    def measure_spread(self, map_bchw: Tensor) -> None:
        """Set `spread_c` from the maps of all workers, who must call it together."""
        _, variance, _ = global_moments(map_bchw)
        self.spread_c.copy_(variance.sqrt().clamp_min(_MIN_SPREAD))


def logit_losses(logits: Tensor, targets: Targets) -> Tensor:
    """Return the squared error of each tanh-scaled logit, (B,)."""
    return (torch.tanh(logits / LOGIT_SCALE) - torch.tanh(targets.logits / LOGIT_SCALE)).square()


def map_losses(map_bchw: Tensor, values_bck: Tensor, targets: Targets, spread_c: Tensor) -> Tensor:
    """Return the mean squared error of each map plus that of its pooled values, in spreads; (B,), 0 where wrong."""
    of_map = ((map_bchw - targets.map_bchw) / spread_c[:, None, None]).square().mean(dim=(1, 2, 3))
    of_values = ((values_bck - targets.values_bck) / spread_c[:, None]).square().mean(dim=(1, 2))
    return (of_map + of_values) * targets.is_right
