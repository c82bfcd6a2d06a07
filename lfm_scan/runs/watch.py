"""Looks after a run while shards stream: stops it when too many images fail, or nothing moves any more."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final

from lfm_scan.errors import FailureRateError, LFMScanError, StallError
from lfm_scan.runs.plan import Plan, read_shard
from lfm_scan.runs.run import Run
from lfm_scan.runs.shard import Failure, Receipt

_ENOUGH_ROWS: Final = 1000
"""A rate is taken over at least so many rows: three bad images at the start say nothing of a million. A run of fewer
ends before it would be stopped."""

_MAX_EXAMPLES: Final = 3


class Watch:
    """Counts what a driver has finished.

    Args:
        run: Its settings hold the bounds.
        plan: Of the run.
        shards: To do, in the order they are handed out.
        clock: Returns seconds.
    """

    def __init__(
        self, run: Run, plan: Plan, shards: Sequence[int], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._run = run
        self._plan = plan
        self._to_do = dict.fromkeys(shards)
        self._clock = clock
        self._last_progress = clock()
        self._num_rows = 0
        self._num_failed = 0
        self._failures: list[Failure] = []

    def shard_done(self, receipt: Receipt) -> None:
        """Count a shard.

        Raises:
            FailureRateError: If more images failed than the user allows.
        """
        self._last_progress = self._clock()
        self._to_do.pop(receipt.shard, None)
        self._num_rows += receipt.summary.num_rows
        self._num_failed += receipt.summary.num_failed
        self._failures = [*self._failures, *receipt.failures][:_MAX_EXAMPLES]
        allowed = self._run.config.max_failure_rate
        if self._num_rows >= _ENOUGH_ROWS and self._num_failed > allowed * self._num_rows:
            examples = "; ".join(f"{each.uri}: {each.status}: {each.error}" for each in self._failures)
            raise FailureRateError(
                f"stopped: {self._num_failed:,} of {self._num_rows:,} images failed, more than --max-failure-rate "
                f"{allowed:g} allows. For example {examples}. What is done stays done: repeat the command with a "
                "higher rate to go on, or mend the cause and scan what failed again with --retry-failed"
            )

    def check_progress(self, lacking: Callable[[], str | None] = lambda: None) -> None:
        """Make sure that something was finished of late.

        Args:
            lacking: Says what the cluster lacks to finish anything, if it lacks something.

        Raises:
            StallError: If nothing was for longer than the user allows.
        """
        stalled_s = self._clock() - self._last_progress
        if stalled_s < self._run.config.stall_timeout:
            return
        stuck = list(self._to_do)[:_MAX_EXAMPLES]
        missing = lacking()
        raise StallError(
            f"stopped: no shard was finished for {stalled_s:,.0f} s (--stall-timeout), {len(self._to_do):,} of "
            f"{self._plan.num_shards:,} are left. {f'There is {missing}. ' if missing else ''}The first of them: "
            f"{'; '.join(map(self._describe, stuck))}. What is done stays done: repeat the command to go on"
        )

    def _describe(self, shard: int) -> str:
        try:
            uris = read_shard(self._run.directory, self._plan, shard).column("uri")
        except LFMScanError as exc:
            return f"shard {shard} ({exc})"
        return f"shard {shard}, {uris[0].as_py()} to {uris[-1].as_py()}"
