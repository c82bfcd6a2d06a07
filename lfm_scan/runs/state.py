"""How a run is doing, from what its directory holds and nothing else: no driver is asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, Final

from lfm_scan.errors import NotFoundError, RunError
from lfm_scan.runs import rundir
from lfm_scan.runs.heartbeat import DRIVERS, MAX_BEAT_BYTES, Beat, Phase
from lfm_scan.runs.plan import Plan, read_plan
from lfm_scan.runs.rundir import RunDirectory
from lfm_scan.runs.summary import Summary
from lfm_scan.storage import ObjectInfo

_ALIVE_INTERVALS: Final = 3.5
"""Three beats may fail to get through before a driver counts as dead."""

_MAX_ALIVE_S: Final = 600.0
_RATE_WINDOW: Final = timedelta(minutes=10)
_READ_THREADS: Final = 16


class State(StrEnum):
    """Where a run stands."""

    PLANNING = "planning"
    SCANNING = "scanning"
    MERGING = "merging"
    FINISHED = "finished"
    STOPPED = "stopped"
    """Nobody works on it; the same command goes on."""
    FAILED = "failed"
    """Nobody works on it, and the last driver ended with an error; the same command goes on."""


@dataclass(frozen=True, kw_only=True)
class Driver:
    """A driver that works on the run, or did.

    Attributes:
        beat: The last thing it said.
        seen_at: When the store received that, by the store's clock.
        is_alive: Whether it can be expected to say more.
    """

    beat: Beat
    seen_at: datetime
    is_alive: bool


@dataclass(frozen=True, kw_only=True)
class RunState:
    """How a run is doing.

    Attributes:
        run_dir: Its directory.
        run_id: Of the run.
        created_at: When it was first started, as its first driver wrote it.
        sources: What it scans.
        state: Where it stands.
        num_rows: Inputs in all; None until they are planned.
        num_rows_listed: Inputs listed so far, as drivers said; once planned, all.
        num_rows_done: Rows whose shard is committed.
        num_shards: Shards in all; None until they are planned.
        num_shards_done: Shards committed.
        num_failed: Images that should have had a score and have none. Until the run is finished: as drivers said, and
            one that was killed may have taken what it found in its last seconds with it.
        by_status: Rows by status, known as well as `num_failed` is.
        num_flagged: Rows flagged; None until the run is finished.
        rows_per_s: Rows committed in the last 10 minutes over the span those commits cover; None without two commits
            in it that differ in time.
        seconds_left: At that rate, while a driver is alive; else None.
        finished_at: When it was, if it is.
        drivers: All that ever worked on it, the latest start last.
    """

    run_dir: str
    run_id: str
    created_at: str
    sources: tuple[str, ...]
    state: State
    num_rows: int | None = None
    num_rows_listed: int = 0
    num_rows_done: int = 0
    num_shards: int | None = None
    num_shards_done: int = 0
    num_failed: int = 0
    by_status: Mapping[str, int] = field(default_factory=dict)
    num_flagged: int | None = None
    rows_per_s: float | None = None
    seconds_left: float | None = None
    finished_at: str | None = None
    drivers: tuple[Driver, ...] = ()

    @property
    def is_alive(self) -> bool:
        """Whether a driver works on it."""
        return any(driver.is_alive for driver in self.drivers)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        drivers = [
            {**driver.beat.to_json(), "seen_at": driver.seen_at.isoformat(), "is_alive": driver.is_alive}
            for driver in self.drivers
        ]
        return {**asdict(self), "sources": list(self.sources), "drivers": drivers}


def read_state(
    directory: RunDirectory, now: datetime | None = None, config: Mapping[str, Any] | None = None
) -> RunState:
    """Return how a run is doing. Costs one LIST of its parts, which are counted and not kept, unless it is finished.

    A driver is alive if the store received its last beat less than 3.5 intervals ago. That compares the store's clock
    with this machine's: if they differ by more than half a minute, a living driver may look dead, or a dead one alive
    for that much longer. Rates only compare times of the store.

    Args:
        directory: Of the run.
        now: The moment to judge by. Default: this machine's clock.
        config: Its config.json, if the caller has read it.

    Raises:
        RunError: If it is no run directory, or damaged.
        StorageError: If it cannot be read.
    """
    now = now or datetime.now(UTC)
    known = _told_by(directory.read_json(rundir.CONFIG) if config is None else config, directory)
    # Before _SUCCESS.json: a driver seen as finished has written that, so its run is not taken for a stopped one.
    known = _with_drivers(known, read_drivers(directory, now))
    success = directory.read_json(rundir.SUCCESS)
    plan = read_plan(directory)
    if success is not None:
        return _finished(known, plan, success, directory)
    if plan is not None:
        return _planned(known, plan, directory.iter_parts(), now)
    return known


def _planned(known: RunState, plan: Plan, parts: Iterable[tuple[int, ObjectInfo]], now: datetime) -> RunState:
    """Add how far a run is whose plan stands."""
    progress = _Progress(since=now - _RATE_WINDOW)
    for shard, part in parts:
        if shard < plan.num_shards:  # others are not of this run; a driver will say so
            progress.add(plan.rows_of(shard), part.last_modified)
    rate = progress.rows_per_s
    state = known.state
    if state == State.PLANNING:
        state = State.SCANNING if progress.num_shards < plan.num_shards else State.MERGING
    return replace(
        known,
        state=state,
        num_rows=plan.num_rows,
        num_rows_listed=plan.num_rows,
        num_rows_done=progress.num_rows,
        num_shards=plan.num_shards,
        num_shards_done=progress.num_shards,
        rows_per_s=rate,
        seconds_left=(plan.num_rows - progress.num_rows) / rate if rate and known.is_alive else None,
    )


def _finished(known: RunState, plan: Plan | None, success: dict[str, Any], directory: RunDirectory) -> RunState:
    """Replace what drivers said by what the finished run says itself."""
    try:
        summary = Summary.from_json(success["summary"])
        finished_at = str(success["finished_at"])
    except (AttributeError, KeyError, TypeError, ValueError) as exc:
        raise RunError(f"{directory.path(rundir.SUCCESS)}: not written by lfm-scan: {exc!r}") from exc
    num_shards = None if plan is None else plan.num_shards
    return replace(
        known,
        state=State.FINISHED,
        num_rows=summary.num_rows,
        num_rows_listed=summary.num_rows,
        num_rows_done=summary.num_rows,
        num_shards=num_shards,
        num_shards_done=num_shards or 0,
        num_failed=summary.num_failed,
        by_status=dict(summary.by_status),
        num_flagged=summary.num_flagged,
        finished_at=finished_at,
    )


def _with_drivers(known: RunState, drivers: tuple[Driver, ...]) -> RunState:
    """Add what drivers say: who works on the run, and what they found so far."""
    last = max(drivers, key=lambda driver: driver.seen_at, default=None)
    state = known.state
    if any(driver.is_alive for driver in drivers):
        state = State.PLANNING  # until a plan shows up
    elif last is not None and last.beat.phase == Phase.FAILED:
        state = State.FAILED
    return replace(
        known,
        state=state,
        num_rows_listed=max((driver.beat.num_listed for driver in drivers), default=0),
        num_failed=sum(driver.beat.num_failed for driver in drivers),
        by_status=dict(sum((Counter(driver.beat.by_status) for driver in drivers), Counter[str]())),
        drivers=drivers,
    )


class _Progress:
    """Counts committed parts one by one, and how fast the latest of them came.

    Args:
        since: Parts committed before do not count for the rate.
    """

    def __init__(self, since: datetime) -> None:
        self._since = since
        self._first: datetime | None = None
        self._last: datetime | None = None
        self._num_rows_first = 0
        self._num_rows_recent = 0
        self.num_shards = 0
        self.num_rows = 0

    def add(self, num_rows: int, committed_at: datetime | None) -> None:
        """Count a part."""
        self.num_shards += 1
        self.num_rows += num_rows
        if committed_at is not None and committed_at >= self._since:
            self._note(num_rows, committed_at)

    @property
    def rows_per_s(self) -> float | None:
        """Rows a second, or None if that cannot be told."""
        if self._first is None or self._last is None or self._first == self._last:
            return None
        # What came at the first moment was worked on before it, and is not part of the span.
        return (self._num_rows_recent - self._num_rows_first) / (self._last - self._first).total_seconds()

    def _note(self, num_rows: int, moment: datetime) -> None:
        self._num_rows_recent += num_rows
        if self._first is None or moment < self._first:
            self._first, self._num_rows_first = moment, 0
        if moment == self._first:
            self._num_rows_first += num_rows
        self._last = moment if self._last is None else max(self._last, moment)


def _told_by(config: Mapping[str, Any] | None, directory: RunDirectory) -> RunState:
    """Return what config.json tells of a run: nobody works on it, as far as that goes."""
    if config is None:
        raise RunError(f"{directory.uri}: not a run directory: it has no {rundir.CONFIG}")
    try:
        return RunState(
            run_dir=directory.uri,
            run_id=str(config["run_id"]),
            created_at=str(config["created_at"]),
            sources=tuple(str(source) for source in config["config"]["sources"]),
            state=State.STOPPED,
        )
    except (KeyError, TypeError) as exc:
        raise RunError(f"{directory.path(rundir.CONFIG)}: not written by lfm-scan: {exc!r}") from exc


def read_drivers(directory: RunDirectory, now: datetime) -> tuple[Driver, ...]:
    """Return who works on a run, and who did, the latest start last; what is there and no beat is left out.

    Args:
        directory: Of the run.
        now: The moment to judge by who is alive.

    Raises:
        StorageError: If they cannot be read.
    """
    try:
        found = list(directory.store.list(directory.path(DRIVERS)))
    except NotFoundError:
        return ()
    with ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="drivers") as pool:
        drivers = list(pool.map(lambda each: _read_driver(directory, each, now), found))
    return tuple(
        sorted((driver for driver in drivers if driver is not None), key=lambda driver: driver.beat.started_at)
    )


def _read_driver(directory: RunDirectory, found: ObjectInfo, now: datetime) -> Driver | None:
    if not found.uri.endswith(".json") or (found.size_bytes or 0) > MAX_BEAT_BYTES:
        return None
    try:
        fetched = directory.store.get(found.uri)
        beat = Beat.from_bytes(fetched.data)
    except (NotFoundError, ValueError):
        return None
    seen_at = fetched.info.last_modified or beat.beat_at
    patience_s = min(_ALIVE_INTERVALS * beat.interval_s, _MAX_ALIVE_S)
    return Driver(
        beat=beat,
        seen_at=seen_at,
        is_alive=not beat.phase.is_over and (now - seen_at).total_seconds() < patience_s,
    )
