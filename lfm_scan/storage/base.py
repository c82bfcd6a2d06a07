"""What every store offers, and the values it speaks in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from lfm_scan.errors import OversizeError


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One stored object as a listing shows it.

    Attributes:
        uri: Names it exactly: s3://bucket/key with the raw key, or a local path.
        size_bytes: Its size; None if the store does not say.
        etag: The store's, without quotes; None for files.
        last_modified: In UTC.
    """

    uri: str
    size_bytes: int | None
    etag: str | None
    last_modified: datetime | None


@dataclass(frozen=True, slots=True)
class Fetched:
    """An object's bytes, complete and verified, and its facts at the moment it was read."""

    data: bytes
    info: ObjectInfo


@dataclass(frozen=True, slots=True)
class PutOutcome:
    """What `create` found.

    Attributes:
        created: Whether this call's bytes are what is stored now, even if the store's reply was lost.
        etag: Of what is stored now.
        size_bytes: Of what is stored now.
    """

    created: bool
    etag: str | None
    size_bytes: int


class Store(Protocol):
    """A place that holds objects."""

    def list(self, uri: str) -> Iterator[ObjectInfo]:
        """Yield every object at or under `uri`, in the order of their URIs' UTF-8 bytes.

        Directory markers are left out. S3 lists by prefix of the key; a local folder is walked.

        Raises:
            StorageError: If the place cannot be listed. A place that exists and is empty yields nothing.
        """
        ...

    def folders(self, uri: str) -> Iterator[str]:
        """Yield the URIs of the folders directly in a folder, without a slash at their end; objects are passed over.

        Raises:
            StorageError: If the place cannot be listed, or knows no folders.
        """
        ...

    def get(self, uri: str, max_bytes: int | None = None, version_id: str | None = None) -> Fetched:
        """Return an object, complete and verified.

        Args:
            uri: Of the object.
            max_bytes: Refuse a larger one without reading it.
            version_id: Of a version, where the store keeps them.

        Raises:
            NotFoundError: If it is not there.
            AccessDeniedError: If it may not be read.
            OversizeError: If it has more than `max_bytes`.
            OutageError: If the store answers nobody for longer than its patience.
            StorageError: If it cannot be read for another reason, after all retries.
        """
        ...

    def head(self, uri: str, version_id: str | None = None) -> ObjectInfo:
        """Return an object's facts.

        Raises:
            StorageError: As `get`.
        """
        ...

    def get_range(
        self, uri: str, start: int, num_bytes: int, etag: str | None = None, version_id: str | None = None
    ) -> bytes:
        """Return a stretch of an object: exactly so many bytes, which must be there.

        Args:
            uri: Of the object.
            start: Offset of the first byte.
            num_bytes: At least 1.
            etag: The object must still have this one.
            version_id: Of a version, where the store keeps them.

        Raises:
            ChangedError: If the object has another ETag, or ends earlier.
            StorageError: As `get`.
        """
        ...

    def create(self, uri: str, data: bytes) -> PutOutcome:
        """Store an object under a name not yet taken, all at once; never overwrite.

        Raises:
            StorageError: If it cannot be stored. That the name is taken is an outcome, not an error.
        """
        ...

    def replace(self, uri: str, data: bytes) -> None:
        """Store an object all at once, over one that may be there: for signs of life, never for results.

        Raises:
            StorageError: If it cannot be stored.
        """
        ...


def check_size(size_bytes: int | None, max_bytes: int | None) -> None:
    """Refuse an object by its size; one of unknown size passes.

    Raises:
        OversizeError: If it has more than `max_bytes`.
    """
    if size_bytes is not None and max_bytes is not None and size_bytes > max_bytes:
        raise OversizeError(f"{size_bytes:,} bytes, the limit is {max_bytes:,}")


def join(base: str, *names: str) -> str:
    """Append names to a URI or path."""
    return "/".join((base.rstrip("/"), *names))


def name_of(uri: str) -> str:
    """Return the last component of a URI or path."""
    return uri.rstrip("/").rsplit("/", 1)[-1]
