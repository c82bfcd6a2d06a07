from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import tracemalloc
import urllib.parse
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lfm_scan.errors import AccessDeniedError, NotFoundError, SourceError
from lfm_scan.options import InputConfig, StorageConfig
from lfm_scan.sources import inventory
from lfm_scan.sources.inputs import Input, Kind
from lfm_scan.sources.inventory import is_inventory, read_inventory
from lfm_scan.status import Status
from lfm_scan.storage import Fetched, LocalStore, ObjectInfo, S3Store, check_size
from tests.servers import S3Server

_SCHEMA = "Bucket, Key, VersionId, IsLatest, IsDeleteMarker, Size, LastModifiedDate, ETag"
_TIME = "2026-01-02T03:04:05.678Z"
_MOMENT = datetime(2026, 1, 2, 3, 4, 5, 678000, UTC)
_ETAG = "d41d8cd98f00b204e9800998ecf8427e"

# Keys as S3 takes them; each is found again, in each format.
_KEYS = ["a b+c%20.png", "ü/€.png", 'q"uo,te\n.png', "//x#y?z=1.png", "..", "plain/1.png"]


class Memory(LocalStore):
    """Objects in memory under s3:// URIs, for inventories that no real store would write."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.num_bytes = 0

    def get(self, uri: str, max_bytes: int | None = None, version_id: str | None = None) -> Fetched:
        info = self.head(uri)
        check_size(info.size_bytes, max_bytes)
        return Fetched(self.objects[uri], info)

    def head(self, uri: str, version_id: str | None = None) -> ObjectInfo:
        if uri not in self.objects:
            raise NotFoundError(f"{uri}: not found")
        return ObjectInfo(uri, len(self.objects[uri]), "e", None)

    def get_range(
        self, uri: str, start: int, num_bytes: int, etag: str | None = None, version_id: str | None = None
    ) -> bytes:
        self.num_bytes += num_bytes
        return self.objects[uri][start : start + num_bytes]


def _row(key: str, *rest: str) -> list[str]:
    return ["source", urllib.parse.quote_plus(key, safe="/"), *rest]


def _csv(rows: Sequence[Sequence[str]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows(rows)
    return gzip.compress(text.getvalue().encode())


def _manifest(data: dict[str, bytes], fmt: str = "CSV", schema: str = _SCHEMA, **changes: Any) -> bytes:  # noqa: ANN401
    manifest = {
        "sourceBucket": "source",
        "destinationBucket": "arn:aws:s3:::lists",
        "version": "2016-11-30",
        "creationTimestamp": "1514944800000",
        "fileFormat": fmt,
        "fileSchema": schema,
        "files": [
            {"key": key, "size": len(body), "MD5checksum": hashlib.md5(body).hexdigest()} for key, body in data.items()
        ],
    }
    return json.dumps(manifest | changes).encode()


def _store(data: dict[str, bytes], **manifest: Any) -> tuple[Memory, ObjectInfo]:  # noqa: ANN401
    store = Memory()
    store.objects = {f"s3://lists/{key}": body for key, body in data.items()}
    store.objects["s3://lists/m/manifest.json"] = _manifest(data, **manifest)
    return store, store.head("s3://lists/m/manifest.json")


def _inputs(data: dict[str, bytes], config: InputConfig | None = None, **manifest: Any) -> list[Input]:  # noqa: ANN401
    store, found = _store(data, **manifest)
    return list(read_inventory(store, found, config or InputConfig()))


def _parquet(columns: dict[str, Any], **options: Any) -> bytes:  # noqa: ANN401
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, **options)
    return buffer.getvalue()


def test_an_inventory_is_told_by_its_members() -> None:
    assert is_inventory(_manifest({}))
    assert not is_inventory(b'{"files": []}')
    assert not is_inventory(b"[" * 100_000)
    assert not is_inventory(b'["fileSchema", "fileFormat", "files", "sourceBucket"]')
    assert not is_inventory(b"\xff")
    assert not is_inventory(b"")


def test_a_csv_inventory_gives_every_key_as_it_is() -> None:
    rows = [_row(key, "10", _TIME, _ETAG) for key in _KEYS]
    schema = "Bucket, Key, Size, LastModifiedDate, ETag"

    inputs = _inputs({"d/1.csv.gz": _csv(rows[:4]), "d/2.csv.gz": _csv(rows[4:])}, schema=schema)

    assert [each.uri for each in inputs] == [f"s3://source/{key}" for key in _KEYS]
    assert inputs[0] == Input(
        uri="s3://source/a b+c%20.png", size_bytes=10, etag=_ETAG, last_modified=_MOMENT, kind=Kind.OBJECT
    )


@pytest.mark.parametrize(
    "times",
    [
        pa.array([_MOMENT] * len(_KEYS), pa.timestamp("ms", "UTC")),
        pa.array([_MOMENT.replace(tzinfo=None)] * len(_KEYS), pa.timestamp("ms")),
        pa.array([int(_MOMENT.timestamp() * 1000)] * len(_KEYS), pa.int64()),
    ],
)
def test_a_parquet_inventory_gives_every_key_as_it_is(times: pa.Array) -> None:
    columns = {
        "bucket": ["source"] * len(_KEYS),
        "key": _KEYS,
        "size": pa.array([10] * len(_KEYS)),
        "last_modified_date": times,
        "e_tag": [_ETAG] * len(_KEYS),
        "storage_class": ["STANDARD"] * len(_KEYS),
    }

    inputs = _inputs({"d/1.parquet": _parquet(columns, row_group_size=4)}, fmt="Parquet", schema="message s3 {}")

    assert [each.uri for each in inputs] == [f"s3://source/{key}" for key in _KEYS]
    assert inputs[0] == Input(uri=f"s3://source/{_KEYS[0]}", size_bytes=10, etag=_ETAG, last_modified=_MOMENT)


_VERSIONS = [
    ("a.png", "v2", "true", "false", "10"),
    ("a.png", "v1", "false", "false", "9"),
    ("a.png", "", "false", "false", "8"),
    ("b.png", "v4", "true", "true", ""),
    ("b.png", "v3", "false", "false", "7"),
    ("c.png", "", "true", "false", "6"),
    ("folder/", "v5", "true", "false", "0"),
    ("data/", "v6", "true", "false", "5"),
]


def _version_files(fmt: str) -> dict[str, bytes]:
    if fmt == "CSV":
        return {"d": _csv([_row(*row, _TIME, _ETAG) for row in _VERSIONS])}
    keys, ids, latest, deleted, sizes = zip(*_VERSIONS, strict=True)
    columns = {
        "key": keys,
        "version_id": [each or None for each in ids],
        "is_latest": [each == "true" for each in latest],
        "is_delete_marker": [each == "true" for each in deleted],
        "size": [int(each) if each else None for each in sizes],
    }
    return {"d": _parquet(columns)}


@pytest.mark.parametrize("fmt", ["CSV", "Parquet"])
def test_of_versions_come_the_latest_without_markers(fmt: str) -> None:
    inputs = _inputs(_version_files(fmt), fmt=fmt)

    assert [(each.uri, each.location, each.version_id, each.size_bytes) for each in inputs] == [
        ("s3://source/a.png?versionId=v2", "s3://source/a.png", "v2", 10),
        ("s3://source/c.png", None, None, 6),
        ("s3://source/data/?versionId=v6", "s3://source/data/", "v6", 5),
    ]


@pytest.mark.parametrize("fmt", ["CSV", "Parquet"])
def test_all_versions_come_if_asked_for_and_one_without_id_is_the_null_version(fmt: str) -> None:
    inputs = _inputs(_version_files(fmt), InputConfig(all_versions=True), fmt=fmt)

    assert [(each.where, each.version_id) for each in inputs] == [
        ("s3://source/a.png", "v2"),
        ("s3://source/a.png", "v1"),
        ("s3://source/a.png", "null"),
        ("s3://source/b.png", "v3"),
        ("s3://source/c.png", "null"),
        ("s3://source/data/", "v6"),
    ]
    assert inputs[2].uri == "s3://source/a.png?versionId=null"


def test_asking_for_all_versions_of_an_inventory_without_them_gives_the_objects() -> None:
    inputs = _inputs({"d": _csv([_row("a")])}, InputConfig(all_versions=True), schema="Bucket, Key")

    assert inputs == [Input(uri="s3://source/a")]


def test_a_bad_row_costs_one_row() -> None:
    good = ("v", "true", "false", "1", _TIME, _ETAG)
    rows = [
        _row("1.png", *good),
        ["source", "%ff.png", *good],
        ["source", "2.png"],
        _row("3.png", "v", "maybe", "false", "1", _TIME, _ETAG),
        _row("4.png", "v", "true", "false", "-1", _TIME, _ETAG),
        _row("5.png", "v", "true", "false", "x", _TIME, _ETAG),
        _row("6.png", "v", "true", "false", "1", "yesterday", _ETAG),
        _row("", *good),
        _row("7.png", "v", "true", "false", "9" * 5000, _TIME, _ETAG),
        [],
        _row("8.png", *good),
    ]

    inputs = _inputs({"d/1.csv.gz": _csv(rows)})

    assert [each.where for each in inputs if each.status is None] == ["s3://source/1.png", "s3://source/8.png"]
    bad = {each.uri: each.error for each in inputs if each.status is Status.ERROR}
    assert list(bad) == [f"s3://lists/d/1.csv.gz#line={number}" for number in range(2, 10)]
    assert bad["s3://lists/d/1.csv.gz#line=2"] == "the key '%ff.png' is not URL-encoded UTF-8"
    assert bad["s3://lists/d/1.csv.gz#line=3"] == "2 cells, the inventory's fileSchema has 8"
    assert bad["s3://lists/d/1.csv.gz#line=4"] == "not a row of an S3 Inventory: 'maybe' should be true or false"
    assert bad["s3://lists/d/1.csv.gz#line=8"] == "not a row of an S3 Inventory: no key"


def test_bad_cells_of_a_parquet_inventory_cost_one_row_each() -> None:
    columns = {
        "key": ["1", None, "2", "3"],
        "size": pa.array([1, 1, -1, 1]),
        "last_modified_date": pa.array([0, 0, 0, 2**60]),
    }

    inputs = _inputs({"d": _parquet(columns)}, fmt="Parquet")

    assert [(each.uri, each.status) for each in inputs] == [
        ("s3://source/1", None),
        ("s3://lists/d#row=1", Status.ERROR),
        ("s3://lists/d#row=2", Status.ERROR),
        ("s3://lists/d#row=3", Status.ERROR),
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fmt": "ORC"}, r"an inventory in ORC is not read: set its output format to CSV or Parquet"),
        ({"sourceBucket": "a/../b"}, r"sourceBucket 'a/../b' is not a bucket"),
        ({"destinationBucket": None}, r"destinationBucket None is not a bucket"),
        ({"files": {}}, r"'files' is not a list"),
        ({"files": [{"key": "d"}]}, r"is not a data file: key, size and MD5checksum are needed"),
        ({"files": [{"key": "d", "size": 1, "MD5checksum": "x"}]}, r"is not a data file"),
        ({"schema": "Bucket, Size"}, r"s3://lists/d: the inventory has no column of keys"),
        ({"fmt": "Parquet"}, r"s3://lists/d: a data file of the inventory cannot be read: not a Parquet file"),
    ],
)
def test_an_inventory_that_cannot_be_used_is_named_with_the_remedy(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        _inputs({"d": _csv([_row("a")])}, **{"schema": "Bucket, Key", **changes})


def test_another_manifest_json_is_refused() -> None:
    store = Memory()
    store.objects["s3://b/manifest.json"] = b'{"name": "a web app"}'

    with pytest.raises(SourceError, match=r"s3://b/manifest.json: not the manifest.json of an S3 Inventory"):
        list(read_inventory(store, store.head("s3://b/manifest.json"), InputConfig()))


def test_a_local_copy_of_the_manifest_is_refused() -> None:
    with pytest.raises(SourceError, match=r"name its manifest.json by s3://"):
        list(read_inventory(LocalStore(), ObjectInfo("/x/manifest.json", 1, None, None), InputConfig()))


@pytest.mark.parametrize("whole_bytes", [2**20, 10])
def test_a_data_file_that_is_missing_or_another_stops_before_its_first_row(
    monkeypatch: pytest.MonkeyPatch, whole_bytes: int
) -> None:
    monkeypatch.setattr(inventory, "_WHOLE_BYTES", whole_bytes)
    files = {"d/1": _csv([_row("a")]), "d/2": _csv([_row("b")])}

    for spoilt in (files["d/2"] + b"x", files["d/2"][:-1], files["d/2"][:-1] + b"x", None):
        store, found = _store(files, schema="Bucket, Key")
        store.objects["s3://lists/d/2"] = spoilt or b""
        if spoilt is None:
            del store.objects["s3://lists/d/2"]
        inputs = read_inventory(store, found, InputConfig())
        assert next(inputs).uri == "s3://source/a"
        with pytest.raises(SourceError, match=r"s3://lists/d/2: (not the file that|a data file of .* is missing)"):
            next(inputs)


def test_a_store_that_refuses_is_a_storage_error() -> None:
    class Refusing(Memory):
        def get(self, uri: str, max_bytes: int | None = None, version_id: str | None = None) -> Fetched:
            raise AccessDeniedError("no")

    with pytest.raises(AccessDeniedError):
        list(read_inventory(Refusing(), ObjectInfo("s3://b/manifest.json", 1, None, None), InputConfig()))


def test_a_data_file_cut_short_by_its_writer_is_a_source_error() -> None:
    with pytest.raises(SourceError, match=r"s3://lists/d: is not a whole gzip file"):
        _inputs({"d": _csv([_row("a")])[:-4]}, schema="Bucket, Key")


def test_a_large_data_file_is_read_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inventory, "_WHOLE_BYTES", 2**20)
    rows = [_row(f"{'x' * 1800}/{n}.png", "", "true", "false", "1", _TIME, _ETAG) for n in range(20_000)]
    lots = gzip.compress(gzip.decompress(_csv(rows)), 0)  # stored: 39 MB
    store, found = _store({"d": lots})

    tracemalloc.start()
    try:
        num_inputs = sum(each.status is None for each in read_inventory(store, found, InputConfig()))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert num_inputs == 20_000
    assert store.num_bytes == 2 * len(lots)  # once to be sure, once to read
    assert peak < 24 * 2**20


def test_a_line_without_end_takes_no_memory() -> None:
    text = b'"source","' + b"x" * (128 * 2**20) + b'"\n"source","a"\n'
    data = gzip.compress(text, 1)
    del text

    tracemalloc.start()
    try:
        inputs = _inputs({"d": data}, schema="Bucket, Key")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert [each.uri for each in inputs] == ["s3://lists/d#line=1", "s3://source/a"]
    assert inputs[0].error == "the line has more than 1,048,576 bytes"
    assert peak < 16 * 2**20


def test_an_inventory_on_s3_names_objects_that_can_be_read(s3_server: S3Server, s3_bucket: str) -> None:
    keys = ["a b+c%20.png", "ü/€.png", "plain/1.png"]
    for key in keys:
        s3_server.put(s3_bucket, key, key.encode())
    data = _csv([_row(key, str(len(key.encode()))) for key in keys])
    s3_server.put(s3_bucket, "lists/d/1.csv.gz", data)
    names = {"sourceBucket": s3_bucket, "destinationBucket": f"arn:aws:s3:::{s3_bucket}"}
    manifest = _manifest({"lists/d/1.csv.gz": data}, schema="Bucket, Key, Size", **names)
    s3_server.put(s3_bucket, "lists/2026-01-02T00-00Z/manifest.json", manifest)
    store = S3Store(StorageConfig(endpoint_url=s3_server.endpoint_url))

    found = store.head(f"s3://{s3_bucket}/lists/2026-01-02T00-00Z/manifest.json")
    inputs = list(read_inventory(store, found, InputConfig()))

    assert [store.get(each.where, each.size_bytes).data for each in inputs] == [key.encode() for key in keys]
