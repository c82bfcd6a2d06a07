"""What this process has asked of stores since it started: requests, tries made again, answers that asked for fewer."""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_S3_OPERATIONS: Final = {
    "GetObject": "GET",
    "HeadBucket": "HEAD",
    "HeadObject": "HEAD",
    "ListObjectsV2": "LIST",
    "PutObject": "PUT",
}


@dataclass(frozen=True)
class Traffic:
    """Counts up to a moment; the difference of two is what was asked between them.

    Attributes:
        requests: To S3, by GET, HEAD, LIST and PUT, all tries counted.
        num_retries: Requests to any store that were sent once more.
        num_throttles: Answers that asked for fewer requests.
    """

    requests: Mapping[str, int] = field(default_factory=dict)
    num_retries: int = 0
    num_throttles: int = 0

    def __sub__(self, before: Traffic) -> Traffic:
        return Traffic(
            dict(Counter(self.requests) - Counter(before.requests)),
            self.num_retries - before.num_retries,
            self.num_throttles - before.num_throttles,
        )


def traffic() -> Traffic:
    """Return the counts so far."""
    with _lock:
        return Traffic(dict(_requests), _events["retry"], _events["throttle"])


def count_retry() -> None:
    """Note that a request is sent once more."""
    with _lock:
        _events["retry"] += 1


def count_throttle() -> None:
    """Note that a store asks for fewer requests."""
    with _lock:
        _events["throttle"] += 1


def counted(function: Callable[P, T]) -> Callable[P, tuple[T, Traffic]]:
    """Return a function that also returns what was asked of stores by its process meanwhile."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> tuple[T, Traffic]:
        before = traffic()
        return function(*args, **kwargs), traffic() - before

    return call


def watch_s3(client: Any) -> None:  # noqa: ANN401 - boto3 makes its client classes at run time
    """Count the requests of a boto3 client from now on."""
    client.meta.events.register("before-send.s3", _count_request)


_lock: Final = threading.Lock()
_requests: Final[Counter[str]] = Counter()
_events: Final[Counter[str]] = Counter()


def _count_request(event_name: str, **_: object) -> None:
    operation = _S3_OPERATIONS.get(event_name.rpartition(".")[2])
    if operation is not None:
        with _lock:
            _requests[operation] += 1
