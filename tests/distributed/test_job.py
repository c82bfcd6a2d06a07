"""Jobs on a real head with its job server and token authentication, over a real S3 store."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import duckdb
import pandas as pd
import pytest
from ray._private.runtime_env.packaging import create_package
from ray.job_submission import JobStatus

from lfm_scan import read_results
from lfm_scan.cli.main import main
from lfm_scan.distributed import submit
from lfm_scan.distributed.stopping import drain_s
from lfm_scan.errors import RunError
from lfm_scan.model import load_checkpoint
from tests.distributed.target import make_target
from tests.faults import FaultProxy, Request
from tests.images import write_pictures
from tests.scanning import REPOSITORY, command
from tests.servers import S3Server, free_port

_RAY = str(Path(sys.executable).with_name("ray"))
_NUM_PICTURES = 60
_FIRST_HELD = 20


@pytest.fixture(scope="module")
def ray_head(s3_server: S3Server) -> Iterator[dict[str, str]]:
    """A Ray head of two CPUs whose jobs may use the S3 server; gives the environment in which `ray job` reaches it."""
    dashboard, token = free_port(), secrets.token_hex(32)
    env = {**os.environ, **s3_server.env, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "RAY_ADDRESS": ""}
    env["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = "0"  # nothing on it is worth waiting for
    env["RAY_JOB_STOP_WAIT_TIME_S"] = "12"  # usually 3, too few for a goodbye on a busy machine
    env["PYTHONFAULTHANDLER"] = "1"  # a job that crashes leaves nothing but its log
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
    deadline = time.monotonic() + 500
    while True:
        submitted = subprocess.run(
            [_RAY, "job", "submit", "--working-dir", ".", "--", "python", f"jobs/{job}.py", *map(str, arguments)],
            env=env,
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )
        # The job server answers before it can take a job.
        if "No available agent" not in submitted.stderr or time.monotonic() > deadline:
            return submitted
        time.sleep(2)


def _start(env: dict[str, str], *arguments: object) -> subprocess.Popen[str]:
    """Start `lfm-scan submit` as a user does, in a terminal of its own."""
    return subprocess.Popen(
        command("submit", "--", *arguments),
        env=env,
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )


def _ask(env: dict[str, str], path: str) -> Any:  # noqa: ANN401 - JSON
    request = urllib.request.Request(
        f"{env['RAY_ADDRESS']}/api/jobs/{path}", headers={"Authorization": f"Bearer {env['RAY_AUTH_TOKEN']}"}
    )
    with urllib.request.urlopen(request, timeout=30) as reply:
        return json.load(reply)


def _job_id(submitted: str) -> str:
    found = re.search(r"Job (raysubmit_\w+) was submitted", submitted)
    assert found is not None, submitted
    return found[1]


def _last_line(log: str) -> dict[str, Any]:
    """Return what the last line of a job's log says; Ray's own command says more after it."""
    [*_, last] = [line for line in log.splitlines() if line.startswith("{")]
    return dict(json.loads(last))


def test_a_submitted_job_scans_and_ends_its_log_with_a_line_for_programs(
    ray_head: dict[str, str], tmp_path: Path, tiny_weights: Path
) -> None:
    write_pictures(tmp_path / "in", 12)

    done = _submit(ray_head, "scan", tmp_path / "in", "--output", tmp_path / "run", "--weights", tiny_weights)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "12/12 images (100%), 0 failed" in done.stdout
    assert "succeeded" in done.stdout + done.stderr
    assert read_results(tmp_path / "run")["status"].tolist() == ["ok"] * 12
    told = _last_line(done.stdout)
    assert (told["state"], told["exit_code"], told["error"]) == ("finished", 0, None)
    assert (told["num_rows"], told["num_rows_done"], told["by_status"]) == (12, 12, {"ok": 12})
    assert told["results"] == f"{tmp_path}/run/results"


def test_a_job_with_too_many_failures_has_failed_and_submit_ends_with_its_code(
    ray_head: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "scan.toml").write_text("max_failure_rate = 0.0\n")

    submitted = _start(
        ray_head, "scan", tmp_path / "in", "--output", tmp_path / "run", "--config", tmp_path / "scan.toml"
    )
    stdout, stderr = submitted.communicate(timeout=500)

    assert submitted.returncode == 3, stdout + stderr
    assert "error: 1 of 1 images failed, more than --max-failure-rate 0 allows" in stdout
    assert json.loads(stdout.splitlines()[-1])["exit_code"] == 3
    job = _ask(ray_head, _job_id(stderr))
    assert (job["status"], job["driver_exit_code"]) == ("FAILED", 3)


def test_a_job_that_is_stopped_midway_goes_on_when_it_is_submitted_again(
    ray_head: dict[str, str], s3_server: S3Server, s3_bucket: str, tiny_weights: Path, tmp_path: Path
) -> None:
    target = make_target(s3_server, s3_bucket, tiny_weights, _NUM_PICTURES, shard_size=2)
    scan = ("scan", f"s3://{s3_bucket}/in/", "--output", target.uri("run"), "--weights", tiny_weights)

    def reads_from(first: int, request: Request) -> bool:
        name = re.search(r"in/(\d+)\.png", request.path)
        return request.method == "GET" and name is not None and int(name[1]) >= first

    with FaultProxy(s3_server.endpoint_url) as proxy:
        here = ("--endpoint-url", proxy.endpoint_url, "--shard-size", 2)
        never = proxy.hold(partial(reads_from, 2 * _FIRST_HELD))  # or a run might end before the signal reaches it
        with proxy.hold(partial(reads_from, _FIRST_HELD)) as held:
            first = _start(ray_head, *scan, *here)
            held.wait()
            [job] = [job for job in _ask(ray_head, "") if job["status"] == "RUNNING"]
            stop = [_RAY, "job", "stop", "--no-wait", job["submission_id"]]
            subprocess.run(stop, env=ray_head, capture_output=True, timeout=500, check=True)
            time.sleep(3)  # for the signal: shards that are begun are finished, and no others begin
        stdout, stderr = first.communicate(timeout=500)
        never.release()
        assert first.returncode == 143, stdout + stderr
        assert _ask(ray_head, job["submission_id"])["status"] == "STOPPED"
        told = json.loads(stdout.splitlines()[-1])
        num_done = 2 * target.num_parts("run")
        assert 0 < num_done < _NUM_PICTURES
        assert (told["state"], told["exit_code"], told["num_rows"]) == ("stopped", 143, _NUM_PICTURES)
        assert f"Scanning {_NUM_PICTURES} images in 30 shards" in stdout
        assert f"Interrupted. {told['num_rows_done']} of {_NUM_PICTURES} images are done and safe" in stdout

        second = _start(ray_head, *scan, *here)
        assert second.stdout is not None
        log = "".join(
            iter(second.stdout.readline, f"Going on: {num_done} of {_NUM_PICTURES} images are done already\n")
        )
        os.killpg(second.pid, signal.SIGINT)
        _, stderr = second.communicate(timeout=500)
        assert second.returncode == 130, log + stderr
        assert "The job goes on without us." in stderr
        job_id = _job_id(stderr)
        while _ask(ray_head, job_id)["status"] == "RUNNING":
            time.sleep(0.2)
    told = json.loads(_ask(ray_head, f"{job_id}/logs")["logs"].splitlines()[-1])
    assert (told["state"], told["exit_code"], told["by_status"]) == ("finished", 0, {"ok": _NUM_PICTURES})

    names = sorted(f"s3://{s3_bucket}/in/{index:04}.png" for index in range(_NUM_PICTURES))
    with_pandas = pd.read_parquet(told["results"], storage_options={"endpoint_url": s3_server.endpoint_url})
    assert sorted(with_pandas["uri"]) == names
    client = s3_server.client()
    for found in client.list_objects_v2(Bucket=s3_bucket, Prefix="run/results/")["Contents"]:
        client.download_file(s3_bucket, found["Key"], str(tmp_path / Path(found["Key"]).name))
    with_duckdb = duckdb.execute(f"SELECT uri, status FROM '{tmp_path}/*.parquet' ORDER BY uri").fetchall()
    assert with_duckdb == [(name, "ok") for name in names]


def test_wrong_arguments_are_found_before_anything_is_uploaded(capsys: pytest.CaptureFixture[str]) -> None:
    nobody = ["submit", "--address", f"http://127.0.0.1:{free_port()}"]

    assert main([*nobody, "--", "scan", "s3://in/", "--outptu", "s3://out/"]) == 2
    captured = capsys.readouterr()
    assert "Did you mean --output?" in captured.out + captured.err
    assert main([*nobody, "--", "status", "s3://run"]) == 2
    assert "submit: give scan or train" in capsys.readouterr().err
    assert main([*nobody, "--", "scan", "s3://in/", "--output", "runs/1"]) == 2
    assert "submit: runs/1 is a relative path" in capsys.readouterr().err
    assert main([*nobody, "--", "scan", "s3://in/", "--output", "s3://out/"]) == 1
    assert f"no Ray cluster answers at {nobody[-1]} (Connection refused): check --address" in capsys.readouterr().err


class _Client:
    """A job server whose connection breaks off twice; it tells a log from its beginning each time."""

    def __init__(self, **info: object) -> None:
        self._tries = iter((["a\n", "b"], ["a\nb", "b\n"], ["a\n", "bb\nc\n"]))
        self._states = iter((JobStatus.RUNNING, info.pop("status")))
        self._info = info

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        pieces = next(self._tries)
        for piece in pieces:
            yield piece
        if pieces[0] == "a\nb":
            raise RuntimeError("WebSocket connection closed unexpectedly")

    def get_job_info(self, job_id: str) -> SimpleNamespace:
        return SimpleNamespace(status=next(self._states), message=None, driver_exit_code=None, **self._info)


def test_a_log_is_shown_once_however_often_the_connection_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "_RETRY_S", 0)
    shown: list[str] = []

    code = submit.follow(submit.Job(_Client(status=JobStatus.SUCCEEDED), "job", 0), shown.append)  # type: ignore[arg-type]

    assert (code, "".join(shown)) == (0, "a\nbb\nc\n")


@pytest.mark.parametrize(
    ("status", "driver_exit_code", "expected"),
    [
        (JobStatus.SUCCEEDED, 0, 0),
        (JobStatus.STOPPED, None, 143),
        (JobStatus.FAILED, 3, 3),
        (JobStatus.FAILED, -9, 137),
        (JobStatus.FAILED, None, 1),
    ],
)
def test_a_job_ends_with_the_code_of_its_command(
    status: JobStatus, driver_exit_code: int | None, expected: int
) -> None:
    shown: list[str] = []
    info = SimpleNamespace(status=status, driver_exit_code=driver_exit_code, message="no such image")

    assert submit._exit_code(info, shown.append) == expected
    assert shown == (["no such image\n"] if expected == 1 else [])


def test_a_job_server_that_falls_silent_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "_RETRY_S", 0)
    monkeypatch.setattr(submit, "_PATIENCE_S", 0)

    class Silent:
        def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
            raise ConnectionError("nobody there")

        def get_address(self) -> str:
            return "http://head:8265"

    with pytest.raises(RunError, match=r"nobody there.*ray job status job-1 --address http://head:8265"):
        asyncio.run(submit._follow(submit.Job(Silent(), "job-1", 0), print))  # type: ignore[arg-type]


def test_a_job_leaves_the_shards_it_began_less_time_than_it_has_itself() -> None:
    job = {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}

    assert drain_s({}) == 20
    assert drain_s(job) == 1
    assert drain_s({**job, "RAY_JOB_STOP_WAIT_TIME_S": "30"}) == 20
    assert drain_s({**job, "RAY_JOB_STOP_WAIT_TIME_S": "12"}) == 10
    assert drain_s({**job, "RAY_JOB_STOP_WAIT_TIME_S": "0"}) == 0


def test_what_is_uploaded_with_a_job_is_small_and_has_no_history(tmp_path: Path) -> None:
    package = tmp_path / "package.zip"
    create_package(str(REPOSITORY), package, include_gitignore=True)

    with zipfile.ZipFile(package) as archive:
        folders = {name.split("/")[0] for name in archive.namelist() if "/" in name}
    assert folders == {"jobs", "lfm_scan"}
    assert package.stat().st_size < 6 * 2**20


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
    told = _last_line(done.stdout)
    assert (told["state"], told["exit_code"], told["epoch"], told["best_epoch"]) == ("finished", 0, 1, 1)
    assert told["checkpoint"] == f"{tmp_path}/run/checkpoints/best.safetensors"
    checkpoint = load_checkpoint((tmp_path / "run" / "checkpoints" / "best.safetensors").read_bytes())
    assert checkpoint.metadata.preprocess == "crop256"
    assert {row["set"] for row in checkpoint.metadata.training["data"]} == {"forensynths_mini"}


def _wait_for_job_server(url: str, token: str, head: subprocess.Popen[bytes]) -> None:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    deadline = time.monotonic() + 500
    while time.monotonic() < deadline and head.poll() is None:
        try:
            with urllib.request.urlopen(request, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    output = head.communicate()[0].decode() if head.poll() is not None else "it is running"
    raise RuntimeError(f"the Ray head did not answer at {url}: {output[-2000:]}")
