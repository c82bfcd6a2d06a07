"""What to measure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from cyclopts import Parameter

from lfm_scan.config import Preprocess
from lfm_scan.errors import ConfigError
from lfm_scan.options import ComputeConfig, StorageConfig


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What to measure, and for how long.

    Attributes:
        images: Whose images to measure with: a folder, an s3:// prefix, or another source of a scan. Default: images
            made on the spot, of three sizes; then nothing needs the network.
        seconds: For each stage; the pipeline gets five times as long.
        weights: "bundled", "published" (the authors' file, fetched once), or the path or s3:// URI of a checkpoint.
        preprocess: How an image becomes 256x256. Default: the policy that the checkpoint names.
        compute: What a scan may use of this machine.
        storage: How to reach S3.
    """

    images: str | None = None
    seconds: float = 2.0
    weights: str = "bundled"
    preprocess: Preprocess | None = None
    compute: Annotated[ComputeConfig, Parameter(name="*", group="Compute")] = field(default_factory=ComputeConfig)
    storage: Annotated[StorageConfig, Parameter(name="*", group="Object store")] = field(default_factory=StorageConfig)

    def __post_init__(self) -> None:
        if not 0 < self.seconds <= 600:
            raise ConfigError(f"--seconds must be above 0 and at most 600, got {self.seconds:g}")
