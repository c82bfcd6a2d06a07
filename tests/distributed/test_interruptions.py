"""Drivers that are terminated and interrupted: real processes, real signals, then the same command again."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pandas as pd
import pytest

import lfm_scan
from lfm_scan.config import ScanConfig
from tests.images import write_pictures
from tests.scanning import REPOSITORY, SCORE_COLUMNS, command
from tests.scanning import lfm_scan as run_lfm_scan
from tests.waiting import PATIENCE_S, wait_until

_NUM_PICTURES = 120
_SHARD_SIZE = 2  # many shards, so that seconds pass between the fourth and the last


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    write_pictures(folder, _NUM_PICTURES)
    return folder


@pytest.fixture(scope="module")
def undisturbed(
    pictures: Path, tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory, local_ray: None
) -> pd.DataFrame:
    run_dir = str(tmp_path_factory.mktemp("undisturbed") / "run")
    lfm_scan.scan(ScanConfig((str(pictures),), output=run_dir, weights=str(tiny_weights)))
    return lfm_scan.read_results(run_dir)


@pytest.fixture
def driver_arguments(pictures: Path, tiny_weights: Path, tmp_path: Path) -> list[str]:
    """Arguments of a scan of many small shards into tmp_path / "run"."""
    return list(
        map(
            str,
            ("scan", pictures, "--output", tmp_path / "run", "--weights", tiny_weights, "--shard-size", _SHARD_SIZE),
        )
    )


@pytest.mark.usefixtures("joined_ray")
def test_a_driver_terminated_midway_loses_nothing_and_counts_nothing_twice(
    undisturbed: pd.DataFrame, driver_arguments: list[str], tmp_path: Path
) -> None:
    _stop_midway_and_go_on(signal.SIGTERM, 143, undisturbed, driver_arguments, tmp_path / "run")


def test_a_driver_with_a_ray_of_its_own_interrupted_midway_loses_nothing_and_counts_nothing_twice(
    undisturbed: pd.DataFrame, driver_arguments: list[str], tmp_path: Path
) -> None:
    _stop_midway_and_go_on(signal.SIGINT, 130, undisturbed, driver_arguments, tmp_path / "run")


def _stop_midway_and_go_on(
    signum: signal.Signals, exit_code: int, undisturbed: pd.DataFrame, driver_arguments: list[str], run_dir: Path
) -> None:
    parts = run_dir / "parts"

    with subprocess.Popen(
        command(*driver_arguments), cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, process_group=0
    ) as driver:
        wait_until(lambda: len(list(parts.glob("part-*"))) >= 4 or driver.poll() is not None)
        driver.send_signal(signum)
        _, stderr = driver.communicate(timeout=PATIENCE_S)
    assert driver.returncode == exit_code, stderr.decode()
    assert not (run_dir / "_SUCCESS.json").exists()
    committed = {path.name: path.read_bytes() for path in parts.glob("part-*")}
    assert 4 <= len(committed) < _NUM_PICTURES // _SHARD_SIZE
    assert b"Repeat the same command to go on" in stderr

    again = run_lfm_scan(*driver_arguments)

    assert again.returncode == 0, again.stderr
    assert "images are done already" in again.stderr
    frame = lfm_scan.read_results(run_dir)
    assert frame["uri"].is_unique
    pd.testing.assert_frame_equal(frame[SCORE_COLUMNS], undisturbed[SCORE_COLUMNS])
    assert all((parts / name).read_bytes() == data for name, data in committed.items())


@pytest.mark.usefixtures("joined_ray")
def test_two_drivers_at_once_share_one_run(
    driver_arguments: list[str], undisturbed: pd.DataFrame, tmp_path: Path
) -> None:
    drivers = [
        subprocess.Popen(command(*driver_arguments), cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    ends = [(driver.communicate(timeout=2 * PATIENCE_S), driver.returncode) for driver in drivers]

    assert [code for _, code in ends] == [0, 0], ends
    pd.testing.assert_frame_equal(lfm_scan.read_results(tmp_path / "run")[SCORE_COLUMNS], undisturbed[SCORE_COLUMNS])
