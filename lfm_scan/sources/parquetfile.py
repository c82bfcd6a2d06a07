"""Parquet files that may be hostile: bounded metadata, bounded pages, bounded batches, and damage told from bugs.

pyarrow would take Arrow types from a schema that a file brings along, among them extension types that this process has
registered; one of Ray's unpickles its values. That schema is renamed in the footer before pyarrow sees it, so every
column has the type that Parquet itself gives it.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections.abc import Iterator, Sequence
from datetime import date, datetime, time
from typing import Any, BinaryIO, Final

import pyarrow as pa
import pyarrow.parquet as pq

from lfm_scan.errors import ImageError, StorageError
from lfm_scan.sources.pages import GuardedFile, PageTooLargeError, column_chunks
from lfm_scan.status import Status

_MAGIC: Final = b"PAR1"
_ENCRYPTED_MAGIC: Final = b"PARE"
_TAIL_BYTES: Final = 8
_FIRST_READ_BYTES: Final = 2**16
_MAX_FOOTER_BYTES: Final = 16 * 2**20
_ARROW_SCHEMA: Final = b"ARROW:schema"
_NO_SCHEMA: Final = b"arrow_schema"

_BUFFER_BYTES: Final = 2**20
_MAX_PAGE_BYTES: Final = 256 * 2**20
"""Of a page unpacked; reading it takes up to three times as much. Writers aim at 1 MiB, some put 100 images in one."""
_MAX_ROWS: Final = 128

# What pyarrow raises on bytes it cannot read, found by fuzzing it; anything else is our bug.
_DAMAGE: Final = (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError)


class Parquet:
    """An open Parquet file: Parquet's own types, nothing read but what is asked for.

    Attributes:
        schema: Of its columns.
        num_rows: In all.
        group_rows: Number of rows of each row group.
    """

    def __init__(self, file: BinaryIO) -> None:
        footer = _footer(file)
        with reading():
            # A file that is all footer, so that pyarrow sees this one and no other.
            metadata = pq.ParquetFile(pa.BufferReader(_MAGIC + footer + _tail_of(footer))).metadata
            self._guard = GuardedFile(file, column_chunks(footer))
            self._file = pq.ParquetFile(
                self._guard,
                metadata=metadata,
                buffer_size=_BUFFER_BYTES,
                pre_buffer=False,  # or it would hold all of a column chunk
                page_checksum_verification=True,
                arrow_extensions_enabled=False,
            )
            self.schema: pa.Schema = self._file.schema_arrow
            self.schema.to_string(show_schema_metadata=False)  # decodes every name in it
            self.num_rows = int(metadata.num_rows)
            self.group_rows = [int(metadata.row_group(index).num_rows) for index in range(metadata.num_row_groups)]
        self._check_rows(file.seek(0, io.SEEK_END))

    def batches(self, columns: Sequence[str], group: int, max_rows: int = _MAX_ROWS) -> Iterator[pa.RecordBatch]:
        """Yield the rows of a row group, fewer at a time the larger its pages are.

        A value is no larger than a page, but each row may hold the same one: so rows times page are bounded.

        Args:
            columns: To read; a struct's member as struct.member.
            group: Index of the row group.
            max_rows: In a batch.

        Raises:
            ImageError: If what comes next is damaged, or too large.
            StorageError: If it cannot be read.
        """
        num_done = 0
        while True:
            self._guard.max_page_bytes = _MAX_PAGE_BYTES // max_rows
            try:
                for batch in self._batches(columns, group, max_rows, num_done):
                    yield batch
                    num_done += batch.num_rows
                return
            except PageTooLargeError as exc:
                if exc.num_bytes > _MAX_PAGE_BYTES:
                    raise ImageError(
                        Status.UNSUPPORTED,
                        f"a page of the Parquet file has {exc.num_bytes:,} bytes, the limit is {_MAX_PAGE_BYTES:,}: "
                        "write it with smaller pages",
                    ) from exc
                max_rows = _MAX_PAGE_BYTES // exc.num_bytes

    def _batches(self, columns: Sequence[str], group: int, max_rows: int, num_done: int) -> Iterator[pa.RecordBatch]:
        with reading():
            for batch in self._file.iter_batches(
                max_rows, row_groups=[group], columns=list(columns), use_threads=False
            ):
                if batch.num_rows > num_done:
                    yield batch.slice(num_done)
                num_done = max(0, num_done - batch.num_rows)

    def _check_rows(self, size_bytes: int) -> None:
        """Refuse numbers of rows that cannot be.

        A run of equal values takes a few bytes however long it is, so a small file can claim any number of rows; a
        table of images that has more rows than bytes is made to be planned for ever.
        """
        if min(self.group_rows, default=0) < 0 or sum(self.group_rows) != self.num_rows:
            raise ImageError(Status.CORRUPT, "the Parquet file contradicts itself on how many rows it has")
        if self.num_rows > size_bytes:
            raise ImageError(Status.CORRUPT, f"the Parquet file claims {self.num_rows:,} rows in {size_bytes:,} bytes")


def open_parquet(file: BinaryIO) -> Parquet:
    """Open a Parquet file.

    Args:
        file: Can seek; read in stretches, not as a whole.

    Raises:
        ImageError: If it is empty, truncated, corrupt or unsupported.
        StorageError: If it cannot be read.
    """
    return Parquet(file)


def values_of(array: pa.Array) -> list[Any]:
    """Return the values of a column to carry, with the types that `carried_types` tells.

    What no Python value can be, such as the year 30,000, is None. Text that is not UTF-8 has its bad bytes written out.
    """
    if pa.types.is_nested(array.type):
        return [_json_of(scalar) for scalar in array]
    try:
        return list(array.to_pylist())
    except _DAMAGE:
        return [_value_of(scalar) for scalar in array]


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Turn what pyarrow raises until the end of the block into an ImageError. A store's errors pass through it."""
    try:
        yield
    except StorageError:
        raise
    except (pa.ArrowNotImplementedError, NotImplementedError) as exc:
        raise ImageError(Status.UNSUPPORTED, f"a Parquet feature that is not read: {_brief(exc)}") from exc
    except _DAMAGE as exc:
        raise ImageError(Status.CORRUPT, f"the Parquet file is damaged: {_brief(exc)}") from exc


def _brief(exc: BaseException) -> str:
    return (str(exc).splitlines() or [type(exc).__name__])[0][:300]


def unique_names(schema: pa.Schema) -> list[str]:
    """Return the names of the columns that no other column shares."""
    return [name for name in schema.names if schema.get_field_index(name) >= 0]


def _footer(file: BinaryIO) -> bytes:
    """Return a Parquet file's metadata, without its Arrow schema."""
    size_bytes = file.seek(0, io.SEEK_END)
    if size_bytes == 0:
        raise ImageError(Status.EMPTY, "the file has no bytes")
    tail = _stretch(file, max(0, size_bytes - _FIRST_READ_BYTES), size_bytes)
    if len(tail) < len(_MAGIC) + _TAIL_BYTES or not tail.endswith((_MAGIC, _ENCRYPTED_MAGIC)):
        if _stretch(file, 0, len(_MAGIC)) in (_MAGIC, _ENCRYPTED_MAGIC):
            raise ImageError(Status.TRUNCATED, "the Parquet file has no end: upload it again")
        raise ImageError(Status.UNSUPPORTED, "not a Parquet file")
    if tail.endswith(_ENCRYPTED_MAGIC):
        raise ImageError(Status.UNSUPPORTED, "an encrypted Parquet file: decrypt it first")
    num_bytes = int.from_bytes(tail[-_TAIL_BYTES : -len(_MAGIC)], "little")
    start = size_bytes - _TAIL_BYTES - num_bytes
    if start < len(_MAGIC):
        raise ImageError(
            Status.CORRUPT, f"the Parquet file claims {num_bytes:,} bytes of metadata, it has {size_bytes:,}"
        )
    if num_bytes > _MAX_FOOTER_BYTES:
        raise ImageError(
            Status.UNSUPPORTED,
            f"the Parquet file has {num_bytes:,} bytes of metadata, the limit is {_MAX_FOOTER_BYTES:,}: write it with "
            "fewer columns or larger row groups",
        )
    if num_bytes + _TAIL_BYTES > len(tail):
        tail = _stretch(file, start, size_bytes)
    return tail[-_TAIL_BYTES - num_bytes : -_TAIL_BYTES].replace(_ARROW_SCHEMA, _NO_SCHEMA)


def _tail_of(footer: bytes) -> bytes:
    return len(footer).to_bytes(4, "little") + _MAGIC


def _stretch(file: BinaryIO, start: int, end: int) -> bytes:
    file.seek(start)
    return file.read(end - start)


def _json_of(scalar: pa.Scalar) -> str | None:
    try:
        value = scalar.as_py()
        return None if value is None else json.dumps(_plain(value), separators=(",", ":"))
    except (*_DAMAGE, RecursionError):
        return None


def _plain(value: object) -> object:
    """Return a value as JSON knows it: dates and times as ISO text, decimals as text, NaN as null."""
    match value:
        case dict():
            return {name: _plain(member) for name, member in value.items()}
        case list() | tuple():
            return [_plain(member) for member in value]
        case float():
            return value if math.isfinite(value) else None
        case None | bool() | int() | str():
            return value
        case datetime() | date() | time():
            return value.isoformat()
        case _:
            return str(value)


def _value_of(scalar: pa.Scalar) -> object:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return bytes(scalar.as_buffer()).decode("utf-8", "backslashreplace")
    except _DAMAGE:
        return None
