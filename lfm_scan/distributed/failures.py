"""What a user is told when something failed on a worker."""

from __future__ import annotations

import re
from typing import Final

import ray

from lfm_scan import errors
from lfm_scan.errors import LFMScanError, RunError

_OUR_ERROR: Final = re.compile(r"^lfm_scan\.errors\.(\w+): (.*)$", re.MULTILINE)
"""The last line of a Python traceback that ends in one of our errors."""

_ANY_ERROR: Final = re.compile(r"^\s*((?:\w+\.)*\w+(?:Error|Exception): .*)$", re.MULTILINE)


def translate(exc: Exception) -> LFMScanError:
    """Return our own error if a worker raised one, else Ray's in one line.

    Ray Data and Ray Train raise their own errors from ours, and pickling drops the cause; what survives is the
    traceback's text.
    """
    for name, message in reversed(_OUR_ERROR.findall(str(exc))):
        kind = getattr(errors, name, None)
        if isinstance(kind, type) and issubclass(kind, LFMScanError) and not issubclass(kind, errors.ImageError):
            return kind(message)
    # Ray wraps what a worker raised in errors of its own; the first one named is the cause.
    named = [text for text in _ANY_ERROR.findall(str(exc)) if not text.startswith("ray.exceptions.UserCode")]
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    reason = (named or lines[-1:] or [type(exc).__name__])[0]
    return RunError(f"Ray gave up: {reason}; what is done stays done, repeat the command to go on")


def dying() -> str | None:
    """Return how often actors of this job had to be started again, in words that follow "there is"; None if never.

    Ray starts them again for ever, and says why in its own log alone.
    """
    job = ray.JobID(bytes.fromhex(ray.get_runtime_context().get_job_id()))
    try:
        # Its public name asks the dashboard, which a Ray started for a run has not.
        actors = ray._private.state.actors(job_id=job)
    except AttributeError:  # another Ray may have it elsewhere
        return None
    num_restarts = sum(actor["NumRestarts"] for actor in actors.values())
    if not num_restarts:
        return None
    return f"something that has killed actors {num_restarts:,} times since the start, too little memory perhaps"
