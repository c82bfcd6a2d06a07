"""Trainings on Ray Train: two workers, killed and resumed, on real images and a real store."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

import lfm_scan
from lfm_scan.concurrency import Background
from lfm_scan.config import ScanConfig
from lfm_scan.distributed.train import Event, TrainListener, _fitted, train
from lfm_scan.errors import ConfigError, TrainingError
from lfm_scan.options import StorageConfig
from lfm_scan.training.config import RecipeConfig, TrainCompute, TrainConfig
from tests.scanning import REPOSITORY, command
from tests.servers import S3Server
from tests.training.runs import assert_same_weights, small_config, write_doubled

_TWO = TrainCompute(workers=2, precision="fp32")


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
                workers = [each for each in _processes_of_this_ray() if "RayTrainWorker" in " ".join(_command_of(each))]
                killed.append(workers[-1].pid)
                os.kill(workers[-1].pid, signal.SIGKILL)

    train(config, Killer())

    assert killed
    assert_same_weights(_last(config), _last(undisturbed))


def _processes_of_this_ray() -> list[psutil.Process]:
    """Leave out those of other tests, which may train now."""
    node: Any = ray._private.worker._global_node
    (raylet,) = node.all_processes["raylet"]
    return psutil.Process(raylet.process.pid).children(recursive=True)


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
    recipe, alone = replace(undisturbed.recipe, learning_rate=1e30), replace(_TWO, workers=1, max_failures=0)
    with pytest.raises(TrainingError, match=r"step \d+"):
        train(replace(undisturbed, output=str(tmp_path / "b"), recipe=recipe, compute=alone))


def _wait_for(is_there: Callable[[], bool], driver: subprocess.Popen[str], timeout_s: float = 500) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_there():
        assert driver.poll() is None, driver.communicate()
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.1)


def test_a_killed_driver_goes_on_on_real_images_in_s3_and_its_checkpoint_scans(
    dev_data: Path, s3_server: S3Server, s3_bucket: str, tmp_path: Path, local_ray: None
) -> None:
    for name in ("forensynths_mini", "cyclegan_pairs"):
        for path in sorted((dev_data / "dev" / name).rglob("*.png"))[::4]:
            s3_server.put(s3_bucket, f"data/{path.relative_to(dev_data / 'dev')}", path.read_bytes())
    config = TrainConfig(
        (f"s3://{s3_bucket}/data/",),
        output=f"s3://{s3_bucket}/run",
        validation_share=0.3,
        checkpoint_every=1,
        max_leak=1.0,  # the real images' codecs tell their labels in one set; it does not matter here
        recipe=RecipeConfig(preset="crop", crop_px=64, train_batch_size=4, learning_rate=0.001, epochs=2),
        storage=StorageConfig(endpoint_url=s3_server.endpoint_url),
        compute=TrainCompute(workers=2),
    )
    _kill_a_driver_with_a_state(config, s3_server, s3_bucket)

    outcome = train(config)  # refused if the command line's settings were others

    history = outcome.position.history
    assert [entry["epoch"] for entry in history] == [1, 2]
    assert history[0]["steps"] == history[1]["steps"] >= 2
    scan = ScanConfig(
        config.sources, output=str(tmp_path / "scan"), weights=outcome.best_checkpoint, storage=config.storage
    )
    lfm_scan.scan(scan)
    rows = lfm_scan.read_results(scan.output)
    assert len(rows) == 24
    assert rows["score"].notna().all()
    assert (rows["model_id"] == outcome.model_id).all()


def _kill_a_driver_with_a_state(config: TrainConfig, s3_server: S3Server, bucket: str) -> None:
    """Run the same training from the command line, and kill it once a state is saved, before it has finished."""
    recipe = config.recipe
    driver = subprocess.Popen(
        command(
            *("train", *config.sources, "--output", config.output, "--endpoint-url", s3_server.endpoint_url),
            *("--preset", recipe.preset, "--crop-px", recipe.crop_px, "--train-batch-size", recipe.train_batch_size),
            *("--learning-rate", recipe.learning_rate, "--epochs", recipe.epochs, "--max-leak", config.max_leak),
            *("--workers", config.compute.workers, "--checkpoint-every", config.checkpoint_every),
            *("--validation-share", config.validation_share),
        ),
        env={**os.environ, **s3_server.env},
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )

    def has(key: str) -> bool:
        return bool(s3_server.client().list_objects_v2(Bucket=bucket, Prefix=f"run/{key}").get("KeyCount"))

    try:
        _wait_for(lambda: has("state.bin"), driver)
    finally:
        os.killpg(driver.pid, signal.SIGKILL)
        driver.communicate()
    assert not has("_SUCCESS.json")


def test_a_training_is_run_once_however_often_its_end_is_asked_for() -> None:
    calls: list[str] = []

    class Trainer:
        def fit(self) -> str:
            calls.append("fit")
            return "result"

    with Background(_fitted(Trainer())) as fitting:  # type: ignore[arg-type]
        result: object = fitting.get(5)
        assert result == "result"
        with pytest.raises(StopIteration):
            fitting.get(5)
    assert calls == ["fit"]
