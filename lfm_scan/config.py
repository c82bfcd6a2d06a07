"""The one configuration object of a scan: for the command line, `jobs/scan.py` and the library alike.

Command-line flags are derived from the fields and their docstrings here. It is saved beside the results; credentials
are never part of it.
"""

from __future__ import annotations

import os
import urllib.parse
from dataclasses import KW_ONLY, asdict, dataclass, field
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from lfm_scan.errors import ConfigError
from lfm_scan.options import ComputeConfig, ImageLimits, InputConfig, LogFormat, Prices, StorageConfig, flag_of

Preprocess = Literal["resize256", "crop256"]


@dataclass(frozen=True)
class ScanConfig:
    """What to scan, with what, and where the results go.

    Attributes:
        sources: Folders, files, globs, s3://bucket/prefix, tar or Parquet files, manifests, or an S3 Inventory.
        output: Run directory, local or s3://. A run that was interrupted there goes on.
        weights: "bundled", "published" (the authors' file, fetched once), or the path or s3:// URI of a checkpoint.
        preprocess: How an image becomes 256x256. Default: the policy that the checkpoint names.
        threshold: Images that score above it are flagged, 0 to 1.
        flag_unassessable: Flag by score alone, even where the score means nothing for the image.
        max_failure_rate: End with code 3 if a larger share of the images could not be scored, 0 to 1; from 1,000 images
            on, stop as soon as that is so.
        stall_timeout: Stop if no shard is finished for so many seconds.
        log_format: How standard error and workers' logs read: text for people, or json, one object a line.
        inputs: Which of the sources' objects are inputs.
        limits: What one image may cost.
        compute: What the scan may use.
        storage: How to reach S3.
        prices: What the user pays; the end of the run says what it cost.
    """

    sources: tuple[str, ...] = ()
    _: KW_ONLY
    output: Annotated[str, Parameter(alias="-o")]
    weights: str = "bundled"
    preprocess: Preprocess | None = None
    threshold: float = 0.5
    flag_unassessable: bool = False
    max_failure_rate: float = 1.0
    stall_timeout: float = 1800.0
    log_format: LogFormat = "text"
    inputs: Annotated[InputConfig, Parameter(name="*", group="Inputs")] = field(default_factory=InputConfig)
    limits: Annotated[ImageLimits, Parameter(name="*", group="Limits on one image")] = field(
        default_factory=ImageLimits
    )
    compute: Annotated[ComputeConfig, Parameter(name="*", group="Compute")] = field(default_factory=ComputeConfig)
    storage: Annotated[StorageConfig, Parameter(name="*", group="Object store")] = field(default_factory=StorageConfig)
    prices: Annotated[Prices, Parameter(name="*", group="Prices")] = field(default_factory=Prices)

    def __post_init__(self) -> None:
        for name in ("threshold", "max_failure_rate"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ConfigError(f"{flag_of(name)} must be 0 to 1, got {value}")
        if self.stall_timeout <= 0:
            raise ConfigError(f"--stall-timeout must be above 0 seconds, got {self.stall_timeout:g}")
        if not self.sources and self.inputs.retry_failed is None:
            raise ConfigError("no source to scan: give a folder, a file, a glob, or s3://bucket/prefix")
        if self.sources and self.inputs.retry_failed is not None:
            raise ConfigError("--retry-failed takes its inputs from the earlier run: give no sources with it")
        if self.inputs.retry_failed is not None and self.inputs.since is not None:
            raise ConfigError("--retry-failed and --since contradict each other: give one")
        if not self.output:
            raise ConfigError("--output names no run directory")

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


def absolute(uri: str) -> str:
    """Return a local path as an absolute one, so that it means the same on every worker; a URI as it is.

    A file:// URI is a local path too.

    Raises:
        ConfigError: If it is a file:// URI without a whole path.
    """
    if uri.startswith("file://"):
        path = os.fsdecode(urllib.parse.unquote_to_bytes(uri.removeprefix("file://")))
        if not path.startswith("/"):
            raise ConfigError(f"{uri}: a file:// URI has three slashes and a whole path: file:///folder/name")
        return os.path.abspath(path)
    return uri if "://" in uri else os.path.abspath(os.path.expanduser(uri))
