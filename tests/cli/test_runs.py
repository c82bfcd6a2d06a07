from __future__ import annotations

import io
import json
import os
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from rich.console import Console

from lfm_scan.cli.main import main
from lfm_scan.cli.runs import print_runs
from lfm_scan.errors import NoSuchBucketError, NotFoundError, UnreachableError
from lfm_scan.options import StorageConfig
from lfm_scan.runs import catalogue
from lfm_scan.runs.catalogue import Catalogue, find_runs
from lfm_scan.runs.heartbeat import Heartbeat, Phase
from lfm_scan.runs.rundir import RunDirectory
from lfm_scan.runs.shard import Receipt
from lfm_scan.runs.state import State
from lfm_scan.runs.summary import Summary
from tests.faults import FaultProxy
from tests.scanning import main_in_fresh_python
from tests.servers import S3Server, free_port

_NOW = datetime(2026, 11, 21, 7, 0, tzinfo=UTC)
_PLAN = {"num_rows": 23, "shard_size": 4, "files": ["plan/plan-000000.parquet"], "sha256": "0"}
_SUMMARY = Summary(num_rows=23, by_status=Counter(ok=20, corrupt=3), num_flagged=7)


def _write_run(
    uri: str, minute: int, storage: StorageConfig | None = None, *, num_parts: int = 0, finished: bool = False
) -> RunDirectory:
    """Leave what a scan that was started at a minute past six leaves: 23 images in 6 shards."""
    directory = RunDirectory(uri, storage or StorageConfig())
    directory.create_json(
        "config.json",
        {
            "run_id": f"run-{minute}",
            "created_at": f"2026-11-21T06:{minute:02}:00+00:00",
            "config": {"sources": ["s3://photos/2026/"]},
        },
    )
    if num_parts:
        directory.create_json("plan/index.json", _PLAN)
    for shard in range(num_parts):
        directory.store.create(directory.part_uri(shard), b"")
        _set_age(directory.part_uri(shard), 10 * shard)
    if finished:
        value = {"summary": _SUMMARY.to_json(), "finished_at": "2026-11-21T06:30:00+00:00"}
        directory.create_json("_SUCCESS.json", value)
    return directory


def _drive(directory: RunDirectory, phase: Phase, *, seconds_ago: float = 0, **by_status: int) -> None:
    """Leave what a driver leaves that was last heard of so long ago."""
    heartbeat = Heartbeat(directory)
    heartbeat.shard_done(Receipt(0, True, Summary(sum(by_status.values()), by_status=Counter(by_status))))
    heartbeat._update(phase=phase)
    heartbeat._store_beat()
    _set_age(heartbeat.uri, seconds_ago)


def _set_age(uri: str, seconds_ago: float) -> None:
    if not uri.startswith("s3://"):
        moment = _NOW.timestamp() - seconds_ago
        os.utime(uri, (moment, moment))


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    """Runs in every state, and what else people keep beside them."""
    _drive(_write_run(str(tmp_path / "done"), 1, num_parts=6, finished=True), Phase.FINISHED, seconds_ago=1800)
    _drive(_write_run(str(tmp_path / "working"), 2, num_parts=2), Phase.SCANNING, seconds_ago=4, ok=6, timeout=2)
    _drive(_write_run(str(tmp_path / "stopped"), 3, num_parts=3), Phase.STOPPED, seconds_ago=90)
    _drive(_write_run(str(tmp_path / "failed"), 4, num_parts=1), Phase.FAILED, seconds_ago=7300)
    _write_run(str(tmp_path / "begun"), 5)  # and killed before it could say anything
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text("{")
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "config.json").write_text('{"kind": "training", "config": {}}')
    (tmp_path / "of another program").mkdir()
    (tmp_path / "of another program" / "config.json").write_text("[1]")
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").touch()
    return tmp_path


def _find(uri: object, storage: StorageConfig | None = None) -> Catalogue:
    return find_runs(RunDirectory.at(str(uri), storage or StorageConfig(), patient=False), _NOW)


def test_every_run_is_told_with_its_state_and_all_else_is_counted(prefix: Path) -> None:
    found = _find(prefix)

    assert [(Path(run.run_dir).name, run.state, run.num_rows_done, run.is_alive) for run in found.runs] == [
        ("begun", State.STOPPED, 0, False),
        ("failed", State.FAILED, 4, False),
        ("stopped", State.STOPPED, 12, False),
        ("working", State.SCANNING, 8, True),
        ("done", State.FINISHED, 23, False),
    ]
    assert [(run.num_failed, run.num_flagged) for run in found.runs] == [
        (0, None),
        (0, None),
        (0, None),
        (2, None),
        (3, 7),
    ]
    [(uri, why)] = found.unreadable
    assert uri == str(prefix / "damaged")
    assert "not JSON" in why
    assert (found.num_trainings, found.num_others, found.is_complete) == (1, 2, True)


def test_runs_read_at_a_glance(prefix: Path) -> None:
    file = io.StringIO()
    print_runs(_find(prefix), _NOW, Console(file=file, width=2000, highlight=False, soft_wrap=True))

    assert [line.rstrip() for line in file.getvalue().splitlines()] == [
        "Run      State      Done    Images  Failed  Flagged  Rate   Started                    Last heard of",
        "begun    stopped       -  0 listed       0        -  -      2026-11-21T06:05:00+00:00  never",
        "failed   failed     17 %        23       0        -  -      2026-11-21T06:04:00+00:00  2 h 01 min ago",
        "stopped  stopped    52 %        23       0        -  -      2026-11-21T06:03:00+00:00  1 min 30 s ago",
        "working  scanning   34 %        23       2        -  0.4/s  2026-11-21T06:02:00+00:00  4 s ago, alive",
        "done     finished  100 %        23       3        7  -      2026-11-21T06:01:00+00:00  30 min 00 s ago",
        f"Unreadable {prefix}/damaged: {prefix}/damaged/config.json: not JSON: Expecting property name enclosed in "
        "double quotes: line 1 column 2 (char 1); it was not written by lfm-scan",
        "Not shown  trainings 1, folders that are no runs 2",
    ]


def test_a_run_directory_itself_is_one_run(prefix: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(prefix / "done"), "--json"]) == 0

    told = json.loads(capsys.readouterr().out)
    [run] = told["runs"]
    assert (run["run_dir"], run["state"], run["num_flagged"]) == (str(prefix / "done"), "finished", 7)
    assert told["num_others"] == 3  # drivers, parts, plan


def test_an_empty_folder_has_no_runs_and_a_missing_one_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["runs", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"No runs in {tmp_path}\n"
    with pytest.raises(NotFoundError):
        _find(tmp_path / "nowhere")


def test_more_folders_than_are_looked_into_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "MAX_FOLDERS", 2)
    for minute in range(3):
        _write_run(str(tmp_path / f"run-{minute}"), minute)

    found = _find(tmp_path)

    assert [run.run_id for run in found.runs] == ["run-1", "run-0"]
    assert not found.is_complete


def test_a_hundred_runs_in_s3_cost_a_few_requests_each(s3_server: S3Server, s3_bucket: str) -> None:
    storage = StorageConfig(endpoint_url=s3_server.endpoint_url)
    for minute in range(60):
        _write_run(f"s3://{s3_bucket}/runs/{minute:02}", minute, storage, num_parts=1)
    for number in range(40):
        _write_run(f"s3://{s3_bucket}/runs/done-{number:02}", 0, storage, num_parts=1, finished=True)
    _drive(RunDirectory(f"s3://{s3_bucket}/runs/59", storage), Phase.SCANNING, ok=4)
    s3_server.put(s3_bucket, "runs/notes/readme.txt", b"x")
    s3_server.put(s3_bucket, "runs-of-others/config.json", b"{}")

    with FaultProxy(s3_server.endpoint_url) as proxy:
        found = find_runs(RunDirectory(f"s3://{s3_bucket}/runs", StorageConfig(endpoint_url=proxy.endpoint_url), False))
        num_requests = len(proxy.journal)

    assert Counter(run.state for run in found.runs) == {State.FINISHED: 40, State.STOPPED: 59, State.SCANNING: 1}
    latest = found.runs[0]
    assert (latest.run_dir, latest.num_rows_done, latest.is_alive) == (f"s3://{s3_bucket}/runs/59", 4, True)
    assert (found.num_others, found.unreadable) == (1, ())
    # Folders and the prefix; config, drivers, success and plan of each; parts of those that go on; and a beat.
    assert num_requests == 2 + 1 + 100 * 4 + 60 + 1


def test_a_store_that_cannot_be_asked_is_an_error_and_not_an_empty_list(s3_server: S3Server, s3_bucket: str) -> None:
    with pytest.raises(NoSuchBucketError):
        _find("s3://no-such-bucket-here/runs", StorageConfig(endpoint_url=s3_server.endpoint_url))
    with pytest.raises(UnreachableError):
        _find(f"s3://{s3_bucket}/runs", StorageConfig(endpoint_url=f"http://127.0.0.1:{free_port()}"))


def test_what_a_store_holds_does_not_drive_the_terminal(tmp_path: Path) -> None:
    _write_run(str(tmp_path / "a\x1b]0;owned\x07[red]x"), 1)
    file = io.StringIO()
    print_runs(_find(tmp_path), _NOW + timedelta(hours=1), Console(file=file, width=200, highlight=False))

    assert "a\ufffd]0;owned\ufffd[red]x" in file.getvalue()


def test_the_command_imports_neither_torch_nor_ray(prefix: Path) -> None:
    stdout, modules = main_in_fresh_python("runs", prefix)

    assert "working" in stdout
    assert not modules & {"torch", "ray", "pandas"}
