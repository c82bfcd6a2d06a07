"""The settings that single layers take: plain dataclasses that check themselves and import nothing heavy.

`lfm_scan.config` puts them together into the one configuration object; the first lines of `Attributes` become help
texts of the command line.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from lfm_scan.errors import ConfigError

Device = Literal["auto", "cpu", "cuda"]

PILLOW_MAX_PIXELS: Final = 89_478_485
"""Pillow's own bound, past which it warns and, at twice that, refuses. We keep it and never touch the switch."""

MAX_SHARD_SIZE: Final = 4096
"""Decoded, 768 MiB: still one block in Ray's object store."""


@dataclass(frozen=True, kw_only=True)
class ImageLimits:
    """What one image may cost.

    Attributes:
        max_image_bytes: Largest file in bytes; a larger one is too_large.
        max_image_pixels: Most pixels, checked before decoding; an image with more is too_large.
        min_side_px: Shortest side in pixels; an image below it is too_small. The model itself needs 48.
    """

    max_image_bytes: int = 64 * 2**20
    max_image_pixels: int = 80_000_000
    min_side_px: int = 48

    def __post_init__(self) -> None:
        if self.max_image_bytes < 1:
            raise ConfigError(f"max-image-bytes must be at least 1, got {self.max_image_bytes}")
        if not 1 <= self.max_image_pixels <= PILLOW_MAX_PIXELS:
            raise ConfigError(
                f"max-image-pixels must be 1 to {PILLOW_MAX_PIXELS:,}, the decoder's own bound against "
                f"decompression bombs; got {self.max_image_pixels:,}"
            )
        if self.min_side_px < 1:
            raise ConfigError(f"min-side-px must be at least 1, got {self.min_side_px}")


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """What the scan may use of the machine or cluster.

    Attributes:
        device: Where the model runs; auto takes GPUs if the cluster has any.
        batch_size: Images a forward pass. Default: 1 on a CPU, 128 on a GPU.
        min_actors: Scoring actors kept alive.
        max_actors: Most scoring actors. Default: one a core on CPUs; on GPUs as many as fit.
        gpus_per_actor: GPUs a scoring actor takes, 0.25 puts four on one GPU.
        cpus_per_decode: CPUs a fetch-and-decode task claims. Default: 0.25 on cores that also score, else 1.
        fetch_threads: Requests in flight in each fetch-and-decode task.
        shard_size: Images a shard, the unit of work and of commit. Default: chosen so that every core has work, at
            most 512.
        ray_address: Of a running Ray cluster. Default: the one this job runs in, else a new one on this machine.
    """

    device: Device = "auto"
    batch_size: int | None = None
    min_actors: int = 1
    max_actors: int | None = None
    gpus_per_actor: float = 1.0
    cpus_per_decode: float | None = None
    fetch_threads: int = 16
    shard_size: int | None = None
    ray_address: str | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "min_actors", "max_actors", "fetch_threads", "shard_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{flag_of(name)} must be at least 1, got {value}")
        if self.max_actors is not None and self.max_actors < self.min_actors:
            raise ConfigError(f"--max-actors {self.max_actors} is below --min-actors {self.min_actors}")
        if self.gpus_per_actor <= 0:
            raise ConfigError(f"--gpus-per-actor must be above 0, got {self.gpus_per_actor}")
        if self.gpus_per_actor > 1 and self.gpus_per_actor != int(self.gpus_per_actor):
            raise ConfigError(f"--gpus-per-actor above 1 must be a whole number, got {self.gpus_per_actor}")
        if self.cpus_per_decode is not None and self.cpus_per_decode <= 0:
            raise ConfigError(f"--cpus-per-decode must be above 0, got {self.cpus_per_decode}")
        if self.shard_size is not None and self.shard_size > MAX_SHARD_SIZE:
            raise ConfigError(
                f"--shard-size {self.shard_size}: the decoded images of one shard must fit one block in memory, "
                f"at most {MAX_SHARD_SIZE}"
            )


@dataclass(frozen=True, kw_only=True)
class StorageConfig:
    """How to reach S3. Credentials are never part of it: they come from the environment, a profile or a role.

    Attributes:
        endpoint_url: Of an S3-compatible store, e.g. http://127.0.0.1:8333. Default: AWS.
        region: Of the bucket. Default: the environment's or the profile's, else us-east-1.
        anonymous: Send unsigned requests, for public buckets.
    """

    endpoint_url: str | None = None
    region: str | None = None
    anonymous: bool = False

    def __post_init__(self) -> None:
        if self.endpoint_url is not None and not self.endpoint_url.startswith(("http://", "https://")):
            raise ConfigError(f"--endpoint-url must start with http:// or https://, got {self.endpoint_url!r}")
        if self.endpoint_url is not None and "@" in self.endpoint_url:
            raise ConfigError("--endpoint-url must not hold credentials, it is saved with the run: use AWS_* variables")


def flag_of(name: str) -> str:
    """Return the command line flag of a field, for error messages."""
    return "--" + name.replace("_", "-")
