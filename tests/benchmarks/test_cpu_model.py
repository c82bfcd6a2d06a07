"""The benchmark of the model on a CPU still runs, and its naive side is the network."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import cpu_model
from lfm_scan.scoring.torch_backend import TorchBackend
from lfm_scan.scoring.weights import BUNDLED, read_weights
from tests.scoring.networks import logits_by_definition, random_checkpoint, random_pixels


def test_it_measures_every_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cpu_model.main(["--smoke", "--output", str(tmp_path / "cpu_model.json")])
    report = json.loads((tmp_path / "cpu_model.json").read_text())
    sides = {row["side"] for row in report["speed"]}
    assert sides >= {"naive", "torch fp32"}
    assert all(row["images_per_s"] > 0 for row in report["speed"])
    assert report["speed"][0]["times_naive"] == 1
    printed = capsys.readouterr().out
    assert all(side in printed for side in sides)


def test_the_naive_side_is_the_network() -> None:
    checkpoint, pixels = random_checkpoint(), random_pixels(3)
    expected = logits_by_definition(checkpoint, pixels)
    np.testing.assert_allclose(cpu_model.Naive(checkpoint)(pixels), expected, rtol=0, atol=1e-4 * np.ptp(expected))


def test_several_processes_score_in_order(tmp_path: Path) -> None:
    pixels = random_pixels(3)
    np.save(tmp_path / "pixels.npy", pixels)
    with cpu_model.Side("torch fp32", BUNDLED, num_processes=2, num_threads=1) as side:
        logits, wall_s, peak_mb = side.run(tmp_path / "pixels.npy")
    np.testing.assert_allclose(logits, TorchBackend(read_weights(BUNDLED)[1]).logits(pixels), rtol=0, atol=1e-4)
    assert wall_s > 0
    assert peak_mb > 10
