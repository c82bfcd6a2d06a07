"""Parquet files: with an image in each row, or with its URI."""

from __future__ import annotations

import bisect
import io
import itertools
import threading
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Final

import pyarrow as pa

from lfm_scan.errors import ChangedError, ImageError, OutageError, OversizeError, SourceError, StorageError
from lfm_scan.options import InputConfig
from lfm_scan.scoring.prepare import image_error
from lfm_scan.sources.inputs import Input, Kind
from lfm_scan.sources.manifest import URI_COLUMNS, find_uri_column, folder_of, listed, named_input
from lfm_scan.sources.parquetfile import Parquet, open_parquet, reading, unique_names, values_of
from lfm_scan.status import Status
from lfm_scan.storage import Fetched, ObjectInfo, Store, check_size, open_object

IMAGE_COLUMNS: Final = ("image", "image_bytes", "bytes", "content", "data", "img", "jpg", "jpeg", "png", "webp")
"""Names, in lower case, of binary columns taken to hold images."""

_WHOLE_BYTES: Final = 64 * 2**20
"""Files up to so many are fetched at once, which lets the store's checksum vouch for them."""
_NUM_KEPT: Final = 2
_PLANNING_BYTES: Final = 2**20
"""A request, while planning: the columns to carry lie here and there."""
_MAX_CELLS: Final = 32


def read_table(store: Store, found: ObjectInfo, config: InputConfig) -> Iterator[Input]:
    """Yield an input for each row of a Parquet file.

    A column of images is one that `config` names, or one of type struct<bytes, path> as Hugging Face writes it, or a
    binary one with a name of `IMAGE_COLUMNS`; rows become `<file>#row=<n>`, from 0. Else a column of URIs is read as a
    manifest's. Images are not read here, only the footer and the columns to carry.

    A file that cannot be read gives one input with its own URI and a status, for all of it or for the rest.

    Args:
        store: The file lies in.
        found: The file.
        config: Which columns hold images or URIs, and which to carry.

    Raises:
        SourceError: If the file is sound and has no column to use, or not one to carry.
        OutageError: If the store answers nobody.
    """
    try:
        file = open_parquet(open_object(store, found, chunk_bytes=_PLANNING_BYTES))
        image = find_image_column(found.uri, file.schema, config)
        types = _carried_types(found.uri, file.schema, config)
        if image is not None:
            yield from _image_rows(file, found, list(types))
        else:
            yield from _uri_rows(file, found, _find_uri_column(found.uri, file.schema, config), list(types))
    except OutageError:
        raise
    except StorageError as exc:
        yield _unreadable(found, image_error(exc))
    except ImageError as exc:
        yield _unreadable(found, exc)


def carried_types(store: Store, found: ObjectInfo, config: InputConfig) -> dict[str, pa.DataType]:
    """Return the types of the columns to carry from a Parquet file; none if it cannot be read.

    Numbers, booleans, dates and times keep their type. Text of any sort is a string; nested values are JSON text.

    Raises:
        SourceError: If the file has not got one of them, or it is binary.
        OutageError: If the store answers nobody.
    """
    try:
        file = open_parquet(open_object(store, found, chunk_bytes=_PLANNING_BYTES))
    except OutageError:
        raise
    except (StorageError, ImageError):
        return {}
    return _carried_types(found.uri, file.schema, config)


def columns_among(store: Store, found: ObjectInfo, names: Sequence[str]) -> list[str]:
    """Return those of some columns' names that a Parquet file has; none if it cannot be read.

    Raises:
        OutageError: If the store answers nobody.
    """
    try:
        schema = open_parquet(open_object(store, found, chunk_bytes=_PLANNING_BYTES)).schema
    except OutageError:
        raise
    except (StorageError, ImageError):
        return []
    return [name for name in names if schema.get_field_index(name) >= 0]


def read_cells(
    store: Store, inputs: Sequence[Input], max_bytes: int, config: InputConfig
) -> Iterator[Fetched | ImageError]:
    """Yield the bytes of rows of one Parquet file, or why there are none, in order.

    Only the row groups and the column that are needed are read, some cells at a time.

    Args:
        store: The file lies in.
        inputs: Of one file, as `read_table` gave them, with rising positions.
        max_bytes: Cells with more are too_large.
        config: As `read_table` had it: says which column holds the images.

    Raises:
        OutageError: If the store answers nobody.
    """
    remaining = deque(inputs)
    try:
        for outcome in _outcomes(store, inputs, max_bytes, config):
            remaining.popleft()
            yield outcome
        return
    except OutageError:
        raise
    except StorageError as exc:
        error = image_error(exc)
    except ImageError as exc:
        error = exc
    except SourceError as exc:
        error = ImageError(Status.ERROR, str(exc))
    for _ in remaining:
        yield error


def find_image_column(uri: str, schema: pa.Schema, config: InputConfig) -> str | None:
    """Return the name of the column that holds images; None if URIs are to be read.

    Raises:
        SourceError: If the one asked for holds none, or several could.
    """
    name = config.image_column
    if name is not None:
        index = schema.get_field_index(name)
        if index < 0:
            raise SourceError(f"{uri}: has no column {name!r} (--image-column); it has {_columns(schema)}")
        if not (_is_binary(schema.field(index).type) or _is_image(schema.field(index).type)):
            raise SourceError(
                f"{uri}: column {name!r} (--image-column) is {_type_of(schema.field(index))}; images are binary, or a "
                "struct with binary bytes"
            )
        return name
    if config.uri_column is not None:
        return None
    fields = [schema.field(each) for each in unique_names(schema)]
    images = [field.name for field in fields if _is_image(field.type) and field.type.get_field_index("path") >= 0]
    if not images:
        images = [field.name for field in fields if field.name.lower() in IMAGE_COLUMNS and _is_binary(field.type)]
    if len(images) > 1:
        raise SourceError(f"{uri}: columns {listed(images)} may all hold images: name one by --image-column")
    return images[0] if images else None


def _find_uri_column(uri: str, schema: pa.Schema, config: InputConfig) -> str:
    texts = [each for each in unique_names(schema) if _is_text(schema.field(each).type)]
    name = config.uri_column or find_uri_column(texts)
    if name is None:
        raise SourceError(
            f"{uri}: no column holds images (binary and named {', '.join(IMAGE_COLUMNS)}, or struct<bytes, path>) or "
            f"URIs (text and named {', '.join(URI_COLUMNS)}); it has {_columns(schema)}: name one by --image-column or "
            "--uri-column"
        )
    if name not in texts:
        raise SourceError(f"{uri}: has no column {name!r} of text (--uri-column); it has {_columns(schema)}")
    return name


def _carried_types(uri: str, schema: pa.Schema, config: InputConfig) -> dict[str, pa.DataType]:
    types = {}
    for name in config.carry:
        index = schema.get_field_index(name)
        if index < 0:
            raise SourceError(f"{uri}: has no column {name!r} to carry (--carry); it has {_columns(schema)}")
        kind = schema.field(index).type
        if _holds_binary(kind):
            raise SourceError(
                f"{uri}: column {name!r} (--carry) is {_type_of(schema.field(index))}: binary values are not carried"
            )
        is_text = _is_text(kind) or pa.types.is_nested(kind) or pa.types.is_null(kind)
        types[name] = pa.string() if is_text else kind
    return types


def _image_rows(file: Parquet, found: ObjectInfo, carry: Sequence[str]) -> Iterator[Input]:
    num_rows = file.num_rows
    carried = _carried_rows(file, carry) if carry else itertools.repeat({}, num_rows)
    row = 0
    for row, values in enumerate(itertools.islice(carried, num_rows), 1):
        yield Input(
            uri=f"{found.uri}#row={row - 1}",
            etag=found.etag,
            last_modified=found.last_modified,
            kind=Kind.PARQUET,
            location=found.uri,
            position=row - 1,
            carried=values,
        )
    if row < num_rows:
        raise ImageError(Status.CORRUPT, f"the Parquet file ends after {row:,} of {num_rows:,} rows")


def _uri_rows(file: Parquet, found: ObjectInfo, column: str, carry: Sequence[str]) -> Iterator[Input]:
    folder = folder_of(found.uri)
    for row, values in enumerate(_carried_rows(file, [*carry, *({column} - set(carry))])):
        value = values[column] if column in carry else values.pop(column)
        yield named_input(value, folder, f"{found.uri}#row={row}", values)


def _carried_rows(file: Parquet, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    for group in range(len(file.group_rows)):
        for batch in file.batches(columns, group):
            # By name and not by place: a dot in a name may have selected more columns than it should.
            values = [values_of(batch.column(batch.schema.get_field_index(name))) for name in columns]
            for row in zip(*values, strict=True):
                yield dict(zip(columns, row, strict=True))


def _unreadable(found: ObjectInfo, error: ImageError) -> Input:
    return Input(
        uri=found.uri,
        size_bytes=found.size_bytes,
        etag=found.etag,
        last_modified=found.last_modified,
        status=error.status,
        error=error.message.encode("utf-8", "backslashreplace").decode(),
    )


@dataclass(frozen=True, slots=True)
class _Cells:
    """The images of an open Parquet file.

    Attributes:
        info: Of the file.
        file: As `open_parquet` gives it.
        column: Name of the column.
        starts: Index of the first row of each row group, and at the end the number of rows.
    """

    info: ObjectInfo
    file: Parquet
    column: str
    starts: Sequence[int]

    def group_of(self, planned: Input) -> int:
        """Return the row group that an input lies in, or that it should lie behind."""
        return bisect.bisect_right(self.starts, planned.position or 0) - 1

    def read(self, group: int, wanted: Sequence[Input], max_bytes: int) -> Iterator[Fetched | ImageError]:
        """Yield the cells of inputs of one row group. Damage costs what comes after it in the group."""
        if group == len(self.starts) - 1:
            gone = ImageError(Status.ERROR, f"the file has {self.starts[-1]:,} rows: it changed since it was planned")
            yield from itertools.repeat(gone, len(wanted))
            return
        waiting = deque(wanted)
        try:
            yield from self._read(group, waiting, max_bytes)
            damage = ImageError(Status.CORRUPT, f"row group {group} of the Parquet file ends early")
        except ImageError as exc:
            damage = exc
        yield from itertools.repeat(damage, len(waiting))

    def _read(self, group: int, waiting: deque[Input], max_bytes: int) -> Iterator[Fetched | ImageError]:
        first = self.starts[group]
        for batch in self.file.batches(self._leaves, group, _MAX_CELLS):
            cells = batch.column(batch.schema.get_field_index(self.column))
            while waiting and (waiting[0].position or 0) < first + len(cells):
                with reading():
                    outcome = self._cell(cells[(waiting[0].position or 0) - first], waiting[0].uri, max_bytes)
                waiting.popleft()
                yield outcome
            if not waiting:
                return
            first += len(cells)

    def _cell(self, cell: pa.Scalar, uri: str, max_bytes: int) -> Fetched | ImageError:
        if not cell.is_valid:
            return ImageError(Status.EMPTY, "the cell is null")
        if pa.types.is_struct(cell.type):
            path = cell["path"] if cell.type.get_field_index("path") >= 0 else None
            cell = cell["bytes"]
            if not cell.is_valid:
                if path is not None and path.is_valid:
                    return ImageError(Status.ERROR, "the cell holds a path, not bytes: scan the files themselves")
                return ImageError(Status.EMPTY, "the cell has no bytes")
        buffer = cell.as_buffer()
        try:
            check_size(buffer.size, max_bytes)
        except OversizeError as exc:
            return image_error(exc)
        info = ObjectInfo(uri, buffer.size, self.info.etag, self.info.last_modified)
        return Fetched(buffer.to_pybytes(), info)

    @property
    def _leaves(self) -> list[str]:
        kind = self.file.schema.field(self.column).type
        if not pa.types.is_struct(kind):
            return [self.column]
        return [f"{self.column}.{name}" for name in ("bytes", "path") if kind.get_field_index(name) >= 0]


def _outcomes(
    store: Store, inputs: Sequence[Input], max_bytes: int, config: InputConfig
) -> Iterator[Fetched | ImageError]:
    if not inputs:
        return
    cells = _open_cells(store, inputs[0], config)
    for group, wanted in itertools.groupby(inputs, key=cells.group_of):
        yield from cells.read(group, list(wanted), max_bytes)


def _open_cells(store: Store, planned: Input, config: InputConfig) -> _Cells:
    info, file = _fetch(store, planned)
    opened = open_parquet(file)
    column = find_image_column(info.uri, opened.schema, config)
    if column is None:
        raise ChangedError(f"{info.uri}: has no column of images any more: it changed since it was planned")
    starts = [0, *itertools.accumulate(opened.group_rows)]
    return _Cells(info, opened, column, starts)


def _fetch(store: Store, planned: Input) -> tuple[ObjectInfo, BinaryIO]:
    """Return a small file as bytes, kept for the next shard, and a large one to be read by ranges."""
    uri = planned.where
    kept = _kept.get(uri, planned.etag)
    if kept is None:
        try:
            kept = store.get(uri, _WHOLE_BYTES)
        except OversizeError:
            info = store.head(uri)
            _check_unchanged(info, planned)
            return info, open_object(store, info)
        _check_unchanged(kept.info, planned)
        _kept.put(uri, kept)
    return kept.info, io.BytesIO(kept.data)


def _check_unchanged(info: ObjectInfo, planned: Input) -> None:
    known = [(info.etag, planned.etag), (info.last_modified, planned.last_modified)]
    # A store with ETags is believed on them alone; of a file there is only the time.
    before_after = next(((now, then) for now, then in known if now is not None and then is not None), None)
    if before_after is not None and before_after[0] != before_after[1]:
        raise ChangedError(f"{info.uri}: changed since it was planned: scan it again in a new run")


class _Kept:
    """The files read last in this process. Those without an ETag are not kept: they may change unnoticed."""

    def __init__(self) -> None:
        self._files: OrderedDict[tuple[str, str], Fetched] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, uri: str, etag: str | None) -> Fetched | None:
        """Return a file if it is kept."""
        with self._lock:
            file = self._files.get((uri, etag or ""))
            if file is not None:
                self._files.move_to_end((uri, etag or ""))
            return file

    def put(self, uri: str, file: Fetched) -> None:
        """Keep a file; drop the one that was not read for longest."""
        if file.info.etag is None:
            return
        with self._lock:
            self._files[uri, file.info.etag] = file
            self._files.move_to_end((uri, file.info.etag))
            while len(self._files) > _NUM_KEPT:
                self._files.popitem(last=False)


_kept: Final = _Kept()


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_image(kind: pa.DataType) -> bool:
    """Tell whether this is a struct with binary bytes."""
    if not pa.types.is_struct(kind):
        return False
    index = kind.get_field_index("bytes")
    return bool(index >= 0 and _is_binary(kind.field(index).type))


def _holds_binary(kind: pa.DataType) -> bool:
    if pa.types.is_nested(kind):
        return any(_holds_binary(kind.field(index).type) for index in range(kind.num_fields))
    return _is_binary(kind) or bool(pa.types.is_fixed_size_binary(kind))


def _columns(schema: pa.Schema) -> str:
    return listed([f"{field.name} ({_type_of(field)})" for field in schema])


def _type_of(field: pa.Field) -> str:
    return f"{field.type!s:.60}"
