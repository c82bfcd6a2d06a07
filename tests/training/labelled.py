"""Samples for tests: labelled image files, and tables of samples that no file is behind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa

from lfm_scan.options import InputConfig, StorageConfig
from lfm_scan.training.columns import LabelColumns
from lfm_scan.training.gather import gather_samples
from lfm_scan.training.samples import SAMPLE_SCHEMA, Split
from tests.images import encoded

_USUAL: dict[str, object] = {
    "kind": "object",
    "status": "ok",
    "set": "s",
    "split": "train",
    "format": "PNG",
    "width": 256,
    "height": 256,
    "lossy": False,
    "num_bytes": 100_000,
}


def write_tree(root: Path, num_pairs: int, size: tuple[int, int] = (260, 258)) -> Path:
    """Write pairs of PNG files as s/0_real/N.png and s/1_fake/N.png, each with pixels of its own."""
    for number in range(num_pairs):
        for label, folder in enumerate(("0_real", "1_fake")):
            path = root / "s" / folder / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(seed=2 * number + label, size=size))
    return root


def gathered(*sources: Path, split: Split = Split.TRAIN) -> pa.Table:
    """Return the samples of some sources."""
    return gather_samples([str(source) for source in sources], InputConfig(), StorageConfig(), LabelColumns(), split)


def made_up(rows: Sequence[Mapping[str, object]]) -> pa.Table:
    """Return samples with the given values, and usual ones where none is given."""
    return pa.Table.from_pylist(
        [_USUAL | {"uri": f"/{number}.png"} | dict(row) for number, row in enumerate(rows)], schema=SAMPLE_SCHEMA
    )
