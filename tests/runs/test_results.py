from __future__ import annotations

from collections.abc import Iterator

import fsspec
import pytest

from lfm_scan.options import StorageConfig
from lfm_scan.runs import rundir
from lfm_scan.runs.parquet import to_parquet
from lfm_scan.runs.results import read_results
from lfm_scan.runs.rundir import RunDirectory
from lfm_scan.schema import RESULT_SCHEMA


@pytest.fixture
def memory() -> Iterator[RunDirectory]:
    yield RunDirectory.at("memory://results-test/run", StorageConfig())
    fsspec.filesystem("memory").rm("/results-test", recursive=True)


def test_a_run_in_any_store_can_be_read(memory: RunDirectory) -> None:
    row = {
        **{field.name: None for field in RESULT_SCHEMA},
        **dict.fromkeys(("preprocess", "model_id", "weights_sha256", "run_id"), "x"),
        "assessable": True,
        "flagged": False,
        "status": "ok",
        "shard": 0,
        "scored_at": 0,
    }
    for index, uris in enumerate((["a", "b"], ["c"])):
        table = RESULT_SCHEMA.empty_table().from_pylist([{**row, "uri": uri} for uri in uris], schema=RESULT_SCHEMA)
        memory.store.create(memory.result_uri(index), to_parquet(table))
    names = ["results/results-00000.parquet", "results/results-00001.parquet"]
    memory.create_json(rundir.SUCCESS, {"results": [{"name": name} for name in names]})

    assert read_results(memory.uri)["uri"].tolist() == ["a", "b", "c"]
    only = read_results(memory.uri, ["uri", "status"], [("uri", ">", "a")])
    assert only.to_dict("list") == {"uri": ["b", "c"], "status": ["ok", "ok"]}
