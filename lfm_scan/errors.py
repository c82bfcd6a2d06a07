"""Every exception this package raises on purpose.

    LFMScanError
    ├── ConfigError             a setting is wrong, or two settings contradict each other
    ├── CheckpointError         a weights file is missing, hostile, damaged or of another model
    ├── ImageError              one image cannot be scored; becomes a row, never stops a run
    ├── StorageError            a store did not do what was asked
    │   ├── AccessDeniedError   credentials are missing, wrong or too weak
    │   ├── NotFoundError       the object, folder or file does not exist
    │   │   └── NoSuchBucketError  nor does its bucket
    │   ├── OversizeError       the object is larger than the caller asked for
    │   ├── ChangedError        the object is not the one that was listed
    │   └── UnreachableError    no answer: wrong endpoint, network down, or time ran out
    │       └── OutageError     the store answers nobody, and has not for long: no single object is at fault
    └── RunError                a run cannot start, go on or be read
        ├── FingerprintError    the run directory belongs to a scan with other settings
        ├── FailureRateError    more images failed than the user allows
        ├── StallError          no shard was finished for longer than the user allows
        ├── SourceError         a manifest, inventory or archive is not what it should be
        └── TrainingError       a training cannot start or go on: its data, its losses, or its state

They cross process boundaries inside Ray, so each can be pickled: positional arguments only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lfm_scan.imaging.info import ImageInfo
    from lfm_scan.status import Status


class LFMScanError(Exception):
    """Base class: catch this to catch everything the package raises on purpose."""


class ConfigError(LFMScanError):
    """A setting is out of range, unknown, or contradicts another one."""


class CheckpointError(LFMScanError):
    """A weights file is missing, hostile, damaged, or not a checkpoint of this model."""


class ImageError(LFMScanError):
    """One image cannot be scored.

    Attributes:
        status: The status its row gets.
        message: What is wrong, what the limit is and what to do.
        info: Facts read from the file before it failed, or None.
    """

    def __init__(self, status: Status, message: str, info: ImageInfo | None = None) -> None:
        super().__init__(status, message, info)
        self.status = status
        self.message = message
        self.info = info

    def __str__(self) -> str:
        return f"{self.status}: {self.message}"


class StorageError(LFMScanError):
    """A store did not do what was asked."""


class AccessDeniedError(StorageError):
    """Credentials are missing, wrong, or lack a permission."""


class NotFoundError(StorageError):
    """The object, folder or file does not exist."""


class NoSuchBucketError(NotFoundError):
    """Not even the bucket exists: where a missing object is normal, this is not."""


class OversizeError(StorageError):
    """The object has more bytes than the caller accepts; its body was not read."""


class UnreachableError(StorageError):
    """The store did not answer: wrong endpoint, network down, or time ran out."""


class OutageError(UnreachableError):
    """The store has answered nobody for longer than its patience: the run must stop, not blame an image."""


class ChangedError(StorageError):
    """The object is no longer the one that was listed."""


class RunError(LFMScanError):
    """A run cannot start, go on, or be read."""


class FingerprintError(RunError):
    """The run directory belongs to a scan with other inputs, weights or settings."""


class FailureRateError(RunError):
    """More images failed than the user allows."""


class StallError(RunError):
    """No shard was finished for longer than the user allows."""


class SourceError(RunError):
    """A manifest, an inventory or an archive is not what it should be."""


class TrainingError(RunError):
    """A training cannot start or go on: its data, its losses, or its saved state are not what they should be."""
