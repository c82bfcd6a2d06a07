"""What work took: seconds by stage, cores, memory, requests. It adds up over shards and knows no single image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from enum import StrEnum
from typing import Any, Final, TypeVar

from lfm_scan.storage.traffic import Traffic

K = TypeVar("K", str, int)


class Stage(StrEnum):
    """What the thread that works on a shard is doing. It does one thing at a time, so stages add up to its time.

    Requests, the decoder and the network work ahead of each other where they can; what happens behind another stage
    takes none of the thread's time, and counts nowhere.
    """

    FETCH = "fetch"
    """Waits for bytes that are not there yet."""
    DECODE = "decode"
    """Hashes files and hands them to the decoder; waits for pixels that are not there yet."""
    SCORE = "score"
    """Runs the network."""
    COMMIT = "commit"
    """Writes the rows as Parquet and stores them."""
    OTHER = "other"
    """The rest: reads the plan, makes the rows."""


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What some work took. Usages add up; peaks and names are those of all of it.

    Attributes:
        seconds: Of workers, by stage; see `Stage`.
        core_s: Seconds of cores that workers and their decoders used.
        gpu_s: Seconds of GPUs that the network had while it scored.
        fetched_bytes: Of images, whether they could be decoded or not.
        batches: Calls of the network by the number of images given to it.
        requests: To S3, by GET, HEAD, LIST and PUT, all tries counted.
        num_retries: Requests to any store that were sent once more.
        num_throttles: Answers of stores that asked for fewer requests.
        peak_worker_bytes: Most memory that one worker process has had since it started, as the kernel counts it.
        peak_decoder_bytes: The same of one decoder.
        peak_gpu_bytes: Most memory of a GPU that one worker has reserved.
        node_s: Seconds of workers by the name of their node.
    """

    seconds: Mapping[str, float] = field(default_factory=dict)
    core_s: float = 0.0
    gpu_s: float = 0.0
    fetched_bytes: int = 0
    batches: Mapping[int, int] = field(default_factory=dict)
    requests: Mapping[str, int] = field(default_factory=dict)
    num_retries: int = 0
    num_throttles: int = 0
    peak_worker_bytes: int = 0
    peak_decoder_bytes: int = 0
    peak_gpu_bytes: int = 0
    node_s: Mapping[str, float] = field(default_factory=dict)

    def __add__(self, other: Usage) -> Usage:
        return Usage(**{each.name: _combine(each.name, self, other) for each in fields(self)})

    @classmethod
    def of_traffic(cls, asked: Traffic) -> Usage:
        """Return the usage of something that only asked stores."""
        return cls(requests=asked.requests, num_retries=asked.num_retries, num_throttles=asked.num_throttles)

    def with_nodes(self, most: int) -> Usage:
        """Return the same with so many nodes named, the busiest, and the others together."""
        if len(self.node_s) <= most:
            return self
        busiest = sorted(self.node_s.items(), key=lambda item: item[1], reverse=True)
        others = {_OTHER_NODES: sum(seconds for _, seconds in busiest[most:])}
        return replace(self, node_s={**dict(busiest[:most]), **others})

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values; times to a tenth of a millisecond."""
        value = asdict(self)
        value["batches"] = {str(size): count for size, count in sorted(self.batches.items())}
        return {name: _rounded(item) for name, item in value.items()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Usage:
        """Return the usage that `to_json` gave.

        Raises:
            AttributeError, KeyError, TypeError, ValueError: If it is none.
        """
        return cls(
            seconds=_numbers(value["seconds"]),
            core_s=float(value["core_s"]),
            gpu_s=float(value["gpu_s"]),
            fetched_bytes=int(value["fetched_bytes"]),
            batches={int(size): int(count) for size, count in value["batches"].items()},
            requests={str(name): int(count) for name, count in value["requests"].items()},
            num_retries=int(value["num_retries"]),
            num_throttles=int(value["num_throttles"]),
            peak_worker_bytes=int(value["peak_worker_bytes"]),
            peak_decoder_bytes=int(value["peak_decoder_bytes"]),
            peak_gpu_bytes=int(value["peak_gpu_bytes"]),
            node_s=_numbers(value["node_s"]),
        )


_DIGITS: Final = 4
_OTHER_NODES: Final = "others"


def _combine(name: str, mine: Usage, theirs: Usage) -> Any:  # noqa: ANN401 - of whatever type the field is
    one, other = getattr(mine, name), getattr(theirs, name)
    if isinstance(one, Mapping):
        return _added(one, other)
    return max(one, other) if name.startswith("peak_") else one + other


def _added(one: Mapping[K, float], other: Mapping[K, float]) -> dict[K, float]:
    total: Counter[K] = Counter()
    total.update(one)
    total.update(other)
    return dict(total)


def _rounded(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    return round(value, _DIGITS) if isinstance(value, float) else value


def _numbers(value: Mapping[str, Any]) -> dict[str, float]:
    return {str(name): float(number) for name, number in value.items()}
