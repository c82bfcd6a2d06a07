"""Parquet files that may be hostile: opened with bounded metadata, read in bounded batches, damage told from bugs.

pyarrow would take Arrow types from a schema that a file brings along, among them extension types that this process has
registered; one of Ray's unpickles its values. That schema is renamed in the footer before pyarrow sees it, so every
column has the type that Parquet itself gives it.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from datetime import date, datetime, time
from typing import Any, BinaryIO, Final

import pyarrow as pa
import pyarrow.parquet as pq

from lfm_scan.errors import ImageError, StorageError
from lfm_scan.status import Status

_MAGIC: Final = b"PAR1"
_ENCRYPTED_MAGIC: Final = b"PARE"
_TAIL_BYTES: Final = 8
_FIRST_READ_BYTES: Final = 2**16
_MAX_FOOTER_BYTES: Final = 16 * 2**20
_ARROW_SCHEMA: Final = b"ARROW:schema"
_NO_SCHEMA: Final = b"arrow_schema"

_BUFFER_BYTES: Final = 2**20
_BATCH_BYTES: Final = 16 * 2**20
_MAX_ROWS: Final = 4096

# What pyarrow raises on bytes it cannot read, found by fuzzing it; anything else is our bug.
_DAMAGE: Final = (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError, KeyError)


def open_parquet(file: BinaryIO) -> pq.ParquetFile:
    """Open a Parquet file that may be hostile: bounded metadata, no types but Parquet's own, page checksums verified.

    Args:
        file: Can seek; read in stretches, not as a whole.

    Raises:
        ImageError: If it is empty, truncated, corrupt or unsupported.
        StorageError: If it cannot be read.
    """
    metadata_file = _footer(file)
    with reading():
        metadata = pq.ParquetFile(pa.BufferReader(metadata_file)).metadata
        opened = pq.ParquetFile(
            file,
            metadata=metadata,
            buffer_size=_BUFFER_BYTES,
            pre_buffer=False,  # or it would hold all of a column chunk
            page_checksum_verification=True,
            arrow_extensions_enabled=False,
        )
        opened.schema_arrow.to_string(show_schema_metadata=False)  # decodes every name in it
        _check_rows(metadata, _size_of(file))
    return opened


def read_batches(
    file: pq.ParquetFile, columns: Sequence[str], groups: Sequence[int], max_rows: int = _MAX_ROWS
) -> Iterator[pa.RecordBatch]:
    """Yield the rows of row groups, few at a time where they are large.

    Args:
        file: As `open_parquet` gives it.
        columns: To read; a struct's member as struct.member.
        groups: Indices of the row groups.
        max_rows: In a batch.

    Raises:
        ImageError: If what comes next is damaged.
        StorageError: If it cannot be read.
    """
    for group in groups:  # one by one: a batch across them would be lost as a whole to damage in the second
        with reading():
            yield from file.iter_batches(
                min(max_rows, _rows_a_batch(file.metadata.row_group(group))),
                row_groups=[group],
                columns=list(columns),
                use_threads=False,
            )


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


def group_rows(metadata: pq.FileMetaData) -> Iterator[int]:
    """Yield the number of rows of each row group, by the footer."""
    return (metadata.row_group(index).num_rows for index in range(metadata.num_row_groups))


def _size_of(file: BinaryIO) -> int:
    return file.seek(0, 2)


def _footer(file: BinaryIO) -> bytes:
    """Return a Parquet file that is only the file's footer, without its Arrow schema."""
    size_bytes = _size_of(file)
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
    return _MAGIC + tail[-_TAIL_BYTES - num_bytes :].replace(_ARROW_SCHEMA, _NO_SCHEMA)


def _stretch(file: BinaryIO, start: int, end: int) -> bytes:
    file.seek(start)
    return file.read(end - start)


def _check_rows(metadata: pq.FileMetaData, size_bytes: int) -> None:
    """Refuse numbers of rows that cannot be.

    A run of equal values takes a few bytes however long it is, so a small file can claim any number of rows; a table
    of images that has more rows than bytes is made to be planned for ever.
    """
    num_rows = list(group_rows(metadata))
    if min(num_rows, default=0) < 0 or sum(num_rows) != metadata.num_rows:
        raise ImageError(Status.CORRUPT, "the Parquet file contradicts itself on how many rows it has")
    if metadata.num_rows > size_bytes:
        raise ImageError(Status.CORRUPT, f"the Parquet file claims {metadata.num_rows:,} rows in {size_bytes:,} bytes")


def _rows_a_batch(group: pq.RowGroupMetaData) -> int:
    """Return how many rows are some `_BATCH_BYTES` of all columns, by what the footer says of their mean.

    A column's own size is not asked for: pyarrow's accessor ends the process if the column's metadata are damaged.
    """
    return max(1, _BATCH_BYTES * int(group.num_rows) // max(1, int(group.total_byte_size)))


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
