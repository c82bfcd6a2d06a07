"""One door to every store: list, get with verification, create once. Nothing here ever renames or deletes a result."""

from __future__ import annotations

from lfm_scan.options import StorageConfig
from lfm_scan.storage.base import Fetched, ObjectInfo, PutOutcome, Store, check_size, join, name_of
from lfm_scan.storage.http import HttpStore
from lfm_scan.storage.local import LocalStore
from lfm_scan.storage.other import FsspecStore
from lfm_scan.storage.reader import open_object
from lfm_scan.storage.s3 import S3Store

__all__ = [
    "Fetched",
    "FsspecStore",
    "HttpStore",
    "LocalStore",
    "ObjectInfo",
    "PutOutcome",
    "S3Store",
    "StorageConfig",
    "Store",
    "check_size",
    "is_remote",
    "join",
    "name_of",
    "open_object",
    "open_store",
]


def is_remote(uri: str) -> bool:
    """Tell whether a URI names an object store rather than a local path."""
    return "://" in uri and not uri.startswith("file://")


def open_store(uri: str, config: StorageConfig | None = None, *, patient: bool = True) -> Store:
    """Return the store a URI belongs to. Stores are cheap, thread-safe, and not meant to be pickled.

    Args:
        uri: A local path, a file:// URI, s3://bucket/key, an http:// or https:// URL, or what fsspec can open: gs://,
            az://, abfs:// and others.
        config: How to reach it.
        patient: Retry for as long as a long run should. False answers within seconds: for the checks at start-up.

    Raises:
        ConfigError: If the scheme is not supported, or needs a package that is not installed.
    """
    config = config or StorageConfig()
    if uri.startswith("s3://"):
        return S3Store(config, patient=patient)
    if uri.startswith(("http://", "https://")):
        return HttpStore(config, patient=patient)
    if is_remote(uri):
        return FsspecStore(uri, config, patient=patient)
    return LocalStore()
