from __future__ import annotations

import io
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lfm_scan.cli.main import main
from lfm_scan.cli.status import print_state
from lfm_scan.runs.heartbeat import Beat, Phase
from lfm_scan.runs.rundir import RunDirectory
from lfm_scan.runs.state import Driver, RunState, State
from tests.scanning import main_in_fresh_python
from tests.servers import S3Server, free_port

_NOW = datetime(2026, 11, 21, 7, 0, tzinfo=UTC)
_CONFIG: dict[str, Any] = {
    "run_id": "20261121T060000-0123abcd",
    "created_at": "2026-11-21T06:00:00+00:00",
    "config": {"sources": ["s3://photos/2026/"]},
}


def _driver(
    phase: Phase, *, seconds_ago: float, is_alive: bool = False, num_rows: int = 0, error: str | None = None
) -> Driver:
    beat = Beat(
        driver_id="20261121T060000-00000001",
        host="node-7",
        pid=4321,
        lfm_scan_version="1",
        interval_s=10,
        started_at=_NOW,
        beat_at=_NOW,
        phase=phase,
        num_rows=num_rows,
        error=error,
    )
    return Driver(beat=beat, seen_at=_NOW - timedelta(seconds=seconds_ago), is_alive=is_alive)


def _state(state: State, **changes: Any) -> RunState:  # noqa: ANN401
    known = {"run_dir": "s3://audits/run", "run_id": "run-1", "created_at": "then", "sources": ("s3://photos/",)}
    return RunState(**{**known, "state": state, **changes})


def _printed(state: RunState) -> str:
    file = io.StringIO()
    print_state(state, _NOW, Console(file=file, width=200, highlight=False))
    return file.getvalue()


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    RunDirectory(str(tmp_path / "run")).create_json("config.json", _CONFIG)
    return tmp_path / "run"


def test_a_scan_in_progress_reads_at_a_glance() -> None:
    text = _printed(
        _state(
            State.SCANNING,
            num_rows=5_000_000,
            num_rows_done=1_204_224,
            num_shards=9766,
            num_shards_done=2352,
            num_failed=312,
            by_status={"ok": 1000, "corrupt": 12, "timeout": 300, "empty": 4},
            rows_per_s=812.34,
            seconds_left=4680.0,
            drivers=(
                _driver(Phase.SCANNING, seconds_ago=900, num_rows=7),
                _driver(Phase.SCANNING, seconds_ago=4, is_alive=True, num_rows=1_204_217),
            ),
        )
    )

    assert [line.rstrip() for line in text.splitlines()] == [
        "Run run-1 is scanning",
        "",
        "Done       1,204,224 of 5,000,000 images (24 %), 2,352 of 9,766 shards",
        "Failed     312, as the drivers told so far: 300 timeout, 12 corrupt",
        "Rate       812.3 images/s over the last 10 minutes, 1 h 18 min left",
        "Directory  s3://audits/run",
        "Sources    s3://photos/",
        "Started    then",
        "Drivers    node-7, process 4321: scanning, 1,204,217 images done, last heard of 4 s ago",
        "           node-7, process 4321: silent while scanning, 7 images done, last heard of 15 min 00 s ago",
    ]


def test_a_failed_run_says_why_and_what_to_do() -> None:
    text = _printed(
        _state(
            State.FAILED,
            num_rows=3,
            num_shards=1,
            rows_per_s=1.0,
            drivers=(_driver(Phase.FAILED, seconds_ago=100, error="s3://x: the store refused"),),
        )
    )

    assert "Run run-1 has failed: what is done is safe, repeat its command to go on" in text
    assert "failed 1 min 40 s ago, 0 images done\n             s3://x: the store refused" in text
    assert "Rate" not in text  # nobody is at it


def test_a_run_in_planning_tells_how_many_are_listed() -> None:
    assert "Done       nothing yet, 12,345 images are listed" in _printed(
        _state(State.PLANNING, num_rows_listed=12_345)
    )


def test_all_is_done_only_when_all_is_done() -> None:
    almost = _state(State.SCANNING, num_rows=1000, num_rows_done=999, num_shards=1000, num_shards_done=999)

    assert "(99 %)" in _printed(almost)


def test_long_lists_are_cut_and_counted() -> None:
    text = _printed(
        _state(
            State.STOPPED,
            sources=tuple(f"s3://{index}/" for index in range(1000)),
            drivers=tuple(_driver(Phase.STOPPED, seconds_ago=index) for index in range(1000)),
        )
    )

    assert "s3://2/" in text
    assert "s3://3/" not in text
    assert "and 997 more" in text
    assert "stopped 4 s ago" in text
    assert "stopped 5 s ago" not in text
    assert "and 995 more" in text


def test_what_a_store_holds_neither_drives_the_terminal_nor_passes_for_markup() -> None:
    text = _printed(_state(State.STOPPED, sources=("s3://a/\x1b]0;owned\x07[red]x[/red]\udcff/",)))

    assert "s3://a/\ufffd]0;owned\ufffd[red]x[/red]\ufffd/" in text


def test_the_command_prints_and_ends_with_0_whatever_the_state(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status", str(run_dir)]) == 0
    assert "Run 20261121T060000-0123abcd has stopped" in capsys.readouterr().out


def test_the_command_gives_json_to_programs(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(run_dir), "--json"]) == 0

    value = json.loads(capsys.readouterr().out)
    assert (value["run_id"], value["state"], value["drivers"]) == ("20261121T060000-0123abcd", "stopped", [])


def test_what_is_no_run_is_one_clear_line_and_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(tmp_path)]) == 1

    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"error: {tmp_path}: not a run directory: it has no config.json\n"


def test_a_run_in_s3_takes_the_options_of_a_scan(
    s3_server: S3Server, s3_bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    s3_server.put(s3_bucket, "run/config.json", json.dumps(_CONFIG).encode())
    nobody = f"http://127.0.0.1:{free_port()}"

    assert main(["status", f"s3://{s3_bucket}/run", "--endpoint-url", s3_server.endpoint_url]) == 0
    assert f"Directory  s3://{s3_bucket}/run" in capsys.readouterr().out
    assert main(["status", f"s3://{s3_bucket}/run", "--endpoint-url", nobody]) == 1
    assert "no answer from the store" in capsys.readouterr().err


def test_the_command_imports_neither_torch_nor_ray(run_dir: Path) -> None:
    stdout, modules = main_in_fresh_python("status", run_dir)

    assert "has stopped" in stdout
    assert not modules & {"torch", "ray", "pandas"}
