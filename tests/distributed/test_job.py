"""`ray job submit` against a real head with its job server and token authentication."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from lfm_scan import read_results
from lfm_scan.model import load_checkpoint
from tests.images import write_pictures
from tests.scanning import REPOSITORY
from tests.servers import free_port

_RAY = str(Path(sys.executable).with_name("ray"))


@pytest.fixture(scope="module")
def ray_head() -> Iterator[dict[str, str]]:
    """A Ray head of two CPUs; gives the environment in which `ray job` reaches it."""
    dashboard, token = free_port(), secrets.token_hex(32)
    env = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "RAY_ADDRESS": ""}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"  # the job says just `python`
    # Ray's sockets lie in its temporary folder, and a socket's path has 107 characters at most: not under tmp_path.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        head = subprocess.Popen(
            [
                *(_RAY, "start", "--head", "--block", "--num-cpus=2", f"--port={free_port()}", f"--temp-dir={folder}"),
                *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", "--disable-usage-stats"),
                f"--dashboard-agent-listen-port={free_port()}",  # the usual one is that of the tests' own Ray
            ],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
        try:
            _wait_for_job_server(f"http://127.0.0.1:{dashboard}/api/version", token, head)
            yield {**env, "RAY_ADDRESS": f"http://127.0.0.1:{dashboard}"}
        finally:
            head.send_signal(signal.SIGTERM)  # --block ends the node's processes with itself
            with contextlib.suppress(subprocess.TimeoutExpired):
                head.communicate(timeout=20)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(head.pid, signal.SIGKILL)
            head.communicate()


def _submit(env: dict[str, str], job: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    deadline = time.monotonic() + 120
    while True:
        submitted = subprocess.run(
            [_RAY, "job", "submit", "--working-dir", ".", "--", "python", f"jobs/{job}.py", *map(str, arguments)],
            env=env,
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        # The job server answers before it can take a job.
        if "No available agent" not in submitted.stderr or time.monotonic() > deadline:
            return submitted
        time.sleep(2)


def test_a_submitted_job_scans_and_a_failed_one_says_why(
    ray_head: dict[str, str], tmp_path: Path, tiny_weights: Path
) -> None:
    write_pictures(tmp_path / "in", 12)

    done = _submit(ray_head, "scan", tmp_path / "in", "--output", tmp_path / "run", "--weights", tiny_weights)
    failed = _submit(ray_head, "scan", tmp_path / "nowhere", "--output", tmp_path / "run2", "--weights", tiny_weights)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "12/12 images (100%), 0 failed" in done.stdout
    assert "succeeded" in done.stdout + done.stderr
    assert read_results(tmp_path / "run")["status"].tolist() == ["ok"] * 12
    assert failed.returncode != 0
    assert "error: " in failed.stdout
    assert "No such file or directory" in failed.stdout
    assert not (tmp_path / "run2").exists()


def test_a_submitted_job_trains_two_workers_on_real_images(
    ray_head: dict[str, str], dev_data: Path, tmp_path: Path
) -> None:
    recipe = [
        "--preset",
        "crop",
        "--crop-px",
        "64",
        "--train-batch-size",
        "16",
        "--epochs",
        "1",
        "--validation-share",
        "0.3",
    ]

    done = _submit(
        ray_head,
        "train",
        dev_data / "dev" / "forensynths_mini",
        "--output",
        tmp_path / "run",
        "--workers",
        "2",
        *recipe,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert "Epoch 1: loss 0." in done.stdout
    checkpoint = load_checkpoint((tmp_path / "run" / "checkpoints" / "best.safetensors").read_bytes())
    assert checkpoint.metadata.preprocess == "crop256"
    assert {row["set"] for row in checkpoint.metadata.training["data"]} == {"forensynths_mini"}


def _wait_for_job_server(url: str, token: str, head: subprocess.Popen[bytes]) -> None:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and head.poll() is None:
        try:
            with urllib.request.urlopen(request, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    output = head.communicate()[0].decode() if head.poll() is not None else "it is running"
    raise RuntimeError(f"the Ray head did not answer at {url}: {output[-2000:]}")
