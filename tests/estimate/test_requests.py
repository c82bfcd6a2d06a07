from __future__ import annotations

from pathlib import Path

import pytest

from lfm_scan.estimate.requests import requests_of_run
from lfm_scan.options import StorageConfig
from lfm_scan.runs.plan import write_plan
from lfm_scan.runs.rundir import RunDirectory
from lfm_scan.sources.inputs import INPUT_SCHEMA, Input


@pytest.mark.parametrize(
    ("num_inputs", "num_shards", "num_plan_files", "num_result_files", "num_puts"),
    # The table of docs/scale.md, of 512 images a shard.
    [(10**4, 20, 2, 1, 27), (10**5, 196, 13, 1, 214), (10**6, 1954, 123, 1, 2082), (10**7, 19532, 1221, 5, 20762)],
)
def test_a_run_writes_what_the_page_on_scale_says(
    num_inputs: int, num_shards: int, num_plan_files: int, num_result_files: int, num_puts: int
) -> None:
    found = requests_of_run(num_inputs, num_workers=2, shard_size=512)

    assert found.num_shards == num_shards
    assert found.num_plan_files == num_plan_files
    assert abs(found.num_result_files - num_result_files) <= 1  # there by rows, here by whole shards
    assert found.num_puts == num_puts + found.num_result_files - num_result_files
    assert found.num_lists == 1 + -(-num_shards // 1000)
    assert found.num_gets == 3 + 2 * num_shards


@pytest.mark.parametrize(("num_inputs", "num_workers"), [(1, 1), (16, 2), (17, 2), (1000, 3), (1000, 400), (9000, 1)])
def test_the_plan_is_the_one_that_a_scan_makes(tmp_path: Path, num_inputs: int, num_workers: int) -> None:
    inputs = [Input(uri=f"/{index:05}.png", size_bytes=1) for index in range(num_inputs)]
    directory = RunDirectory(str(tmp_path), StorageConfig())

    plan = write_plan(directory, inputs, INPUT_SCHEMA, num_workers=num_workers)

    found = requests_of_run(num_inputs, num_workers)
    assert (found.shard_size, found.num_shards) == (plan.shard_size, plan.num_shards)
    assert found.num_plan_files == len(plan.files)
