"""Listing a prefix: page by page, and where that pays, its folders side by side.

A listing is exact on stores that do not list in key order: the folders that the store itself names are listed each
for itself, and no key is ever compared to a boundary. Where the store lists in key order, so do we.
"""

from __future__ import annotations

import contextlib
import functools
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Generic, Protocol, TypeVar

from lfm_scan.errors import StorageError
from lfm_scan.storage.base import ObjectInfo
from lfm_scan.storage.s3_retry import StoppedError

T = TypeVar("T")

_NUM_THREADS: Final = 8
_MAX_DEPTH: Final = 4
_MAX_LEVEL_PAGES: Final = 3
_MAX_FOLDERS_IN_PAGE: Final = 8
"""A folder costs a request. Below 125 objects a folder, eight threads are no faster than one that lists them all."""
_MAX_PAGES_AHEAD: Final = 8
"""Of each of the listings that run ahead; a page is about 400 KB."""
_MAX_LISTINGS_AHEAD: Final = 2 * _NUM_THREADS
_POLL_S: Final = 0.2


@dataclass(frozen=True)
class Page:
    """One answer to a listing request.

    Attributes:
        objects: Without directory markers.
        folders: Prefixes up to the next delimiter, where one was given.
        next_token: Continues the listing; None at its end.
    """

    objects: list[ObjectInfo]
    folders: list[str]
    next_token: str | None


class ReadPage(Protocol):
    """Asks for one page of a bucket's listing, and again until it is there."""

    def __call__(self, prefix: str, *, delimiter: str, token: str | None, stop: threading.Event) -> Page:
        """Return a page.

        Args:
            prefix: Of the keys.
            delimiter: Where folders end; empty for none.
            token: Of the page before.
            stop: Set when nobody waits for the page any more.

        Raises:
            StoppedError: If `stop` is set.
            StorageError: If the store does not list.
        """
        ...


@dataclass(frozen=True)
class _Part:
    """A stretch of a listing: objects already read, then what a prefix has from a page on.

    Attributes:
        objects: Already read.
        prefix: To go on with; None if there is no more.
        token: Of the page to go on with; None before the first one.
    """

    objects: list[ObjectInfo]
    prefix: str | None = None
    token: str | None = None

    @property
    def is_fresh(self) -> bool:
        """Whether it is a prefix of which nothing was read."""
        return self.prefix is not None and self.token is None


def list_objects(read: ReadPage, bucket: str, prefix: str) -> Iterator[ObjectInfo]:
    """Yield the objects under a prefix. The first page takes one request and no thread.

    Args:
        read: Asks the store.
        bucket: Its name, for messages.
        prefix: Of the keys.

    Raises:
        StorageError: If the store does not list.
    """
    listing = _Listing(read, f"s3://{bucket}/")
    first = listing.page(prefix)
    yield from first.objects
    if first.next_token is None:
        return
    parts = listing.split(prefix, first)
    if len(parts) == 1 and parts[0].token is not None:
        for page in listing.pages(_Part([], prefix, first.next_token)):
            yield from page
        return
    # The folders have what the first page had once more.
    seen = {found.uri for found in first.objects}
    with _Workers(listing.stop) as workers:
        for page in _side_by_side(listing, workers, parts):
            yield from (found for found in page if found.uri not in seen)


def list_folders(read: ReadPage, bucket: str, prefix: str) -> Iterator[str]:
    """Yield the prefixes that the keys under a prefix have up to their next slash, with the slash.

    Args:
        read: Asks the store.
        bucket: Its name, for messages.
        prefix: Of the keys, up to a slash.

    Raises:
        StorageError: If the store does not list.
    """
    listing = _Listing(read, f"s3://{bucket}/")
    token: str | None = None
    while True:
        page = listing.page(prefix, token, delimiter="/")
        yield from page.folders
        token = page.next_token
        if token is None:
            return


def _side_by_side(listing: _Listing, workers: _Workers, parts: list[_Part]) -> Iterator[list[ObjectInfo]]:
    """Yield the pages of parts in order, while the parts behind them are read ahead."""
    for _ in range(_MAX_DEPTH - 1):
        num_open = sum(part.prefix is not None for part in parts)
        if num_open >= _NUM_THREADS or not any(part.is_fresh for part in parts):
            break
        parts = _split_each(listing, workers, parts)
    running: deque[Iterator[list[ObjectInfo]]] = deque()
    for part in parts:
        running.append(workers.start(functools.partial(listing.pages, part)))
        if len(running) >= _MAX_LISTINGS_AHEAD:
            yield from running.popleft()
    while running:
        yield from running.popleft()


def _split_each(listing: _Listing, workers: _Workers, parts: list[_Part]) -> list[_Part]:
    def split(part: _Part) -> Iterator[list[_Part]]:
        if part.prefix is None or part.token is not None:
            yield [part]
        else:
            yield listing.split(part.prefix, listing.page(part.prefix))

    lanes = [workers.start(functools.partial(split, part)) for part in parts]
    return [part for lane in lanes for split_parts in lane for part in split_parts]


class _Listing:
    """Reads pages of one bucket, until it is stopped."""

    def __init__(self, read: ReadPage, root: str) -> None:
        self._read = read
        self._root = root
        self.stop = threading.Event()

    def page(self, prefix: str, token: str | None = None, delimiter: str = "") -> Page:
        """Return one page."""
        page = self._read(prefix, delimiter=delimiter, token=token, stop=self.stop)
        if token is not None and page.next_token == token:
            raise StorageError(f"{self._root}{prefix}: the listing does not advance: the store repeats its token")
        return page

    def pages(self, part: _Part) -> Iterator[list[ObjectInfo]]:
        """Yield a part's objects, page by page."""
        yield part.objects
        if part.prefix is None:
            return
        token, is_last = part.token, False
        while not is_last:
            page = self.page(part.prefix, token)
            yield page.objects
            token, is_last = page.next_token, page.next_token is None

    def split(self, prefix: str, first: Page) -> list[_Part]:
        """Return the folders and loose objects a prefix has, in the order of their keys.

        Args:
            prefix: To split.
            first: Its first page, without a delimiter.

        Returns:
            The prefix itself, from the second page on, if it is small or its folders are small or too many.
        """
        if first.next_token is None:
            return [_Part(first.objects)]
        whole = [_Part(first.objects, prefix, first.next_token)]
        if self._count_folders(prefix, first) > _MAX_FOLDERS_IN_PAGE:
            return whole
        level = self._level(prefix)
        return whole if level is None else level

    def _count_folders(self, prefix: str, page: Page) -> int:
        start = len(self._root) + len(prefix)
        return len({found.uri[start:].partition("/")[0] for found in page.objects if "/" in found.uri[start:]})

    def _level(self, prefix: str) -> list[_Part] | None:
        """Return what a prefix has up to the next slash; None if that takes too many pages."""
        entries: dict[str, _Part] = {}
        token: str | None = None
        for _ in range(_MAX_LEVEL_PAGES):
            page = self.page(prefix, token, delimiter="/")
            if any(not folder.startswith(prefix) or folder == prefix for folder in page.folders):
                return None  # not a store that knows delimiters: such folders would be listed for ever
            entries |= {found.uri: _Part([found]) for found in page.objects}
            entries |= {self._root + folder: _Part([], folder) for folder in page.folders}
            token = page.next_token
            if token is None:
                return _merged([entries[uri] for uri in sorted(entries)])
        return None


def _merged(parts: list[_Part]) -> list[_Part]:
    """Put neighbouring loose objects into one part."""
    merged: list[_Part] = []
    for part in parts:
        if merged and part.prefix is None and merged[-1].prefix is None:
            merged[-1].objects.extend(part.objects)
        else:
            merged.append(part)
    return merged


@dataclass(frozen=True)
class _Failed:
    error: Exception


_END: Final = object()


class _Workers:
    """Threads that run iterators ahead of whoever reads them. The end of the block ends them, whatever they do.

    They are daemons: a generator that is never closed must not keep the process from ending.
    """

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"list-{number}", daemon=True) for number in range(_NUM_THREADS)
        ]

    def __enter__(self) -> _Workers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for _thread in self._threads:
            self._jobs.put(lambda: None)  # wakes it up
        for thread in self._threads:
            thread.join()

    def start(self, produce: Callable[[], Iterator[T]]) -> Iterator[T]:
        """Run an iterator in a thread, a few items ahead. Jobs start in the order they are given.

        Raises:
            Exception: What the iterator raises, where the reader has come to.
        """
        lane: _Lane[T] = _Lane(self._stop)
        self._jobs.put(functools.partial(lane.fill, produce))
        return lane.items()

    def _work(self) -> None:
        while not self._stop.is_set():
            self._jobs.get()()


class _Lane(Generic[T]):
    """What one job has produced and nobody has read yet."""

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop
        self._queue: queue.Queue[Any] = queue.Queue(_MAX_PAGES_AHEAD)

    def fill(self, produce: Callable[[], Iterator[T]]) -> None:
        """Produce all, or until nobody reads any more."""
        with contextlib.suppress(StoppedError):
            try:
                for item in produce():
                    self._put(item)
            except StoppedError:
                raise
            except Exception as exc:  # noqa: BLE001 - the reader raises it
                self._put(_Failed(exc))
            else:
                self._put(_END)

    def items(self) -> Iterator[T]:
        """Yield what was produced."""
        while True:
            item = self._queue.get()
            if item is _END:
                return
            if isinstance(item, _Failed):
                raise item.error
            yield item

    def _put(self, item: object) -> None:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=_POLL_S)
            except queue.Full:
                continue
            return
        raise StoppedError
