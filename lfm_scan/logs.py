"""What is written for people and programs to read as it happens: on one line, and without credentials."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, Final, TextIO

from lfm_scan.options import LogFormat

_LOGGER: Final = "lfm_scan"
_MAX_CHARS: Final = 500
_SECRETS: Final = (
    re.compile(r"(://)[^/@\s]+(?=@)"),
    re.compile(r"(?i)([?&;][\w-]*(?:signature|sig|credential|token|secret|password|key)[\w-]*=)[^&\s'\"]+"),
)
"""What a URL may hold besides an address: a user with a password, and the signature of a presigned one."""


def one_line(text: str, max_chars: int = _MAX_CHARS) -> str:
    """Return a text on one line of bounded length, without the credentials that a URL in it may hold."""
    text = " ".join(text.split())
    for pattern in _SECRETS:
        text = pattern.sub(r"\1***", text)
    return text[:max_chars]


def event(name: str, level: int = logging.INFO, **facts: Any) -> None:  # noqa: ANN401 - whatever JSON takes
    """Log that something happened.

    Args:
        name: Of the kind of event.
        level: As of `logging`.
        facts: About it; JSON values.
    """
    logging.getLogger(_LOGGER).log(level, name, extra={"event": name, "facts": facts})


@contextlib.contextmanager
def about(**facts: object) -> Iterator[None]:
    """Add facts to every line that this process logs until the block ends, whichever thread does.

    For workers, which do one thing at a time: their helpers' threads speak of the same shard.
    """
    before = dict(_facts)
    _facts.update(facts)
    try:
        yield
    finally:
        _facts.clear()
        _facts.update(before)


@contextlib.contextmanager
def written_to(stream: TextIO, log_format: LogFormat) -> Iterator[None]:
    """Write what this package logs to a stream, until the block ends."""
    logger = logging.getLogger(_LOGGER)
    before = logger.level, logger.propagate
    handler = _handler(stream, log_format)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before


def set_up_worker(log_format: LogFormat) -> None:
    """Write what this package logs to standard error from now on, which Ray keeps in the worker's log file."""
    logger = logging.getLogger(_LOGGER)
    ours = next((handler for handler in logger.handlers if isinstance(handler.formatter, _Formatter)), None)
    if ours is None:
        logger.addHandler(_handler(sys.stderr, log_format))
        logger.propagate = False
    else:  # it may have worked for another run before
        ours.setFormatter(_FORMATTERS[log_format]())


def is_structured() -> bool:
    """Whether this process writes its log as JSON: then all that it says should be."""
    handlers = logging.getLogger(_LOGGER).handlers
    return any(isinstance(handler.formatter, _JsonFormatter) for handler in handlers)


_facts: Final[dict[str, object]] = {}


class _Formatter(logging.Formatter):
    """Lines for people: when, how bad, about what, where, what."""

    def format(self, record: logging.LogRecord) -> str:
        about = "".join(f" {name}={value}" for name, value in _facts.items())
        return f"{_time_of(record)} {record.levelname}{about} {record.name}: {_message_of(record)}"


class _JsonFormatter(_Formatter):
    """Lines for programs: one JSON object each."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": _time_of(record),
            "level": record.levelname.lower(),
            "event": getattr(record, "event", "log"),
            **_facts,
            **getattr(record, "facts", {}),
        }
        if not hasattr(record, "event"):
            line |= {"logger": record.name, "message": _message_of(record)}
        # Escaped: a name in a store may hold what neither UTF-8 nor a terminal takes.
        return json.dumps(line, default=str)


_FORMATTERS: Final[dict[LogFormat, type[_Formatter]]] = {"text": _Formatter, "json": _JsonFormatter}


def _handler(stream: TextIO, log_format: LogFormat) -> logging.Handler:
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_FORMATTERS[log_format]())
    return handler


def _time_of(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")


def _message_of(record: logging.LogRecord) -> str:
    text = record.getMessage()
    if record.exc_info and record.exc_info[1] is not None:
        text = f"{text}: {record.exc_info[1]!r}"
    return one_line(text, max_chars=4 * _MAX_CHARS)
