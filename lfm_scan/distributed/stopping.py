"""Ending a run on request: what is begun is finished first, for as long as whoever asks will wait."""

from __future__ import annotations

import contextlib
import os
import threading
import uuid
from collections.abc import Iterator, Mapping
from typing import Final

import ray

_DRAIN_S: Final = 20.0
"""For which shards that are begun may go on after a request to stop: spot machines give 30 s in the worst case."""

_IN_A_JOB: Final = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray's job server, and by nothing else."""

_JOB_STOP_WAIT: Final = "RAY_JOB_STOP_WAIT_TIME_S"
_JOB_STOP_WAIT_S: Final = 3.0
"""How long `ray job stop` waits for a job before it kills it, unless that variable says otherwise."""

_GOODBYE_S: Final = 2.0
"""To leave Ray, store the last sign of life and say how to go on."""


def drain_s(environment: Mapping[str, str] = os.environ) -> float:
    """Return how many seconds the shards that are begun may go on after a request to stop.

    Who is killed before it is done has lost nothing, but says nothing either: in a Ray job it is less than
    `ray job stop` waits.
    """
    if _IN_A_JOB not in environment:
        return _DRAIN_S
    try:
        wait_s = float(environment.get(_JOB_STOP_WAIT, _JOB_STOP_WAIT_S))
    except ValueError:
        wait_s = _JOB_STOP_WAIT_S
    return min(_DRAIN_S, max(0.0, wait_s - _GOODBYE_S))


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

    Attributes:
        name: Of the actor; of no other flag.
    """

    def __init__(self) -> None:
        self.name = f"lfm-scan-stop-{uuid.uuid4().hex}"
        self._actor: object = None

    def set(self) -> None:
        """Raise the flag. It comes down when this object goes."""
        self._actor = ray.remote(num_cpus=0)(_Flag).options(name=self.name).remote()

    def is_set(self) -> bool:
        """Whether it is raised."""
        try:
            ray.get_actor(self.name)
        except ValueError:
            return False
        return True


class _Flag:
    """Is there. It need not even have started to be found by its name."""
