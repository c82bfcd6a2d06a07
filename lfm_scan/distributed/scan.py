"""The scan: open or pick up a run, plan, stream, commit, finalize."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import ray

from lfm_scan import errors
from lfm_scan.config import ScanConfig
from lfm_scan.distributed.pipeline import Work, run_pipeline
from lfm_scan.distributed.resources import shape_pipeline
from lfm_scan.distributed.session import ray_session
from lfm_scan.errors import LFMScanError, RunError
from lfm_scan.runs.finalize import Group, MergedFile, group_parts, merge_group, write_success
from lfm_scan.runs.plan import Plan
from lfm_scan.runs.run import Run, ensure_plan, open_run, todo
from lfm_scan.runs.shard import Receipt
from lfm_scan.runs.summary import Summary

_OUR_ERROR: Final = re.compile(r"^lfm_scan\.errors\.(\w+): (.*)$", re.MULTILINE)
"""The last line of a Python traceback that ends in one of our errors."""


class Listener:
    """Wants to know how a scan goes. This one does nothing; the progress bar overrides what it shows."""

    def opened(self, run: Run) -> None:
        """The run directory is there and fits; Ray starts next."""

    def listing(self, num_rows: int) -> None:
        """So many inputs have been listed."""

    def planned(self, plan: Plan, num_rows_done: int) -> None:
        """The plan stands; so many inputs were done by an earlier start of the run."""

    def shard_done(self, receipt: Receipt) -> None:
        """A shard is committed."""

    def finalizing(self) -> None:
        """All shards are committed; the parts are merged."""


@dataclass(frozen=True)
class ScanOutcome:
    """How a scan ended.

    Attributes:
        run_id: Of the run.
        run_dir: Where its results are.
        summary: Counts over all rows.
        already_finished: The run was finished before, and nothing was done.
        num_rows_resumed: Rows done by an earlier start.
        elapsed_s: Wall time of this start.
    """

    run_id: str
    run_dir: str
    summary: Summary
    already_finished: bool
    num_rows_resumed: int
    elapsed_s: float


def scan(config: ScanConfig, listener: Listener | None = None, *, debug: bool = False) -> ScanOutcome:
    """Score every image of the sources, to one row each in the run directory.

    A run that was interrupted goes on; a finished one is left alone.

    Args:
        config: What to scan, with what, and where the results go.
        listener: Is told how it goes.
        debug: Let Ray and its workers talk.

    Raises:
        LFMScanError: If the run cannot start or go on. What is committed stays, and the next start goes on from it.
    """
    started = time.monotonic()
    listener = listener or Listener()
    run = open_run(config)
    if run.success is not None:
        summary = Summary.from_json(run.success["summary"])
        return ScanOutcome(run.run_id, run.directory.uri, summary, True, summary.num_rows, time.monotonic() - started)
    listener.opened(run)
    with ray_session(config.compute.ray_address, debug=debug):
        try:
            num_rows_resumed, summary = _scan(run, listener)
        except ray.exceptions.RayError as exc:
            raise _translate(exc) from exc
    return ScanOutcome(run.run_id, run.directory.uri, summary, False, num_rows_resumed, time.monotonic() - started)


def _scan(run: Run, listener: Listener) -> tuple[int, Summary]:
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    shape = shape_pipeline(run.config.compute, resources.get("CPU", 1), resources.get("GPU", 0))
    plan = ensure_plan(run, shape.num_workers, listener.listing)
    shards = todo(run, plan)
    num_rows_resumed = plan.num_rows - sum(map(plan.rows_of, shards))
    listener.planned(plan, num_rows_resumed)
    if shards:
        for receipt in run_pipeline(Work(run.job, plan, run.weights, shape, run.config.compute.batch_size), shards):
            listener.shard_done(receipt)
    listener.finalizing()
    parts = run.directory.list_parts()
    files = _merge(run, group_parts(plan, parts))
    return num_rows_resumed, write_success(run, plan, parts, files)


def _merge(run: Run, groups: Sequence[Group]) -> list[MergedFile]:
    """Merge a single group here, many on the cluster."""
    if len(groups) == 1:
        return [merge_group(run.directory, run.run_id, groups[0])]
    task = ray.remote(num_cpus=1, memory=2 * 2**30)(merge_group)
    return list(ray.get([task.remote(run.directory, run.run_id, group) for group in groups]))


def _translate(exc: ray.exceptions.RayError) -> LFMScanError:
    """Return our own error if a worker raised one, else Ray's in one line.

    Ray Data raises its own error from ours, and pickling drops the cause; what survives is the traceback's text.
    """
    for name, message in reversed(_OUR_ERROR.findall(str(exc))):
        kind = getattr(errors, name, None)
        if isinstance(kind, type) and issubclass(kind, LFMScanError) and not issubclass(kind, errors.ImageError):
            return kind(message)
    lines = [line for line in str(exc).splitlines() if line.strip()]
    reason = lines[-1].strip() if lines else type(exc).__name__
    return RunError(f"Ray gave up: {reason}; what is done stays done, repeat the command to go on")
