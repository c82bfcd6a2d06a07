"""One planned input: what to score, what it is called, and how to get at its bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any, Final

import pyarrow as pa

from lfm_scan.errors import SourceError
from lfm_scan.status import Status
from lfm_scan.storage import ObjectInfo


class Kind(StrEnum):
    """Where the bytes of an input lie."""

    OBJECT = "object"
    """They are an object of their own."""
    TAR = "tar"
    """A stretch of an uncompressed tar archive."""
    TAR_GZ = "tar.gz"
    """A member of a compressed tar archive."""
    PARQUET = "parquet"
    """A cell of a Parquet file."""


_NOTHING: Final[Mapping[str, Any]] = {}  # shared: most of a million inputs carry nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """One input of a run: one row of its plan and, in the end, one row of its results.

    Attributes:
        uri: Names the exact origin: an object's URI, `s3://b/x.tar#member`, `s3://b/x.parquet#row=17`,
            `s3://b/key?versionId=...`.
        size_bytes: Of the image file, where the listing says.
        etag: Of the object, or of the container it lies in.
        last_modified: Of the object, or of the container it lies in, in UTC.
        kind: Where its bytes lie.
        location: URI of the object to read, where that is not `uri`: the container, or the object of a version.
        version_id: Of the object, where a version is meant.
        position: In the container: offset of the first byte (tar), index of the member among the archive's headers
            (tar.gz), index of the row (parquet).
        crc32: Of the bytes as the planner saw them, where it did.
        status: Why there are no bytes, where the planner knows that already; else None.
        error: What is wrong, with `status`.
        carried: Other columns of the source that the user wants in the results.
    """

    uri: str
    size_bytes: int | None = None
    etag: str | None = None
    last_modified: datetime | None = None
    kind: Kind = Kind.OBJECT
    location: str | None = None
    version_id: str | None = None
    position: int | None = None
    crc32: int | None = None
    status: Status | None = None
    error: str | None = None
    carried: Mapping[str, Any] = field(default_factory=lambda: _NOTHING)

    @classmethod
    def of(cls, found: ObjectInfo) -> Input:
        """Return the input that a listed object is."""
        return cls(uri=found.uri, size_bytes=found.size_bytes, etag=found.etag, last_modified=found.last_modified)

    @property
    def where(self) -> str:
        """URI of the object to read."""
        return self.location or self.uri


INPUT_SCHEMA: Final = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),
        pa.field("size_bytes", pa.int64()),
        pa.field("etag", pa.string()),
        pa.field("last_modified", pa.timestamp("us", tz="UTC")),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("location", pa.string()),
        pa.field("version_id", pa.string()),
        pa.field("position", pa.int64()),
        pa.field("crc32", pa.int64()),
        pa.field("status", pa.string()),
        pa.field("error", pa.string()),
    ]
)
"""A plan's columns, without those it carries."""

CARRIED: Final = "carried:"
"""Before the name of each column that a plan carries: none can then be taken for one of its own."""


def input_schema(carried: Mapping[str, pa.DataType]) -> pa.Schema:
    """Return the columns of a plan that carries some of the source's."""
    return pa.schema([*INPUT_SCHEMA, *(pa.field(CARRIED + name, kind) for name, kind in carried.items())])


def carried_fields(schema: pa.Schema) -> list[pa.Field]:
    """Return the fields that a plan with this schema carries, under their own names."""
    return [field.with_name(field.name.removeprefix(CARRIED)) for field in schema if field.name.startswith(CARRIED)]


def to_table(inputs: Iterable[Input], schema: pa.Schema) -> pa.Table:
    """Return inputs as a table.

    Args:
        inputs: Of a plan.
        schema: As `input_schema` gives it.

    Raises:
        SourceError: If a carried value is not of its column's type.
    """
    rows = list(inputs)
    columns = []
    for column in schema:
        if column.name.startswith(CARRIED):
            name = column.name.removeprefix(CARRIED)
            values = [row.carried.get(name) for row in rows]
            if pa.types.is_string(column.type):  # sources may disagree on a type; then it is text
                values = [value if value is None else str(value) for value in values]
            columns.append(_typed(values, name, column.type))
        else:
            columns.append(pa.array([getattr(row, column.name) for row in rows], type=column.type))
    return pa.Table.from_arrays(columns, schema=schema)


def _typed(values: list[Any], name: str, kind: pa.DataType) -> pa.Array:
    try:
        return pa.array(values, type=kind)
    except (pa.ArrowException, OverflowError, TypeError, ValueError) as exc:
        raise SourceError(
            f"--carry {name}: the first file has it as {kind}, another one has a value that is none ({exc}): scan the "
            "files that differ in a run of their own"
        ) from exc


def from_table(table: pa.Table) -> list[Input]:
    """Return the inputs in a table that `to_table` made."""
    names = [name.removeprefix(CARRIED) for name in table.column_names if name.startswith(CARRIED)]
    inputs = []
    for row in table.to_pylist():
        carried = {name: row.pop(CARRIED + name) for name in names}
        row["kind"] = Kind(row["kind"])
        row["status"] = row["status"] and Status(row["status"])
        inputs.append(Input(**row, carried=carried))
    return inputs
