"""Signs of life: while a driver works on a run, it keeps saying so in `RUN_DIR/drivers/`, for `lfm-scan status`.

They are the only objects of a run that are ever overwritten, and nothing but a reader's picture of the run depends on
them: a store that does not take them never disturbs the run.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from lfm_scan.logs import one_line
from lfm_scan.runs.error_histogram import ErrorHistogram
from lfm_scan.runs.rundir import RunDirectory
from lfm_scan.runs.usage import Usage
from lfm_scan.version import __version__

if TYPE_CHECKING:
    from lfm_scan.runs.plan import Plan
    from lfm_scan.runs.shard import Receipt

DRIVERS: Final = "drivers/"
"""Where the beats of a run are, one object a driver."""

MAX_BEAT_BYTES: Final = 64 * 2**10
"""Of one beat: what is larger was not written here."""

_INTERVAL_S: Final = 10.0
_LAST_BEAT_WAIT_S: Final = 10.0
"""How long the end of a run waits for the last beat to be stored."""

_LOG_EVERY_S: Final = 60.0
_MAX_ERROR_KINDS: Final = 8
"""In a beat, each with one example: it stays small."""

_MAX_NODES: Final = 100
"""Named in a beat."""

_logger: Final = logging.getLogger(__name__)


class Phase(StrEnum):
    """What a driver is doing."""

    LISTING = "listing"
    """It opens the run, and plans it if there is no plan yet."""
    SCANNING = "scanning"
    MERGING = "merging"
    FINISHED = "finished"
    STOPPED = "stopped"
    """It was interrupted; the run can go on."""
    FAILED = "failed"
    """An error ended it; what is committed stays."""

    @property
    def is_over(self) -> bool:
        """Whether the driver will say nothing more."""
        return self in (Phase.FINISHED, Phase.STOPPED, Phase.FAILED)


@dataclass(frozen=True, kw_only=True)
class Beat:
    """What a driver says of itself.

    Attributes:
        driver_id: Of the driver, new at every start.
        host: It runs on.
        pid: Of its process there.
        lfm_scan_version: Of the program.
        interval_s: Seconds between beats.
        started_at: By the driver's clock, in UTC.
        beat_at: By the driver's clock, in UTC.
        phase: What it does.
        phase_s: Seconds that it has spent in each phase.
        num_listed: Inputs that it has listed; once there is a plan, those in it.
        num_rows_before: Rows that were done when it started.
        num_rows: Rows in the parts that it committed itself.
        num_failed: Images among them that should have had a score and have none.
        by_status: Rows among them by status.
        error: Why it failed, in one line.
        errors: Kinds of errors among its rows.
        usage: What its shards took, those too that another driver had committed first; and what it took itself.
        held_core_s: Seconds of cores that the cluster had meanwhile, used or not.
        held_gpu_s: The same of GPUs.
    """

    driver_id: str
    host: str
    pid: int
    lfm_scan_version: str
    interval_s: float
    started_at: datetime
    beat_at: datetime
    phase: Phase = Phase.LISTING
    phase_s: Mapping[str, float] = field(default_factory=dict)
    num_listed: int = 0
    num_rows_before: int = 0
    num_rows: int = 0
    num_failed: int = 0
    by_status: Mapping[str, int] = field(default_factory=dict)
    error: str | None = None
    errors: ErrorHistogram = field(default_factory=ErrorHistogram)
    usage: Usage = field(default_factory=Usage)
    held_core_s: float = 0.0
    held_gpu_s: float = 0.0

    @property
    def elapsed_s(self) -> float:
        """Seconds from its start to this beat."""
        return (self.beat_at - self.started_at).total_seconds()

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {
            **asdict(self),
            "started_at": self.started_at.isoformat(),
            "beat_at": self.beat_at.isoformat(),
            "errors": self.errors.cut(_MAX_ERROR_KINDS, 1).to_json(),
            "usage": self.usage.with_nodes(_MAX_NODES).to_json(),
        }

    @classmethod
    def from_bytes(cls, data: bytes) -> Beat:
        """Return the beat in a stored object.

        Raises:
            ValueError: If it is none.
        """
        try:
            value = json.loads(data)
            return cls(
                driver_id=str(value["driver_id"]),
                host=str(value["host"]),
                pid=int(value["pid"]),
                lfm_scan_version=str(value["lfm_scan_version"]),
                interval_s=float(value["interval_s"]),
                started_at=datetime.fromisoformat(value["started_at"]).astimezone(UTC),
                beat_at=datetime.fromisoformat(value["beat_at"]).astimezone(UTC),
                phase=Phase(value["phase"]),
                num_listed=int(value["num_listed"]),
                num_rows_before=int(value["num_rows_before"]),
                num_rows=int(value["num_rows"]),
                num_failed=int(value["num_failed"]),
                by_status={str(status): int(count) for status, count in value["by_status"].items()},
                error=None if value["error"] is None else str(value["error"]),
                # The rest is absent from what earlier versions wrote.
                errors=ErrorHistogram.from_json(value["errors"]) if "errors" in value else ErrorHistogram(),
                usage=Usage.from_json(value["usage"]) if "usage" in value else Usage(),
                phase_s={str(phase): float(seconds) for phase, seconds in value.get("phase_s", {}).items()},
                held_core_s=float(value.get("held_core_s", 0.0)),
                held_gpu_s=float(value.get("held_gpu_s", 0.0)),
            )
        except (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError) as exc:
            raise ValueError(f"not a driver's sign of life: {type(exc).__name__}: {exc}") from exc


class Heartbeat:
    """Beats from a thread of its own for as long as a block lasts, and once more when it ends.

    The last beat says how it ended: finished; stopped, if it was interrupted; or failed, and why.

    Args:
        directory: Of the run.
        interval_s: Seconds between beats.
    """

    def __init__(self, directory: RunDirectory, interval_s: float = _INTERVAL_S) -> None:
        # A beat that does not get through within seconds is late anyway, and the next one says more.
        self._directory = replace(directory, patient=False)
        now = datetime.now(UTC)
        self._beat = Beat(
            driver_id=f"{now:%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:8]}",
            host=socket.gethostname(),
            pid=os.getpid(),
            lfm_scan_version=__version__,
            interval_s=interval_s,
            started_at=now,
            beat_at=now,
        )
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep_beating, name="heartbeat", daemon=True)
        self._silent_until = 0.0
        self._counted_until = time.monotonic()

    @property
    def uri(self) -> str:
        """Of the object it keeps overwriting."""
        return self._directory.path(f"{DRIVERS}{self._beat.driver_id}.json")

    @property
    def beat(self) -> Beat:
        """What it would say now."""
        with self._lock:
            self._count_time()
            return self._beat

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.phase(Phase.FINISHED)
        elif isinstance(error, Exception):
            self._update(error=_reason(error))
            self.phase(Phase.FAILED)
        else:
            self.phase(Phase.STOPPED)
        self._over.set()
        self._thread.join(_LAST_BEAT_WAIT_S)

    def listing(self, num_rows: int) -> None:
        """So many inputs have been listed."""
        self._update(num_listed=num_rows)

    def planned(self, plan: Plan, num_rows_done: int) -> None:
        """The plan stands; so many inputs were done by an earlier start of the run."""
        self._update(num_listed=plan.num_rows, num_rows_before=num_rows_done)
        self.phase(Phase.SCANNING)

    def shard_done(self, receipt: Receipt) -> None:
        """A shard is committed. Its rows count if this driver wrote them, so that no two drivers count them."""
        summary, beat = receipt.summary, self._beat
        self.used(receipt.usage)
        if receipt.created:
            self._update(
                num_rows=beat.num_rows + summary.num_rows,
                num_failed=beat.num_failed + summary.num_failed,
                by_status=dict(Counter(beat.by_status) + summary.by_status),
                errors=beat.errors + receipt.errors,
            )

    def used(self, usage: Usage) -> None:
        """So much was used."""
        self._update(usage=self._beat.usage + usage)

    def held(self, core_s: float, gpu_s: float) -> None:
        """The cluster had so many more seconds of cores and GPUs."""
        self._update(held_core_s=self._beat.held_core_s + core_s, held_gpu_s=self._beat.held_gpu_s + gpu_s)

    def phase(self, phase: Phase) -> None:
        """The driver goes on to something else."""
        with self._lock:
            self._count_time()
            self._beat = replace(self._beat, phase=phase)

    def _update(self, **changes: Any) -> None:  # noqa: ANN401
        with self._lock:
            self._beat = replace(self._beat, **changes)

    def _count_time(self) -> None:
        """Bring the beat up to this moment; what it says was done for as long as nothing else is said."""
        now, beat = time.monotonic(), self._beat
        if not beat.phase.is_over:
            spent_s = dict(beat.phase_s)
            spent_s[str(beat.phase)] = spent_s.get(beat.phase, 0.0) + now - self._counted_until
            self._beat = replace(beat, phase_s=spent_s, beat_at=datetime.now(UTC))
        self._counted_until = now

    def _keep_beating(self) -> None:
        over = False
        while not over:
            self._store_beat()
            over = self._over.wait(self._beat.interval_s)
        self._store_beat()

    def _store_beat(self) -> None:
        try:
            data = json.dumps(self.beat.to_json(), indent=1).encode()
            self._directory.store.replace(self.uri, data)
        except Exception as exc:  # noqa: BLE001 - whatever it is, the run goes on
            if time.monotonic() >= self._silent_until:
                self._silent_until = time.monotonic() + _LOG_EVERY_S
                _logger.warning("cannot say that this driver is alive, the run goes on without: %s", _reason(exc))


def _reason(error: BaseException) -> str:
    return one_line(str(error)) or type(error).__name__
