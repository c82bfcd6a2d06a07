"""How a scan goes, for programs: one JSON object a line on standard error, as --log-format json asks."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Final, Self

from lfm_scan import logs
from lfm_scan.cli.progress import ScanProgress
from lfm_scan.distributed.scan import ScanOutcome
from lfm_scan.runs.plan import Plan
from lfm_scan.runs.run import Run
from lfm_scan.runs.shard import Receipt

_STDERR: Final = 2
_LISTING_EVERY_S: Final = 5.0


@contextlib.contextmanager
def json_on_stderr() -> Iterator[None]:
    """Write the log as JSON to what is standard error now, wherever that is sent during the block."""
    with open(os.dup(_STDERR), "w", buffering=1, encoding="utf-8") as stream, logs.written_to(stream, "json"):
        yield


class ScanEvents(ScanProgress):
    """Listens to a scan and logs an event for whatever happens; shows nothing."""

    def __init__(self) -> None:
        super().__init__(None)
        self._last_listing = 0.0
        self._about = contextlib.ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._about.close()

    def opened(self, run: Run) -> None:
        """Log which run this is, and name it in all lines that follow."""
        super().opened(run)
        self._about.enter_context(logs.about(run_id=run.run_id))
        metadata = run.checkpoint.metadata
        logs.event(
            "opened",
            run_dir=run.directory.uri,
            model_id=metadata.model_id,
            weights_sha256=run.checkpoint.sha256,
            preprocess=run.job.preprocess,
        )

    def waiting(self, lacking: str) -> None:
        """Log for what kind of node the scan will wait."""
        logs.event("waiting", lacking=lacking)

    def listing(self, num_rows: int) -> None:
        """Log how many inputs are listed so far, every few seconds."""
        if time.monotonic() - self._last_listing >= _LISTING_EVERY_S:
            self._last_listing = time.monotonic()
            logs.event("listing", num_rows=num_rows)

    def planned(self, plan: Plan, num_rows_done: int) -> None:
        """Log the size of the run."""
        super().planned(plan, num_rows_done)
        logs.event("planned", num_rows=plan.num_rows, num_shards=plan.num_shards, num_rows_done=num_rows_done)

    def shard_done(self, receipt: Receipt) -> None:
        """Log what became of a shard, and some of its failures."""
        super().shard_done(receipt)
        summary, usage = receipt.summary, receipt.usage.to_json()
        logs.event(
            "shard_done",
            shard=receipt.shard,
            created=receipt.created,
            num_rows=summary.num_rows,
            num_failed=summary.num_failed,
            by_status=dict(summary.by_status),
            seconds=usage["seconds"],
            nodes=list(usage["node_s"]),
            num_retries=usage["num_retries"],
            num_throttles=usage["num_throttles"],
            failures=[
                {"uri": each.uri, "status": each.status, "error": logs.one_line(each.error)}
                for each in receipt.failures
            ],
            num_rows_done=self.so_far()["num_rows_done"],
        )

    def finalizing(self) -> None:
        """Log that the results are being merged."""
        logs.event("merging")

    def ended(self, report: dict[str, Any]) -> None:
        """Log how it ended, and what it took."""
        logs.event(report["state"], **report)

    def print_interrupted(self) -> None:
        """Say nothing: `ended` has."""


def log_left_alone(outcome: ScanOutcome) -> None:
    """Log that a run was finished before."""
    logs.event("left_alone", **{"run_id": outcome.run_id, "run_dir": outcome.run_dir, **(outcome.report or {})})
