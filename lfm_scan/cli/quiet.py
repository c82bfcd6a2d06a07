"""Keeping Ray's chatter off the user's terminal without losing it."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import TextIO


@contextlib.contextmanager
def stderr_in_log(enabled: bool) -> Iterator[TextIO]:
    """Send everything this process writes to a log file; yield the real standard error.

    Ray's C++ core writes to the file descriptor of standard error, past every Python switch, and what Ray has to say of
    workers that die it prints to standard output. The log is deleted if the block ends well or by Ctrl-C; otherwise its
    path is printed, for it may say more than the error.

    Args:
        enabled: If false, nothing is redirected.
    """
    if not enabled:
        yield sys.stderr
        return
    sys.stderr.flush()
    saved = os.dup(2)
    descriptor, path = tempfile.mkstemp(prefix="lfm-scan-", suffix=".log")
    os.dup2(descriptor, 2)
    os.close(descriptor)
    keep = False
    try:
        with (
            open(saved, "w", buffering=1, encoding="utf-8", errors="replace", closefd=False) as terminal,
            contextlib.redirect_stdout(sys.stderr),
        ):
            yield terminal
    except BaseException as exc:
        keep = isinstance(exc, Exception) and os.path.getsize(path) > 0
        threading.excepthook = lambda args: None  # Ray's threads may outlive Ray, and complain
        raise
    finally:
        sys.stderr.flush()
        os.dup2(saved, 2)
        os.close(saved)
        if keep:
            print(f"What Ray said is in {path}", file=sys.stderr)  # noqa: T201 - the redirection has just ended
        else:
            os.unlink(path)
