from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from lfm_scan.options import InputConfig, StorageConfig
from lfm_scan.sources.fetch import Fetcher
from lfm_scan.sources.select import list_inputs
from lfm_scan.storage import Fetched


def test_rows_of_a_table_out_of_order_get_their_own_bytes(tmp_path: Path) -> None:
    cells = [f"image {row}".encode() for row in range(100)]
    pq.write_table(pa.table({"image": cells}), tmp_path / "t.parquet")
    planned = list(list_inputs([str(tmp_path / "t.parquet")], InputConfig(), StorageConfig()))
    order = [40, 0, 99, 99, 33, 34]

    found = list(Fetcher(StorageConfig(), InputConfig(), 1000, 2).fetch([planned[row] for row in order]))

    assert [each.data for each in found if isinstance(each, Fetched)] == [cells[row] for row in order]
