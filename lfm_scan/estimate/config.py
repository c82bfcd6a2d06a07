"""What to estimate, on what machines, at what prices."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field
from typing import Annotated

from cyclopts import Parameter

from lfm_scan.config import Preprocess
from lfm_scan.errors import ConfigError
from lfm_scan.options import ComputeConfig, ImageLimits, InputConfig, Prices, StorageConfig, flag_of


@dataclass(frozen=True)
class EstimateConfig:
    """What to estimate.

    Attributes:
        sources: As of a scan: folders, files, globs, s3://bucket/prefix, tar or Parquet files, manifests, an inventory.
        sample: Inputs to fetch, decode and score.
        seed: Decides which inputs.
        cores: Cores that the scan will have. Default: this machine's.
        gpus: GPUs that the scan will have. Default: this machine's, unless --device says cpu.
        gpu_images_per_s: Images that one of those GPUs scores in a second. Default: as measured, where a GPU is here.
        weights: "bundled", "published" (the authors' file, fetched once), or the path or s3:// URI of a checkpoint.
        preprocess: How an image becomes 256x256. Default: the policy that the checkpoint names.
        prices: What the user pays.
        inputs: Which of the sources' objects are inputs.
        limits: What one image may cost.
        compute: What the scan may use of a machine.
        storage: How to reach S3.
    """

    sources: tuple[str, ...]
    _: KW_ONLY
    sample: int = 200
    seed: int = 0
    cores: int | None = None
    gpus: int | None = None
    gpu_images_per_s: float | None = None
    weights: str = "bundled"
    preprocess: Preprocess | None = None
    prices: Annotated[Prices, Parameter(name="*", group="Prices")] = field(default_factory=Prices)
    inputs: Annotated[InputConfig, Parameter(name="*", group="Inputs")] = field(default_factory=InputConfig)
    limits: Annotated[ImageLimits, Parameter(name="*", group="Limits on one image")] = field(
        default_factory=ImageLimits
    )
    compute: Annotated[ComputeConfig, Parameter(name="*", group="Compute")] = field(default_factory=ComputeConfig)
    storage: Annotated[StorageConfig, Parameter(name="*", group="Object store")] = field(default_factory=StorageConfig)

    def __post_init__(self) -> None:
        if not self.sources:
            raise ConfigError("no source to estimate: give a folder, a file, a glob, or s3://bucket/prefix")
        if self.sample < 1:
            raise ConfigError(f"--sample must be at least 1, got {self.sample}")
        if self.cores is not None and self.cores < 1:
            raise ConfigError(f"--cores must be at least 1, got {self.cores}")
        if self.gpus is not None and self.gpus < 0:
            raise ConfigError(f"--gpus must be at least 0, got {self.gpus}")
        if self.gpu_images_per_s is not None and not 0 < self.gpu_images_per_s < float("inf"):
            raise ConfigError(f"--gpu-images-per-s must be above 0, got {self.gpu_images_per_s:g}")
        for name in ("retry_failed", "reuse"):
            if getattr(self.inputs, name) is not None:
                raise ConfigError(f"{flag_of(name)}: what it saves cannot be told from a sample; estimate without it")
