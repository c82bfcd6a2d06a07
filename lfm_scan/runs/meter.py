"""Measures the work on a shard while it is done: a few clock readings an image, a few calls of the kernel a shard."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final, Protocol, TypeVar

from lfm_scan.runs.usage import Stage, Usage
from lfm_scan.storage.traffic import traffic

T = TypeVar("T")

_PEAK: Final = "VmHWM:"
_KIB: Final = 1024


class DecoderProcess(Protocol):
    """A process that decodes for this one."""

    @property
    def pid(self) -> int | None:
        """Its id; None while there is none."""
        ...

    @property
    def cpu_s(self) -> float:
        """Seconds of a core that it has used."""
        ...


class Meter:
    """Measures what this process does for one shard, from its making on.

    Not thread-safe: it follows the thread that works on the shard. Processor time and requests are those of the whole
    process, so it is right where a process works on one shard at a time, as Ray's workers do.

    Args:
        node: Name of the machine. Default: its host name.
        decoder: Works for this process.
        gpus: That the network has here.
        clock: Returns seconds.
    """

    def __init__(
        self,
        node: str | None = None,
        decoder: DecoderProcess | None = None,
        gpus: float = 0.0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._node = node or socket.gethostname()
        self._decoder = decoder
        self._gpus = gpus
        self._clock = clock
        self._seconds: dict[Stage, float] = defaultdict(float)
        self._stage = Stage.OTHER
        self._fetched_bytes = 0
        self._batches: Counter[int] = Counter()
        self._traffic = traffic()
        self._core_s = self._cores_used()
        self._since = clock()

    @contextlib.contextmanager
    def doing(self, stage: Stage) -> Iterator[None]:
        """Count the time of the block for a stage; a block within it counts for its own."""
        before = self._turn_to(stage)
        try:
            yield
        finally:
            self._turn_to(before)

    def waiting(self, stage: Stage, items: Iterable[T]) -> Iterator[T]:
        """Yield the items; the time that each takes to come counts for a stage."""
        remaining = iter(items)
        while True:
            before = self._turn_to(stage)
            try:
                item = next(remaining)
            except StopIteration:
                return
            finally:
                self._turn_to(before)
            yield item

    def fetched(self, num_bytes: int) -> None:
        """So many bytes of an image arrived."""
        self._fetched_bytes += num_bytes

    def scored(self, num_images: int, batch_size: int) -> None:
        """The network was given so many images, and takes so many at once."""
        full, rest = divmod(num_images, batch_size)
        if full:
            self._batches[_bucket(batch_size)] += full
        if rest:
            self._batches[_bucket(rest)] += 1

    def usage(self) -> Usage:
        """Return what the work took up to now."""
        self._turn_to(self._stage)
        asked = traffic() - self._traffic
        return Usage(
            seconds={str(stage): seconds for stage, seconds in self._seconds.items()},
            core_s=max(0.0, self._cores_used() - self._core_s),
            gpu_s=self._gpus * self._seconds.get(Stage.SCORE, 0.0),
            fetched_bytes=self._fetched_bytes,
            batches=dict(self._batches),
            requests=asked.requests,
            num_retries=asked.num_retries,
            num_throttles=asked.num_throttles,
            peak_worker_bytes=_peak_bytes(os.getpid()),
            peak_decoder_bytes=_peak_bytes(None if self._decoder is None else self._decoder.pid),
            peak_gpu_bytes=_peak_gpu_bytes() if self._gpus else 0,
            node_s={self._node: sum(self._seconds.values())},
        )

    def _turn_to(self, stage: Stage) -> Stage:
        """Count the time up to now, go on with a stage, and return the one that was before."""
        now = self._clock()
        self._seconds[self._stage] += now - self._since
        self._since = now
        before, self._stage = self._stage, stage
        return before

    def _cores_used(self) -> float:
        """Return the seconds of cores used by this process, its decoder, and decoders before that."""
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        present = 0.0 if self._decoder is None else self._decoder.cpu_s
        return time.process_time() + ended.ru_utime + ended.ru_stime + present


def _bucket(num_images: int) -> int:
    """Return the next power of two, so that there are few of them."""
    return 1 << (num_images - 1).bit_length()


def _peak_bytes(pid: int | None) -> int:
    """Return the most memory a process has had resident; 0 where there is none.

    Not by getrusage: that counts what the process had before it became another program.
    """
    if pid is None:
        return 0
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(_PEAK):
                return int(line.split()[1]) * _KIB
    return 0


def _peak_gpu_bytes() -> int:
    """Return the most memory of its GPU that this process has reserved through torch."""
    import torch  # noqa: PLC0415 - workers that only decode have no use for it

    return int(torch.cuda.max_memory_reserved()) if torch.cuda.is_available() else 0
