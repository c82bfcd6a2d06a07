"""Trainings on Ray Train: two workers, killed and resumed, on real images and a real store."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

import lfm_scan
from lfm_scan.distributed.train import Event, TrainListener, train
from lfm_scan.errors import ConfigError, TrainingError
from lfm_scan.training.config import TrainCompute, TrainConfig
from tests.scanning import REPOSITORY, command
from tests.scanning import lfm_scan as run_lfm_scan
from tests.servers import S3Server
from tests.training.runs import assert_same_weights, small_config, write_doubled

_TWO = TrainCompute(workers=2, precision="fp32")
# The real images' codecs tell their labels in one set; it does not matter here.
_REAL = [
    "--preset",
    "crop",
    "--crop-px",
    "64",
    "--train-batch-size",
    "16",
    "--learning-rate",
    "0.001",
    "--max-leak",
    "1",
]


@pytest.fixture(scope="module")
def doubled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_doubled(tmp_path_factory.mktemp("data"), 24)


class _Losses(TrainListener):
    """Notes the loss of the first step and those of the epochs."""

    def __init__(self) -> None:
        self.first_step: float | None = None
        self.epochs: list[float] = []

    def progressed(self, event: Event) -> None:
        if event["kind"] == "epoch":
            self.epochs.append(event["loss"])
        elif self.first_step is None:
            assert event["step"] == 1
            self.first_step = event["loss"]


@pytest.fixture(scope="module")
def undisturbed_and_losses(
    doubled: Path, tmp_path_factory: pytest.TempPathFactory, local_ray: None
) -> tuple[TrainConfig, _Losses]:
    """A training by two workers that nothing disturbed."""
    config = small_config(doubled, tmp_path_factory.mktemp("undisturbed") / "run", compute=_TWO, checkpoint_every=2)
    losses = _Losses()
    train(config, losses)
    return config, losses


@pytest.fixture
def undisturbed(undisturbed_and_losses: tuple[TrainConfig, _Losses]) -> TrainConfig:
    return undisturbed_and_losses[0]


def _last(config: TrainConfig) -> Path:
    return Path(config.output) / "checkpoints" / "last.safetensors"


def test_two_workers_learn_what_one_process_learns(
    undisturbed_and_losses: tuple[TrainConfig, _Losses], tmp_path: Path
) -> None:
    undisturbed, losses = undisturbed_and_losses
    alone = _Losses()
    train(replace(undisturbed, output=str(tmp_path / "alone"), compute=replace(_TWO, workers=0)), alone)

    # tests/training/test_step.py compares gradients; here, that the workers had the batches of one process. Not more:
    # what batch normalisation takes out again has a gradient of rounding errors, which Adam blows up step by step.
    assert alone.first_step == pytest.approx(losses.first_step, rel=1e-4)
    assert alone.epochs[0] == pytest.approx(losses.epochs[0], rel=0.02)
    assert len(alone.epochs) == len(losses.epochs) == 2


def test_a_worker_that_is_killed_costs_time_and_nothing_else(undisturbed: TrainConfig, tmp_path: Path) -> None:
    config = replace(undisturbed, output=str(tmp_path / "run"))
    killed: list[int] = []

    class Killer(TrainListener):
        def progressed(self, event: Event) -> None:
            if event["kind"] == "epoch" and not killed:
                workers = [each for each in psutil.process_iter() if "RayTrainWorker" in " ".join(_command_of(each))]
                killed.append(workers[-1].pid)
                os.kill(workers[-1].pid, signal.SIGKILL)

    train(config, Killer())

    assert killed
    assert_same_weights(_last(config), _last(undisturbed))


def _command_of(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_workers_that_do_not_fit_and_errors_in_workers_are_one_clear_line(
    undisturbed: TrainConfig, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="--workers 2 of 2 CPUs leave nothing of the cluster's 2"):
        train(replace(undisturbed, output=str(tmp_path / "a"), compute=replace(_TWO, cpus_per_worker=2)))
    recipe = replace(undisturbed.recipe, learning_rate=1e30)
    with pytest.raises(TrainingError, match=r"step \d+"):
        train(replace(undisturbed, output=str(tmp_path / "b"), recipe=recipe, compute=replace(_TWO, max_failures=0)))


def _wait_for(is_there: Callable[[], bool], driver: subprocess.Popen[str], timeout_s: float = 200) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_there():
        assert driver.poll() is None, driver.communicate()
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.1)


def test_a_killed_driver_goes_on_on_real_images_in_s3_and_its_checkpoint_scans(
    dev_data: Path, s3_server: S3Server, s3_bucket: str, tmp_path: Path
) -> None:
    for name in ("forensynths_mini", "cyclegan_pairs"):
        for path in sorted((dev_data / "dev" / name).rglob("*.png"))[::2]:
            s3_server.put(s3_bucket, f"data/{path.relative_to(dev_data / 'dev')}", path.read_bytes())
    arguments = [
        *("train", f"s3://{s3_bucket}/data/", "--endpoint-url", s3_server.endpoint_url, *_REAL, "--epochs", "2"),
        *("--workers", "2", "--checkpoint-every", "1", "--validation-share", "0.3"),
    ]
    env = {**os.environ, **s3_server.env}
    output = f"s3://{s3_bucket}/killed"
    driver = subprocess.Popen(
        command(*arguments, "--output", output),
        env=env,
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )

    def is_saved() -> bool:
        found = s3_server.client().list_objects_v2(Bucket=s3_bucket, Prefix="killed/state.bin")
        return bool(found.get("KeyCount"))

    try:
        _wait_for(is_saved, driver)
    finally:
        os.killpg(driver.pid, signal.SIGKILL)
        driver.communicate()

    resumed = run_lfm_scan(*arguments, "--output", output, env=s3_server.env)
    assert resumed.returncode == 0, resumed.stderr
    history = json.loads(s3_server.client().get_object(Bucket=s3_bucket, Key="killed/history.json")["Body"].read())
    assert [(entry["epoch"], entry["steps"]) for entry in history] == [(1, 2), (2, 2)]
    scanned = run_lfm_scan(
        *("scan", f"s3://{s3_bucket}/data/", "--output", tmp_path / "scan"),
        *("--weights", f"{output}/checkpoints/best.safetensors", "--endpoint-url", s3_server.endpoint_url),
        env=s3_server.env,
    )
    assert scanned.returncode == 0, scanned.stderr
    rows = lfm_scan.read_results(tmp_path / "scan")
    assert len(rows) == 47
    assert rows["score"].notna().all()
    assert rows["model_id"].str.startswith("lfm-crop-").all()
