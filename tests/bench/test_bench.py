from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from lfm_scan.bench.bench import Bench, advice, bench, bottleneck, core_ms, shares
from lfm_scan.bench.config import BenchConfig
from lfm_scan.bench.pipeline import ScanTimes, pipeline_times
from lfm_scan.bench.stages import INSIDE, GroupTimes, Stage
from lfm_scan.config import ScanConfig
from tests.images import write_pictures

_MS = {
    Stage.FETCH: 1.0,
    Stage.ISOLATED: 8.0,
    Stage.HASH: 0.5,
    Stage.DECODE: 6.0,
    Stage.TRACES: 0.0,
    Stage.PREPROCESS: 0.5,
    Stage.MODEL: 30.0,
    Stage.COMMIT: 1.0,
}


def _times(fetch_images_per_s: float = 1e4, **ms: float) -> GroupTimes:
    return GroupTimes(
        name="JPEG 640x480",
        num_images=3,
        num_left_out=0,
        mean_bytes=1e5,
        ms={**_MS, **{Stage[name]: value for name, value in ms.items()}},
        fetch_images_per_s=fetch_images_per_s,
    )


def test_a_cores_time_is_the_sum_of_the_stages_and_not_of_their_parts() -> None:
    assert core_ms(_times(), "cpu") == pytest.approx(40)
    assert core_ms(_times(), "cuda") == pytest.approx(10)
    assert shares(_times(), "cpu") == pytest.approx(
        {Stage.FETCH: 0.025, Stage.ISOLATED: 0.2, Stage.MODEL: 0.75, Stage.COMMIT: 0.025}
    )


def test_the_bottleneck_is_the_largest_share_unless_a_store_or_gpu_is_slower() -> None:
    assert bottleneck(_times(), "cpu", 2) == "model"
    assert bottleneck(_times(ISOLATED=50.0), "cpu", 2) == "isolated decode"
    assert bottleneck(_times(fetch_images_per_s=5.0), "cpu", 2) == "store"
    assert bottleneck(_times(MODEL=1.0), "cuda", 2) == "isolated decode"
    assert bottleneck(_times(MODEL=1.0), "cuda", 64) == "gpu"


def test_advice_says_what_a_gpu_would_bring_and_how_many_cores_feed_it() -> None:
    assert "at most 4.0 times as fast" in advice(_times(), "cpu", 2)
    assert "R / 100 cores" in advice(_times(), "cpu", 2)
    assert advice(_times(MODEL=0.1), "cuda", 16) == (
        "the GPU scores 10,000 images/s and takes 100 cores to feed; there are 16: add cores"
    )
    assert advice(_times(MODEL=1.0), "cuda", 16).endswith(
        "takes 10 cores to feed; there are 16: another GPU would help"
    )
    assert "--fetch-threads" in advice(_times(fetch_images_per_s=5.0), "cpu", 2)


def test_the_steady_rate_is_told_from_the_time_to_start() -> None:
    # Two workers, shards of 10 images: both begin at 8 s and finish one each second; merging takes 2 s.
    marks = tuple((8.0 + 1 + second, 10 * (2 * second + worker + 1)) for second in range(6) for worker in range(2))

    times = pipeline_times("JPEG", ScanTimes(16.0, marks), 2, stages_images_per_s=25.0)

    assert (times.group, times.num_images, times.elapsed_s) == ("JPEG", 120, 16.0)
    assert times.images_per_s == pytest.approx(20.0)
    assert times.start_up_s == pytest.approx(10.0)
    assert times.share_of_stages == pytest.approx(0.8)


@pytest.mark.parametrize("marks", [(), ((9.0, 10),), ((9.0, 10), (9.0, 20)), ((9.0, 10), (9.0, 20), (9.0, 30))])
def test_a_scan_too_short_to_tell_has_no_rate(marks: tuple[tuple[float, int], ...]) -> None:
    times = pipeline_times("JPEG", ScanTimes(10.0, marks), 2, 25.0)

    assert (times.images_per_s, times.start_up_s, times.share_of_stages) == (None, None, None)
    assert times.num_images == (marks[-1][1] if marks else 0)


def test_every_stage_is_measured_and_the_scan_gets_images_of_its_own(tmp_path: Path, tiny_weights: Path) -> None:
    write_pictures(tmp_path, 4)
    scanned: list[int] = []

    def scan(config: ScanConfig) -> ScanTimes:
        files = list(Path(config.sources[0]).iterdir())
        scanned.append(len({file.read_bytes() for file in files}))
        assert config.weights == str(tiny_weights)
        return ScanTimes(2.0, tuple((1.0 + index, index + 1) for index in range(len(files))))

    said: list[str] = []
    found = bench(BenchConfig(images=str(tmp_path), seconds=0.01, weights=str(tiny_weights)), scan, said.append)

    assert isinstance(found, Bench)
    (times,) = found.groups
    assert (times.name, times.num_images) == ("the images given", 4)
    assert set(times.ms) == set(Stage)
    assert all(ms > 0 and math.isfinite(ms) for ms in times.ms.values())
    assert sum(times.ms[stage] for stage in INSIDE) > 0
    assert times.fetch_images_per_s > 0
    assert found.model_images_per_s > 0
    assert scanned == [found.pipeline.num_images]
    assert scanned[0] >= 8 * found.cores
    assert json.loads(json.dumps(found.to_json()))["groups"][0]["ms"]["model"] == times.ms[Stage.MODEL]
    assert said[-1] == "the whole pipeline"
