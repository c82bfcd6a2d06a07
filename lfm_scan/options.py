"""The settings that single layers take: plain dataclasses that check themselves and import nothing heavy.

`lfm_scan.config` puts them together into the one configuration object; the first lines of `Attributes` become help
texts of the command line.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Literal

from lfm_scan.errors import ConfigError

Device = Literal["auto", "cpu", "cuda"]
LogFormat = Literal["text", "json"]
BackendName = Literal["auto", "torch", "openvino"]
Precision = Literal["fp32", "fp16", "bf16"]
Pooling = Literal["gap", "gmp", "cbam", "tkp"]
Variant = Literal["paper", "published"]
Preset = Literal["paper", "published", "crop"]

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
        max_decode_seconds: CPU seconds that decoding one image may take, and by the clock four times as long; past
            either the image is timeout.
        max_decode_bytes: Memory that decoding one image may take, in bytes; past it the image is too_large.
        score_truncated: Score what is there of a file whose end is missing; such a score is marked not assessable.
    """

    max_image_bytes: int = 64 * 2**20
    max_image_pixels: int = 80_000_000
    min_side_px: int = 48
    max_decode_seconds: float = 5.0
    max_decode_bytes: int = 2**30
    score_truncated: bool = False

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
        if not 0.1 <= self.max_decode_seconds <= 3600:
            raise ConfigError(f"--max-decode-seconds must be 0.1 to 3600, got {self.max_decode_seconds}")
        if self.max_decode_bytes < 64 * 2**20:
            raise ConfigError(
                f"--max-decode-bytes must be at least {64 * 2**20:,}, what a decoder needs for itself; got "
                f"{self.max_decode_bytes:,}"
            )


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """What the scan may use of the machine or cluster.

    Attributes:
        device: Where the model runs; auto takes GPUs if the cluster has any, cuda waits for a cluster to start some.
        backend: What runs the network on a CPU; auto is OpenVINO where it is installed.
        precision: Of the convolutions. On a CPU bf16 is faster where the processor has it, and what it brings near the
            threshold is computed again in fp32, so that no decision changes. On a GPU fp16 is faster.
        batch_size: Images a forward pass on a GPU. Default: what its memory allows. A CPU takes one at a time.
        min_actors: Scoring actors kept alive; a cluster that starts nodes on demand is asked for so many at once.
        max_actors: Most scoring actors. Default: as many as fit, one a core on CPUs, and more as the cluster grows.
        gpus_per_actor: GPUs a scoring actor takes, 0.25 puts four on one GPU.
        cpus_per_decode: Where GPUs score, CPUs that a fetch-and-decode task claims.
        memory_per_worker: Memory in bytes that each actor or task that decodes claims; a node takes on no more of them
            than its memory holds.
        fetch_threads: Requests in flight in each process that fetches.
        shard_size: Images a shard, the unit of work and of commit. Default: chosen so that every core has work, at
            most 512.
        ray_address: Of a running Ray cluster. Default: the one this job runs in, else a new one on this machine.
    """

    device: Device = "auto"
    backend: BackendName = "auto"
    precision: Precision = "fp32"
    batch_size: int | None = None
    min_actors: int = 1
    max_actors: int | None = None
    gpus_per_actor: float = 1.0
    cpus_per_decode: float = 1.0
    memory_per_worker: int = 2**30
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
        if self.memory_per_worker < 0:
            raise ConfigError(f"--memory-per-worker must be at least 0, got {self.memory_per_worker}")
        if self.cpus_per_decode <= 0:
            raise ConfigError(f"--cpus-per-decode must be above 0, got {self.cpus_per_decode}")
        if self.shard_size is not None and self.shard_size > MAX_SHARD_SIZE:
            raise ConfigError(
                f"--shard-size {self.shard_size}: the decoded images of one shard must fit one block in memory, "
                f"at most {MAX_SHARD_SIZE}"
            )


@dataclass(frozen=True, kw_only=True)
class StorageConfig:
    """How to reach stores. Credentials are never part of it: they come from the environment, a profile or a role.

    Attributes:
        endpoint_url: Of an S3-compatible store, e.g. http://127.0.0.1:8333. Default: AWS.
        region: Of the bucket. Default: the environment's or the profile's, else us-east-1.
        addressing: How S3 requests name the bucket: in the path, or as a virtual host.
        anonymous: Send unsigned requests, for public buckets.
        profile: Named profile of the AWS configuration files.
        assume_role: ARN of a role to assume; its credentials are renewed before they expire.
        external_id: External id that the role asks for.
        requester_pays: Pay for requests to buckets that ask for it.
        sse: Encryption of what is written: AES256 or aws:kms. Default: the bucket's.
        kms_key_id: Key for aws:kms. Default: the account's.
        max_attempts: Tries for one request while the store answers others.
        outage_patience: Seconds to go on trying while the store answers nobody.
        connect_timeout: Seconds to wait for a connection.
        read_timeout: Seconds to wait for the next bytes of an answer.
        max_connections: Connections kept open, in each process.
    """

    endpoint_url: str | None = None
    region: str | None = None
    addressing: Literal["auto", "path", "virtual"] = "auto"
    anonymous: bool = False
    profile: str | None = None
    assume_role: str | None = None
    external_id: str | None = None
    requester_pays: bool = False
    sse: Literal["AES256", "aws:kms"] | None = None
    kms_key_id: str | None = None
    max_attempts: int = 6
    outage_patience: float = 300.0
    connect_timeout: float = 3.0
    read_timeout: float = 10.0
    max_connections: int = 64

    def __post_init__(self) -> None:
        if self.endpoint_url is not None and not self.endpoint_url.startswith(("http://", "https://")):
            raise ConfigError(f"--endpoint-url must start with http:// or https://, got {self.endpoint_url!r}")
        if self.endpoint_url is not None and "@" in self.endpoint_url:
            raise ConfigError("--endpoint-url must not hold credentials, it is saved with the run: use AWS_* variables")
        if self.kms_key_id is not None and self.sse != "aws:kms":
            raise ConfigError("--kms-key-id needs --sse aws:kms")
        if self.external_id is not None and self.assume_role is None:
            raise ConfigError("--external-id needs --assume-role")
        if self.anonymous and (self.profile or self.assume_role):
            raise ConfigError("--anonymous sends no credentials: it contradicts --profile and --assume-role")
        for name in ("max_attempts", "max_connections"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{flag_of(name)} must be at least 1, got {getattr(self, name)}")
        for name in ("connect_timeout", "read_timeout"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{flag_of(name)} must be above 0, got {getattr(self, name)}")
        if self.outage_patience < 0:
            raise ConfigError(f"--outage-patience must be at least 0, got {self.outage_patience}")


@dataclass(frozen=True, kw_only=True)
class InputConfig:
    """Which of the sources' objects are inputs, and what else to take from the sources.

    Attributes:
        include: Only inputs that match one of these globs: "*.jpg" for a name, "cats/*.jpg" for the end of a URI.
        exclude: No inputs that match one of these globs.
        suffix: Only inputs whose name ends so, in whatever case: .jpg
        min_size: Only inputs of at least so many bytes, as listed.
        max_size: Only inputs of at most so many bytes, as listed.
        modified_after: Only inputs modified at or after this ISO date or time, UTC unless it says otherwise.
        modified_before: Only inputs modified before this ISO date or time.
        all_versions: Of an S3 Inventory with versions, take old ones too.
        image_column: Column of a Parquet source that holds image bytes. Default: found by name and type.
        uri_column: Column of a manifest that holds URIs. Default: found by name.
        carry: Columns of a manifest or Parquet source, or member suffixes of a WebDataset, to carry into the results.
        since: Run directory of an earlier scan: only objects that are new or changed since.
        retry_failed: Run directory of an earlier scan: its inputs that were missing, denied, timeout, crashed or error.
        reuse: Run directory of an earlier scan with the same settings: identical bytes take their score from there.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    suffix: tuple[str, ...] = ()
    min_size: int | None = None
    max_size: int | None = None
    modified_after: str | None = None
    modified_before: str | None = None
    all_versions: bool = False
    image_column: str | None = None
    uri_column: str | None = None
    carry: tuple[str, ...] = ()
    since: str | None = None
    retry_failed: str | None = None
    reuse: str | None = None

    def __post_init__(self) -> None:
        for name in ("modified_after", "modified_before"):
            if getattr(self, name) is not None:
                parse_time(getattr(self, name), flag_of(name))
        for name in ("min_size", "max_size"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ConfigError(f"{flag_of(name)} must be at least 0, got {value}")
        if len(set(self.carry)) != len(self.carry):
            raise ConfigError(f"--carry names a column twice: {', '.join(self.carry)}")
        if self.image_column is not None and self.uri_column is not None:
            raise ConfigError("--image-column and --uri-column: a source has its images in one place; give one")


@dataclass(frozen=True, kw_only=True)
class Prices:
    """What the user pays, in one currency. What has no price is left out of the cost, which says so.

    Attributes:
        price_per_core_hour: Of a core, used or not, while the scan runs.
        price_per_gpu_hour: Of a GPU, used or not, while the scan runs.
        price_per_1000_gets: Of 1,000 GET or HEAD requests.
        price_per_1000_puts: Of 1,000 PUT or LIST requests.
        price_per_gb: Of 10^9 bytes fetched, where the store charges for them.
    """

    price_per_core_hour: float | None = None
    price_per_gpu_hour: float | None = None
    price_per_1000_gets: float | None = None
    price_per_1000_puts: float | None = None
    price_per_gb: float | None = None

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            price = getattr(self, name)
            if price is not None and not 0 <= price < float("inf"):
                raise ConfigError(f"{flag_of(name)} must be at least 0, got {price:g}")


def check_precision(device: str, precision: Precision) -> None:
    """Refuse what a device has not, or has at a price.

    Raises:
        ConfigError: If it is so.
    """
    if (device, precision) == ("cpu", "fp16"):
        raise ConfigError("--precision fp16 is for GPUs: on a CPU use bf16, or fp32")
    if (device, precision) == ("cuda", "bf16"):
        raise ConfigError("--precision bf16 changes decisions on a GPU, where nothing is computed again: use fp16")


def parse_time(text: str, flag: str) -> datetime:
    """Return the moment an ISO date or time names, in UTC unless it says otherwise.

    Raises:
        ConfigError: If it is neither.
    """
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as exc:
        raise ConfigError(f"{flag} {text!r}: not an ISO date or time, such as 2026-11-21 or 2026-11-21T07:00Z") from exc
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def flag_of(name: str) -> str:
    """Return the command line flag of a field, for error messages."""
    return "--" + name.replace("_", "-")
