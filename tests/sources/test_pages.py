from __future__ import annotations

import io
import random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lfm_scan.errors import ImageError
from lfm_scan.sources import parquetfile
from lfm_scan.sources.pages import GuardedFile, PageError, PageTooLargeError, column_chunks
from lfm_scan.sources.parquetfile import open_parquet
from lfm_scan.status import Status


def _parquet(columns: dict[str, Any], **options: Any) -> bytes:  # noqa: ANN401
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, **options)
    return buffer.getvalue()


def _footer(data: bytes) -> bytes:
    return data[-8 - int.from_bytes(data[-8:-4], "little") : -8]


def _values(data: bytes, column: str) -> list[Any]:
    file = open_parquet(io.BytesIO(data))
    groups = range(len(file.group_rows))
    return [value for group in groups for batch in file.batches([column], group) for value in batch[column].to_pylist()]


@pytest.fixture
def columns() -> dict[str, Any]:
    noise = random.Random(0)
    return {
        "image": [noise.randbytes(noise.randrange(3000)) for _ in range(500)],
        "id": range(500),
        "same": [b"x" * 1000] * 500,
        "tags": [["a", None], None] * 250,
        "no": [True, None] * 250,
    }


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd", "gzip", "brotli", "lz4"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_every_layout_reads_as_pyarrow_reads_it(columns: dict[str, Any], compression: str, version: str) -> None:
    options = {"compression": compression, "data_page_version": version, "row_group_size": 130, "data_page_size": 5000}
    for more in ({}, {"use_dictionary": False, "write_statistics": False}, {"write_page_index": True}):
        data = _parquet(columns, **options, **more)
        for name in columns:
            assert _values(data, name) == pq.read_table(io.BytesIO(data))[name].to_pylist()


def test_chunks_lie_where_pyarrow_says_they_lie(columns: dict[str, Any]) -> None:
    data = _parquet(columns, row_group_size=130, store_schema=False, write_page_index=True)
    metadata = pq.read_metadata(io.BytesIO(data))
    expected = []
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            start = column.dictionary_page_offset or column.data_page_offset
            expected.append((start, start + column.total_compressed_size))

    assert column_chunks(_footer(data)) == expected


def test_a_page_that_unpacks_to_more_than_the_limit_takes_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquetfile, "_MAX_PAGE_BYTES", 2**20)
    data = _parquet({"image": [bytes(2**26)]}, compression="zstd", use_dictionary=False, write_statistics=False)
    assert len(data) < 2**14
    pool = pa.proxy_memory_pool(pa.default_memory_pool())
    before = pa.default_memory_pool()
    pa.set_memory_pool(pool)
    try:
        file = open_parquet(io.BytesIO(data))
        with pytest.raises(
            ImageError, match=r"a page of the Parquet file has 67,108,\d+ bytes, the limit is 1,048,576"
        ):
            next(file.batches(["image"], 0))
    finally:
        pa.set_memory_pool(before)

    assert pool.max_memory() < 2**23


def test_many_rows_of_one_large_value_come_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquetfile, "_MAX_PAGE_BYTES", 2**20)
    value = bytes(200_000)
    file = open_parquet(io.BytesIO(_parquet({"image": [b"first"] * 50 + [value] * 50})))

    batches = list(file.batches(["image"], 0))

    assert [each for batch in batches for each in batch["image"].to_pylist()] == [b"first"] * 50 + [value] * 50
    assert {batch.num_rows for batch in batches} == {5}


def test_rows_come_once_where_a_later_page_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquetfile, "_MAX_PAGE_BYTES", 2**20)
    noise = random.Random(0)
    # Pages of some 20 kB, then one of 900 kB: 128 rows of it would be too much.
    values = [noise.randbytes(1000) for _ in range(3000)] + [noise.randbytes(900_000), b"last"]
    data = _parquet({"image": values}, use_dictionary=False, data_page_size=5000, write_batch_size=5)
    file = open_parquet(io.BytesIO(data))

    batches = list(file.batches(["image"], 0, 32))

    assert [each for batch in batches for each in batch["image"].to_pylist()] == values
    assert (batches[0].num_rows, batches[-1].num_rows) == (32, 1)


def test_footers_that_are_damaged_give_chunks_or_a_page_error(columns: dict[str, Any]) -> None:
    chance = random.Random(0)
    sound = _footer(_parquet(columns, row_group_size=130, store_schema=False))
    outcomes = set()
    for _ in range(1500):
        footer = bytearray(sound)
        for _ in range(chance.randrange(1, 4)):
            footer[chance.randrange(len(footer))] = chance.randrange(256)
        try:
            chunks = column_chunks(bytes(footer[: chance.randrange(len(footer))] if chance.random() < 0.2 else footer))
        except PageError:
            outcomes.add("refused")
        else:
            outcomes.add("read")
            assert all(start < end for start, end in chunks)
    assert outcomes == {"refused", "read"}


@pytest.mark.parametrize(
    "footer",
    [b"", b"\x49\xfc\xff\xff\xff\xff\xff\x0f", b"\x19" * 5000, b"\x1c" * 100_000, b"\x18" + b"\xff" * 20, b"\x1e\x00"],
    ids=["empty", "endless list", "lists in lists", "structs in structs", "number without end", "unknown type"],
)
def test_a_footer_made_to_hurt_is_a_page_error(footer: bytes) -> None:
    with pytest.raises(PageError):
        column_chunks(footer)


def test_only_columns_can_be_read_and_only_in_order() -> None:
    data = _parquet({"image": [b"x" * 1000] * 2000}, use_dictionary=False, compression="none", data_page_size=1000)
    ((start, end),) = column_chunks(_footer(data))
    file = GuardedFile(io.BytesIO(data), [(start, end)])
    file.max_page_bytes = 2**30

    for position in (0, end, len(data) - 4):
        file.seek(position)
        with pytest.raises(PageError, match="where no column is"):
            file.read(4)
    file.seek(end - 10)
    with pytest.raises(PageError, match="skips a page"):
        file.read(4)
    file.seek(start)
    assert file.read(100) == data[start : start + 100]
    assert file.read(100) == data[start + 100 : start + 200]
    file.max_page_bytes = 10
    file.seek(start)
    with pytest.raises(PageTooLargeError):
        file.read(1)


def test_columns_that_overlap_are_refused() -> None:
    data = _parquet({"image": [b"1"], "id": [1]}, store_schema=False)
    footer = _footer(data)
    first, second = column_chunks(footer)

    def zigzag(number: int) -> bytes:
        number *= 2
        out = b""
        while number > 127:
            out, number = out + bytes([number & 127 | 128]), number >> 7
        return out + bytes([number])

    # The second column's dictionary page, which is its start, is said to lie within the first.
    assert len(zigzag(second[0])) == len(zigzag(first[1] - 1))
    moved = footer.replace(zigzag(second[0]), zigzag(first[1] - 1))
    assert moved != footer
    file = data[: -8 - len(footer)] + moved + data[-8:]

    with pytest.raises(ImageError, match="column chunks overlap") as caught:
        open_parquet(io.BytesIO(file))
    assert caught.value.status is Status.CORRUPT
