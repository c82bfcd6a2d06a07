"""What a training does to images and weights, and the named presets.

Source: LFM section 4 and the authors' published code (arXiv 2508.17029).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

from lfm_scan.errors import ConfigError
from lfm_scan.model.architecture import ArchitectureConfig
from lfm_scan.options import Preset, Variant, flag_of


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A training, but for its data and the machine.

    Attributes:
        preprocess: Policy of the checkpoint: "resize256" resizes each image to 256x256 before the crop, "crop256" keeps
            its pixels as they are.
        crop_px: Side of the random square crop the network sees, in pixels; even, at least 48.
        flip: Whether half of the crops are mirrored left to right.
        epochs: Passes over the training images.
        batch_size: Images a step of the optimizer, over all workers and accumulated passes.
        learning_rate: Of Adam, at the start.
        decay: What the learning rate is multiplied by ...
        decay_every: ... after so many epochs.
        alpha: Weight of the auxiliary loss of random-k sampling.
        rbld: Variant of rank-based linear dropout, or None.
        rks: Variant of random-k sampling, or None.
        architecture: The network.
    """

    preprocess: Literal["resize256", "crop256"] = "resize256"
    crop_px: int = 224
    flip: bool = True
    epochs: int = 50
    batch_size: int = 32
    learning_rate: float = 1e-4
    decay: float = 0.9
    decay_every: int = 10
    alpha: float = 0.1
    rbld: Variant | None = "paper"
    rks: Variant | None = "paper"
    architecture: ArchitectureConfig = field(default_factory=ArchitectureConfig)

    def __post_init__(self) -> None:
        if self.crop_px % 2 or not 48 <= self.crop_px <= 256:
            raise ConfigError(f"--crop-px must be even and 48 to 256, got {self.crop_px}: NPR works on 2x2 blocks")
        for name in ("epochs", "batch_size", "decay_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{flag_of(name)} must be at least 1, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ConfigError(f"--learning-rate must be above 0, got {self.learning_rate}")
        if not 0 < self.decay <= 1:
            raise ConfigError(f"--decay must be above 0 and at most 1, got {self.decay}")
        if self.alpha < 0:
            raise ConfigError(f"--alpha must be at least 0, got {self.alpha}")
        if self.architecture.pooling != "tkp" and (self.rbld or self.rks):
            raise ConfigError(
                f"RBLD and RKS work on top-k values: with --pooling {self.architecture.pooling} give --rbld none and "
                "--rks none"
            )


PRESETS: Final[dict[Preset, Recipe]] = {
    "paper": Recipe(),
    "published": Recipe(rbld="published", rks=None),  # what the authors' repository runs, slips included
    "crop": Recipe(preprocess="crop256"),  # the paper's but for the resize, which a crop policy never does
}
"""The recipes with a name."""


def recipe_of(preset: Preset, architecture: Mapping[str, Any], changes: Mapping[str, Any]) -> Recipe:
    """Return a preset with some of its fields changed.

    Args:
        preset: Its name.
        architecture: Fields of its `ArchitectureConfig`.
        changes: Its other fields.

    Raises:
        ConfigError: If a value is out of range.
    """
    base = PRESETS[preset]
    try:
        network = replace(base.architecture, **architecture)
    except ValueError as exc:
        raise ConfigError(str(exc)) from exc
    return replace(base, **changes, architecture=network)
