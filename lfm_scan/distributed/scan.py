"""The scan: open or pick up a run, plan, stream, commit, finalize."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import ray

from lfm_scan.concurrency import Background, map_in_threads
from lfm_scan.config import ScanConfig
from lfm_scan.distributed.account import Account
from lfm_scan.distributed.failures import dying, translate
from lfm_scan.distributed.pipeline import Work, give_up, map_on_cluster, run_pipeline
from lfm_scan.distributed.resources import cluster_nodes, lacking, memory_claim, shape_pipeline
from lfm_scan.distributed.session import ray_session
from lfm_scan.distributed.stopping import GracefulStop, StopFlag, drain_s
from lfm_scan.distributed.tasks import ToDo
from lfm_scan.runs import rundir
from lfm_scan.runs.earlier import scores_of
from lfm_scan.runs.finalize import Group, MergedFile, group_parts, merge_group, summary_of, write_success
from lfm_scan.runs.heartbeat import Heartbeat, Phase
from lfm_scan.runs.plan import Plan
from lfm_scan.runs.run import Run, ensure_plan, open_run, todo
from lfm_scan.runs.shard import Receipt
from lfm_scan.runs.summary import Summary
from lfm_scan.runs.watch import Watch
from lfm_scan.storage.traffic import counted, traffic

_SETTLE_S: Final = 10.0
"""For which a run that fails waits for its pipeline to end, so that nothing of it is left on the cluster."""

_GIVE_UP_S: Final = 3.0
"""For which a run that ends before its pipeline waits until what is left is cancelled."""

_MERGE_BYTES: Final = 2 * 2**30
"""Memory for merging the parts of one file of results."""

_LOOK_EVERY_S: Final = 0.5


class Listener:
    """Wants to know how a scan goes. This one does nothing; the progress bar overrides what it shows."""

    def opened(self, run: Run) -> None:
        """The run directory is there and fits; Ray starts next."""

    def waiting(self, lacking: str) -> None:
        """The cluster cannot score yet, for want of nodes that it may start on demand."""

    def listing(self, num_rows: int) -> None:
        """So many inputs have been listed."""

    def planned(self, plan: Plan, num_rows_done: int) -> None:
        """The plan stands; so many inputs were done by an earlier start of the run."""

    def shard_done(self, receipt: Receipt) -> None:
        """A shard is committed."""

    def finalizing(self) -> None:
        """All shards are committed; the parts are merged."""

    def ended(self, report: dict[str, Any]) -> None:
        """The scan is over, well or not.

        Args:
            report: As `run_report` makes it: of the whole run if it is finished, else of this start.
        """


class _Listeners(Listener):
    """Tells the caller's listener, the sign of life and the account alike."""

    def __init__(self, listener: Listener, heartbeat: Heartbeat, account: Account) -> None:
        self._listener = listener
        self._heartbeat = heartbeat
        self.account = account

    def waiting(self, lacking: str) -> None:
        self._listener.waiting(lacking)

    def listing(self, num_rows: int) -> None:
        self._heartbeat.listing(num_rows)
        self.account.look()
        self._listener.listing(num_rows)

    def planned(self, plan: Plan, num_rows_done: int) -> None:
        self._heartbeat.planned(plan, num_rows_done)
        self._listener.planned(plan, num_rows_done)

    def shard_done(self, receipt: Receipt) -> None:
        self.account.shard_done(receipt)
        self._listener.shard_done(receipt)

    def finalizing(self) -> None:
        self._heartbeat.phase(Phase.MERGING)
        self._listener.finalizing()


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
        report: What `run.json` holds; None of a run that was finished by an earlier version.
    """

    run_id: str
    run_dir: str
    summary: Summary
    already_finished: bool
    num_rows_resumed: int
    elapsed_s: float
    report: dict[str, Any] | None = None


def scan(
    config: ScanConfig, listener: Listener | None = None, *, stop: GracefulStop | None = None, debug: bool = False
) -> ScanOutcome:
    """Score every image of the sources, to one row each in the run directory.

    A run that was interrupted goes on; a finished one is left alone.

    Args:
        config: What to scan, with what, and where the results go.
        listener: Is told how it goes.
        stop: Through it the caller can ask to stop.
        debug: Let Ray and its workers talk.

    Raises:
        LFMScanError: If the run cannot start or go on. What is committed stays, and the next start goes on from it.
        KeyboardInterrupt: If it was asked to stop.
    """
    started, asked_before = time.monotonic(), traffic()
    run = open_run(config)
    if run.success is not None:
        summary = Summary.from_json(run.success["summary"])
        return ScanOutcome(
            run.run_id,
            run.directory.uri,
            summary,
            True,
            summary.num_rows,
            time.monotonic() - started,
            run.directory.read_json(rundir.REPORT),
        )
    listener = listener or Listener()
    listener.opened(run)
    heartbeat = Heartbeat(run.directory)
    account = Account(run, heartbeat, asked_before)
    listeners = _Listeners(listener, heartbeat, account)
    try:
        with heartbeat, ray_session(config.compute.ray_address, debug=debug) as grows:
            try:
                num_rows_resumed, summary, report = _scan(run, listeners, stop or GracefulStop(), grows)
            except ray.exceptions.RayError as exc:
                raise translate(exc) from exc
            finally:
                account.settle()
    except BaseException:
        listener.ended(account.report())
        raise
    listener.ended(report)
    elapsed_s = time.monotonic() - started
    return ScanOutcome(run.run_id, run.directory.uri, summary, False, num_rows_resumed, elapsed_s, report)


def _scan(run: Run, listener: _Listeners, stop: GracefulStop, may_grow: bool) -> tuple[int, Summary, dict[str, Any]]:
    """Return the number of rows done before, the counts over all rows, and the report."""
    account = listener.account
    account.look()
    nodes = cluster_nodes()
    shape = shape_pipeline(run.config.compute, nodes, may_grow=may_grow)
    missing = lacking(shape, nodes)
    if missing is not None:
        listener.waiting(missing)
    # Without nodes that work, planning does not wait for them: they are asked for once there is something to do.
    index_all = account.counted(map_on_cluster) if any(node.cpus >= 1 for node in nodes) else map_in_threads
    plan = ensure_plan(run, shape.num_workers, listener.listing, index_all)
    shards = todo(run, plan)
    num_rows_resumed = plan.num_rows - sum(map(plan.rows_of, shards))
    listener.planned(plan, num_rows_resumed)
    if shards:
        known = None if run.reuse is None else ray.put(scores_of(run.reuse))
        to_do = ToDo(run.job, plan, known, StopFlag())
        work = Work(to_do, run.weights, shape, run.config.compute)
        _stream(run, work, shards, listener, stop)
    listener.finalizing()
    parts = run.directory.list_parts()
    files = _merge(run, group_parts(plan, parts), account)
    summary = summary_of(run, plan, files)
    report = account.finish(summary, files)
    write_success(run, plan, parts, files)
    return num_rows_resumed, summary, report


def _stream(run: Run, work: Work, shards: Sequence[int], listener: _Listeners, stop: GracefulStop) -> None:
    """Run the pipeline under the run's watch.

    Raises:
        FailureRateError: If too many images fail.
        StallError: If nothing is finished for too long.
        KeyboardInterrupt: If somebody asked to stop, once the shards begun are finished or have taken too long.
    """
    watch = Watch(run, work.to_do.plan, shards)
    with stop.deferred(), Background(run_pipeline(work, shards)) as receipts:
        try:
            _listen(receipts, work, watch, listener, stop)
        except BaseException as exc:
            work.to_do.stop.set()  # the cluster may outlive this run, and must not go on with it
            if isinstance(exc, Exception):
                receipts.wait(_SETTLE_S)
            raise
        finally:
            give_up(work)
            receipts.wait(_GIVE_UP_S)
    if stop.is_requested:
        stop.interrupt()


def _listen(receipts: Background[Receipt], work: Work, watch: Watch, listener: _Listeners, stop: GracefulStop) -> None:
    """Pass on receipts until there are no more, or those of the shards begun have been waited for long enough."""
    deadline = math.inf
    while time.monotonic() < deadline:
        if stop.is_requested and deadline == math.inf:
            work.to_do.stop.set()
            deadline = time.monotonic() + drain_s()
        try:
            receipt = receipts.get(timeout_s=_LOOK_EVERY_S)
        except TimeoutError:
            listener.account.look()
            watch.check_progress(lambda: lacking(work.shape, cluster_nodes()) or dying())
        except StopIteration:
            return
        else:
            listener.shard_done(receipt)
            watch.shard_done(receipt)


def _merge(run: Run, groups: Sequence[Group], account: Account) -> list[MergedFile]:
    """Merge a single group here, many on the cluster."""
    if len(groups) == 1:
        return [merge_group(run.directory, run.run_id, groups[0])]
    task = ray.remote(num_cpus=1, memory=memory_claim(_MERGE_BYTES, cluster_nodes()))(counted(merge_group))
    done = ray.get([task.remote(run.directory, run.run_id, group) for group in groups])
    for _, asked in done:
        account.asked(asked)
    return [file for file, _ in done]
