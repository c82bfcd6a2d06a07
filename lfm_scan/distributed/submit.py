"""`lfm-scan submit`: a thin layer over Ray's job server that ships this package and tells how the job really ended.

`ray job submit` needs a copy of the repository, ends with 0 for a job that was stopped and with 1 for any that failed,
and gives a job that is stopped three seconds.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import aiohttp
import ray
from ray.job_submission import JobStatus, JobSubmissionClient

import lfm_scan
from lfm_scan.distributed.session import check_reachable
from lfm_scan.errors import ConfigError, RunError

_STOP_WAIT: Final = "RAY_JOB_STOP_WAIT_TIME_S"
_STOP_WAIT_S: Final = 30
"""What a job gets to finish the shards it has begun, when it is stopped."""

_EXIT_STOPPED: Final = 143
_EXIT_FAILED: Final = 1

_FILE_OPTIONS: Final = ("--config", "--weights", "--start", "--teacher")
"""Options whose file travels with the job if it lies here."""

_RETRY_S: Final = 2.0
_PATIENCE_S: Final = 300.0
"""For which a job is followed whose server does not answer. The job goes on without us."""

_TROUBLE: Final = (RuntimeError, OSError, aiohttp.ClientError)
"""What Ray's client raises if its server does not answer, or not as it should."""


@dataclass(frozen=True)
class Job:
    """A job that was submitted.

    Attributes:
        client: Reaches its server.
        job_id: Its submission id.
        size_bytes: Of the files that were shipped with it, before they were compressed.
    """

    client: JobSubmissionClient
    job_id: str
    size_bytes: int

    @property
    def address(self) -> str:
        """Of the job server."""
        return str(self.client.get_address())


def submit(command: Sequence[str], address: str | None, runtime_env: Mapping[str, Any]) -> Job:
    """Submit a command of `lfm-scan` with this package, so that the cluster needs only what it depends on.

    Args:
        command: Its arguments, checked. A file here that --config or a checkpoint's option names goes along.
        address: Of the job server, http://host:8265. Default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or this machine.
        runtime_env: What else the job's environment needs, as Ray takes it.

    Raises:
        RunError: If there is no job server, or it does not take the job.
    """
    where = address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
    if where:
        check_reachable(where, "--address")
    try:
        client = JobSubmissionClient(address)
        with tempfile.TemporaryDirectory(prefix="lfm-scan-submit-") as folder:
            shipped = _stage(command, Path(folder))
            size_bytes = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
            job_id = client.submit_job(
                entrypoint=shlex.join(["python", "-m", "lfm_scan", *shipped]),
                runtime_env=_environment(runtime_env, folder),
            )
    except (*_TROUBLE, ValueError, ray.exceptions.RayError) as exc:
        raise RunError(f"cannot submit to {where or 'this machine'}: {_first_line(exc)}") from exc
    return Job(client, job_id, size_bytes)


def follow(job: Job, show: Callable[[str], object]) -> int:
    """Show a job's log until it ends, through any loss of connection, and return its exit code.

    Args:
        job: To follow.
        show: Takes the next piece of its log.

    Returns:
        That of its command; 143 if it was stopped, 1 if it never ran.

    Raises:
        RunError: If the job server does not answer for five minutes.
    """
    return asyncio.run(_follow(job, show))


async def _follow(job: Job, show: Callable[[str], object]) -> int:
    num_shown, heard = 0, time.monotonic()
    while True:
        num_seen = 0
        try:
            # A log is told from its beginning each time.
            async for text in job.client.tail_job_logs(job.job_id):
                if num_seen + len(text) > num_shown:
                    show(text[max(0, num_shown - num_seen) :])
                num_seen += len(text)
                num_shown, heard = max(num_shown, num_seen), time.monotonic()
            info = job.client.get_job_info(job.job_id)
            heard = time.monotonic()
            if info.status.is_terminal():
                return _exit_code(info, show)
        except _TROUBLE as exc:
            if time.monotonic() - heard > _PATIENCE_S:
                raise RunError(
                    f"the job server at {job.address} has not answered for {_PATIENCE_S:.0f} s ({_first_line(exc)}); "
                    f"job {job.job_id} may go on without us: ray job status {job.job_id} --address {job.address}"
                ) from exc
        await asyncio.sleep(_RETRY_S)


def _exit_code(info: Any, show: Callable[[str], object]) -> int:  # noqa: ANN401 - Ray's JobDetails
    if info.status == JobStatus.SUCCEEDED:
        return 0
    if info.status == JobStatus.STOPPED:
        return _EXIT_STOPPED
    if not info.driver_exit_code:
        show(f"{info.message or 'the job failed'}\n")  # it never ran, so its log does not say why
        return _EXIT_FAILED
    # A command that was killed by a signal has its negative number.
    return int(info.driver_exit_code) if info.driver_exit_code > 0 else 128 - int(info.driver_exit_code)


def _stage(command: Sequence[str], folder: Path) -> list[str]:
    """Put what the job needs into a folder; return its command with the names that its files have there."""
    package = Path(lfm_scan.__file__).parent
    shutil.copytree(package, folder / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    shipped = list(command)
    for index, token in enumerate(shipped):
        option, equals, value = token.partition("=")
        if option in _FILE_OPTIONS and equals:
            shipped[index] = f"{option}={_ship(value, option, folder)}"
        elif index and shipped[index - 1] in _FILE_OPTIONS:
            shipped[index] = _ship(token, shipped[index - 1], folder)
    return shipped


def _ship(name: str, option: str, folder: Path) -> str:
    """Copy a local file into the folder and return its name there; what is no local file stays as it is."""
    path = Path(name).expanduser()
    if not path.is_file():
        return name
    copied = f"{option.removeprefix('--')}{path.suffix}"
    shutil.copyfile(path, folder / copied)
    return copied


def _environment(runtime_env: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """Return the job's runtime environment.

    Raises:
        ConfigError: If the user's names another working directory.
    """
    if "working_dir" in runtime_env:
        raise ConfigError("--runtime-env: must not name a working_dir, the job runs in one with this package")
    variables = {_STOP_WAIT: str(_STOP_WAIT_S), **(runtime_env.get("env_vars") or {})}
    return {**runtime_env, "working_dir": folder, "env_vars": variables}


def _first_line(exc: BaseException) -> str:
    return (str(exc).strip().splitlines() or [type(exc).__name__])[0]
