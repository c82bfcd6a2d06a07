"""Scores of an earlier run, by the bytes they were given for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lfm_scan.imaging import ImageInfo

_INFO: Final = tuple(ImageInfo.__dataclass_fields__)
SCORE_COLUMNS: Final = ("sha256", "logit", *_INFO)
"""Columns of the results that a score is known by."""

_DIGEST: Final = pa.binary(32)


@dataclass(frozen=True, slots=True)
class KnownScore:
    """What an earlier run found in a file."""

    logit: float
    info: ImageInfo


class KnownScores:
    """A lookup by sha256.

    Sorted Arrow columns rather than a dictionary: some 60 bytes a row, and every worker of a node reads the same copy
    in shared memory.

    Args:
        table: As `index_scores` returns it.
    """

    def __init__(self, table: pa.Table) -> None:
        self.table = table.combine_chunks()
        digests = self.table.column("digest")
        chunk = digests.chunk(0) if digests.num_chunks else pa.array([], type=_DIGEST)
        data = chunk.buffers()[1]
        start = chunk.offset * _DIGEST.byte_width
        self._digests = np.frombuffer(data or b"", dtype="V32")[chunk.offset : chunk.offset + len(chunk)]
        self._first = np.frombuffer(data or b"", dtype=">u8")[start // 8 : start // 8 + 4 * len(chunk) : 4]

    def __len__(self) -> int:
        return len(self._digests)

    def get(self, sha256: str) -> KnownScore | None:
        """Return the score of the file with this sha256 (hexadecimal), or None."""
        wanted = bytes.fromhex(sha256)
        prefix = int.from_bytes(wanted[:8], "big")
        low, high = np.searchsorted(self._first, prefix, "left"), np.searchsorted(self._first, prefix, "right")
        for row in range(int(low), int(high)):
            if self._digests[row].tobytes() == wanted:
                (found,) = self.table.slice(row, 1).drop_columns(["digest"]).to_pylist()
                return KnownScore(found.pop("logit"), ImageInfo(**found))
        return None


def index_scores(results: pa.Table) -> pa.Table:
    """Return the scored rows of some results, each sha256 once, ready for `KnownScores`.

    Args:
        results: With `SCORE_COLUMNS`; rows without a logit are left out.
    """
    scored = results.select(SCORE_COLUMNS).filter(pc.field("logit").is_valid() & pc.field("sha256").is_valid())
    digests = pa.array((bytes.fromhex(each) for each in scored.column("sha256").to_pylist()), type=_DIGEST)
    table = scored.drop_columns(["sha256"]).append_column("digest", digests)
    for name in ("format", "mode"):
        column = table.column(name).cast(pa.string()).dictionary_encode()
        table = table.set_column(table.schema.get_field_index(name), name, column)
    order = pc.sort_indices(table, sort_keys=[("digest", "ascending")])
    table = table.take(order).combine_chunks()
    if not len(table):
        return table
    sorted_digests = np.frombuffer(table.column("digest").chunk(0).buffers()[1], dtype="V32")[: len(table)]
    is_first = np.concatenate(([True], sorted_digests[1:] != sorted_digests[:-1]))
    return table.filter(pa.array(is_first)).combine_chunks()
