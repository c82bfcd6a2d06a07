"""What a start of a scan takes, as its driver sees it, and the reports made from that."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Final, TypeVar

import ray

from lfm_scan.concurrency import OrderedMap
from lfm_scan.distributed.versions import versions_here
from lfm_scan.errors import StorageError
from lfm_scan.logs import one_line
from lfm_scan.runs import rundir
from lfm_scan.runs.error_histogram import ErrorHistogram
from lfm_scan.runs.finalize import MergedFile
from lfm_scan.runs.heartbeat import Beat, Heartbeat, Phase
from lfm_scan.runs.report import run_report
from lfm_scan.runs.run import Run
from lfm_scan.runs.shard import Receipt
from lfm_scan.runs.state import read_drivers
from lfm_scan.runs.summary import Summary
from lfm_scan.runs.usage import Usage
from lfm_scan.storage.traffic import Traffic, counted, traffic

A = TypeVar("A")
B = TypeVar("B")

_LOOK_EVERY_S: Final = 5.0

_logger: Final = logging.getLogger(__name__)


class Account:
    """Adds up what this start takes, and keeps the heartbeat informed.

    Args:
        run: It works on.
        heartbeat: Of this driver.
        before: What this process had asked of stores when it began.
    """

    def __init__(self, run: Run, heartbeat: Heartbeat, before: Traffic) -> None:
        self._run = run
        self._heartbeat = heartbeat
        self._summary = Summary()
        self._traffic = before
        self._counted_until = time.monotonic()
        self._look_again = 0.0
        self._cores = self._gpus = 0.0

    def shard_done(self, receipt: Receipt) -> None:
        """A shard is committed."""
        self._heartbeat.shard_done(receipt)
        if receipt.created:
            self._summary += receipt.summary
        self.look()

    def look(self) -> None:
        """See what the cluster has now, unless that was seen a moment ago."""
        if time.monotonic() >= self._look_again:
            self._look_again = time.monotonic() + _LOOK_EVERY_S
            self._count_held()
            resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
            self._cores, self._gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)

    def settle(self) -> None:
        """Count what this process asked of stores, and what the cluster had, up to now."""
        self._count_held()
        before, self._traffic = self._traffic, traffic()
        self.asked(self._traffic - before)

    def asked(self, asked: Traffic) -> None:
        """So much was asked of stores for us, elsewhere on the cluster."""
        self._heartbeat.used(Usage.of_traffic(asked))

    def counted(self, ordered_map: OrderedMap) -> OrderedMap:
        """Return the same for work on the cluster, whose requests to stores count as ours."""

        def call(function: Callable[[A], B], items: Iterable[A], /) -> Iterator[B]:
            for result, asked in ordered_map(counted(function), items):
                self.asked(asked)
                yield result

        return call

    def finish(self, summary: Summary, files: Sequence[MergedFile]) -> dict[str, Any]:
        """Write `run.json` and return what it holds. It is written once: of two drivers, by the first.

        Nothing but a reader's picture of the run depends on it: a store that does not take it does not disturb the run.

        Args:
            summary: Counts over all rows of the run.
            files: Its results.
        """
        others = self._others()
        self.settle()
        ours = replace(self._heartbeat.beat, phase=Phase.FINISHED)  # as good as
        errors = sum((file.errors for file in files), ErrorHistogram())
        report = self._report(Phase.FINISHED, summary, errors, [*others, ours])
        try:
            self._run.directory.create_json(rundir.REPORT, report)
        except StorageError as exc:
            _logger.warning("%s is not written, the run goes on without: %s", rundir.REPORT, one_line(str(exc)))
        return report

    def report(self) -> dict[str, Any]:
        """Return what there is to say of this start alone, once it has ended early."""
        beat = self._heartbeat.beat
        return self._report(beat.phase, self._summary, beat.errors, [beat], beat.error)

    def _others(self) -> list[Beat]:
        """Return what other drivers of this run said last."""
        ours = self._heartbeat.beat.driver_id
        try:
            drivers = read_drivers(self._run.directory, datetime.now(UTC))
        except StorageError as exc:
            _logger.warning("%s leaves out other starts of the run: %s", rundir.REPORT, one_line(str(exc)))
            return []
        return [driver.beat for driver in drivers if driver.beat.driver_id != ours]

    def _count_held(self) -> None:
        """Count the time since this was last done, for as many cores and GPUs as were seen last."""
        elapsed_s = time.monotonic() - self._counted_until
        self._counted_until += elapsed_s
        self._heartbeat.held(self._cores * elapsed_s, self._gpus * elapsed_s)

    def _report(
        self, state: Phase, summary: Summary, errors: ErrorHistogram, starts: Sequence[Beat], error: str | None = None
    ) -> dict[str, Any]:
        return run_report(
            run_id=self._run.run_id,
            run_dir=self._run.directory.uri,
            state=state,
            summary=summary,
            errors=errors,
            starts=starts,
            prices=self._run.config.prices,
            versions=versions_here(),
            error=error,
        )
