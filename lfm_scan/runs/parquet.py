"""Tables as the bytes of a Parquet file: every file of a run is complete in memory before it is put."""

from __future__ import annotations

import io
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

_ROW_GROUP_ROWS: Final = 131_072


def to_parquet(table: pa.Table) -> bytes:
    """Return a Parquet file, zstd, with statistics on every column."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", row_group_size=_ROW_GROUP_ROWS)
    return buffer.getvalue()


def from_parquet(data: bytes, schema: pa.Schema | None = None) -> pa.Table:
    """Return the table in a Parquet file, with the columns of a schema or, without one, its own."""
    return pq.read_table(pa.BufferReader(data), schema=schema)
