"""Whole scans of files that mean harm: each costs its own row, and everything beside it in the shard is scored."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

import lfm_scan
from tests.awkward import awkward_bytes, expected_statuses
from tests.images import encoded
from tests.imaging.test_fuzz import mutate, seeds
from tests.planted import PLANTS, marked
from tests.scanning import REPOSITORY
from tests.scanning import lfm_scan as run_lfm_scan

_MARKS = {
    "segfault": "crashed",
    "abort": "crashed",
    "exit": "crashed",
    "sleep": "timeout",
    "spin": "timeout",
    "hog": "too_large",
}


def test_decoders_that_crash_hang_or_hoard_cost_their_image(tmp_path: Path, tiny_weights: Path) -> None:
    folder, plants = tmp_path / "in", tmp_path / "plants"
    folder.mkdir()
    plants.mkdir()
    (plants / "sitecustomize.py").write_text(PLANTS)
    for mark in _MARKS:
        (folder / f"{mark}.png").write_bytes(marked(mark))
    for index in range(24):
        (folder / f"good-{index:02}.png").write_bytes(encoded(seed=index))
    run_dir = tmp_path / "run"

    done = run_lfm_scan(
        *("scan", folder, "--output", run_dir, "--weights", tiny_weights, "--shard-size", 10),
        *("--max-decode-seconds", 3, "--max-decode-bytes", 128 * 2**20),
        env={"PYTHONPATH": os.pathsep.join((str(plants), str(REPOSITORY)))},
    )

    assert done.returncode == 0, done.stderr
    frame = lfm_scan.read_results(run_dir).set_index("uri")
    statuses = {Path(str(uri)).stem: status for uri, status in frame["status"].items()}
    errors = {Path(str(uri)).stem: str(error) for uri, error in frame["error"].items()}
    assert {mark: statuses[mark] for mark in _MARKS} == _MARKS
    good = frame[frame.index.str.contains("good-")]
    assert (good["status"] == "ok").all()
    logits = [result.logit for result in lfm_scan.Scorer(tiny_weights).score(good.index)]
    assert good["logit"].tolist() == pytest.approx(logits, abs=1e-3)
    assert "SIGSEGV" in errors["segfault"]
    assert "--max-decode-seconds" in errors["spin"]


@pytest.mark.usefixtures("local_ray")
def test_a_hundred_and_more_bad_files_get_a_row_each(tmp_path: Path, tiny_weights: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    good, chance = list(seeds().values()), random.Random(7)
    for number in range(60):
        (folder / f"mutated-{number:03}").write_bytes(mutate(good[number % len(good)], good, chance))
    expected = {}
    for number, (name, status) in enumerate(expected_statuses().items()):
        path = folder / f"awkward-{number:03}"  # their names are for another test
        path.write_bytes(awkward_bytes()[name])
        expected[str(path)] = status
    config = lfm_scan.ScanConfig((str(folder),), output=str(tmp_path / "run"), weights=str(tiny_weights))

    outcome = lfm_scan.scan(config)

    frame = lfm_scan.read_results(config.output).set_index("uri")
    assert frame.index.is_unique
    assert len(frame) == 60 + len(expected) > 130
    assert frame.loc[list(expected), "status"].to_dict() == {uri: str(status) for uri, status in expected.items()}
    assert not outcome.summary.by_status.keys() & {"crashed", "timeout", "error"}


@pytest.mark.usefixtures("local_ray")
def test_a_truncated_file_is_scored_only_if_asked_and_says_so(tmp_path: Path, tiny_weights: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    whole = encoded(seed=1)
    (folder / "cut.png").write_bytes(whole[: len(whole) * 2 // 3])
    config = lfm_scan.ScanConfig(
        (str(folder),),
        output=str(tmp_path / "run"),
        weights=str(tiny_weights),
        threshold=0.0,
        limits=lfm_scan.ImageLimits(score_truncated=True),
    )

    lfm_scan.scan(config)

    (row,) = lfm_scan.read_results(config.output).to_dict("records")
    assert row["status"] == "ok"
    assert "the end of the file is missing" in row["error"]
    assert 0 <= row["score"] <= 1
    assert (row["assessable"], row["unassessable_reason"], row["flagged"]) == (False, "truncated", False)
