from __future__ import annotations

import io
import itertools
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lfm_scan.errors import AccessDeniedError, ImageError, OutageError, SourceError, StorageError, UnreachableError
from lfm_scan.options import InputConfig, StorageConfig
from lfm_scan.sources import table
from lfm_scan.sources.inputs import Input, Kind, from_table, input_schema, to_table
from lfm_scan.sources.table import carried_types, read_cells, read_table
from lfm_scan.status import Status
from lfm_scan.storage import Fetched, LocalStore, ObjectInfo, S3Store
from tests.servers import S3Server

_LIMIT = 2**20


def _parquet(columns: dict[str, Any] | pa.Table, **options: Any) -> bytes:  # noqa: ANN401
    buffer = io.BytesIO()
    pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), buffer, **options)
    return buffer.getvalue()


def _hf(values: Sequence[dict[str, Any] | None]) -> pa.Array:
    return pa.array(values, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))


def _images(num_rows: int) -> list[bytes]:
    return [bytes([row % 256]) * (50 + row) for row in range(num_rows)]


def _put(path: Path, data: bytes | dict[str, Any] | pa.Table, **options: Any) -> ObjectInfo:  # noqa: ANN401
    path.write_bytes(data if isinstance(data, bytes) else _parquet(data, **options))
    (found,) = LocalStore().list(str(path))
    return found


def _rows(found: ObjectInfo, **config: Any) -> list[Input]:  # noqa: ANN401
    return list(read_table(LocalStore(), found, InputConfig(**config)))


def _cells(inputs: Sequence[Input], max_bytes: int = _LIMIT, **config: Any) -> list[bytes | tuple[Status, str]]:  # noqa: ANN401
    outcomes = list(read_cells(LocalStore(), inputs, max_bytes, InputConfig(**config)))
    assert len(outcomes) == len(inputs)
    return [_plain(outcome) for outcome in outcomes]


def _plain(outcome: Fetched | ImageError) -> bytes | tuple[Status, str]:
    return outcome.data if isinstance(outcome, Fetched) else (outcome.status, outcome.message)


def _statuses(inputs: Sequence[Input], **config: Any) -> list[Status]:  # noqa: ANN401
    return [outcome[0] if isinstance(outcome, tuple) else Status.OK for outcome in _cells(inputs, **config)]


@pytest.fixture(autouse=True)
def _nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "_kept", table._Kept())


class CountingStore(LocalStore):
    """Counts what is read, and may see files as if they had ETags or were too large to fetch whole."""

    def __init__(self, etag: str | None = None) -> None:
        self.ranges: list[tuple[int, int]] = []
        self.num_gets = 0
        self.etag = etag

    def get(self, uri: str, max_bytes: int | None = None, version_id: str | None = None) -> Fetched:
        self.num_gets += 1
        fetched = super().get(uri, max_bytes, version_id)
        info = ObjectInfo(uri, fetched.info.size_bytes, self.etag, fetched.info.last_modified)
        return Fetched(fetched.data, info)

    def get_range(
        self, uri: str, start: int, num_bytes: int, etag: str | None = None, version_id: str | None = None
    ) -> bytes:
        self.ranges.append((start, num_bytes))
        return super().get_range(uri, start, num_bytes, etag, version_id)

    @property
    def num_bytes(self) -> int:
        return sum(num_bytes for _, num_bytes in self.ranges)


def test_each_row_is_an_input_and_its_cell_the_bytes(tmp_path: Path) -> None:
    images = _images(100)
    found = _put(tmp_path / "x.parquet", {"id": range(100), "image": images}, row_group_size=30)

    inputs = _rows(found)

    assert inputs[17] == Input(
        uri=f"{tmp_path}/x.parquet#row=17",
        last_modified=found.last_modified,
        kind=Kind.PARQUET,
        location=f"{tmp_path}/x.parquet",
        position=17,
    )
    assert [each.position for each in inputs] == list(range(100))
    assert _cells(inputs) == images


@pytest.mark.parametrize("wanted", [[0], [99], [29, 30], [5, 31, 32, 90], [40, 40], [], list(range(25, 65))])
@pytest.mark.parametrize("max_whole_bytes", [2**20, 100])
def test_any_rows_can_be_asked_for_whole_or_by_ranges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: list[int], max_whole_bytes: int
) -> None:
    monkeypatch.setattr(table, "_WHOLE_BYTES", max_whole_bytes)
    images = _images(100)
    found = _put(
        tmp_path / "x.parquet", {"a": _hf([{"bytes": each, "path": "p"} for each in images])}, row_group_size=30
    )
    inputs = _rows(found)

    assert _cells([inputs[row] for row in wanted]) == [images[row] for row in wanted]


def test_a_fetched_cell_has_the_files_facts_and_its_own_size(tmp_path: Path) -> None:
    found = _put(tmp_path / "x.parquet", {"png": [b"abc"]})

    (fetched,) = read_cells(LocalStore(), _rows(found), _LIMIT, InputConfig())

    assert isinstance(fetched, Fetched)
    assert fetched.info == ObjectInfo(f"{tmp_path}/x.parquet#row=0", 3, None, found.last_modified)


def _two_structs() -> dict[str, Any]:
    return {"a": _hf([{"bytes": b"1"}]), "b": _hf([{"bytes": b"2"}])}


@pytest.mark.parametrize(
    ("columns", "config", "expected"),
    [
        ({"anything": _hf([{"bytes": b"1"}]), "image": [b"2"]}, {}, b"1"),
        ({"IMAGE_Bytes": [b"1"], "other": [b"2"]}, {}, b"1"),
        ({"content": pa.array([b"1"], pa.large_binary())}, {}, b"1"),
        ({"data": pa.array([b"1"], pa.binary_view())}, {}, b"1"),
        ({"image": pa.array([b"1"]).dictionary_encode()}, {}, b"1"),
        ({"image": [b"1"], "thumb": [b"2"]}, {"image_column": "thumb"}, b"2"),
        (_two_structs(), {"image_column": "b"}, b"2"),
        ({"a.b": [b"1"], "a": pa.array([{"b": 5}])}, {"image_column": "a.b"}, b"1"),
        ({"a": pa.array([{"bytes": b"1"}])}, {"image_column": "a"}, b"1"),
        ({"image": [b"1"], "url": ["/u"]}, {}, b"1"),
        ({"image": pa.array([b"1"]), "image ": [b"2"]}, {}, b"1"),
    ],
)
def test_the_image_column_is_found_by_type_or_name_or_taken_as_named(
    tmp_path: Path, columns: dict[str, Any], config: dict[str, Any], expected: bytes
) -> None:
    found = _put(tmp_path / "x.parquet", columns)

    inputs = _rows(found, **config)

    assert [each.kind for each in inputs] == [Kind.PARQUET]
    assert _cells(inputs, **config) == [expected]


@pytest.mark.parametrize(
    ("columns", "config", "message"),
    [
        (_two_structs(), {}, r"columns 'a', 'b' may all hold images: name one by --image-column"),
        ({"jpg": [b"1"], "png": [b"2"]}, {}, r"columns 'jpg', 'png' may all hold images"),
        (
            {"id": [1], "text": ["x"]},
            {},
            r"no column holds images .* or URIs .*; it has 'id \(int64\)', 'text \(string\)': name one by "
            "--image-column or --uri-column",
        ),
        ({"id": [1]}, {"image_column": "im"}, r"no column 'im' \(--image-column\); it has 'id \(int64\)'"),
        ({"id": [1]}, {"image_column": "id"}, r"column 'id' \(--image-column\) is int64; images are binary"),
        ({"id": [1]}, {"uri_column": "id"}, r"no column 'id' of text \(--uri-column\)"),
        ({"image": [b"1"]}, {"carry": ("id",)}, r"no column 'id' to carry \(--carry\); it has 'image \(binary\)'"),
        ({"image": [b"1"], "b": [b""]}, {"carry": ("b",)}, r"'b' \(--carry\) is binary: binary values are not carried"),
        ({"image": [b"1"], "b": [[b""]]}, {"carry": ("b",)}, r"binary values are not carried"),
    ],
)
def test_a_sound_file_without_the_column_is_named_with_the_flag(
    tmp_path: Path, columns: dict[str, Any], config: dict[str, Any], message: str
) -> None:
    found = _put(tmp_path / "x.parquet", columns)

    with pytest.raises(SourceError, match=f"{tmp_path}/x.parquet: .*{message}"):
        _rows(found, **config)


def test_a_name_that_two_columns_share_is_no_column(tmp_path: Path) -> None:
    twice = pa.Table.from_arrays([pa.array([b"1"]), pa.array([1])], names=["image", "image"])
    found = _put(tmp_path / "x.parquet", twice)

    with pytest.raises(SourceError, match=r"no column holds images"):
        _rows(found)


def test_an_empty_table_yields_nothing(tmp_path: Path) -> None:
    assert _rows(_put(tmp_path / "x.parquet", {"image": pa.array([], pa.binary())})) == []
    assert _rows(_put(tmp_path / "y.parquet", {"url": pa.array([], pa.string())})) == []


def test_a_column_of_uris_is_read_as_a_manifest(tmp_path: Path) -> None:
    uris = ["s3://b/1.png", "2.png", None, "", "/3.png", "a\0b"]
    found = _put(tmp_path / "x.parquet", {"n": range(6), "URL": uris}, row_group_size=2)

    inputs = _rows(found, carry=("n", "URL"))

    assert [each.uri for each in inputs] == [
        "s3://b/1.png",
        f"{tmp_path}/2.png",
        f"{tmp_path}/x.parquet#row=2",
        f"{tmp_path}/x.parquet#row=3",
        "/3.png",
        f"{tmp_path}/x.parquet#row=5",
    ]
    assert [each.status for each in inputs] == [None, None, Status.ERROR, Status.ERROR, None, Status.ERROR]
    assert {each.kind for each in inputs} == {Kind.OBJECT}
    assert [each.carried for each in inputs] == [{"n": n, "URL": uri} for n, uri in enumerate(uris)]
    assert [each.uri for each in _rows(found, uri_column="URL")] == [each.uri for each in inputs]


def test_carried_values_keep_their_type_and_nested_ones_are_json(tmp_path: Path) -> None:
    moment = datetime(2026, 1, 2, 3, 4, 5, 678900, UTC)
    columns: dict[str, Any] = {
        "i": pa.array([1, None], pa.int16()),
        "f": pa.array([0.5, None], pa.float32()),
        "o": pa.array([True, None]),
        "s": pa.array(["é", None]),
        "d": pa.array(["x", None]).dictionary_encode(),
        "v": pa.array(["y", None], pa.large_string()),
        "t": pa.array([moment, None], pa.timestamp("us", "Europe/Berlin")),
        "n": pa.array([moment, None], pa.timestamp("ns", "UTC")),
        "y": pa.array([date(2026, 1, 2), None]),
        "c": pa.array([Decimal("1.50"), None]),
        "l": pa.array([[1.5, float("nan"), None], None]),
        "r": pa.array([{"when": moment, "tags": ["a"]}, None]),
        "z": pa.array([None, None]),
    }
    found = _put(tmp_path / "x.parquet", {**columns, "image": [b"1", b"2"]})
    config = InputConfig(carry=tuple(columns))

    types = carried_types(LocalStore(), found, config)
    inputs = list(read_table(LocalStore(), found, config))

    string = pa.string()
    assert types == {
        "i": pa.int16(),
        "f": pa.float32(),
        "o": pa.bool_(),
        "s": string,
        "d": string,
        "v": string,
        "t": pa.timestamp("us", "UTC"),
        "n": pa.timestamp("ns", "UTC"),
        "y": pa.date32(),
        "c": pa.decimal128(3, 2),
        "l": string,
        "r": string,
        "z": string,
    }
    assert from_table(to_table(inputs, input_schema(types))) == inputs
    assert inputs[0].carried == {
        "i": 1,
        "f": 0.5,
        "o": True,
        "s": "é",
        "d": "x",
        "v": "y",
        "t": moment,
        "n": moment,
        "y": date(2026, 1, 2),
        "c": Decimal("1.50"),
        "l": "[1.5,null,null]",
        "r": '{"when":"2026-01-02T03:04:05.678900+00:00","tags":["a"]}',
        "z": None,
    }
    assert set(inputs[1].carried.values()) == {None}


def test_a_carried_value_that_python_cannot_hold_does_not_cost_its_row(tmp_path: Path) -> None:
    text = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0\4\0\0\0"), pa.py_buffer(b"a\xffok")]
    )
    found = _put(
        tmp_path / "x.parquet",
        {
            "image": [b"1", b"2"],
            "t": pa.array([2**60, 0], pa.timestamp("s")).cast(pa.timestamp("ms"), safe=False),
            "s": text,
        },
    )
    found = _put(
        tmp_path / "x.parquet", {"image": [b"1", b"2"], "t": pa.array([2**60, 0], pa.timestamp("us")), "s": text}
    )

    inputs = _rows(found, carry=("t", "s"))

    assert [each.carried for each in inputs] == [{"t": None, "s": "a\\xff"}, {"t": datetime(1970, 1, 1), "s": "ok"}]


def test_planning_reads_no_image(tmp_path: Path) -> None:
    noise = random.Random(0)
    columns = {"id": range(40), "image": [noise.randbytes(300_000) for _ in range(40)], "label": ["x"] * 40}
    found = _put(tmp_path / "x.parquet", columns, row_group_size=10)
    assert found.size_bytes is not None
    store = CountingStore()

    inputs = list(read_table(store, found, InputConfig()))

    assert len(inputs) == 40
    assert store.num_bytes <= 2 * 2**16
    assert [each.carried["label"] for each in read_table(store, found, InputConfig(carry=("label",)))] == ["x"] * 40


def test_only_the_row_groups_and_the_column_that_are_needed_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "_WHOLE_BYTES", 2**20)
    noise = random.Random(0)
    images = [noise.randbytes(2**20) for _ in range(40)]
    other = [noise.randbytes(2**20) for _ in range(40)]
    found = _put(tmp_path / "x.parquet", {"image": images, "other": other}, row_group_size=4, compression="none")
    inputs = _rows(found)
    store = CountingStore()

    outcomes = list(read_cells(store, inputs[20:24], 2 * _LIMIT, InputConfig()))

    assert [_plain(outcome) for outcome in outcomes] == images[20:24]
    assert store.num_bytes < 24 * 2**20  # of 80; four images, and what a request of 8 MiB reads beyond them


def test_small_files_are_fetched_once_for_neighbouring_shards(tmp_path: Path) -> None:
    found = _put(tmp_path / "x.parquet", {"image": _images(20)})
    store = CountingStore(etag="e1")
    inputs = list(read_table(store, ObjectInfo(found.uri, found.size_bytes, "e1", None), InputConfig()))

    cells = [
        *read_cells(store, inputs[:10], _LIMIT, InputConfig()),
        *read_cells(store, inputs[10:], _LIMIT, InputConfig()),
    ]

    assert [_plain(cell) for cell in cells] == _images(20)
    assert store.num_gets == 1


def test_no_more_than_two_files_are_kept(tmp_path: Path) -> None:
    store = CountingStore(etag="e1")
    for name in ("a", "b", "c", "a"):
        found = _put(tmp_path / f"{name}.parquet", {"image": [name.encode()]})
        inputs = list(read_table(store, ObjectInfo(found.uri, found.size_bytes, "e1", None), InputConfig()))
        assert [_plain(cell) for cell in read_cells(store, inputs, _LIMIT, InputConfig())] == [name.encode()]

    assert store.num_gets == 4
    assert len(table._kept._files) == 2


def test_cells_without_bytes_say_why(tmp_path: Path) -> None:
    cells = [None, {"bytes": None, "path": None}, {"bytes": None, "path": "a.png"}, {"bytes": b"", "path": "b"}]
    found = _put(tmp_path / "x.parquet", {"image": _hf(cells)})
    plain = _put(tmp_path / "y.parquet", {"image": [None, b"", b"x" * 101, b"x" * 100]})

    assert _cells(_rows(found)) == [
        (Status.EMPTY, "the cell is null"),
        (Status.EMPTY, "the cell has no bytes"),
        (Status.ERROR, "the cell holds a path, not bytes: scan the files themselves"),
        b"",
    ]
    assert _cells(_rows(plain), max_bytes=100) == [
        (Status.EMPTY, "the cell is null"),
        b"",
        (Status.TOO_LARGE, "101 bytes, the limit is 100 (--max-image-bytes)"),
        b"x" * 100,
    ]


def _cut(data: bytes) -> bytes:
    return data[:-100]


def _long_footer(data: bytes) -> bytes:
    return data[:-8] + (2**31).to_bytes(4, "little") + b"PAR1"


def _garbled_footer(data: bytes) -> bytes:
    num_bytes = int.from_bytes(data[-8:-4], "little")
    return data[: -8 - num_bytes] + b"\xff" * num_bytes + data[-8:]


@pytest.mark.parametrize(
    ("spoil", "status", "error"),
    [
        (lambda _: b"", Status.EMPTY, "the file has no bytes"),
        (lambda _: b"PAR1", Status.TRUNCATED, "the Parquet file has no end: upload it again"),
        (lambda _: b"PK\3\4" + bytes(1000), Status.UNSUPPORTED, "not a Parquet file"),
        (_cut, Status.TRUNCATED, "the Parquet file has no end: upload it again"),
        (_long_footer, Status.CORRUPT, "claims 2,147,483,648 bytes of metadata"),
        (_garbled_footer, Status.CORRUPT, "the Parquet file is damaged"),
        (lambda data: data[:-4] + b"PARE", Status.UNSUPPORTED, "an encrypted Parquet file: decrypt it first"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_input(
    tmp_path: Path, spoil: Callable[[bytes], bytes], status: Status, error: str
) -> None:
    found = _put(tmp_path / "x.parquet", spoil(_parquet({"image": _images(10)})))

    (planned,) = _rows(found)

    assert (planned.uri, planned.kind, planned.status) == (found.uri, Kind.OBJECT, status)
    assert error in (planned.error or "")
    assert carried_types(LocalStore(), found, InputConfig(carry=("id",))) == {}


def test_more_metadata_than_the_limit_is_refused(tmp_path: Path) -> None:
    columns = {"image": [b"1"]}
    data = _parquet(pa.table(columns).replace_schema_metadata({"x": "y" * 17 * 2**20}))
    found = _put(tmp_path / "x.parquet", data)

    (planned,) = _rows(found)

    assert planned.status is Status.UNSUPPORTED
    assert "bytes of metadata, the limit is 16,777,216" in (planned.error or "")


def test_a_table_with_more_rows_than_bytes_is_refused(tmp_path: Path) -> None:
    found = _put(tmp_path / "x.parquet", {"image": pa.nulls(5_000_000, pa.binary())})

    (planned,) = _rows(found)

    assert planned.status is Status.CORRUPT
    assert "claims 5,000,000 rows in" in (planned.error or "")


def test_damage_in_a_page_costs_its_row_group_alone(tmp_path: Path) -> None:
    noise = random.Random(0)
    images = [noise.randbytes(1000) for _ in range(300)]
    data = bytearray(_parquet({"image": images}, row_group_size=100, write_page_checksum=True))
    data[data.index(images[150]) + 500] ^= 1
    found = _put(tmp_path / "x.parquet", bytes(data))
    inputs = _rows(found)

    cells = _cells(inputs)

    assert cells[:100] + cells[200:] == images[:100] + images[200:]
    assert {cell[0] for cell in cells[100:200]} == {Status.CORRUPT}
    assert "CRC checksum" in str(cells[150][1])


def test_a_damaged_carried_column_leaves_one_input_for_the_rest(tmp_path: Path) -> None:
    noise = random.Random(0)
    ids = [noise.randbytes(20).hex() for _ in range(300)]
    data = bytearray(
        _parquet({"image": [b"x"] * 300, "id": ids}, row_group_size=100, write_page_checksum=True, compression="none")
    )
    data[data.index(ids[150].encode())] ^= 1
    found = _put(tmp_path / "x.parquet", bytes(data))

    inputs = _rows(found, carry=("id",))

    assert [each.carried["id"] for each in inputs[:-1]] == ids[:100]
    assert (inputs[-1].uri, inputs[-1].status) == (found.uri, Status.CORRUPT)


def test_a_file_that_changed_since_it_was_planned_gives_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.parquet"
    inputs = _rows(_put(path, {"image": _images(3)}))
    later = [
        Input(uri=each.uri, kind=each.kind, location=each.location, position=each.position) for each in _rows(
            _put(path, {"image": _images(3)})
        )
    ]  # fmt: skip
    _put(path, {"image": _images(2)})
    os.utime(path, (1, 1))  # a clock may be too coarse to tell the two apart

    assert _statuses(inputs) == [Status.ERROR] * 3
    assert _cells(inputs)[0][1] == f"{path}: changed since it was planned: scan it again in a new run"
    # Without any fact to tell by, the rows still there are read.
    assert _statuses(later) == [Status.OK, Status.OK, Status.ERROR]
    assert _cells(later)[2][1] == "the file has 2 rows: it changed since it was planned"
    monkeypatch.setattr(table, "_WHOLE_BYTES", 10)
    assert _statuses(inputs) == [Status.ERROR] * 3
    _put(path, {"id": [1]})
    assert _statuses(later) == [Status.ERROR] * 3
    path.write_bytes(b"PAR1")
    assert _statuses(later) == [Status.TRUNCATED] * 3
    path.unlink()
    assert _statuses(later) == [Status.MISSING] * 3


class FailingStore(LocalStore):
    """Works for a number of requests, then raises."""

    def __init__(self, error: StorageError, num_good: int) -> None:
        self._left = num_good
        self._error = error

    def get_range(
        self, uri: str, start: int, num_bytes: int, etag: str | None = None, version_id: str | None = None
    ) -> bytes:
        if not self._left:
            raise self._error
        self._left -= 1
        return super().get_range(uri, start, num_bytes, etag, version_id)


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ObjectInfo:
    """A file of some requests: 30 MB in six row groups."""
    monkeypatch.setattr(table, "_WHOLE_BYTES", 10)
    noise = random.Random(0)
    return _put(tmp_path / "x.parquet", {"image": [noise.randbytes(10**6) for _ in range(30)]}, row_group_size=5)


@pytest.mark.parametrize(
    ("error", "status"), [(AccessDeniedError("no"), "denied"), (UnreachableError("slow"), "timeout")]
)
def test_a_store_that_refuses_in_between_costs_what_was_not_read(
    large: ObjectInfo, error: StorageError, status: str
) -> None:
    inputs = _rows(large)
    # The footer takes two requests, more or less; then come 8 MiB a request.
    outcomes = list(read_cells(FailingStore(error, 4), inputs, _LIMIT, InputConfig()))

    statuses = [outcome.status.value if isinstance(outcome, ImageError) else "ok" for outcome in outcomes]
    assert [key for key, _ in itertools.groupby(statuses)] == ["ok", status]
    assert len(statuses) == 30


def test_an_outage_passes_through_from_every_place(large: ObjectInfo) -> None:
    inputs = _rows(large)
    for num_good in range(4):
        with pytest.raises(OutageError):
            list(read_cells(FailingStore(OutageError("out"), num_good), inputs, _LIMIT, InputConfig()))
    with pytest.raises(OutageError):
        list(read_table(FailingStore(OutageError("out"), 0), large, InputConfig()))
    with pytest.raises(OutageError):
        carried_types(FailingStore(OutageError("out"), 0), large, InputConfig())


def test_a_refused_file_is_one_input(large: ObjectInfo) -> None:
    (planned,) = read_table(FailingStore(AccessDeniedError("no"), 0), large, InputConfig())

    assert (planned.uri, planned.status, planned.error) == (large.uri, Status.DENIED, "no")


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("unpickled",))


class _Pickled(pa.ExtensionType):  # type: ignore[misc]
    """As Ray registers one: its values are unpickled, and so might its metadata be."""

    def __init__(self) -> None:
        super().__init__(pa.large_binary(), "test.pickled")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: pa.DataType, serialized: bytes) -> _Pickled:
        pytest.fail("the file's extension type was loaded")

    def __arrow_ext_scalar_class__(self) -> type:
        class Scalar(pa.ExtensionScalar):  # type: ignore[misc]
            def as_py(self, **_: object) -> object:
                return pickle.loads(self.value.as_py())

        return Scalar


def test_no_type_that_a_file_brings_along_is_loaded(tmp_path: Path) -> None:
    bomb = pa.ExtensionArray.from_storage(_Pickled(), pa.array([pickle.dumps(_Bomb())], pa.large_binary()))
    found = _put(
        tmp_path / "x.parquet", {"image": [b"1"], "id": bomb, "nested": pa.StructArray.from_arrays([bomb], ["x"])}
    )
    pa.register_extension_type(_Pickled())
    try:
        with pytest.raises(pytest.fail.Exception, match="was loaded"):
            pq.read_schema(found.uri)  # else this test would prove nothing
        inputs = _rows(found)
        assert _cells(inputs) == [b"1"]
        for name in ("id", "nested"):
            with pytest.raises(SourceError, match="binary values are not carried"):
                _rows(found, carry=(name,))
    finally:
        pa.unregister_extension_type("test.pickled")


def test_json_and_uuid_columns_are_text_and_bytes(tmp_path: Path) -> None:
    schema = pa.schema([("image", pa.binary()), ("j", pa.json_()), ("u", pa.uuid())])
    columns = [pa.array([b"1"]), pa.array(['{"a":1}'], pa.json_()), pa.array([b"0" * 16], pa.uuid())]
    found = _put(tmp_path / "x.parquet", pa.Table.from_arrays(columns, schema=schema))

    (planned,) = _rows(found, carry=("j",))

    assert planned.carried == {"j": '{"a":1}'}


def test_a_file_on_s3_is_read_whole_or_by_ranges(
    s3_server: S3Server, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = _images(100)
    s3_server.put(s3_bucket, "d/x.parquet", _parquet({"image": images, "id": range(100)}, row_group_size=30))
    store = S3Store(StorageConfig(endpoint_url=s3_server.endpoint_url))
    (found,) = store.list(f"s3://{s3_bucket}/d/")

    inputs = list(read_table(store, found, InputConfig(carry=("id",))))

    assert (inputs[5].etag, inputs[5].carried) == (found.etag, {"id": 5})
    assert [_plain(cell) for cell in read_cells(store, inputs, _LIMIT, InputConfig())] == images
    monkeypatch.setattr(table, "_WHOLE_BYTES", 100)
    monkeypatch.setattr(table, "_kept", table._Kept())
    assert [_plain(cell) for cell in read_cells(store, inputs, _LIMIT, InputConfig())] == images
    s3_server.put(s3_bucket, "d/x.parquet", _parquet({"image": images[:99], "id": range(99)}))
    cells = list(read_cells(store, inputs, _LIMIT, InputConfig()))
    assert {cell.status for cell in cells if isinstance(cell, ImageError)} == {Status.ERROR}
    assert len(cells) == 100


def damaged_files(seed: int, num_files: int) -> Iterator[bytes]:
    """Yield Parquet files with bits flipped, stretches overwritten, moved or cut out, most of them in the footer."""
    chance = random.Random(seed)
    images = [{"bytes": chance.randbytes(chance.randrange(400)), "path": "p"} for _ in range(60)]
    columns = {"image": _hf(images), "id": range(60), "text": ["é"] * 60, "tags": [["a", "b"]] * 60}
    sound = [
        _parquet(columns, row_group_size=25, compression=compression, data_page_version=version, **options)
        for compression, version in (("snappy", "1.0"), ("zstd", "2.0"), ("none", "1.0"))
        for options in ({}, {"use_dictionary": False, "column_encoding": {"image.bytes": "DELTA_BYTE_ARRAY"}})
    ]
    for _ in range(num_files):
        data = bytearray(chance.choice(sound))
        footer = len(data) - int.from_bytes(data[-8:-4], "little") - 8
        for _ in range(chance.randrange(1, 5)):
            at = chance.randrange(footer if chance.random() < 0.7 else 4, len(data))
            match chance.randrange(4):
                case 0:
                    data[at] ^= 1 << chance.randrange(8)
                case 1:
                    data[at : at + 4] = chance.randbytes(4)
                case 2:
                    data[at : at + chance.randrange(1, 20)] = b"\xff" * chance.randrange(4)
                case _:
                    data[at : at + 8] = data[at - 8 : at]
            at = min(at, len(data) - 1)
        yield bytes(data)


def fuzz(seed: int, num_files: int) -> None:
    """Read damaged files; what escapes ends the process with a traceback, a crash with a signal."""

    class Memory(LocalStore):
        data = b""

        def get(self, uri: str, max_bytes: int | None = None, version_id: str | None = None) -> Fetched:
            return Fetched(self.data, ObjectInfo(uri, len(self.data), None, None))

        def get_range(
            self, uri: str, start: int, num_bytes: int, etag: str | None = None, version_id: str | None = None
        ) -> bytes:
            return self.data[start : start + num_bytes]

    seen: set[str] = set()
    store = Memory()
    for data in damaged_files(seed, num_files):
        store.data = data
        found = ObjectInfo("/x.parquet", len(data), None, None)
        for carry in ((), ("id", "text", "tags")):
            config = InputConfig(carry=carry)
            try:
                inputs = list(read_table(store, found, config))
                to_table(inputs, input_schema(carried_types(store, found, config)))
                rows = [each for each in inputs if each.kind is Kind.PARQUET]
                cells = list(read_cells(store, rows, 300, config))
                assert len(cells) == len(rows)
                seen.update(f"read {each.status}" for each in inputs)
                seen.update(f"cell {cell.status}" for cell in cells if isinstance(cell, ImageError))
            except SourceError:
                seen.add("refused")
    print(sorted(seen))


def test_a_thousand_damaged_files_raise_nothing_but_source_errors() -> None:
    code = "import sys; from tests.sources.test_table import fuzz; fuzz(int(sys.argv[1]), 1000)"
    done = subprocess.run([sys.executable, "-c", code, "1"], capture_output=True, text=True, timeout=500, check=False)

    assert (done.returncode, done.stderr) == (0, "")
    for outcome in ("refused", "read corrupt", "cell corrupt", "cell too_large", "read None"):
        assert outcome in done.stdout
