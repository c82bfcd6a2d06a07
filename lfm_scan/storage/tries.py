"""Trying again where no client library does it: after failures that may pass, and not for ever."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Final, TypeVar

from lfm_scan.errors import StorageError
from lfm_scan.storage.traffic import count_retry, count_throttle

T = TypeVar("T")

QUICK_ATTEMPTS: Final = 2
"""Tries of a store that is not to be patient."""

_FIRST_WAIT_S: Final = 0.2
_LONGEST_WAIT_S: Final = 5.0
_LONGEST_ASKED_WAIT_S: Final = 30.0


class PassingError(Exception):
    """A try failed in a way that may pass.

    Attributes:
        error: To raise if no later try works.
        asked_wait_s: Seconds after which the server asks to come back.
        is_busy: Whether the server asks for fewer requests.
    """

    def __init__(self, error: StorageError, asked_wait_s: float = 0.0, *, is_busy: bool = False) -> None:
        super().__init__(error, asked_wait_s)
        self.error = error
        self.asked_wait_s = asked_wait_s
        self.is_busy = is_busy


def jitter_s(num_tries: int) -> float:
    """Return how long to wait after so many failed tries: full jitter, up to 0.2, 0.4, ... 5 s."""
    return random.uniform(0, min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2 ** (num_tries - 1)))  # noqa: S311


def keep_trying(attempt: Callable[[], T], max_attempts: int) -> T:
    """Call until it works, fails for good, or has failed too often.

    Between tries it waits: `jitter_s`, and as long as the server asks for, up to 30 s.

    Args:
        attempt: Makes one try; raises PassingError if another one may work.
        max_attempts: At least 1.

    Raises:
        StorageError: As the last try says.
    """
    for tries_left in reversed(range(max_attempts)):
        try:
            return attempt()
        except PassingError as exc:
            if exc.is_busy:
                count_throttle()
            if not tries_left:
                raise exc.error from exc
            asked_s = min(_LONGEST_ASKED_WAIT_S, exc.asked_wait_s)
        time.sleep(asked_s + jitter_s(max_attempts - tries_left))
        count_retry()
    raise AssertionError("unreachable: the last try returns or raises")
