"""The GPU benchmark runs from end to end on a CPU, at a tiny size, and its arithmetic is that of the model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import gpu_model


def test_the_smoke_run_measures_every_side_a_cpu_has(tmp_path: Path) -> None:
    out = tmp_path / "gpu_model.json"
    gpu_model.main(["--smoke", "--weights", "random", "--out", str(out)])
    report = json.loads(out.read_text())
    assert report["errors"] == []
    sides = {"published", "published, TF32 off", "folded fp32", "folded bf16", "folded fp16"}
    assert {row["side"] for row in report["agreement"]["sides"]} == sides
    assert {(row["side"], row["batch"]) for row in report["throughput"]} == {(s, b) for s in sides for b in (1, 2)}
    assert all(row["images_per_s"] > 0 and row["times_published"] > 0 for row in report["throughput"])
    assert all(row["images_per_s"] > 0 for row in report["host"]["rows"])
    differences = {row["side"]: row["largest_difference"] for row in report["agreement"]["sides"]}
    assert differences["folded fp32"] < 1e-4


def test_an_image_costs_what_the_layers_cost() -> None:
    by_hand = 255**2 * 64 * 12 + 126**2 * 128 * 256 + 62**2 * 256 * 512 + 30**2 * 512 * 1024 + 30**2 * 64 * 512
    assert gpu_model.flop_per_image(256) == 2 * by_hand


def test_pixels_are_those_of_the_protocol(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 256, 256, 3), dtype=np.uint8)
    (tmp_path / "dev").mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "dev" / f"{index}.png")
    (tmp_path / "dev.csv").write_text("path,label\n" + "".join(f"{index}.png,0\n" for index in range(3)))
    assert gpu_model.make_pixels(tmp_path, tmp_path / "dev.npz", every=2) == 2
    with np.load(tmp_path / "dev.npz") as stored:
        assert list(stored["paths"]) == ["0.png", "2.png"]
        np.testing.assert_array_equal(stored["pixels"], images[[0, 2]])


def test_without_a_gpu_the_full_run_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu_model.main([])
    assert "torch finds no GPU here; --smoke and --agreement-only run on a CPU" in capsys.readouterr().err
