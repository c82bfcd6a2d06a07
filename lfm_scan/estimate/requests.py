"""The requests of a run's own bookkeeping: what is read and written in the run directory of a scan without incidents.

Counted as the code makes them: `runs.run`, `runs.plan`, `runs.shard`, `runs.finalize`. Retries and resumes come on top.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from lfm_scan.runs.finalize import group_parts
from lfm_scan.runs.plan import SHARDS_PER_FILE, Plan, choose_shard_size
from lfm_scan.storage import ObjectInfo

_PAGE_KEYS: Final = 1000
"""Of one answer to a LIST."""

_SMALL_PUTS: Final = 4
"""config.json, plan/index.json, run.json, _SUCCESS.json."""

_SMALL_GETS: Final = 3
"""config.json, plan/index.json and _SUCCESS.json, to see whether they are there."""

_PART_ROW_BYTES: Final = 115
"""A row in a part, by docs/scale.md: decides, besides the number of rows, how many parts are merged into one file."""


@dataclass(frozen=True, kw_only=True)
class RunRequests:
    """What a run asks of the store that its directory lies in.

    Attributes:
        num_shards: Shards, and parts.
        shard_size: Images a shard.
        num_plan_files: Files of the plan.
        num_result_files: Merged files.
        num_lists: LIST requests.
        num_gets: GET requests, at most: a worker keeps the plan files that it read last.
        num_puts: PUT requests, without the signs of life: one every 10 s, and at the end they are listed and read.
    """

    num_shards: int
    shard_size: int
    num_plan_files: int
    num_result_files: int
    num_lists: int
    num_gets: int
    num_puts: int


def requests_of_run(num_inputs: int, num_workers: int, shard_size: int | None = None) -> RunRequests:
    """Return what a run of so many inputs asks of its store.

    Args:
        num_inputs: Inputs in all.
        num_workers: Cores, or GPUs, that work on them: decides the size of shards.
        shard_size: Images a shard, if the user chose.
    """
    shard_size = shard_size or choose_shard_size(num_inputs, num_workers)
    plan = Plan(num_inputs, shard_size, (), "")
    part = ObjectInfo("", _PART_ROW_BYTES * shard_size, None, None)
    num_result_files = len(group_parts(plan, dict.fromkeys(range(plan.num_shards), part)))
    num_plan_files = -(-plan.num_shards // SHARDS_PER_FILE)
    return RunRequests(
        num_shards=plan.num_shards,
        shard_size=shard_size,
        num_plan_files=num_plan_files,
        num_result_files=num_result_files,
        num_lists=1 + max(1, -(-plan.num_shards // _PAGE_KEYS)),  # none is done yet; all are
        num_gets=_SMALL_GETS + 2 * plan.num_shards,  # each its plan, and its part for merging
        num_puts=_SMALL_PUTS + num_plan_files + plan.num_shards + num_result_files,
    )
