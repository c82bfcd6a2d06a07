"""`lfm-scan`: arguments in, exit code out.

Exit codes: 0 done; 1 the run failed; 2 wrong arguments; 3 more images failed than --max-failure-rate allows, or none
could be scored; 130 interrupted, 143 terminated, both safe to resume.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Final

import cyclopts.config
from cyclopts import App, CycloptsError, Parameter

from lfm_scan import logs
from lfm_scan.bench.config import BenchConfig
from lfm_scan.config import ScanConfig
from lfm_scan.errors import ConfigError, FailureRateError, LFMScanError
from lfm_scan.estimate.config import EstimateConfig
from lfm_scan.options import StorageConfig
from lfm_scan.synth.config import SynthConfig
from lfm_scan.training.config import TrainConfig
from lfm_scan.version import __version__

if TYPE_CHECKING:
    from lfm_scan.cli.report import Ending
    from lfm_scan.cli.training import TrainEnding

EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_FAILURE_RATE: Final = 3

_MAX_ERROR_CHARS: Final = 4000

_EXIT_CODES: Final[dict[type[LFMScanError], int]] = {ConfigError: EXIT_USAGE, FailureRateError: EXIT_FAILURE_RATE}
_CONFIG_READERS: Final[dict[str, Callable[..., Any]]] = {
    ".toml": cyclopts.config.Toml,
    ".json": cyclopts.config.Json,
    ".yaml": cyclopts.config.Yaml,
    ".yml": cyclopts.config.Yaml,
}

app = App(
    name="lfm-scan",
    version=__version__,
    help="Find AI-generated images in object storage: LFM on Ray Data, one Parquet row an image.",
    help_format="plaintext",  # a glob in a help text is no emphasis
    default_parameter=Parameter(negative=(), show_default=lambda value: "none" if value == () else value),
)


@app.command(name="scan")
def scan_command(
    config: Annotated[ScanConfig, Parameter(name="*")],
    *,
    config_file: Annotated[Path | None, Parameter(name="--config")] = None,
    json_summary: bool = False,
    debug: bool = False,
) -> int:
    """Score every image of the sources and write one Parquet row for each.

    A scan that was interrupted goes on when the command is repeated; a finished one is left alone. Lossy and resized
    images are scored, but marked as not assessable if the checkpoint cannot tell: see docs/results.md.

    Args:
        config: Sources and settings.
        config_file: TOML, YAML or JSON file with the same names as the options; options win.
        json_summary: End standard output with one line of JSON, however the scan ends. Jobs always do.
        debug: Show tracebacks and what Ray says.
    """
    from lfm_scan.cli.events import json_on_stderr
    from lfm_scan.cli.report import Ending
    from lfm_scan.cli.text import print_json_line

    del config_file  # read in `main`, before the arguments were
    ending, is_text = Ending(), config.log_format == "text"
    with contextlib.nullcontext() if is_text else json_on_stderr():
        try:
            ending.exit_code = _scan(config, ending, debug=debug)
        except Exception as exc:
            if debug or (is_text and not json_summary):
                raise
            ending.exit_code, ending.error = _explain(exc), str(exc)
    if json_summary:
        print_json_line(ending.to_json())
    return ending.exit_code


def _scan(config: ScanConfig, ending: Ending, *, debug: bool) -> int:
    """Scan, show how it goes, note how it ends, and return the exit code."""
    # Late, so that --help is quick: this loads ray.
    from lfm_scan.cli.events import ScanEvents, log_left_alone
    from lfm_scan.cli.progress import ScanProgress
    from lfm_scan.cli.quiet import stderr_in_log
    from lfm_scan.cli.report import print_outcome
    from lfm_scan.distributed.scan import scan
    from lfm_scan.distributed.stopping import GracefulStop

    with stderr_in_log(enabled=not debug) as terminal:
        progress = ending.progress = ScanProgress(terminal) if config.log_format == "text" else ScanEvents()
        stop = GracefulStop()
        try:
            with _on_terminate(stop.request), progress:
                outcome = scan(config, progress, stop=stop, debug=debug)
        except KeyboardInterrupt as exc:
            progress.print_interrupted()
            return exc.args[0] if exc.args else 128 + signal.SIGINT
    ending.outcome = outcome
    if config.log_format == "text":
        print_outcome(outcome, config)
    elif outcome.already_finished:
        log_left_alone(outcome)
    summary = outcome.summary
    if summary.num_failed > config.max_failure_rate * summary.num_rows:
        _print_error(
            f"{summary.num_failed:,} of {summary.num_rows:,} images failed, more than --max-failure-rate "
            f"{config.max_failure_rate:g} allows; the column `error` of the results says why"
        )
        return EXIT_FAILURE_RATE
    if not summary.num_scored and summary.num_failed:
        _print_error("no image could be scored; the column `error` of the results says why")
        return EXIT_FAILURE_RATE
    return 0


@app.command(name="train")
def train_command(
    config: Annotated[TrainConfig, Parameter(name="*")],
    *,
    config_file: Annotated[Path | None, Parameter(name="--config")] = None,
    json_summary: bool = False,
    debug: bool = False,
) -> int:
    """Train LFM on labelled images and write checkpoints that `lfm-scan scan --weights` takes.

    A training that was interrupted goes on when the command is repeated, from its last saved state, and ends with the
    weights it would have had without the interruption. See docs/training.md.

    Args:
        config: Data and settings.
        config_file: TOML, YAML or JSON file with the same names as the options; options win.
        json_summary: End standard output with one line of JSON, however the training ends. Jobs always do.
        debug: Show tracebacks and what Ray says.
    """
    from lfm_scan.cli.text import print_json_line
    from lfm_scan.cli.training import TrainEnding

    del config_file  # read in `main`
    ending = TrainEnding(config)
    try:
        ending.exit_code = _train(config, ending, debug=debug)
    except Exception as exc:
        if debug or not json_summary:
            raise
        ending.exit_code, ending.error = _explain(exc), str(exc)
    if json_summary:
        print_json_line(ending.to_json())
    return ending.exit_code


def _train(config: TrainConfig, ending: TrainEnding, *, debug: bool) -> int:
    """Train, show how it goes, note how it ends, and return the exit code."""
    from lfm_scan.cli.quiet import stderr_in_log
    from lfm_scan.cli.training import TrainProgress, print_training
    from lfm_scan.distributed.train import train

    with stderr_in_log(enabled=not debug) as terminal:
        progress = TrainProgress(terminal)
        try:
            with _on_terminate(_interrupt), progress:
                ending.outcome = train(config, progress, debug=debug)
        except KeyboardInterrupt as exc:
            progress.print_interrupted()
            return exc.args[0] if exc.args else 128 + signal.SIGINT
    print_training(ending.outcome)
    return 0


@app.command(name="synth")
def synth_command(
    config: Annotated[SynthConfig, Parameter(name="*")],
    *,
    config_file: Annotated[Path | None, Parameter(name="--config")] = None,
    debug: bool = False,
) -> int:
    """Make aligned pairs to train on: crops of photographs, and the same crops drawn again by upsampling networks.

    Content, format and size are equal in both classes, so that only the pixels tell them apart. What was interrupted
    goes on when the command is repeated. See docs/synth.md.

    Args:
        config: Photographs and settings.
        config_file: TOML, YAML or JSON file with the same names as the options; options win.
        debug: Show tracebacks.
    """
    from lfm_scan.cli.synth import SynthProgress, print_pairs
    from lfm_scan.synth.generate import synthesise

    del config_file, debug  # read in `main`
    progress = SynthProgress(sys.stderr)
    try:
        with _on_terminate(_interrupt), progress:
            outcome = synthesise(config, progress)
    except KeyboardInterrupt as exc:
        progress.print_interrupted()
        return exc.args[0] if exc.args else 128 + signal.SIGINT
    print_pairs(outcome)
    return 0


@app.command(name="estimate")
def estimate_command(
    config: Annotated[EstimateConfig, Parameter(name="*")],
    *,
    json_file: Annotated[Path | None, Parameter(name="--json")] = None,
    config_file: Annotated[Path | None, Parameter(name="--config")] = None,
    debug: bool = False,
) -> int:
    """Say what a scan will take before anybody pays for it: time, core- and GPU-hours, requests, bytes, cost.

    All inputs are listed, as by the scan; a sample of them is fetched, decoded and scored here. See docs/estimate.md.

    Args:
        config: Sources, machines and prices.
        json_file: Write the figures there too, for programs.
        config_file: TOML, YAML or JSON file with the same names as the options; options win.
        debug: Show tracebacks.
    """
    from lfm_scan.cli.estimate import EstimateProgress, print_estimate, write_json
    from lfm_scan.estimate.estimate import estimate

    del config_file, debug  # read in `main`
    _check_writable(json_file)
    try:
        with EstimateProgress(sys.stderr) as progress:
            found = estimate(config, progress)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    if json_file is not None:
        write_json(found, json_file)
    print_estimate(found)
    return 0


@app.command(name="bench")
def bench_command(
    config: Annotated[BenchConfig, Parameter(name="*")] = BenchConfig(),  # noqa: B008 - it never changes
    *,
    json_file: Annotated[Path | None, Parameter(name="--json")] = None,
    debug: bool = False,
) -> int:
    """Measure this machine: each stage of a scan alone, a whole scan, what holds it back, and what to add.

    It takes a minute or two and should have the machine to itself. See docs/estimate.md.

    Args:
        config: With which images, and for how long.
        json_file: Write the figures there too, for programs.
        debug: Show tracebacks and what Ray says.
    """
    from lfm_scan.bench.bench import bench
    from lfm_scan.cli.bench import BenchProgress, print_bench, time_scan, write_json
    from lfm_scan.cli.quiet import stderr_in_log

    _check_writable(json_file)
    try:
        with stderr_in_log(enabled=not debug) as terminal:
            found = bench(config, functools.partial(time_scan, debug=debug), BenchProgress(terminal))
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    if json_file is not None:
        write_json(found, json_file)
    print_bench(found)
    return 0


@app.command(name="submit")
def submit_command(
    *command: str,
    address: str | None = None,
    runtime_env: Path | None = None,
    no_wait: bool = False,
    debug: bool = False,
) -> int:
    """Run a scan or a training on a Ray cluster: lfm-scan submit --address http://head:8265 -- scan s3://in/ -o s3://out/1.

    This package goes along, and a file that --config or --weights names; the cluster needs what it depends on. The
    job's log is followed, through any loss of connection, and its exit code is this command's; 143 if it was stopped.
    Ctrl-C ends the following and not the job. A token is taken as `ray job submit` takes it: RAY_AUTH_MODE=token and
    RAY_AUTH_TOKEN.

    Args:
        command: After two hyphens, scan or train with its arguments.
        address: Of the job server. Default: RAY_API_SERVER_ADDRESS or RAY_ADDRESS, else this machine.
        runtime_env: YAML file with what else the job's environment needs, as Ray takes it: env_vars, pip.
        no_wait: Submit, say how to follow, and end.
        debug: Show tracebacks.
    """
    from lfm_scan.cli.submit import check_command, read_runtime_env, submit_and_follow

    del debug  # read in `main`
    check_command(app, command, _config_providers(command))
    return submit_and_follow(command, address, read_runtime_env(runtime_env), wait=not no_wait)


@app.command(name="status")
def status_command(
    run_dir: str,
    *,
    as_json: Annotated[bool, Parameter(name="--json")] = False,
    storage: Annotated[StorageConfig | None, Parameter(name="*", group="Object store")] = None,
    debug: bool = False,
) -> int:
    """Say how a run is doing: who works on it, how far it is, and what failed.

    It is read from the run directory alone, on any machine that can read it. The exit code is 0 whatever the run's
    state, and 1 if it cannot be read.

    Args:
        run_dir: Run directory, local or s3://.
        as_json: Print one JSON object, for programs.
        storage: How to reach S3.
        debug: Show tracebacks.
    """
    from lfm_scan.cli.status import print_state, print_state_as_json
    from lfm_scan.runs.rundir import RunDirectory
    from lfm_scan.runs.state import read_state

    del debug  # read in `main`
    state = read_state(RunDirectory.at(run_dir, storage or StorageConfig(), patient=False))
    (print_state_as_json if as_json else print_state)(state)
    return 0


@app.command(name="runs")
def runs_command(
    prefix: str,
    *,
    as_json: Annotated[bool, Parameter(name="--json")] = False,
    storage: Annotated[StorageConfig | None, Parameter(name="*", group="Object store")] = None,
    debug: bool = False,
) -> int:
    """List the runs directly under a prefix, the latest first: state, progress, failures, and who works on them.

    It is read from the store alone. The exit code is 0 whatever there is, and 1 if the prefix cannot be listed.

    Args:
        prefix: Folder that holds run directories, local or s3://.
        as_json: Print one JSON object, for programs.
        storage: How to reach S3.
        debug: Show tracebacks.
    """
    from lfm_scan.cli.runs import print_runs, print_runs_as_json
    from lfm_scan.runs.catalogue import find_runs
    from lfm_scan.runs.rundir import RunDirectory

    del debug  # read in `main`
    found = find_runs(RunDirectory.at(prefix, storage or StorageConfig(), patient=False))
    (print_runs_as_json if as_json else print_runs)(found)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    # What comes after two hyphens is the business of the command that is submitted.
    own = tokens[: tokens.index("--")] if "--" in tokens else tokens
    debug = "--debug" in own
    try:
        app.config = _config_providers(own)
        result: Any = app(tokens, exit_on_error=False, result_action="return_value")
    except CycloptsError:
        return EXIT_USAGE  # cyclopts has said what is wrong
    except Exception as exc:
        if debug:
            raise
        return _explain(exc)
    return result if isinstance(result, int) else 0


def _explain(exc: Exception) -> int:
    """Print in one line what went wrong, and return the exit code."""
    if isinstance(exc, LFMScanError):
        _print_error(str(exc))
        return next((code for kind, code in _EXIT_CODES.items() if isinstance(exc, kind)), EXIT_FAILED)
    lines = str(exc).strip().splitlines() or [""]
    _print_error(f"unexpected {type(exc).__name__}: {lines[-1]} (--debug shows where)")
    return EXIT_FAILED


def _config_providers(tokens: Sequence[str]) -> tuple[Any, ...]:
    """Return what reads the --config file, if the arguments name one.

    Raises:
        ConfigError: If there is no such file, or it has an unknown type.
    """
    name = next((after for option, after in itertools.pairwise(tokens) if option == "--config"), None)
    name = next((option.removeprefix("--config=") for option in tokens if option.startswith("--config=")), name)
    if name is None:
        return ()
    reader = _CONFIG_READERS.get(Path(name).suffix.lower())
    if reader is None:
        raise ConfigError(f"--config {name}: must end in {', '.join(_CONFIG_READERS)}")
    if not Path(name).is_file():
        raise ConfigError(f"--config {name}: no such file")
    return (reader(name, use_commands_as_keys=False),)


def _check_writable(json_file: Path | None) -> None:
    """Find out before the work, not after it.

    Raises:
        ConfigError: If no file can be there.
    """
    if json_file is not None and (json_file.is_dir() or not json_file.absolute().parent.is_dir()):
        raise ConfigError(f"--json {json_file}: names a folder, or lies in one that does not exist")


@contextlib.contextmanager
def _on_terminate(request: Callable[[int], None]) -> Iterator[None]:
    """Pass on SIGTERM, which a spot machine or a scheduler sends before it takes the machine away."""

    def handle(signum: int, frame: FrameType | None) -> None:
        request(signum)

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(signum: int) -> None:
    raise KeyboardInterrupt(128 + signum)


def _print_error(message: str) -> None:
    if logs.is_structured():
        logs.event("error", logging.ERROR, message=logs.one_line(message, max_chars=_MAX_ERROR_CHARS))
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(Text("error: ", style="bold red") + Text(" ".join(message.split(os.linesep)), style="default"))
