"""From planned inputs to their bytes: many requests in flight, bounded memory, results in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Final

from lfm_scan.errors import ConfigError, ImageError, OutageError, StorageError
from lfm_scan.options import InputConfig, StorageConfig
from lfm_scan.scoring.prepare import image_error
from lfm_scan.sources.inputs import Input, Kind
from lfm_scan.sources.table import read_cells
from lfm_scan.sources.tar import read_members, read_span, spans
from lfm_scan.status import Status
from lfm_scan.storage import Fetched, check_size, open_store

_MAX_BYTES_IN_FLIGHT: Final = 256 * 2**20
_UNKNOWN_BYTES: Final = 8 * 2**20
"""What an input counts whose size no listing tells: lines of manifests may name 64 MiB each."""

Outcome = Fetched | ImageError


@dataclass(frozen=True)
class Fetcher:
    """Fetches the inputs of shards.

    Attributes:
        storage: How to reach stores.
        config: How containers were read when they were planned.
        max_bytes: Inputs with more are not read.
        num_threads: Requests in flight.
    """

    storage: StorageConfig
    config: InputConfig
    max_bytes: int
    num_threads: int

    def fetch(self, inputs: Sequence[Input]) -> Iterator[Outcome]:
        """Yield each input's bytes, or why there are none, in order.

        Raises:
            OutageError: If a store answers nobody: that is no input's fault.
        """
        with ThreadPoolExecutor(self.num_threads, thread_name_prefix="fetch") as pool:
            for run in _runs(inputs):
                match run[0].kind:
                    case Kind.OBJECT:
                        yield from self._in_threads(pool, [[each] for each in run], self._fetch_object)
                    case Kind.TAR:
                        yield from self._in_threads(pool, spans(run), self._fetch_span)
                    case _:
                        yield from self._read(run)

    def _in_threads(
        self,
        pool: ThreadPoolExecutor,
        units: Iterable[list[Input]],
        fetch: Callable[[list[Input]], list[Outcome]],
    ) -> Iterator[Outcome]:
        """Fetch units of inputs, at most twice as many ahead as there are threads, and only so many bytes."""
        waiting: deque[tuple[int, Future[list[Outcome]]]] = deque()
        bytes_ahead = 0
        remaining = iter(units)
        upcoming = next(remaining, None)
        try:
            while upcoming is not None or waiting:
                while upcoming is not None and len(waiting) < 2 * self.num_threads:
                    num_bytes = sum(self._expected_bytes(each) for each in upcoming)
                    if waiting and bytes_ahead + num_bytes > _MAX_BYTES_IN_FLIGHT:
                        break
                    waiting.append((num_bytes, pool.submit(fetch, upcoming)))
                    bytes_ahead += num_bytes
                    upcoming = next(remaining, None)
                num_bytes, done = waiting.popleft()
                bytes_ahead -= num_bytes
                yield from done.result()
        finally:
            for _, future in waiting:
                future.cancel()

    def _expected_bytes(self, planned: Input) -> int:
        size_bytes = _UNKNOWN_BYTES if planned.size_bytes is None else planned.size_bytes
        return min(size_bytes, self.max_bytes)

    def _fetch_object(self, unit: list[Input]) -> list[Outcome]:
        (planned,) = unit
        if planned.status is not None:
            return [ImageError(planned.status, planned.error or "")]
        try:
            check_size(planned.size_bytes, self.max_bytes)  # saves the request
            store = open_store(planned.where, self.storage)
            fetched = store.get(planned.where, self.max_bytes, planned.version_id)
        except OutageError:
            raise
        except StorageError as exc:
            return [image_error(exc)]
        except ConfigError as exc:  # a line of a manifest may name any scheme
            return [ImageError(Status.ERROR, str(exc))]
        return [replace(fetched, info=replace(fetched.info, uri=planned.uri))]

    def _fetch_span(self, unit: list[Input]) -> list[Outcome]:
        return read_span(open_store(unit[0].where, self.storage), unit, self.max_bytes)

    def _read(self, run: Sequence[Input]) -> Iterator[Outcome]:
        store = open_store(run[0].where, self.storage)
        if run[0].kind is Kind.TAR_GZ:
            return read_members(store, run, self.max_bytes)
        return read_cells(store, run, self.max_bytes, self.config)


def _runs(inputs: Iterable[Input]) -> Iterator[list[Input]]:
    """Yield neighbours that are read together: objects, or what lies in one container in the order of its places."""
    run: list[Input] = []
    for planned in inputs:
        if run and not _goes_on(run[-1], planned):
            yield run
            run = []
        run.append(planned)
    if run:
        yield run


def _goes_on(before: Input, planned: Input) -> bool:
    if planned.kind is not before.kind:
        return False
    if planned.kind is Kind.OBJECT:
        return True
    return planned.where == before.where and (planned.position or 0) > (before.position or 0)
