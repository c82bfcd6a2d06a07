"""An iterator drained by a thread, so that its consumer can look up while it waits."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Final, Generic, Self, TypeVar

T = TypeVar("T")

_MAX_AHEAD: Final = 1000


class Background(Generic[T]):
    """Runs an iterator in a thread. Once the block is left its items are dropped; the thread ends with the iterator.

    Args:
        items: What to run.
    """

    def __init__(self, items: Iterator[T]) -> None:
        self._items = items
        self._queue: queue.Queue[tuple[T] | BaseException] = queue.Queue(_MAX_AHEAD)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pipeline", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._over.set()

    def wait(self, timeout_s: float) -> None:
        """Wait until the iterator has ended, if it does so in time."""
        self._thread.join(timeout_s)

    def get(self, timeout_s: float) -> T:
        """Return the next item.

        Raises:
            TimeoutError: If there is none yet.
            StopIteration: If there is none left.
            BaseException: What the iterator raised.
        """
        try:
            found = self._queue.get(timeout=timeout_s)
        except queue.Empty:
            raise TimeoutError from None
        if isinstance(found, BaseException):
            raise found
        return found[0]

    def _run(self) -> None:
        end: BaseException = StopIteration()
        try:
            for item in self._items:
                self._put((item,))
        except BaseException as exc:  # noqa: BLE001 - raised in the consumer
            end = exc
        self._put(end)

    def _put(self, item: tuple[T] | BaseException) -> None:
        while not self._over.is_set():
            try:
                self._queue.put(item, timeout=0.5)
            except queue.Full:
                continue
            return
