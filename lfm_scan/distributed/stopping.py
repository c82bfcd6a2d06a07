"""Ending a run on request: what is begun is finished first, for as long as whoever asks will wait."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import ray


class GracefulStop:
    """A request to stop, such as SIGTERM on a spot machine.

    While shards stream it is noted, so that those begun can be finished; at any other time, and when it is repeated, it
    interrupts at once. Safe to call from a signal handler.
    """

    def __init__(self) -> None:
        self._requested = threading.Event()
        self._is_deferred = False
        self._signum = 0

    def request(self, signum: int) -> None:
        """Ask to stop.

        Raises:
            KeyboardInterrupt: With the exit code, if there is nothing worth finishing or it was asked before.
        """
        if not self._is_deferred or self._requested.is_set():
            raise KeyboardInterrupt(128 + signum)
        self._signum = signum
        self._requested.set()

    @property
    def is_requested(self) -> bool:
        """Whether somebody asked."""
        return self._requested.is_set()

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Note requests during the block instead of interrupting it."""
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False

    def interrupt(self) -> None:
        """Do what was asked.

        Raises:
            KeyboardInterrupt: With the exit code.
        """
        raise KeyboardInterrupt(128 + self._signum)


class StopFlag:
    """Tells the tasks of a pipeline to take on no more shards. Costs each of them one call a shard."""

    def __init__(self) -> None:
        self._actor: Any = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(_Flag).remote()

    def set(self) -> None:
        """Raise the flag."""
        self._actor.set.remote()

    def is_set(self) -> bool:
        """Whether it is raised."""
        return bool(ray.get(self._actor.is_set.remote()))


class _Flag:
    def __init__(self) -> None:
        self._is_set = False

    def set(self) -> None:
        self._is_set = True

    def is_set(self) -> bool:
        return self._is_set
