from __future__ import annotations

import pyarrow as pa

from lfm_scan.distributed.pipeline import from_row, to_row


def test_a_shard_goes_through_a_row_without_a_copy() -> None:
    pixels = pa.FixedSizeBinaryArray.from_buffers(pa.binary(4), 3, [None, pa.py_buffer(bytes(range(12)))])
    shard = pa.table({"uri": ["a", "b", "c"], "logit": pa.array([1.0, None, None]), "pixels": pixels})
    row = to_row(shard)

    assert row.num_rows == 1
    assert from_row(row).equals(shard)
    assert _address(from_row(row)) == _address(shard)


def test_a_shard_without_rows_is_no_row() -> None:
    assert len(to_row(pa.table({"item": pa.array([], pa.int64())}))) == 0


def _address(shard: pa.Table) -> int:
    address: int = shard.column("pixels").chunk(0).buffers()[1].address
    return address
