from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

import lfm_scan
from lfm_scan.errors import ConfigError, RunError
from lfm_scan.estimate.config import EstimateConfig
from lfm_scan.estimate.estimate import Estimate, Listener, estimate, machines_of, predict
from lfm_scan.estimate.machine import usable_cores
from lfm_scan.estimate.measure import Measured, Sample
from lfm_scan.estimate.statistics import Interval
from lfm_scan.estimate.survey import Survey
from lfm_scan.options import ComputeConfig, InputConfig, Prices
from lfm_scan.sources.inputs import Input
from lfm_scan.status import Status, Unassessable
from tests.awkward import write_awkward_files
from tests.images import encoded, write_pictures

_HOUR_S = 3600


class _Steps(Listener):
    def __init__(self) -> None:
        self.listed = 0
        self.measured = (0, 0)

    def listing(self, num_inputs: int) -> None:
        self.listed = num_inputs

    def measuring(self, num_done: int, num_sampled: int) -> None:
        assert num_done == self.measured[0] + 1
        self.measured = (num_done, num_sampled)


def _config(*sources: Path, weights: Path, **settings: object) -> EstimateConfig:
    return EstimateConfig(tuple(map(str, sources)), weights=str(weights), **settings)  # type: ignore[arg-type]


def _measured(
    *, decode_s: float = 0.02, score_s: float = 0.03, status: Status = Status.OK, reason: Unassessable | None = None
) -> Measured:
    return Measured("/x.png", status, 1000, True, reason, decode_s, score_s)


def _survey(num_inputs: int, num_sampled: int, seconds: float = 0.0) -> Survey:
    return Survey(
        num_inputs=num_inputs,
        size_bytes=1000 * num_inputs,
        num_unsized=0,
        fetch_bytes=900 * num_inputs,
        num_gets=num_inputs - 1,
        num_by_ranges=0,
        sample=(Input(uri="/x.png"),) * num_sampled,
        seconds=seconds,
        requests=Counter({"LIST": 7, "HEAD": 2, "GET": 1}),
    )


def _predicted(
    images: list[Measured], *, num_inputs: int, gpus: int = 0, fetch_s: float = 0.001, **settings: object
) -> Estimate:
    sample = Sample(tuple(images), None if gpus else "cpu", fetch_s, 0.01)
    config = EstimateConfig(("/x",), **settings)  # type: ignore[arg-type]
    return predict(config, _survey(num_inputs, len(images), seconds=36.0), sample, cores=10, gpus=gpus)


def test_a_folder_measured_whole_is_told_as_the_scorer_finds_it(tmp_path: Path, tiny_weights: Path) -> None:
    paths = write_pictures(tmp_path, 12)
    (tmp_path / "broken.png").write_bytes(encoded()[:300])
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "empty.jpg").write_bytes(b"")
    paths = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    steps = _Steps()

    found = estimate(_config(tmp_path, weights=tiny_weights), steps)

    results = lfm_scan.Scorer(tiny_weights).score(list(paths))
    statuses = Counter(str(result.status) for result in results)
    assert (found.num_inputs, found.num_sampled) == (15, 15)
    assert found.size_bytes == Interval.exactly(sum(path.stat().st_size for path in paths))
    assert found.shares.by_status == {status: Interval.exactly(count / 15) for status, count in statuses.items()}
    assert found.shares.unassessable == {"lossy": Interval.exactly(6 / 15)}
    assert found.shares.assessable == Interval.exactly(6 / 15)
    assert found.shares.failing == Interval.exactly(1 / 15)  # truncated; empty and unsupported are answers
    assert steps.listed == 15
    assert steps.measured == (15, 15)
    assert found.work.core_hours.is_exact
    assert found.work.wall_s is not None
    assert found.work.wall_s.value > 0


def test_awkward_files_are_estimated_and_none_stops_it(tmp_path: Path, tiny_weights: Path) -> None:
    write_awkward_files(tmp_path)

    found = estimate(_config(tmp_path, weights=tiny_weights, sample=10_000))

    assert found.num_sampled == found.num_inputs > 20
    assert sum(share.value for share in found.shares.by_status.values()) == pytest.approx(1)
    json.dumps(found.to_json(), allow_nan=False)


def test_nothing_but_broken_files_is_an_estimate_too(tmp_path: Path, tiny_weights: Path) -> None:
    for index in range(3):
        (tmp_path / f"{index}.png").write_bytes(encoded(seed=index)[:200])

    found = estimate(_config(tmp_path, weights=tiny_weights, gpus=1, gpu_images_per_s=1000.0))

    assert found.shares.failing == Interval.exactly(1.0)
    assert found.shares.assessable == Interval.exactly(0.0)
    assert found.work.gpu_hours == Interval.exactly(0.0)


def test_one_of_several_images_gives_figures_without_intervals(tmp_path: Path, tiny_weights: Path) -> None:
    write_pictures(tmp_path, 3)

    found = estimate(_config(tmp_path, weights=tiny_weights, sample=1))

    assert found.num_sampled == 1
    assert found.work.core_hours.value > 0
    assert found.work.core_hours.low is None
    json.dumps(found.to_json(), allow_nan=False)


def test_filters_that_leave_nothing_say_so(tmp_path: Path, tiny_weights: Path) -> None:
    write_pictures(tmp_path, 2)

    with pytest.raises(RunError, match="the filters leave none"):
        estimate(_config(tmp_path, weights=tiny_weights, inputs=InputConfig(suffix=(".webp",))))


def test_torch_has_its_threads_back(tmp_path: Path, tiny_weights: Path) -> None:
    write_pictures(tmp_path, 1)
    torch.set_num_threads(2)

    estimate(_config(tmp_path, weights=tiny_weights))

    assert torch.get_num_threads() == 2


def test_cores_work_as_long_as_their_images_take() -> None:
    found = _predicted([_measured(), _measured(decode_s=0.02, score_s=0.03)], num_inputs=60_000)

    work = found.work
    core_s = 60_000 * (0.01 + 0.02 + 0.03)
    assert work.core_hours.value == pytest.approx((core_s + 36) / _HOUR_S)
    assert work.wall_s is not None
    assert work.wall_s.value == pytest.approx(core_s / 10 + 36)
    assert work.limited_by == "cores"
    assert (work.fetch_ms, work.decode_ms, work.score_ms) == pytest.approx((10, 20, 30))
    assert (work.gpu_hours, work.feed_wall_s, work.gpu_images_per_s_needed) == (None, None, None)


def test_a_slow_store_sets_the_pace() -> None:
    found = _predicted([_measured()] * 2, num_inputs=60_000, fetch_s=0.5)

    assert found.work.limited_by == "store"
    assert found.work.wall_s is not None
    assert found.work.wall_s.value == pytest.approx(60_000 * 0.5 / 10 + 36)


def test_a_gpu_takes_the_model_off_the_cores() -> None:
    images = [_measured(), _measured(), _measured(), _measured(status=Status.CORRUPT, reason=Unassessable.NOT_SCORED)]

    slow = _predicted(images, num_inputs=60_000, gpus=2, gpu_images_per_s=50.0).work
    fast = _predicted(images, num_inputs=60_000, gpus=2, gpu_images_per_s=5000.0).work

    feed_s = 60_000 * (0.01 + 0.02) / 10
    assert slow.gpu_hours is not None
    assert slow.wall_s is not None
    assert fast.wall_s is not None
    assert slow.gpu_hours.value == pytest.approx(45_000 / 50 / _HOUR_S)
    assert slow.wall_s.value == pytest.approx(45_000 / 50 / 2 + 36)
    assert slow.limited_by == "gpus"
    assert fast.wall_s.value == pytest.approx(feed_s + 36)
    assert fast.limited_by == "cores"
    assert fast.gpu_images_per_s_needed == pytest.approx(45_000 / feed_s / 2)
    assert fast.score_ms is None


def test_the_rate_of_a_gpu_is_never_made_up() -> None:
    found = _predicted(
        [_measured()] * 3, num_inputs=60_000, gpus=2, prices=Prices(price_per_core_hour=1.0, price_per_gpu_hour=2.0)
    )

    assert found.machines.gpu_images_per_s is None
    assert found.work.gpu_hours is None
    assert found.work.wall_s is None
    assert found.work.feed_wall_s is not None
    assert found.work.feed_wall_s.value == pytest.approx(60_000 * 0.03 / 10 + 36)
    assert found.cost.total is None
    assert {"cores", "gpus"} <= set(found.cost.missing)


def test_the_rate_of_a_gpu_that_is_here_is_measured() -> None:
    images = [_measured(score_s=0.001), _measured(score_s=0.003), _measured(score_s=0.0, status=Status.EMPTY)]

    found = predict(EstimateConfig(("/x",)), _survey(9, 3), Sample(tuple(images), "cuda", 0.0, 0.0), cores=1, gpus=1)

    assert found.machines.gpu_rate_is_measured
    assert found.machines.gpu_images_per_s == pytest.approx(500)


def test_every_price_is_applied_to_what_it_is_of() -> None:
    prices = Prices(
        price_per_core_hour=0.5,
        price_per_gpu_hour=3.0,
        price_per_1000_gets=0.4,
        price_per_1000_puts=5.0,
        price_per_gb=0.09,
    )
    found = _predicted([_measured()] * 4, num_inputs=60_000, gpus=2, gpu_images_per_s=50.0, prices=prices)

    run = found.requests.run
    hours = (60_000 / 50 / 2 + 36) / _HOUR_S
    parts = {name: part.value for name, part in found.cost.parts.items()}
    assert parts == pytest.approx(
        {
            "cores": 10 * hours * 0.5,
            "gpus": 2 * hours * 3.0,
            "gets": (59_999 + 2 + 1 + run.num_gets) / 1000 * 0.4,
            "puts": (7 + run.num_lists + run.num_puts) / 1000 * 5.0,
            "bytes": 900 * 60_000 / 1e9 * 0.09,
        }
    )
    assert found.cost.total is not None
    assert found.cost.total.value == pytest.approx(sum(parts.values()))
    assert found.cost.missing == ()


def test_sizes_that_no_listing_tells_are_taken_from_the_sample() -> None:
    images = [Measured("/x#row=0", Status.OK, size, False, None, 0.01, 0.01) for size in (1000, 3000)]
    counted = Survey(
        num_inputs=50,
        size_bytes=7000,
        num_unsized=40,
        fetch_bytes=7000,
        num_gets=10,
        num_by_ranges=40,
        sample=(),
        seconds=0.0,
        requests=Counter(),
    )

    found = predict(EstimateConfig(("/x",)), counted, Sample(tuple(images), "cpu", 0.0, 0.0), cores=1, gpus=0)

    assert found.size_bytes.value == 7000 + 40 * 2000
    assert found.size_bytes.low is not None
    assert found.size_bytes.low < found.size_bytes.value


def test_machines_are_this_one_unless_the_user_says() -> None:
    cpu = ComputeConfig(device="cpu")

    assert machines_of(EstimateConfig(("/x",), compute=cpu)) == (usable_cores(), 0)
    assert machines_of(EstimateConfig(("/x",), cores=64, gpus=8)) == (64, 8)
    with pytest.raises(ConfigError, match="contradict"):
        machines_of(EstimateConfig(("/x",), gpus=1, compute=cpu))


def test_a_containers_quota_counts_as_its_cores(tmp_path: Path) -> None:
    cpu_max = tmp_path / "cpu.max"
    cpu_max.write_text("50000 100000\n")
    assert usable_cores(cpu_max) == 1
    cpu_max.write_text("max 100000\n")
    assert usable_cores(cpu_max) == usable_cores(tmp_path / "none") >= 1


def test_prices_below_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="--price-per-gb must be at least 0"):
        Prices(price_per_gb=-1.0)
