from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest

import lfm_scan as package
from lfm_scan.cli.main import main
from tests.images import encoded, write_pictures
from tests.scanning import lfm_scan, main_in_fresh_python
from tests.servers import S3Server, free_port

_SECONDS_TO_AN_ERROR = 150  # a promise to the user, not a speed: no error may wait for long retries


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["scan", "--help"]])
def test_help_and_version_import_neither_torch_nor_ray(arguments: list[str]) -> None:
    stdout, modules = main_in_fresh_python(*arguments)

    assert stdout.strip()
    assert not modules & {"torch", "ray", "pyarrow", "pandas", "boto3"}


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == package.__version__


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "--output", "o", "--threshold", "2"], "--threshold must be 0 to 1"),
        (["a", "--output", "o", "--batch-size", "0"], "--batch-size must be at least 1"),
        (["a", "--output", "o", "--max-image-pixels", "999999999"], "decompression bombs"),
        (["a", "--output", "o", "--endpoint-url", "localhost:9000"], "must start with http"),
        (["a", "--output", "o", "--endpoint-url", "http://key:secret@host"], "must not hold credentials"),
        (["a", "--output", "o", "--preprocess", "resize512"], "resize512"),
        (["a", "--output", "o", "--config", "/no/such.toml"], "no such file"),
        (["a"], "--output"),
        (["a", "--output", "o", "--treshold", "0.5"], "--threshold"),
    ],
)
def test_wrong_arguments_end_with_code_2_and_name_the_argument(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["scan", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err + captured.out
    assert "Traceback" not in captured.err


@pytest.mark.usefixtures("joined_ray")
def test_a_config_file_gives_defaults_and_options_win(tmp_path: Path, tiny_weights: Path) -> None:
    write_pictures(tmp_path / "in", 2)
    config = tmp_path / "scan.toml"
    config.write_text(
        f'sources = ["{tmp_path / "in"}"]\nweights = "{tiny_weights}"\nthreshold = 0.25\nmax_image_bytes = 1000000\n'
    )
    done = lfm_scan("scan", "--config", config, "--output", tmp_path / "run", "--threshold", "0.75")

    assert done.returncode == 0, done.stderr
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["config"]["threshold"] == 0.75
    assert saved["config"]["limits"]["max_image_bytes"] == 1_000_000
    assert saved["config"]["weights"] == str(tiny_weights)


def test_a_misspelt_name_in_a_config_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "scan.toml").write_text("threshhold = 0.9\n")

    assert main(["scan", "in", "--output", "out", "--config", str(tmp_path / "scan.toml")]) == 2
    assert "threshold" in capsys.readouterr().err


def test_the_summary_tells_what_happened(tmp_path: Path, tiny_weights: Path) -> None:
    write_pictures(tmp_path / "in", 8)
    (tmp_path / "in" / "notes.txt").write_text("not an image")
    (tmp_path / "in" / "cut.png").write_bytes(encoded()[:2000])
    arguments = ("scan", tmp_path / "in", "--output", tmp_path / "run", "--weights", tiny_weights)

    done = lfm_scan(*arguments)
    again = lfm_scan(*arguments)

    assert done.returncode == again.returncode == 0, done.stderr
    for text in (
        "ok 8",
        "unsupported 1",
        "truncated 1",
        "4 lossy",
        "pandas.read_parquet",
        str(tmp_path / "run/results"),
    ):
        assert text in done.stdout
    assert "10/10 images (100%), 1 failed" in done.stderr
    assert "core_worker" not in done.stderr + done.stdout  # Ray's chatter
    assert "finished before" in again.stdout
    assert "ok 8" in again.stdout


@pytest.mark.usefixtures("joined_ray")
def test_too_many_failures_end_with_code_3_and_results(tmp_path: Path, tiny_weights: Path) -> None:
    write_pictures(tmp_path / "in", 2)
    (tmp_path / "in" / "cut.png").write_bytes(encoded()[:2000])
    run_dir = tmp_path / "run"

    done = lfm_scan(
        "scan", tmp_path / "in", "--output", run_dir, "--weights", tiny_weights, "--max-failure-rate", "0.1"
    )

    assert done.returncode == 3
    assert "1 of 3 images failed" in done.stderr
    assert len(package.read_results(run_dir)) == 3


@pytest.fixture
def s3_error_arguments(s3_server: S3Server, s3_bucket: str, tiny_weights: Path) -> dict[str, list[str]]:
    s3_server.put(s3_bucket, "in/1.png", encoded())
    common = ["--weights", str(tiny_weights), "--endpoint-url", s3_server.endpoint_url]
    nobody = f"http://127.0.0.1:{free_port()}"
    return {
        "wrong endpoint": [f"s3://{s3_bucket}/in/", "--output", "OUT", *common[:2], "--endpoint-url", nobody],
        "wrong key": [f"s3://{s3_bucket}/in/", "--output", "OUT", *common],
        "missing bucket": ["s3://no-such-bucket-here/in/", "--output", "OUT", *common],
        "missing output bucket": [f"s3://{s3_bucket}/in/", "--output", "s3://no-such-bucket-here/run", *common],
        "empty prefix": [f"s3://{s3_bucket}/nothing-here/", "--output", "OUT", *common],
    }


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("wrong endpoint", "no answer from the store"),
        ("wrong key", "the store refused"),
        ("missing bucket", "the bucket does not exist"),
        ("missing output bucket", "the bucket does not exist"),
        ("empty prefix", "nothing there to scan"),
    ],
)
def test_a_wrong_store_is_one_clear_line_and_writes_nothing(
    case: str, message: str, s3_error_arguments: dict[str, list[str]], tmp_path: Path
) -> None:
    env = {"AWS_ACCESS_KEY_ID": "nobody"} if case == "wrong key" else {}
    arguments = [argument.replace("OUT", str(tmp_path / "run")) for argument in s3_error_arguments[case]]

    started = time.monotonic()
    done = lfm_scan("scan", *arguments, env=env)

    assert time.monotonic() - started < _SECONDS_TO_AN_ERROR
    _assert_one_line_error(done, message)
    assert not (tmp_path / "run").exists()


def test_wrong_local_paths_are_one_clear_line_and_write_nothing(tmp_path: Path, tiny_weights: Path) -> None:
    write_pictures(tmp_path / "in", 1)
    (tmp_path / "file").write_text("in the way")
    source, run_dir = str(tmp_path / "in"), str(tmp_path / "run")
    (tmp_path / "torn.safetensors").write_bytes(tiny_weights.read_bytes()[:1000])

    for arguments, message in [
        ([f"{tmp_path}/nowhere", "--output", run_dir, "--weights", str(tiny_weights)], "No such file or directory"),
        ([source, "--output", run_dir, "--weights", f"{tmp_path}/none.pth"], "no weights at"),
        ([source, "--output", run_dir, "--weights", f"{tmp_path}/torn.safetensors"], "damaged"),
        ([source, "--output", f"{tmp_path}/file/run", "--weights", str(tiny_weights)], "Not a directory"),
        ([source, "--output", run_dir, "--weights", str(tiny_weights), "--device", "cuda"], "do not fit"),
        (
            [source, "--output", f"{tmp_path}/r2", "--weights", str(tiny_weights), "--ray-address", "127.0.0.1:1"],
            "no Ray cluster answers",
        ),
    ]:
        done = lfm_scan("scan", *arguments)
        _assert_one_line_error(done, message)
    assert not list(Path(run_dir).glob("parts/*"))
    assert not Path(run_dir, "_SUCCESS.json").exists()


@pytest.mark.usefixtures("joined_ray")
def test_a_run_directory_of_another_scan_is_refused(tmp_path: Path, tiny_weights: Path) -> None:
    write_pictures(tmp_path / "in", 2)
    arguments = ["scan", tmp_path / "in", "--output", tmp_path / "run", "--weights", tiny_weights]
    assert lfm_scan(*arguments).returncode == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}

    done = lfm_scan(*arguments, "--preprocess", "resize256")

    _assert_one_line_error(done, "preprocess was 'crop256', now 'resize256'")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def _assert_one_line_error(done: subprocess.CompletedProcess[str], message: str) -> None:
    assert done.returncode in (1, 2), done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert message in errors[0]
    assert "Traceback" not in done.stderr
