"""Scans of a store that misbehaves: the same results, byte for byte, as from one that does not."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

import lfm_scan
from lfm_scan.config import ScanConfig
from lfm_scan.errors import OutageError
from lfm_scan.options import ComputeConfig, StorageConfig
from tests.faults import Fault, FaultProxy, Faults, Odds, Request
from tests.images import encoded
from tests.scanning import SCORE_COLUMNS
from tests.servers import S3Server

pytestmark = pytest.mark.usefixtures("local_ray")

_NUM_PICTURES = 60
_SHARD_SIZE = 6
_FAULTS = Faults(
    reads=Odds(status=0.10, broken_body=0.05, reset=0.03, stall=0.02, flip=0.01),
    writes=Odds(status=0.10, lost_reply=0.15, reset=0.05),
    max_per_request=4,  # a fifth in a row before anything has worked would be a store that is down
)


@pytest.fixture
def config(s3_server: S3Server, s3_bucket: str, tiny_weights: Path) -> ScanConfig:
    for index in range(_NUM_PICTURES):
        s3_server.put(s3_bucket, f"in/{index:03}.png", encoded(seed=index))
    s3_server.put(s3_bucket, "in/bad.png", b"\x89PNG\r\n\x1a\nnot really")
    s3_server.put(s3_bucket, "in/empty.jpg", b"")
    return ScanConfig(
        (f"s3://{s3_bucket}/in/",),
        output=f"s3://{s3_bucket}/runs/undisturbed",
        weights=str(tiny_weights),
        storage=StorageConfig(endpoint_url=s3_server.endpoint_url, read_timeout=1.0),
        compute=ComputeConfig(shard_size=_SHARD_SIZE),
    )


@pytest.fixture
def undisturbed(config: ScanConfig) -> pd.DataFrame:
    lfm_scan.scan(config)
    frame = lfm_scan.read_results(config.output, storage=config.storage)
    assert len(frame) == _NUM_PICTURES + 2
    return frame


def _through(proxy: FaultProxy, config: ScanConfig, output: str, **storage: float) -> ScanConfig:
    bucket = config.output.split("/")[2]
    changed = replace(config.storage, endpoint_url=proxy.endpoint_url, **storage)  # type: ignore[arg-type]
    return replace(config, output=f"s3://{bucket}/runs/{output}", storage=changed)


def test_results_do_not_depend_on_the_stores_faults(
    config: ScanConfig, undisturbed: pd.DataFrame, s3_server: S3Server
) -> None:
    copies: list[Request] = []

    def look_for_copies(request: Request) -> Fault | None:
        if "x-amz-copy-source" in request.headers:
            copies.append(request)
        return None

    faults: Counter[Fault | None] = Counter()
    for seed in range(5):
        with FaultProxy(s3_server.endpoint_url, seed, _FAULTS, on_request=look_for_copies) as proxy:
            disturbed = _through(proxy, config, f"seed-{seed}")
            lfm_scan.scan(disturbed)
            journal = proxy.journal
            faults += proxy.count()

        frame = lfm_scan.read_results(disturbed.output, storage=config.storage)
        pd.testing.assert_frame_equal(frame[SCORE_COLUMNS], undisturbed[SCORE_COLUMNS])
        assert frame["uri"].is_unique
        assert not copies
        assert not [record for record in journal if record.method in ("DELETE", "POST")]
    # A tenth of what 5 x 90 reads and 5 x 15 writes should have met: enough to see that each was met.
    assert faults[Fault.STATUS] >= 5
    assert faults[Fault.BROKEN_BODY] >= 2
    assert faults[Fault.RESET] >= 2
    assert faults[Fault.STALL] >= 1
    assert faults[Fault.LOST_REPLY] >= 2


def test_a_store_that_is_down_for_a_while_costs_time_and_nothing_else(
    config: ScanConfig, undisturbed: pd.DataFrame, s3_server: S3Server
) -> None:
    with FaultProxy(s3_server.endpoint_url) as proxy, _outage(proxy, after_parts=3, for_s=12):
        disturbed = _through(proxy, config, "outage", outage_patience=120)
        lfm_scan.scan(disturbed)

    frame = lfm_scan.read_results(disturbed.output, storage=config.storage)
    pd.testing.assert_frame_equal(frame[SCORE_COLUMNS], undisturbed[SCORE_COLUMNS])


def test_a_store_that_stays_down_stops_the_run_and_blames_no_image(
    config: ScanConfig, undisturbed: pd.DataFrame, s3_server: S3Server
) -> None:
    with FaultProxy(s3_server.endpoint_url) as proxy, _outage(proxy, after_parts=3, for_s=None):
        disturbed = _through(proxy, config, "down", outage_patience=5)
        with pytest.raises(OutageError, match="has answered no"):
            lfm_scan.scan(disturbed)
    storage = config.storage

    partial = lfm_scan.read_results(disturbed.output, allow_incomplete=True, storage=storage)
    assert set(partial["status"]) <= {"ok", "corrupt", "empty"}
    assert 0 < len(partial) < len(undisturbed)
    outcome = lfm_scan.scan(replace(disturbed, storage=storage))

    assert outcome.num_rows_resumed == len(partial)
    frame = lfm_scan.read_results(disturbed.output, storage=storage)
    pd.testing.assert_frame_equal(frame[SCORE_COLUMNS], undisturbed[SCORE_COLUMNS])


class _outage:  # noqa: N801 - reads as a verb where it is used
    """Takes the store down once so many parts are committed, for so long."""

    def __init__(self, proxy: FaultProxy, after_parts: int, for_s: float | None) -> None:
        self._proxy = proxy
        self._after_parts = after_parts
        self._for_s = for_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(0.01):
            stored = [each for each in self._proxy.journal if "/parts/part-" in each.path and each.status == 200]
            if len({each.path for each in stored if each.method == "PUT"}) >= self._after_parts:
                self._proxy.down = True
                if self._for_s is not None:
                    self._over.wait(self._for_s)
                    self._proxy.down = False
                return
