"""Working ahead of whoever takes the results: in order, and a bounded number of items at a time."""

from __future__ import annotations

import itertools
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Final, Generic, Protocol, Self, TypeVar

A = TypeVar("A")
B = TypeVar("B")
H = TypeVar("H")
T = TypeVar("T")

_NUM_THREADS: Final = 8
_CHUNK: Final = 10_000
_CHUNKS_AHEAD: Final = 2
_MAX_AHEAD: Final = 1000
_LOOK_UP_S: Final = 0.1


class OrderedMap(Protocol):
    """Applies a function to every item, several at once, a bounded number ahead, and yields results in order."""

    def __call__(self, function: Callable[[A], B], items: Iterable[A], /) -> Iterator[B]:
        """Yield the function's result for each item."""
        ...


def map_ahead(
    submit: Callable[[A], H], result_of: Callable[[H], B], items: Iterable[A], num_ahead: Callable[[], int]
) -> Iterator[B]:
    """Yield the result for each item, in order.

    Args:
        submit: Begins the work on an item and returns a handle of it.
        result_of: Waits for the result behind a handle.
        items: Taken as results are.
        num_ahead: Says how many items may be begun before their results are taken; asked before each.
    """
    remaining = iter(items)
    begun: deque[H] = deque()
    while True:
        begun.extend(map(submit, itertools.islice(remaining, max(0, num_ahead() - len(begun)))))
        if not begun:
            return
        yield result_of(begun.popleft())


def map_in_threads(function: Callable[[A], B], items: Iterable[A], /, num_threads: int = _NUM_THREADS) -> Iterator[B]:
    """Apply a function in threads of this process: the `OrderedMap` of a single machine."""
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="map")
    try:
        yield from map_ahead(lambda item: pool.submit(function, item), Future.result, items, lambda: 2 * num_threads)
    finally:
        pool.shutdown(cancel_futures=True)


def chain_in_threads(
    function: Callable[[A], Iterator[B]], items: Iterable[A], num_threads: int = _NUM_THREADS
) -> Generator[B, None, None]:
    """Yield what a function yields for each item, in order; the next few items are begun ahead, a few chunks each."""
    over = threading.Event()

    def chunks(item: A) -> Iterator[list[B]]:
        results = function(item)
        while not over.is_set() and (chunk := list(itertools.islice(results, _CHUNK))):
            yield chunk

    def start(item: A) -> Background[list[B]]:
        return Background(chunks(item), _CHUNKS_AHEAD).start()

    remaining = iter(items)
    begun = deque(map(start, itertools.islice(remaining, num_threads)))
    try:
        while begun:
            for chunk in begun[0]:
                yield from chunk
            begun.popleft()
            begun.extend(map(start, itertools.islice(remaining, 1)))
    finally:
        over.set()
        for background in begun:
            background.close()


class Background(Generic[T]):
    """Runs an iterator in a thread, so that its consumer can look up while it waits.

    Once it is closed, or the block is left, its items are dropped; the thread ends with the iterator.

    Args:
        items: What to run.
        max_ahead: Items held that nobody has taken yet.
    """

    def __init__(self, items: Iterator[T], max_ahead: int = _MAX_AHEAD) -> None:
        self._items = items
        self._queue: queue.Queue[tuple[T] | BaseException] = queue.Queue(max_ahead)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="background", daemon=True)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[T]:
        while True:
            try:
                item = self.get()
            except StopIteration:
                return
            yield item

    def start(self) -> Self:
        """Begin, and return this."""
        self._thread.start()
        return self

    def close(self) -> None:
        """Take no more items."""
        self._over.set()

    def wait(self, timeout_s: float) -> None:
        """Wait until the iterator has ended, if it does so in time."""
        self._thread.join(timeout_s)

    def get(self, timeout_s: float | None = None) -> T:
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
                self._queue.put(item, timeout=_LOOK_UP_S)
            except queue.Full:
                continue
            return
