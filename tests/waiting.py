"""Waiting for what other processes do."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

PATIENCE_S: Final = 500.0
"""After which whatever is waited for has hung; a busy machine takes minutes for a job."""


def wait_until(is_so: Callable[[], bool], every_s: float = 0.02) -> None:
    """Return once something is so, or it was waited for too long: what the test asserts next says which."""
    deadline = time.monotonic() + PATIENCE_S
    while not is_so() and time.monotonic() < deadline:
        time.sleep(every_s)
