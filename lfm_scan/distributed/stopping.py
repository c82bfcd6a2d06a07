"""Ending a run on request: what is begun is finished first, for as long as whoever asks will wait."""

from __future__ import annotations

import contextlib
import threading
import uuid
from collections.abc import Iterator

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
    """Tells the tasks of a pipeline to take on no more shards.

    Raised, it is a named actor; until then it is only the name, which costs no process and each shard one lookup.
    """

    def __init__(self) -> None:
        self._name = f"lfm-scan-stop-{uuid.uuid4().hex}"
        self._actor: object = None

    def set(self) -> None:
        """Raise the flag. It comes down when this object goes."""
        self._actor = ray.remote(num_cpus=0)(_Flag).options(name=self._name).remote()

    def is_set(self) -> bool:
        """Whether it is raised."""
        try:
            ray.get_actor(self._name)
        except ValueError:
            return False
        return True


class _Flag:
    """Is there. It need not even have started to be found by its name."""
