"""What `lfm-scan submit` does besides Ray's part: it checks the command here, and says how to go on."""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import yaml
from cyclopts import App
from rich.console import Console

from lfm_scan.cli.text import byte_size
from lfm_scan.config import ScanConfig
from lfm_scan.errors import ConfigError
from lfm_scan.training.config import TrainConfig

_COMMANDS: Final = ("scan", "train")


def check_command(app: App, command: Sequence[str], config_providers: tuple[Any, ...]) -> None:
    """Find wrong arguments here, before anything is uploaded.

    Args:
        app: The command line.
        command: To be submitted.
        config_providers: What reads its --config file.

    Raises:
        ConfigError: If it is not a command that makes sense as a job, or names a path that means nothing there.
        CycloptsError: If its arguments are wrong; it is printed.
    """
    if not command or command[0] not in _COMMANDS:
        raise ConfigError(
            f"submit: give {' or '.join(_COMMANDS)} with its arguments after two hyphens: "
            "lfm-scan submit -- scan s3://in/ --output s3://out/1"
        )
    app.config = config_providers
    _, bound, _ = app.parse_args(list(command), exit_on_error=False, print_error=True)
    config: ScanConfig | TrainConfig = bound.arguments["config"]
    validation = config.validation if isinstance(config, TrainConfig) else ()
    for name in (*config.sources, *validation, config.output):
        if "://" not in name and not name.startswith("/"):
            raise ConfigError(
                f"submit: {name} is a relative path, and a job runs in a folder of its own that is thrown away: give a "
                "URI, or a whole path to what all nodes share"
            )


def read_runtime_env(path: Path | None) -> dict[str, Any]:
    """Return what a YAML file says of the job's environment; nothing without a file.

    Raises:
        ConfigError: If it cannot be read, or is no mapping.
    """
    if path is None:
        return {}
    try:
        found = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as exc:
        raise ConfigError(f"--runtime-env {path}: {' '.join(str(exc).split())}") from exc
    if not isinstance(found, dict):
        raise ConfigError(f"--runtime-env {path}: must be a mapping, such as env_vars: {{NAME: value}}")
    return found


def submit_and_follow(command: Sequence[str], address: str | None, runtime_env: dict[str, Any], *, wait: bool) -> int:
    """Submit a command, show its log, and return its exit code; 0 at once without waiting.

    Raises:
        RunError: If the job server does not take the job, or is not heard of any more.
    """
    # Late: it loads ray.
    from lfm_scan.distributed.submit import follow, submit

    console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
    with _without_chatter():
        job = submit([command[0], "--json-summary", *command[1:]], address, runtime_env)
        where = f"{job.job_id} --address {job.address}"
        console.print(f"Job {job.job_id} was submitted to {job.address} with {byte_size(job.size_bytes)} of files")
        how = f"Follow it  ray job logs --follow {where}\nStop it    ray job stop {where}"
        if not wait:
            console.print(how)
            return 0
        try:
            return follow(job, _show)
        except KeyboardInterrupt:
            console.print(f"\nThe job goes on without us.\n{how}")
            return 128 + signal.SIGINT


@contextlib.contextmanager
def _without_chatter() -> Iterator[None]:
    """Keep Ray's client from telling of every file it ships: its loggers set their levels themselves."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(before)


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
