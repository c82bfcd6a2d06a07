from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lfm_scan.errors import RunError
from lfm_scan.options import StorageConfig
from lfm_scan.runs.error_histogram import ErrorHistogram, ErrorKind
from lfm_scan.runs.heartbeat import MAX_BEAT_BYTES, Beat, Heartbeat, Phase
from lfm_scan.runs.plan import Plan
from lfm_scan.runs.rundir import RunDirectory
from lfm_scan.runs.shard import Receipt
from lfm_scan.runs.summary import Summary
from lfm_scan.runs.usage import Usage
from lfm_scan.version import __version__
from tests.servers import S3Server, free_port
from tests.waiting import wait_until

_PLAN = Plan(num_rows=20, shard_size=4, files=("plan/plan-000000.parquet",), sha256="0")


def _receipt(shard: int, *, created: bool = True, **by_status: int) -> Receipt:
    return Receipt(shard, created, Summary(sum(by_status.values()), by_status=Counter(by_status)))


def _wait_for(is_there: Callable[[], bool]) -> None:
    wait_until(is_there, every_s=0.005)
    assert is_there()


def _beat(path: str) -> Beat:
    return Beat.from_bytes(Path(path).read_bytes())


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    return RunDirectory(str(tmp_path / "run"), StorageConfig())


def test_a_beat_says_who_is_at_it_and_how_far(directory: RunDirectory) -> None:
    with Heartbeat(directory, interval_s=0.01) as heartbeat:
        heartbeat.listing(12)
        _wait_for(lambda: Path(heartbeat.uri).exists() and _beat(heartbeat.uri).num_listed == 12)
        assert _beat(heartbeat.uri).phase == Phase.LISTING

        heartbeat.planned(_PLAN, 4)
        heartbeat.shard_done(_receipt(1, ok=2, corrupt=1, too_small=1))
        heartbeat.shard_done(_receipt(2, created=False, ok=1, timeout=3))
        heartbeat.shard_done(_receipt(3, ok=3, corrupt=1))
        _wait_for(lambda: _beat(heartbeat.uri).num_rows == 8)
        beat = _beat(heartbeat.uri)

    assert (beat.pid, beat.lfm_scan_version, beat.interval_s) == (os.getpid(), __version__, 0.01)
    assert beat.started_at < beat.beat_at
    assert (beat.phase, beat.num_listed, beat.num_rows_before) == (Phase.SCANNING, 20, 4)
    assert (beat.num_rows, beat.num_failed) == (8, 2)  # what another driver wrote is another driver's
    assert beat.by_status == {"ok": 5, "corrupt": 2, "too_small": 1}
    assert beat.error is None


def test_it_beats_again_while_nothing_happens(directory: RunDirectory) -> None:
    with Heartbeat(directory, interval_s=0.01) as heartbeat:
        _wait_for(lambda: Path(heartbeat.uri).exists())
        first = _beat(heartbeat.uri).beat_at
        _wait_for(lambda: _beat(heartbeat.uri).beat_at > first)


def test_the_next_step_is_told(directory: RunDirectory) -> None:
    with Heartbeat(directory, interval_s=0.01) as heartbeat:
        heartbeat.phase(Phase.MERGING)
        _wait_for(lambda: Path(heartbeat.uri).exists() and _beat(heartbeat.uri).phase == Phase.MERGING)


@pytest.mark.parametrize(
    ("error", "phase", "line"),
    [
        (None, Phase.FINISHED, None),
        (KeyboardInterrupt(143), Phase.STOPPED, None),
        (RunError("shard 7: gone\nuse a new --output"), Phase.FAILED, "shard 7: gone use a new --output"),
        (ZeroDivisionError(), Phase.FAILED, "ZeroDivisionError"),
    ],
)
def test_the_last_beat_says_how_it_ended(
    directory: RunDirectory, error: BaseException | None, phase: Phase, line: str | None
) -> None:
    heartbeat = Heartbeat(directory, interval_s=3600)

    def work() -> None:
        with heartbeat:
            heartbeat.shard_done(_receipt(0, ok=4))
            if error is not None:
                raise error

    if error is None:
        work()
    else:
        with pytest.raises(type(error)) as raised:
            work()
        assert raised.value is error
    beat = _beat(heartbeat.uri)
    assert (beat.phase, beat.error, beat.num_rows) == (phase, line, 4)


def test_a_beat_says_what_was_used_and_what_went_wrong(directory: RunDirectory) -> None:
    errors = ErrorHistogram((ErrorKind("corrupt", "broken", 1, (("/a", "broken"),)),))
    done = replace(_receipt(1, ok=3, corrupt=1), usage=Usage(seconds={"score": 2.0}, core_s=3.0), errors=errors)
    with Heartbeat(directory, interval_s=3600) as heartbeat:
        heartbeat.shard_done(done)
        heartbeat.shard_done(replace(done, created=False))  # another driver's rows, but our time
        heartbeat.used(Usage(requests={"LIST": 1}))
        heartbeat.held(8.0, 2.0)
        heartbeat.held(4.0, 1.0)
    beat = _beat(heartbeat.uri)

    assert beat.usage == Usage(seconds={"score": 4.0}, core_s=6.0, requests={"LIST": 1})
    assert (beat.held_core_s, beat.held_gpu_s) == (12.0, 3.0)
    assert beat.errors == errors


def test_the_time_of_a_start_is_told_by_phase(directory: RunDirectory) -> None:
    with Heartbeat(directory, interval_s=3600) as heartbeat:
        heartbeat.planned(_PLAN, 0)
        heartbeat.phase(Phase.MERGING)
    beat = _beat(heartbeat.uri)

    assert list(beat.phase_s) == ["listing", "scanning", "merging"]
    assert sum(beat.phase_s.values()) == pytest.approx(beat.elapsed_s, abs=1)


def test_a_beat_of_a_large_cluster_with_many_errors_is_small_enough_to_be_read(directory: RunDirectory) -> None:
    kinds = tuple(
        ErrorKind("error", f"{index}" + "k" * 199, 1, (("s3://" + "u" * 1000, "e" * 500),) * 3) for index in range(50)
    )
    usage = Usage(node_s={f"ip-10-0-0-{index}.eu-central-1.compute.internal 01234567": 1.0 for index in range(3000)})
    with Heartbeat(directory) as heartbeat:
        heartbeat.shard_done(replace(_receipt(0, error=50), usage=usage, errors=ErrorHistogram(kinds)))
    beat = _beat(heartbeat.uri)

    assert Path(heartbeat.uri).stat().st_size < MAX_BEAT_BYTES / 2
    assert sum(beat.usage.node_s.values()) == 3000
    assert sum(each.num_rows for each in beat.errors.kinds) + beat.errors.num_other == 50


def test_a_beat_of_an_earlier_version_is_read(directory: RunDirectory) -> None:
    with Heartbeat(directory) as heartbeat:
        pass
    told = json.loads(Path(heartbeat.uri).read_bytes())
    for name in ("usage", "errors", "phase_s", "held_core_s", "held_gpu_s"):
        del told[name]

    assert Beat.from_bytes(json.dumps(told).encode()).usage == Usage()


def test_every_start_leaves_its_own_record(directory: RunDirectory) -> None:
    for _ in range(2):
        with Heartbeat(directory):
            pass

    assert len(list(Path(directory.uri, "drivers").iterdir())) == 2


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("http://me:hunter2@store/x: no answer", "http://***@store/x: no answer"),
        (
            "https://b.s3.amazonaws.com/k?X-Amz-Credential=AKIA/1&X-Amz-Signature=abc&X-Amz-Security-Token=t0k: 403",
            "https://b.s3.amazonaws.com/k?X-Amz-Credential=***&X-Amz-Signature=***&X-Amz-Security-Token=*** 403",
        ),
        ("s3://b/a.png?versionId=3: gone", "s3://b/a.png?versionId=3: gone"),
        ("x" * 10_000, "x" * 500),
    ],
)
def test_the_reason_of_a_failure_is_short_and_holds_no_credentials(
    directory: RunDirectory, message: str, line: str
) -> None:
    heartbeat = Heartbeat(directory)
    with pytest.raises(RunError), heartbeat:
        raise RunError(message)

    assert _beat(heartbeat.uri).error == line


def test_beats_go_to_s3(s3_server: S3Server, s3_bucket: str) -> None:
    storage = StorageConfig(endpoint_url=s3_server.endpoint_url)
    directory = RunDirectory(f"s3://{s3_bucket}/run", storage)

    with Heartbeat(directory, interval_s=0.05) as heartbeat:
        _wait_for(lambda: bool(list(directory.store.list(directory.path("drivers/")))))
        heartbeat.planned(_PLAN, 0)

    data = directory.store.get(heartbeat.uri).data
    assert Beat.from_bytes(data).phase == Phase.FINISHED
    assert s3_server.access_key.encode() not in data
    assert s3_server.secret_key.encode() not in data


@pytest.mark.parametrize("place", ["a file is in the way", "nobody answers"])
def test_a_store_that_takes_no_beats_does_not_disturb_the_run_and_is_told_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, place: str
) -> None:
    (tmp_path / "file").touch()
    directory = {
        "a file is in the way": RunDirectory(str(tmp_path / "file")),
        "nobody answers": RunDirectory(
            "s3://bucket/run", StorageConfig(endpoint_url=f"http://127.0.0.1:{free_port()}", anonymous=True)
        ),
    }[place]

    with caplog.at_level(logging.WARNING), Heartbeat(directory, interval_s=0.01) as heartbeat:
        _wait_for(lambda: bool(caplog.records))
        heartbeat.planned(_PLAN, 0)
        heartbeat.shard_done(_receipt(0, ok=4))

    [record] = caplog.records
    assert "cannot say that this driver is alive, the run goes on without: " in record.message


def _without(name: str) -> dict[str, Any]:
    return {key: value for key, value in _value().items() if key != name}


def _value(**changes: object) -> dict[str, Any]:
    return {**Heartbeat(RunDirectory("/run"))._beat.to_json(), **changes}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        b"[" * 60_000,
        b"[]",
        b"null",
        json.dumps(_without("phase")).encode(),
        json.dumps(_value(phase="asleep")).encode(),
        json.dumps(_value(num_rows=float("inf"))).encode(),
        json.dumps(_value(by_status=[1])).encode(),
        json.dumps(_value(beat_at="yesterday")).encode(),
    ],
    ids=lambda data: repr(data[:20]),
)
def test_what_is_no_beat_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="not a driver's sign of life"):
        Beat.from_bytes(data)


def test_a_beat_survives_being_stored() -> None:
    beat = Heartbeat(RunDirectory("/run"))._beat

    assert Beat.from_bytes(json.dumps(beat.to_json()).encode()) == beat
