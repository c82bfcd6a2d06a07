"""Which runs lie under a prefix, and how they are doing: from the store alone."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, Literal

from lfm_scan.concurrency import map_in_threads
from lfm_scan.errors import LFMScanError, UnreachableError
from lfm_scan.runs import rundir
from lfm_scan.runs.rundir import RunDirectory
from lfm_scan.runs.state import RunState, read_state

MAX_FOLDERS: Final = 10_000
"""Folders that are looked into: each costs a request, and a prefix of images may have millions."""

_MAX_CONFIG_BYTES: Final = 16 * 2**20
"""Of a config.json; what is larger was not written here."""

_READ_THREADS: Final = 16


@dataclass(frozen=True, kw_only=True)
class Catalogue:
    """What lies directly under a prefix.

    Attributes:
        prefix: Where.
        runs: The runs, the latest start first.
        unreadable: Runs that cannot be read: URI and why.
        num_trainings: Folders that hold a training instead of a scan.
        num_others: Folders that hold neither.
        is_complete: Whether all folders were looked into.
    """

    prefix: str
    runs: tuple[RunState, ...] = ()
    unreadable: tuple[tuple[str, str], ...] = ()
    num_trainings: int = 0
    num_others: int = 0
    is_complete: bool = True

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {
            "prefix": self.prefix,
            "runs": [run.to_json() for run in self.runs],
            "unreadable": [{"run_dir": uri, "error": error} for uri, error in self.unreadable],
            "num_trainings": self.num_trainings,
            "num_others": self.num_others,
            "is_complete": self.is_complete,
        }


def find_runs(prefix: RunDirectory, now: datetime | None = None) -> Catalogue:
    """Find the runs in a prefix and in the folders directly under it, at most 10,000 of them.

    A folder that is no run costs one request. A finished run costs four and one for each driver it had; any other run
    one more for each 1,000 shards done.

    Args:
        prefix: Where to look, as if it was a run directory.
        now: The moment to judge by. Default: this machine's clock.

    Raises:
        StorageError: If the folders cannot be listed, or the store does not answer.
    """
    now = now or datetime.now(UTC)
    folders = list(itertools.islice(prefix.store.folders(prefix.uri), MAX_FOLDERS + 1))
    candidates = [prefix.uri, *folders[:MAX_FOLDERS]]
    look = functools.partial(_look, prefix, now)
    found = list(map_in_threads(look, candidates, _READ_THREADS))
    kinds = Counter(each.kind for each in found)
    runs = [each.state for each in found if each.state is not None]
    return Catalogue(
        prefix=prefix.uri,
        runs=tuple(sorted(runs, key=lambda run: (run.created_at, run.run_dir), reverse=True)),
        unreadable=tuple((each.uri, each.error) for each in found if each.error is not None),
        num_trainings=kinds["training"],
        num_others=kinds["other"] - (found[0].kind == "other"),  # the prefix itself need not be anything
        is_complete=len(folders) <= MAX_FOLDERS,
    )


@dataclass(frozen=True)
class _Found:
    uri: str
    kind: Literal["run", "training", "other", "unreadable"]
    state: RunState | None = None
    error: str | None = None


def _look(prefix: RunDirectory, now: datetime, uri: str) -> _Found:
    """Return what a folder holds."""
    directory = RunDirectory(uri, prefix.storage, prefix.patient)
    try:
        config = directory.read_json(rundir.CONFIG, _MAX_CONFIG_BYTES)
        if isinstance(config, dict) and config.get("kind") == "training":
            return _Found(uri, "training")
        if not isinstance(config, dict) or "run_id" not in config:
            return _Found(uri, "other")
        return _Found(uri, "run", read_state(directory, now, config))
    except UnreachableError:
        raise
    except LFMScanError as exc:
        return _Found(uri, "unreadable", error=str(exc))
