"""How long to go on with a request that fails, and whom to blame in the end: its object, or the whole store.

boto3 makes one try a request; all others are made here, so that nothing multiplies. A failed try counts against the
object only if the store answers somebody else who asks after it. A store that answers nobody is down: its objects are
waited for, and nothing is held against them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

import botocore.exceptions

from lfm_scan.errors import LFMScanError, OutageError
from lfm_scan.storage.s3_errors import REPLY_ERRORS, Fault, classify, translate
from lfm_scan.storage.traffic import count_retry, count_throttle
from lfm_scan.storage.tries import jitter_s

T = TypeVar("T")

_NEVER: Final = threading.Event()
_MORE_TRIES_ONCE_IT_WORKED: Final = 3


class StoppedError(Exception):
    """Nobody waits for this request any more."""


class Health:
    """What all threads of a process know about one store: when it answered last, and for how long it has not."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last_answered = time.monotonic()
        self._silent_since: float | None = None
        self._witness: Callable[[], object] | None = None
        self._has_worked = False

    @property
    def has_worked(self) -> bool:
        """Whether any request has succeeded."""
        return self._has_worked

    @property
    def witness(self) -> Callable[[], object] | None:
        """A request that succeeded before: if it does again, the store is not down."""
        return self._witness

    def answered(self, began: float) -> None:
        """Note that the store answered, whatever it said.

        Args:
            began: When the request was sent. Its answer may be read late, and says nothing about later moments.
        """
        with self._lock:
            self._last_answered = max(self._last_answered, began)
            self._silent_since = None

    def worked(self, began: float, witness: Callable[[], object] | None) -> None:
        """Note that a request succeeded.

        Args:
            began: When it was sent.
            witness: Sends a small request like it.
        """
        self.answered(began)
        with self._lock:
            self._has_worked = True
            self._witness = witness or self._witness

    def failed(self) -> float:
        """Note a failed try, and return the moment."""
        with self._lock:
            now = time.monotonic()
            if self._silent_since is None:
                self._silent_since = now
            return now

    def answered_since(self, moment: float) -> bool:
        """Tell whether the store answered a request that was sent after a moment."""
        with self._lock:
            return self._last_answered > moment

    def silent_s(self) -> float:
        """Seconds from the first failed try that no answer has followed. A store that nobody asks is not silent."""
        with self._lock:
            return 0.0 if self._silent_since is None else time.monotonic() - self._silent_since


@dataclass(frozen=True)
class Persistence:
    """How to go on with requests to one store.

    Attributes:
        store: What to call it.
        health: Shared by all its requests.
        max_attempts: Tries of one request while the store answers others.
        outage_patience: Seconds to go on while it answers nobody. None: answer soon, whoever is at fault; a store
            that has never worked within seconds.
    """

    store: str
    health: Health
    max_attempts: int
    outage_patience: float | None

    def run(
        self,
        attempt: Callable[[], T],
        uri: str,
        *,
        knock: Callable[[], object],
        witness: Callable[[], object] | None = None,
        stop: threading.Event | None = None,
    ) -> T:
        """Try until it works or it is no use.

        Args:
            attempt: Makes one try; it may be made any number of times.
            uri: Of the object, for messages.
            knock: Sends a small request that a store in working order answers, whatever it thinks of the object.
            witness: Sends a small request that works if this one did; kept for requests to come.
            stop: Set when nobody waits for the result any more.

        Raises:
            OutageError: If the store answers nobody for longer than its patience.
            StoppedError: If `stop` is set between two tries.
            StorageError: If the store refuses, or the object is at fault.
        """
        failures = _Failures(self, uri, knock, stop or _NEVER)
        while True:
            began = time.monotonic()
            try:
                result = attempt()
            except REPLY_ERRORS as exc:
                error = failures.add(exc, began)
                if error is not None:
                    raise error from exc
                count_retry()
            except LFMScanError:
                self.health.answered(began)  # what we found wrong with it was in an answer
                raise
            else:
                self.health.worked(began, witness)
                return result


class _Failures:
    """The failed tries of one request."""

    def __init__(self, persistence: Persistence, uri: str, knock: Callable[[], object], stop: threading.Event) -> None:
        self._persistence = persistence
        self._health = persistence.health
        self._uri = uri
        self._knock = knock
        self._stop = stop
        self._num_tries = 0
        self._num_blamed = 0
        self._since = time.monotonic()

    def add(self, exc: Exception, began: float) -> LFMScanError | None:
        """Wait as long as it is wise after a try that failed, and return the error if another one is no use."""
        fault = classify(exc)
        if fault is Fault.FINAL:
            if isinstance(exc, botocore.exceptions.ClientError):
                self._health.answered(began)
            return translate(exc, self._uri)
        if fault is Fault.BUSY:
            count_throttle()
        self._num_tries += 1
        failed_at = self._health.failed()
        if fault is Fault.AGAIN:
            self._health.answered(began)
        patience = self._persistence.outage_patience
        if patience is None and self._num_tries >= self._quick_tries():
            return translate(exc, self._uri)
        self._wait()
        return None if patience is None else self._judge(exc, fault, failed_at, patience)

    def _quick_tries(self) -> int:
        """A store that has worked before is worth more tries than an address that may be mistyped."""
        return self._persistence.max_attempts * (_MORE_TRIES_ONCE_IT_WORKED if self._health.has_worked else 1)

    def _wait(self) -> None:
        if self._stop.wait(jitter_s(self._num_tries)):
            raise StoppedError

    def _judge(self, exc: Exception, fault: Fault, failed_at: float, patience: float) -> LFMScanError | None:
        # A busy store speaks of its load, never of the object: that uses up time, but no tries.
        if fault is not Fault.BUSY:
            # In a row: at both ends of an outage one try may fail just before others are answered.
            is_blamed = fault is Fault.AGAIN or self._store_answers(failed_at)
            self._num_blamed = self._num_blamed + 1 if is_blamed else 0
            if self._num_blamed >= self._persistence.max_attempts:
                return translate(exc, self._uri)
        if self._num_tries < self._persistence.max_attempts:
            return None
        if fault is Fault.BUSY and self._health.answered_since(failed_at):
            return translate(exc, self._uri) if time.monotonic() - self._since >= patience else None
        return self._outage(exc) if self._health.silent_s() >= patience else None

    def _store_answers(self, failed_at: float) -> bool:
        """Tell whether the store answered anybody after the failed try; if nobody asked, ask ourselves."""
        if self._health.answered_since(failed_at):
            return True
        witness, began = self._health.witness, time.monotonic()
        if self._num_tries < self._persistence.max_attempts or witness is None or not _is_answered(witness):
            return False
        self._health.answered(began)
        return True

    def _outage(self, exc: Exception) -> LFMScanError:
        if self._health.witness is None and _is_answered(self._knock):
            # Nothing was ever read here, so there is no better witness: one bad object must not stop the run for good.
            return translate(exc, self._uri)
        reason = str(exc).splitlines()[0]
        return OutageError(
            f"{self._persistence.store} has answered nobody for {self._health.silent_s():.0f} s, the last was "
            f"{self._uri} ({reason}): nothing is lost, repeat the command to go on; --outage-patience waits longer"
        )


def _is_answered(request: Callable[[], object]) -> bool:
    try:
        request()
    except REPLY_ERRORS as exc:
        return isinstance(exc, botocore.exceptions.ClientError) and classify(exc) in (Fault.FINAL, Fault.AGAIN)
    return True
