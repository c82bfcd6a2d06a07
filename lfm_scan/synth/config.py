"""The settings of `lfm-scan synth`. Command-line flags are derived from the fields and their docstrings here."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, asdict, dataclass, field
from typing import Annotated, Any, Final

from cyclopts import Parameter

from lfm_scan.errors import ConfigError
from lfm_scan.options import ImageLimits, InputConfig, StorageConfig, flag_of
from lfm_scan.synth.kinds import KINDS

MAX_CROP_PX: Final = 512
MIN_CROP_PX: Final = 64
MAX_CROPS: Final = 1000
"""Of one photograph: they are in memory together."""
_CROP_STEP_PX: Final = 8
"""The largest factor of a network."""


@dataclass(frozen=True)
class SynthConfig:
    """Which photographs to make pairs of, with which networks, and where the pairs go.

    Attributes:
        sources: Photographs: folders, files, globs, s3://bucket/prefix, tar or Parquet files, manifests.
        output: Folder for the pairs, local or s3://; a new one.
        networks: Kinds of network to train and draw with. Default: all.
        networks_per_crop: How many of them draw each crop, by turns. Default: all.
        crops: Crops to cut from each photograph.
        crop_px: Side of a crop in pixels.
        min_shrink: Least factor by which a photograph is scaled down; below 2 traces of its JPEG file may stay.
        max_shrink: Largest factor by which a photograph is scaled down.
        rescale_share: Share of the crops that are scaled once more, a little up or down, as pictures on the web often
            are, 0 to 1. A detector that never saw such photographs takes them for generated.
        vary_share: Share of the crops that get other tones and another sharpness first, as cameras and people give
            them, 0 to 1.
        steps: Steps to train each network for; the deep ones take as many times more as they need.
        min_psnr: Of the crops a network drew without having learned from them, in dB; one below draws nothing, for it
            would teach blur.
        validation_share: Share of the photographs whose pairs are all for validation, 0 to below 1.
        seed: Of everything random.
        inputs: Which of the sources' objects are photographs.
        limits: What one photograph may cost.
        storage: How to reach S3.
    """

    sources: tuple[str, ...] = ()
    _: KW_ONLY
    output: Annotated[str, Parameter(alias="-o")]
    networks: tuple[str, ...] = ()
    networks_per_crop: int | None = None
    crops: int = 48
    crop_px: int = 256
    min_shrink: float = 2.0
    max_shrink: float = 6.0
    rescale_share: float = 0.5
    vary_share: float = 0.0
    steps: int = 300
    min_psnr: float = 33.0
    validation_share: float = 0.15
    seed: int = 0
    inputs: Annotated[InputConfig, Parameter(name="*", group="Inputs")] = field(default_factory=InputConfig)
    limits: Annotated[ImageLimits, Parameter(name="*", group="Limits on one image")] = field(
        default_factory=ImageLimits
    )
    storage: Annotated[StorageConfig, Parameter(name="*", group="Object store")] = field(default_factory=StorageConfig)

    def __post_init__(self) -> None:
        if not self.sources:
            raise ConfigError("no photographs: give a folder, a file, a glob, or s3://bucket/prefix")
        if not self.output:
            raise ConfigError("--output names no folder")
        self._check_networks()
        if self.crop_px % _CROP_STEP_PX or not MIN_CROP_PX <= self.crop_px <= MAX_CROP_PX:
            raise ConfigError(
                f"--crop-px must be a multiple of {_CROP_STEP_PX}, {MIN_CROP_PX} to {MAX_CROP_PX}, got {self.crop_px}: "
                "networks draw blocks of 8x8 pixels"
            )
        if not 1 <= self.min_shrink <= self.max_shrink:
            raise ConfigError(
                f"--min-shrink {self.min_shrink:g} and --max-shrink {self.max_shrink:g} must be 1 or more, and in order"
            )
        for name in ("rescale_share", "vary_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{flag_of(name)} must be 0 to 1, got {getattr(self, name):g}")
        if not 1 <= self.crops <= MAX_CROPS:
            raise ConfigError(f"--crops must be 1 to {MAX_CROPS}, got {self.crops}")
        if self.steps < 1:
            raise ConfigError(f"--steps must be at least 1, got {self.steps}")
        if not 0 <= self.min_psnr < math.inf:
            raise ConfigError(f"--min-psnr must be 0 or more, in dB; got {self.min_psnr:g}")
        if not 0 <= self.validation_share < 1:
            raise ConfigError(f"--validation-share must be 0 to below 1, got {self.validation_share:g}")
        if self.seed < 0:
            raise ConfigError(f"--seed must be at least 0, got {self.seed}")
        for name in ("carry", "since", "retry_failed", "reuse"):
            if getattr(self.inputs, name):
                raise ConfigError(f"{flag_of(name)} is for scans: synth takes every photograph of its sources anew")

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of the kinds of network to train."""
        return self.networks or tuple(KINDS)

    @property
    def min_side_px(self) -> float:
        """The shorter side that a photograph needs."""
        return self.min_shrink * self.crop_px

    def to_json(self) -> dict[str, Any]:
        """Return the fields that decide which pairs are made, as JSON values."""
        fields = asdict(self)
        for name in ("output", "storage"):
            del fields[name]
        return fields

    def _check_networks(self) -> None:
        unknown = [name for name in self.networks if name not in KINDS]
        if unknown:
            raise ConfigError(f"--networks {unknown[0]!r} is not known: choose from {', '.join(KINDS)}")
        if len(set(self.networks)) != len(self.networks):
            raise ConfigError(f"--networks names a kind twice: {', '.join(self.networks)}")
        if self.networks_per_crop is not None and not 1 <= self.networks_per_crop <= len(self.kinds):
            raise ConfigError(
                f"--networks-per-crop must be 1 to {len(self.kinds)}, the number of networks; got "
                f"{self.networks_per_crop}"
            )
