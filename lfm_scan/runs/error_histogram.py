"""What went wrong with images, by kind: messages that differ only in names and numbers are of one kind."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from lfm_scan.logs import one_line
from lfm_scan.status import Status

_MAX_KINDS: Final = 50
_MAX_KINDS_AT_ONCE: Final = 1000
"""Counted among the rows of one table: messages that are all different must not fill the memory."""

_MAX_EXAMPLES: Final = 3
_MAX_KIND_CHARS: Final = 200

_PLACES: Final = re.compile(r"\w+://\S+|(?<!\S)/\S+")
_NUMBERS: Final = re.compile(r"0x[0-9a-f]+|\d[\d,.]*\d|\d")


@dataclass(frozen=True)
class ErrorKind:
    """Rows with alike messages.

    Attributes:
        status: Of the rows.
        kind: Their message, with … for names and # for numbers.
        num_rows: How many.
        examples: URI and message of up to three.
    """

    status: str
    kind: str
    num_rows: int
    examples: tuple[tuple[str, str], ...]

    def __add__(self, other: ErrorKind) -> ErrorKind:
        examples = (*self.examples, *other.examples)[:_MAX_EXAMPLES]
        return replace(self, num_rows=self.num_rows + other.num_rows, examples=examples)


@dataclass(frozen=True)
class ErrorHistogram:
    """The kinds of errors among some rows, the most frequent first. Histograms add up.

    Attributes:
        kinds: At most 50.
        num_other: Rows of kinds that found no place.
    """

    kinds: tuple[ErrorKind, ...] = ()
    num_other: int = 0

    def __add__(self, other: ErrorHistogram) -> ErrorHistogram:
        merged = _count((*self.kinds, *other.kinds))
        return replace(merged, num_other=merged.num_other + self.num_other + other.num_other)

    def cut(self, num_kinds: int, num_examples: int) -> ErrorHistogram:
        """Return the same with fewer kinds, and fewer examples of each."""
        kept, dropped = self.kinds[:num_kinds], self.kinds[num_kinds:]
        return ErrorHistogram(
            tuple(replace(each, examples=each.examples[:num_examples]) for each in kept),
            self.num_other + sum(each.num_rows for each in dropped),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {
            "kinds": [
                {
                    "status": each.status,
                    "kind": each.kind,
                    "num_rows": each.num_rows,
                    "examples": [{"uri": uri, "error": error} for uri, error in each.examples],
                }
                for each in self.kinds
            ],
            "num_other": self.num_other,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ErrorHistogram:
        """Return the histogram that `to_json` gave.

        Raises:
            AttributeError, KeyError, TypeError, ValueError: If it is none.
        """
        kinds = tuple(
            ErrorKind(
                str(each["status"]),
                str(each["kind"]),
                int(each["num_rows"]),
                tuple((str(example["uri"]), str(example["error"])) for example in each["examples"]),
            )
            for each in value["kinds"]
        )
        return cls(kinds, int(value["num_other"]))


def histogram_of(results: pa.Table) -> ErrorHistogram:
    """Return the kinds of errors among rows with the columns of `RESULT_SCHEMA`: of all that have no score."""
    return _count(_kinds(results))


def _kinds(results: pa.Table) -> Iterator[ErrorKind]:
    failed = results.select(["uri", "status", "error"]).filter(pc.not_equal(results.column("status"), Status.OK.value))
    for batch in failed.to_batches():
        for row in batch.to_pylist():
            message = one_line(row["error"] or "")
            yield ErrorKind(row["status"], _kind_of(message, row["uri"]), 1, ((row["uri"], message),))


def _kind_of(message: str, uri: str) -> str:
    kind = _PLACES.sub("…", message.replace(uri, "…"))
    return _NUMBERS.sub("#", kind)[:_MAX_KIND_CHARS]


def _count(kinds: Iterable[ErrorKind]) -> ErrorHistogram:
    found: dict[tuple[str, str], ErrorKind] = {}
    num_other = 0
    for each in kinds:
        name = each.status, each.kind
        if name in found:
            found[name] += each
        elif len(found) < _MAX_KINDS_AT_ONCE:
            found[name] = each
        else:
            num_other += each.num_rows
    ordered = sorted(found.values(), key=lambda each: (-each.num_rows, each.status, each.kind))
    return ErrorHistogram(tuple(ordered), num_other).cut(_MAX_KINDS, _MAX_EXAMPLES)
