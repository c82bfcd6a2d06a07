"""A stored object as a file: read in stretches that are verified and retried one by one."""

from __future__ import annotations

import io
from typing import Final

from lfm_scan.errors import StorageError
from lfm_scan.storage.base import ObjectInfo, Store

_STREAM_BYTES: Final = 8 * 2**20


class _ObjectFile(io.RawIOBase):
    """Reads an object by ranges; a seek costs nothing until the next read."""

    def __init__(self, store: Store, found: ObjectInfo, size_bytes: int, version_id: str | None) -> None:
        super().__init__()
        self._store = store
        self._found = found
        self._size_bytes = size_bytes
        self._version_id = version_id
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size_bytes}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        num_bytes = min(len(buffer), self._size_bytes - self._position)
        if num_bytes <= 0:
            return 0
        data = self._store.get_range(
            self._found.uri, self._position, num_bytes, etag=self._found.etag, version_id=self._version_id
        )
        buffer[:num_bytes] = data
        self._position += num_bytes
        return num_bytes


def open_object(
    store: Store, found: ObjectInfo, version_id: str | None = None, *, chunk_bytes: int = _STREAM_BYTES
) -> io.BufferedReader:
    """Open an object for reading.

    Args:
        store: It lies in.
        found: As listed. If the object has another ETag by then, reading raises ChangedError.
        version_id: Of a version, where the store keeps them.
        chunk_bytes: Bytes a request, for reads smaller than that: large for streams, small for reading here and there.

    Raises:
        StorageError: On opening if its size has to be asked for, later if a read fails.
    """
    size_bytes = found.size_bytes
    if size_bytes is None:
        found = store.head(found.uri, version_id)
        size_bytes = found.size_bytes
    if size_bytes is None:
        raise StorageError(f"{found.uri}: the store does not tell its size")
    return io.BufferedReader(_ObjectFile(store, found, size_bytes, version_id), chunk_bytes)
