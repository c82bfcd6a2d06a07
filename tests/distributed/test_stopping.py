"""Runs that end early: because somebody asked, too much failed, or nothing moved."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import ray
from ray._private import auto_init_hook

import lfm_scan
from lfm_scan.concurrency import Background
from lfm_scan.config import ScanConfig
from lfm_scan.distributed.scan import Listener
from lfm_scan.distributed.session import ray_session
from lfm_scan.distributed.stopping import GracefulStop
from lfm_scan.errors import FailureRateError, StallError
from lfm_scan.options import ComputeConfig, StorageConfig
from lfm_scan.runs.shard import Receipt
from tests.faults import FaultProxy, Request
from tests.images import encoded, write_pictures
from tests.servers import S3Server


def test_a_request_to_stop_interrupts_where_nothing_is_worth_finishing() -> None:
    with pytest.raises(KeyboardInterrupt) as interrupt:
        GracefulStop().request(signal.SIGTERM)

    assert interrupt.value.args == (143,)


def test_a_request_is_noted_while_shards_stream_and_the_second_interrupts() -> None:
    stop = GracefulStop()
    with stop.deferred():
        stop.request(signal.SIGTERM)
        assert stop.is_requested
        with pytest.raises(KeyboardInterrupt):
            stop.request(signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt) as interrupt:
        stop.interrupt()
    assert interrupt.value.args == (143,)


def test_an_iterator_in_the_background_gives_items_errors_and_its_end() -> None:
    released = threading.Event()

    def items() -> Iterator[int]:
        yield 1
        released.wait()
        yield 2
        raise ValueError("broken")

    with Background(items()) as background:
        assert background.get(5) == 1
        with pytest.raises(TimeoutError):
            background.get(0.05)
        released.set()
        assert background.get(5) == 2
        with pytest.raises(ValueError, match="broken"):
            background.get(5)
    with Background(iter(())) as empty, pytest.raises(StopIteration):
        empty.get(5)


def test_what_outlives_an_interrupted_session_does_not_start_a_ray_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto_init_hook, "enable_auto_connect", True)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **settings: None)
    monkeypatch.setattr(ray, "shutdown", lambda: None)

    def connects_itself() -> bool:
        return bool(auto_init_hook.enable_auto_connect)

    with ray_session(None):
        pass
    assert connects_itself()
    with pytest.raises(KeyboardInterrupt), ray_session(None):
        raise KeyboardInterrupt
    assert not connects_itself()
    with ray_session(None):
        assert connects_itself()


@pytest.fixture
def config(tmp_path: Path, tiny_weights: Path) -> ScanConfig:
    folder = tmp_path / "pictures"
    write_pictures(folder, 40)
    return ScanConfig(
        (str(folder),),
        output=str(tmp_path / "run"),
        weights=str(tiny_weights),
        compute=ComputeConfig(shard_size=2),
    )


@pytest.mark.usefixtures("local_ray")
def test_shards_that_are_begun_are_finished_before_a_run_stops(
    config: ScanConfig, s3_server: S3Server, s3_bucket: str
) -> None:
    for index in range(40):
        s3_server.put(s3_bucket, f"in/{index:02}.png", encoded(seed=index))
    stop = GracefulStop()
    requests: list[float] = []

    class Stopper(Listener):
        def shard_done(self, receipt: Receipt) -> None:
            if not stop.is_requested:
                requests.append(time.monotonic())
                stop.request(signal.SIGTERM)
                threading.Timer(2, held.release).start()  # by then nothing more is begun

    free: list[int] = []

    def is_of_a_later_shard(request: Request) -> bool:
        """Let the shard through that is begun first, whichever it is."""
        name = re.search(r"in/(\d\d)\.png", request.path)
        if name is None:
            return False
        shard = int(name[1]) // 2
        free.extend([] if free else [shard])
        return shard not in free

    with FaultProxy(s3_server.endpoint_url) as proxy, proxy.hold(is_of_a_later_shard) as held:
        config = replace(
            config, sources=(f"s3://{s3_bucket}/in/",), storage=StorageConfig(endpoint_url=proxy.endpoint_url)
        )
        with pytest.raises(KeyboardInterrupt):
            lfm_scan.scan(config, Stopper(), stop=stop)
        (requested,) = requests
        elapsed_s = time.monotonic() - requested

    num_parts = len(os.listdir(f"{config.output}/parts"))
    assert 1 <= num_parts < 20
    assert elapsed_s < 60
    outcome = lfm_scan.scan(replace(config, storage=StorageConfig(endpoint_url=s3_server.endpoint_url)))
    assert outcome.num_rows_resumed == 2 * num_parts
    assert outcome.summary.by_status == {"ok": 40}


@pytest.mark.usefixtures("local_ray")
def test_a_run_in_which_too_much_fails_stops_and_names_examples(config: ScanConfig, tmp_path: Path) -> None:
    manifest = tmp_path / "list.txt"
    manifest.write_text("".join(f"gone-{index}.png\n" for index in range(2000)))
    compute = ComputeConfig(shard_size=250)
    config = replace(config, sources=(str(manifest), *config.sources), max_failure_rate=0.1, compute=compute)

    with pytest.raises(FailureRateError, match=r"images failed.*--max-failure-rate 0.1.*gone-\d+.png: missing: "):
        lfm_scan.scan(config)

    assert not (Path(config.output) / "_SUCCESS.json").exists()
    outcome = lfm_scan.scan(replace(config, max_failure_rate=1.0))
    assert outcome.summary.by_status == {"ok": 40, "missing": 2000}


@pytest.mark.usefixtures("local_ray")
def test_a_run_that_stands_still_stops_and_says_where(config: ScanConfig, s3_server: S3Server, s3_bucket: str) -> None:
    for index in range(6):
        s3_server.put(s3_bucket, f"in/{index}.png", encoded(seed=index))
    with (
        FaultProxy(s3_server.endpoint_url) as proxy,
        proxy.hold(lambda request: request.method == "GET" and request.path.endswith("in/2.png")) as held,
    ):
        stuck = replace(
            config,
            sources=(f"s3://{s3_bucket}/in/",),
            storage=StorageConfig(endpoint_url=proxy.endpoint_url, read_timeout=300, outage_patience=1, max_attempts=1),
            stall_timeout=8,
        )
        with pytest.raises(StallError, match=rf"no shard was finished for .*s3://{s3_bucket}/in/2.png to"):
            lfm_scan.scan(stuck)
        held.release()

    well = replace(config, sources=stuck.sources, storage=StorageConfig(endpoint_url=s3_server.endpoint_url))
    outcome = lfm_scan.scan(well)
    assert outcome.summary.by_status == {"ok": 6}
