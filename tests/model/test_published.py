"""The authors' checkpoint: its identity, its keys, and logits equal to those of the authors' own code."""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path

import pytest
import torch

from lfm_scan.model import Checkpoint, Domain, load_checkpoint
from lfm_scan.model.published import PUBLISHED_MODEL_ID, PUBLISHED_SHA256, key_table
from lfm_scan.scoring.scorer import Scorer

# The published logits were taken in fp32 on another machine; sums in another order differ by this much at most.
_TOLERANCE = 1e-3
_FILES_PER_SET = 5


@pytest.fixture(scope="module")
def published(published_weights: Path) -> Checkpoint:
    return load_checkpoint(published_weights.read_bytes(), name=str(published_weights))


def test_the_file_is_the_one_the_authors_published(published: Checkpoint, published_weights: Path) -> None:
    assert hashlib.sha256(published_weights.read_bytes()).hexdigest() == PUBLISHED_SHA256
    assert published.sha256 == PUBLISHED_SHA256
    assert published.metadata.model_id == PUBLISHED_MODEL_ID
    assert published.metadata.domain == Domain(lossy=False, resampled=False)


def test_the_key_table_covers_every_key_of_the_file_and_of_the_model(
    published: Checkpoint, published_weights: Path
) -> None:
    theirs = torch.load(published_weights, map_location="cpu", weights_only=True)
    table = key_table(num_blocks=4)
    assert set(table.values()) | {"downsample_conv.weight", "upsample_conv.weight"} == set(theirs)
    assert set(table) == set(published.model.state_dict())
    for ours, name in table.items():
        assert torch.equal(published.model.state_dict()[ours], theirs[name]), ours


@pytest.mark.parametrize(("policy", "column"), [("resize256", "logit_resize256"), ("crop256", "logit_centercrop256")])
def test_logits_equal_those_of_the_authors_code(
    published_weights: Path, dev_data: Path, policy: str, column: str
) -> None:
    rows = _sample(dev_data / "dev.csv", column)
    scorer = Scorer(published_weights, preprocess=policy, device="cpu")
    results = scorer.score(dev_data / "dev" / row["path"] for row in rows)
    apart = {
        row["path"]: (result.logit, float(row[column]))
        for row, result in zip(rows, results, strict=True)
        if result.logit is None or abs(result.logit - float(row[column])) > _TOLERANCE
    }
    assert not apart
    assert len(rows) >= 30


def _sample(table: Path, column: str) -> list[dict[str, str]]:
    """Return a few files of every set, spread over it, that have a logit and that the program scores."""
    with table.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row[column] and min(int(row["width"]), int(row["height"])) >= 48]
    by_set: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        by_set.setdefault(row["set"], []).append(row)
    return [row for members in by_set.values() for row in members[:: max(1, len(members) // _FILES_PER_SET)]]
