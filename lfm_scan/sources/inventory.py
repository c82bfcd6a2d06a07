"""S3 Inventory: the listing of a bucket that S3 itself writes, daily or weekly, for buckets too large to list.

Formats as in "Amazon S3 Inventory list" and "Locating your inventory list" of the Amazon S3 User Guide: a manifest.json
names data files in a destination bucket. In CSV there is no header and keys are URL-encoded; in Parquet they are not.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import urllib.parse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, BinaryIO, Final

from lfm_scan.errors import ImageError, NotFoundError, OversizeError, SourceError
from lfm_scan.options import InputConfig
from lfm_scan.sources.inputs import Input
from lfm_scan.sources.lines import BadLine, decompressed, read_lines, read_records
from lfm_scan.sources.parquetfile import open_parquet, unique_names, values_of
from lfm_scan.status import Status
from lfm_scan.storage import ObjectInfo, Store, open_object

_MAX_MANIFEST_BYTES: Final = 64 * 2**20
"""Room for some 300,000 data files; S3 writes a million keys and more to each."""
_WHOLE_BYTES: Final = 64 * 2**20
_CHUNK_BYTES: Final = 2**20
_BUCKET: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_MD5: Final = re.compile(r"[0-9a-f]{32}")
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_COLUMNS: Final = ("key", "versionid", "islatest", "isdeletemarker", "size", "lastmodifieddate", "etag")
"""The ones read, as CSV's KeyName and Parquet's key_name both are without case and underscores."""


@dataclass(frozen=True, slots=True)
class _DataFile:
    uri: str
    size_bytes: int
    md5: str


@dataclass(frozen=True, slots=True)
class _Manifest:
    bucket: str
    fmt: str
    schema: str
    files: tuple[_DataFile, ...]


def is_inventory(data: bytes) -> bool:
    """Tell whether the bytes of a manifest.json are an S3 Inventory's."""
    try:
        manifest = json.loads(data)
    except (ValueError, RecursionError):
        return False
    return isinstance(manifest, dict) and {"fileSchema", "fileFormat", "files", "sourceBucket"} <= manifest.keys()


def read_inventory(store: Store, found: ObjectInfo, config: InputConfig) -> Iterator[Input]:
    """Yield the objects of an S3 Inventory, in its order, in bounded memory.

    Delete markers and directory markers are left out. Of an inventory with versions come the latest ones, or all; each
    is `s3://bucket/key?versionId=<id>`. One without an ID is the null version: named so if all versions are asked for,
    else the object itself. A row that cannot be read is an input with status error.

    Args:
        store: The manifest and the data files lie in.
        found: The manifest.json.
        config: Whether to take old versions.

    Raises:
        SourceError: If the manifest is none, its format is not read, or a data file is missing, damaged or another.
        StorageError: If a file cannot be read for another reason.
    """
    if not found.uri.startswith("s3://"):
        raise SourceError(f"{found.uri}: the files of an inventory lie in S3: name its manifest.json by s3://...")
    manifest = _read_manifest(store, found)
    for file in manifest.files:
        rows = _csv_rows if manifest.fmt == "csv" else _parquet_rows
        for place, row in rows(file, _verified(store, file), manifest):
            planned = _to_input(row, manifest.bucket, place, config)
            if planned is not None:
                yield planned


def _read_manifest(store: Store, found: ObjectInfo) -> _Manifest:
    try:
        data = store.get(found.uri, _MAX_MANIFEST_BYTES).data
    except OversizeError as exc:
        raise SourceError(f"{found.uri}: too large for an inventory's manifest.json: {exc}") from exc
    if not is_inventory(data):
        raise SourceError(
            f"{found.uri}: not the manifest.json of an S3 Inventory, which has fileSchema, fileFormat, files and "
            "sourceBucket"
        )
    manifest = json.loads(data)
    fmt = str(manifest["fileFormat"]).lower()
    if fmt not in ("csv", "parquet"):
        raise SourceError(
            f"{found.uri}: an inventory in {fmt[:20].upper()} is not read: set its output format to CSV or Parquet"
        )
    source = _bucket(found.uri, manifest, "sourceBucket")
    destination = _bucket(found.uri, manifest, "destinationBucket")
    files = manifest["files"]
    if not isinstance(files, list):
        raise SourceError(f"{found.uri}: 'files' is not a list")
    parsed = tuple(_data_file(found.uri, file, destination) for file in files)
    return _Manifest(source, fmt, str(manifest["fileSchema"]), parsed)


def _bucket(uri: str, manifest: Mapping[str, Any], name: str) -> str:
    """Return the bucket that a member of the manifest names, itself or by an ARN: arn:aws:s3:::bucket."""
    value = manifest.get(name)
    bucket = value.rpartition(":")[2] if isinstance(value, str) else ""
    if not _BUCKET.fullmatch(bucket):
        raise SourceError(f"{uri}: {name} {value!r:.100} is not a bucket")
    return bucket


def _data_file(uri: str, file: object, bucket: str) -> _DataFile:
    match file:
        case {"key": str(key), "size": int(size_bytes), "MD5checksum": str(md5)} if _MD5.fullmatch(md5.lower()):
            return _DataFile(f"s3://{bucket}/{key}", size_bytes, md5.lower())
    raise SourceError(f"{uri}: {file!r:.200} is not a data file: key, size and MD5checksum are needed")


def _verified(store: Store, file: _DataFile) -> BinaryIO:
    """Return a data file, which is the one that the manifest means: a large one is read twice, to be sure first."""
    try:
        if file.size_bytes <= _WHOLE_BYTES:
            data = store.get(file.uri, file.size_bytes).data
            _check(file, len(data), hashlib.md5(data, usedforsecurity=False).hexdigest())
            return io.BytesIO(data)
        info = store.head(file.uri)
        digest = hashlib.md5(usedforsecurity=False)
        with open_object(store, info) as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
        _check(file, info.size_bytes, digest.hexdigest())
        return open_object(store, info, chunk_bytes=_CHUNK_BYTES)
    except NotFoundError as exc:
        raise SourceError(f"{file.uri}: a data file of the inventory is missing: use one that is complete") from exc
    except OversizeError as exc:
        raise SourceError(f"{file.uri}: not the file that the inventory's manifest means: {exc}") from exc


def _check(file: _DataFile, size_bytes: int | None, md5: str) -> None:
    if (size_bytes, md5) != (file.size_bytes, file.md5):
        raise SourceError(
            f"{file.uri}: not the file that the inventory's manifest means: {size_bytes or 0:,} bytes with MD5 {md5}, "
            f"it should be {file.size_bytes:,} with {file.md5}"
        )


def _csv_rows(file: _DataFile, data: BinaryIO, manifest: _Manifest) -> Iterator[tuple[str, dict[str, Any] | BadLine]]:
    names = [_plain(name) for name in manifest.schema.split(",")]
    _check_key(file, names)
    for number, cells in read_records(read_lines(decompressed(data), file.uri), ","):
        place = f"{file.uri}#line={number}"
        if isinstance(cells, BadLine):
            yield place, cells
        elif len(cells) == len(names):
            yield place, _decoded(dict(zip(names, cells, strict=True)))
        elif cells:
            yield place, BadLine(f"{len(cells)} cells, the inventory's fileSchema has {len(names)}")


def _decoded(row: dict[str, Any]) -> dict[str, Any] | BadLine:
    """Return a CSV row with its key as it is; an empty cell is no value."""
    try:
        key = urllib.parse.unquote_plus(row["key"], errors="strict")
    except UnicodeDecodeError:
        return BadLine(f"the key {row['key']!r:.100} is not URL-encoded UTF-8")
    return {name: cell or None for name, cell in row.items()} | {"key": key}


def _parquet_rows(
    file: _DataFile, data: BinaryIO, manifest: _Manifest
) -> Iterator[tuple[str, dict[str, Any] | BadLine]]:
    del manifest  # the file says itself what its columns are
    try:
        opened = open_parquet(data)
        columns = {_plain(name): name for name in unique_names(opened.schema) if _plain(name) in _COLUMNS}
        _check_key(file, columns)
        number = 0
        for group in range(len(opened.group_rows)):
            for batch in opened.batches(list(columns.values()), group):
                values = [values_of(batch.column(name)) for name in columns.values()]
                for row in zip(*values, strict=True):
                    yield f"{file.uri}#row={number}", dict(zip(columns, row, strict=True))
                    number += 1
    except ImageError as exc:
        raise SourceError(f"{file.uri}: a data file of the inventory cannot be read: {exc.message}") from exc


def _check_key(file: _DataFile, names: object) -> None:
    if "key" not in names:  # type: ignore[operator]
        raise SourceError(f"{file.uri}: the inventory has no column of keys")


def _plain(name: str) -> str:
    return name.strip().lower().replace("_", "")


def _to_input(row: dict[str, Any] | BadLine, bucket: str, place: str, config: InputConfig) -> Input | None:
    """Return the input that a row of the inventory is; None for one that is left out."""
    if isinstance(row, BadLine):
        return Input(uri=place, status=Status.ERROR, error=row.reason)
    try:
        key, size_bytes = _text(row["key"]), _number(row.get("size"))
        is_latest, is_deleted = _truth(row.get("islatest"), True), _truth(row.get("isdeletemarker"), False)
        version_id, etag = _text(row.get("versionid")), _text(row.get("etag"))
        last_modified = _time(row.get("lastmodifieddate"))
    except (ValueError, OverflowError) as exc:
        return Input(uri=place, status=Status.ERROR, error=f"not a row of an S3 Inventory: {exc}"[:300])
    if not key:
        return Input(uri=place, status=Status.ERROR, error="not a row of an S3 Inventory: no key")
    if is_deleted or (key.endswith("/") and size_bytes == 0) or not (is_latest or config.all_versions):
        return None
    if config.all_versions and "versionid" in row:
        version_id = version_id or "null"  # which S3 leaves out in inventories only
    location = f"s3://{bucket}/{key}"
    return Input(
        uri=f"{location}?versionId={version_id}" if version_id else location,
        size_bytes=size_bytes,
        etag=etag and etag.strip('"'),
        last_modified=last_modified,
        location=location if version_id else None,
        version_id=version_id,
    )


def _text(value: object) -> str | None:
    if value is None or isinstance(value, str):
        return value or None
    raise ValueError(f"{value!r:.100} should be text")


def _number(value: object) -> int | None:
    if value is None:
        return None
    number = int(value) if isinstance(value, (int, str)) else -1
    if not 0 <= number < 2**63:
        raise ValueError(f"{value!r:.100} should be a size in bytes")
    return number


def _truth(value: object, default: bool) -> bool:
    match value:
        case None:
            return default
        case bool():
            return value
        case str() if value.lower() in ("true", "false"):
            return value.lower() == "true"
    raise ValueError(f"{value!r:.100} should be true or false")


def _time(value: object) -> datetime | None:
    """Return a moment: a time, as Parquet has it, or milliseconds or ISO text. UTC unless it says otherwise."""
    if isinstance(value, int):
        return _EPOCH + timedelta(milliseconds=value)
    moment = datetime.fromisoformat(value) if isinstance(value, str) else value
    if moment is None:
        return None
    if not isinstance(moment, datetime):
        raise ValueError(f"{value!r:.100} should be a time")
    return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
