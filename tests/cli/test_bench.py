from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from lfm_scan.bench.bench import Bench
from lfm_scan.bench.pipeline import PipelineTimes
from lfm_scan.bench.stages import GroupTimes, Stage
from lfm_scan.cli.bench import print_bench
from lfm_scan.cli.main import main
from tests.images import write_pictures
from tests.scanning import lfm_scan

_MS = dict(zip(Stage, (1.0, 80.0, 1.5, 48.0, 0.0, 0.2, 30.0, 0.02), strict=True))


def _bench(device: str = "cpu") -> Bench:
    groups = tuple(
        GroupTimes(name=name, num_images=3, num_left_out=1, mean_bytes=4.5e5, ms=_MS, fetch_images_per_s=1e4)
        for name in ("PNG 512x512", "JPEG 1600x1200", "JPEG 4000x3000")
    )
    return Bench(
        cores=2,
        processor="a kind of core",
        device=device,
        model_id="lfm-test",
        preprocess="crop256",
        groups=groups,
        model_images_per_s=60.0,
        pipeline=PipelineTimes("JPEG 1600x1200", 500, 20.0, 40.0, 7.5, 0.92),
    )


def _printed(found: Bench) -> list[str]:
    file = io.StringIO()
    print_bench(found, Console(file=file, width=100, highlight=False))
    return [line.rstrip() for line in file.getvalue().splitlines()]


def test_the_table_fits_a_terminal_and_says_what_each_stage_takes() -> None:
    lines = _printed(_bench())

    assert not any("…" in line for line in lines)
    rows = {line.partition("  ")[0] or line.strip().partition("  ")[0]: line.split() for line in lines}
    model = next(line.split() for line in lines if line.startswith("model "))
    assert model == ["model", *["30.0", "33.3", "27%"] * 3]
    assert rows["a core's time"] == ["a", "core's", "time", *["111.0", "9.0"] * 3]
    text = " ".join(lines)
    assert "The model on 2 cores at once: 60.0 images/s, 1.8 times one core alone." in text
    assert "40.0 images/s once it runs, 92% of what the stages allow, and 7.5 s to start and end." in text
    assert text.count("Held back by the isolated decode stage: 72% of the cores' time.") == 3


def test_a_gpu_is_no_part_of_a_cores_time() -> None:
    text = " ".join(_printed(_bench("cuda")))

    assert "model, on the GPU" in text
    assert "The GPU scores 60.0 images/s" in text
    assert "takes 3 cores to feed; there are 2: add cores" in text


def test_a_bench_measures_everything_with_a_real_scan(tmp_path: Path, tiny_weights: Path) -> None:
    write_pictures(tmp_path / "images", 4)
    report = tmp_path / "bench.json"

    done = lfm_scan(
        *("bench", "--images", tmp_path / "images", "--weights", tiny_weights, "--seconds", 0.05, "--json", report)
    )

    assert done.returncode == 0, done.stderr
    assert "Measuring the whole pipeline" in done.stderr
    assert "the images given" in done.stdout
    figures = json.loads(report.read_text())
    assert figures["pipeline"]["num_images"] >= 8 * figures["cores"]
    assert figures["pipeline"]["elapsed_s"] > 0
    assert figures["versions"]["torch"]


def test_images_that_are_not_there_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--images", "/no/such/folder"]) == 1
    assert "/no/such/folder" in capsys.readouterr().err
