"""What a scan says of itself, against what an outsider saw of it: the store's proxy, Ray's Prometheus endpoint."""

from __future__ import annotations

import io
import json
import threading
import time
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

import lfm_scan
from lfm_scan.cli.main import main
from lfm_scan.config import ScanConfig
from lfm_scan.distributed.scan import Listener, ScanOutcome
from lfm_scan.options import ComputeConfig, ImageLimits, Prices, StorageConfig
from lfm_scan.runs.heartbeat import Heartbeat
from lfm_scan.runs.shard import Receipt
from lfm_scan.storage.s3_client import forget_clients
from tests.distributed.shapes import staged_on_cpus
from tests.faults import Fault, FaultProxy, Record, Request
from tests.images import encoded
from tests.servers import S3Server
from tests.waiting import wait_until

pytestmark = pytest.mark.usefixtures("local_ray")

_NUM_PICTURES = 14
_PREFIX = "ray_lfm_scan_"


@dataclass(frozen=True)
class Scanned:
    """A scan through a proxy that breaks some requests, and what was seen of it from outside."""

    outcome: ScanOutcome
    directory: str
    storage: StorageConfig
    journal: list[Record]
    num_throttles: int
    fetched_bytes: int
    before: Mapping[str, float]

    @property
    def report(self) -> dict[str, Any]:
        assert self.outcome.report is not None
        return self.outcome.report


@pytest.fixture(scope="module")
def scanned(s3_server: S3Server, tiny_weights: Path) -> Iterator[Scanned]:
    files = {f"{index:03}.png": encoded(seed=index) for index in range(_NUM_PICTURES)}
    files |= {"bad.png": b"\x89PNG\r\n\x1a\nnot really", "000-twin.png": files["000.png"], "huge.png": _huge()}
    bucket = "observed"
    slow: list[Request] = []

    def break_some(request: Request) -> Fault | None:
        # Of what workers do: the first reads of some pictures, and the first writes of all parts.
        is_chosen = request.path.endswith(("3.png", "7.png")) if request.method == "GET" else "/parts/" in request.path
        if request.seen or not is_chosen:
            return None
        if request.draw(0, "status") < 0.5:  # so the proxy chooses what to answer
            slow.append(request)
        return Fault.STATUS

    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.env.items():
            patch.setenv(name, value)
        # The one request that a report and a journal may count differently is a beat while the report is written.
        patch.setattr("lfm_scan.distributed.scan.Heartbeat", partial(Heartbeat, interval_s=3600))
        forget_clients()
        s3_server.client().create_bucket(Bucket=bucket)
        for name, data in files.items():
            s3_server.put(bucket, f"in/{name}", data)
        before = _settled()
        with FaultProxy(s3_server.endpoint_url, on_request=break_some) as proxy:
            storage = StorageConfig(endpoint_url=proxy.endpoint_url)
            outcome = lfm_scan.scan(
                ScanConfig(
                    (f"s3://{bucket}/in/",),
                    output=f"s3://{bucket}/run",
                    weights=str(tiny_weights),
                    log_format="json",
                    limits=ImageLimits(max_decode_bytes=64 * 2**20),
                    compute=ComputeConfig(shard_size=6),
                    storage=storage,
                    prices=Prices(price_per_core_hour=36.0, price_per_1000_puts=5.0),
                )
            )
            journal = proxy.journal
        size = sum(map(len, files.values()))
        storage = StorageConfig(endpoint_url=s3_server.endpoint_url)
        yield Scanned(outcome, f"s3://{bucket}/run", storage, journal, len(slow), size, before)
    forget_clients()


def _huge() -> bytes:
    """Return a picture that takes more memory to decode than it may."""
    file = io.BytesIO()
    Image.new("RGB", (6000, 6000)).save(file, "PNG", compress_level=1)
    return file.getvalue()


def _scraped() -> dict[str, float]:
    """Return our metrics as Ray's Prometheus endpoint shows them: name, with its most telling label, to value."""
    (node,) = ray.nodes()  # type: ignore[no-untyped-call]
    with urllib.request.urlopen(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics") as reply:
        text = reply.read().decode()
    found: defaultdict[str, float] = defaultdict(float)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith(_PREFIX):
                label = next((sample.labels[name] for name in ("status", "stage", "kind") if name in sample.labels), "")
                found[f"{sample.name.removeprefix(_PREFIX)} {label}".strip()] += sample.value
    return dict(found)


def _settled() -> dict[str, float]:
    """Return our metrics once nothing was added for longer than workers take to report what they did."""
    seen, changed = _scraped(), time.monotonic()

    def is_settled() -> bool:
        nonlocal seen, changed
        found = _scraped()
        if _totals(found) != _totals(seen):
            seen, changed = found, time.monotonic()
        return time.monotonic() - changed > 5

    wait_until(is_settled, every_s=0.2)
    return seen


def _totals(metrics: Mapping[str, float]) -> dict[str, float]:
    """Leave out the gauges, which come and go."""
    return {name: value for name, value in metrics.items() if name.partition(" ")[0].endswith(("_total", "_count"))}


def _since(before: Mapping[str, float], name: str) -> dict[str, float]:
    """Return what was added to a metric, by label."""
    return {
        each.removeprefix(name).strip(): value - before.get(each, 0)
        for each, value in _scraped().items()
        if each.partition(" ")[0] == name and value != before.get(each, 0)
    }


def _assert_added(before: Mapping[str, float], name: str, amounts: Mapping[str, float]) -> None:
    """This was added to a metric, by label, once all workers have reported: once a second, each by itself."""
    expected = pytest.approx(amounts, abs=1e-3)
    wait_until(lambda: _since(before, name) == expected, every_s=0.2)
    assert _since(before, name) == expected, name


class _Watch(threading.Thread):
    """Scrapes from start to end: one look may miss a gauge, which Ray forgets two seconds after it was told."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most: dict[str, float] = {}
        self._has_ended = threading.Event()

    def __enter__(self) -> _Watch:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._has_ended.set()
        self.join()

    def run(self) -> None:
        while not self._has_ended.wait(0.2):
            for name, value in _scraped().items():
                self.most[name] = max(value, self.most.get(name, 0.0))

    def wait_for(self, *names: str) -> None:
        wait_until(lambda: self.most.keys() >= set(names))


def test_prometheus_sees_every_row_once(scanned: Scanned) -> None:
    summary, report = scanned.outcome.summary, scanned.report

    _assert_added(scanned.before, "images_total", summary.by_status)
    _assert_added(scanned.before, "shards_total", {"": 3})
    _assert_added(scanned.before, "shard_seconds_count", {"": 3})
    _assert_added(scanned.before, "fetched_bytes_total", {"": scanned.fetched_bytes})
    _assert_added(scanned.before, "store_throttles_total", {"": scanned.num_throttles})
    _assert_added(scanned.before, "batch_images_count", {"": _NUM_PICTURES})
    _assert_added(scanned.before, "stage_seconds_total", report["seconds"])


def test_requests_are_those_that_the_store_saw(scanned: Scanned) -> None:
    until = next(record.n for record in scanned.journal if record.path.endswith("/run.json"))
    seen = Counter(_kind_of(record) for record in scanned.journal if record.n < until)
    broken = [record for record in scanned.journal if record.fault is not None]

    assert scanned.report["requests"] == dict(seen)
    assert scanned.report["num_retries"] == len(broken) >= 5
    assert 0 < scanned.report["num_throttles"] == scanned.num_throttles < len(broken)


def _kind_of(record: Record) -> str:
    return "LIST" if "list-type" in record.query else record.method


def test_the_report_counts_rows_errors_and_resources(scanned: Scanned) -> None:
    report = scanned.report

    assert report["state"] == "finished"
    assert report["summary"]["by_status"] == {"ok": _NUM_PICTURES + 1, "truncated": 1, "too_large": 1}
    assert sorted(each["status"] for each in report["errors"]["kinds"]) == ["too_large", "truncated"]
    assert {each["examples"][0]["uri"].rpartition("/")[2] for each in report["errors"]["kinds"]} == {
        "bad.png",
        "huge.png",
    }
    assert report["fetched_bytes"] == scanned.fetched_bytes
    assert report["batches"] == {"1": _NUM_PICTURES}  # twins are scored once
    assert set(report["seconds"]) == {"fetch", "decode", "score", "commit", "other"}
    assert min(report["seconds"].values()) > 0
    assert sum(report["node_s"].values()) == pytest.approx(sum(report["seconds"].values()), abs=1e-3)
    assert len(report["node_s"]) == 1
    assert min(report["peak_worker_bytes"], report["peak_decoder_bytes"]) > 20 * 2**20
    assert report["core_s"] > 0
    # The cluster of the tests has two cores and no GPU.
    assert report["held_core_s"] == pytest.approx(2 * report["wall_s"], rel=0.3)
    assert (report["gpu_s"], report["held_gpu_s"], report["peak_gpu_bytes"]) == (0.0, 0.0, 0)
    assert report["cost"]["parts"]["cores"] == pytest.approx(0.01 * report["held_core_s"], abs=1e-4)
    assert report["cost"]["missing"] == ["gets", "bytes"]
    assert {"lfm-scan", "ray", "python"} <= report["versions"].keys()


def test_run_json_holds_the_report_and_a_finished_run_gives_it_again(
    scanned: Scanned, s3_server: S3Server, tiny_weights: Path
) -> None:
    stored = s3_server.client().get_object(Bucket="observed", Key="run/run.json")["Body"].read()
    again = lfm_scan.scan(
        ScanConfig(
            ("s3://observed/in/",),
            output=scanned.directory,
            weights=str(tiny_weights),
            storage=scanned.storage,
        )
    )

    assert json.loads(stored) == scanned.report == again.report


def test_a_workers_log_names_run_and_shard(scanned: Scanned) -> None:
    folder = Path(ray._private.worker._global_node.get_logs_dir_path())  # type: ignore[attr-defined]
    lines = [line for path in folder.glob("worker-*.err") for line in path.read_text().splitlines()]
    ours = [json.loads(line) for line in lines if line.startswith("{") and scanned.outcome.run_id in line]

    (line,) = [line for line in ours if "huge.png" in line["message"]]
    assert (line["level"], line["logger"]) == ("warning", "lfm_scan.scoring.isolated")
    assert line["run_id"] == scanned.outcome.run_id
    assert line["shard"] in (0, 1, 2)


class _Keeps(Listener):
    """Keeps the reports."""

    def __init__(self) -> None:
        self.reports: list[dict[str, Any]] = []

    def ended(self, report: dict[str, Any]) -> None:
        self.reports.append(report)


class _Stops(_Keeps):
    """Is interrupted when the first shard is done."""

    def shard_done(self, receipt: Receipt) -> None:
        raise KeyboardInterrupt


def test_a_run_in_two_starts_reports_both(tmp_path: Path, tiny_weights: Path) -> None:
    for index in range(60):  # more than are done while the interruption gets through
        (tmp_path / f"in-{index:02}.png").write_bytes(encoded(seed=index))
    config = ScanConfig(
        (str(tmp_path / "in-*.png"),),
        output=str(tmp_path / "run"),
        weights=str(tiny_weights),
        compute=ComputeConfig(shard_size=1),
    )
    first, second = _Stops(), _Keeps()
    with pytest.raises(KeyboardInterrupt):
        lfm_scan.scan(config, first)
    outcome = lfm_scan.scan(config, second)
    (stopped,), (finished,) = first.reports, second.reports

    assert (stopped["state"], finished["state"]) == ("stopped", "finished")
    assert stopped["summary"]["num_rows"] == 1
    assert finished == outcome.report == json.loads((tmp_path / "run" / "run.json").read_text())
    assert [each["phase"] for each in finished["starts"]] == ["stopped", "finished"]
    assert finished["starts"][0]["num_rows"] == 1
    assert finished["summary"]["num_rows"] == 60
    assert finished["seconds"]["score"] > stopped["seconds"]["score"] > 0


def test_separate_stages_are_measured_each_where_it_runs(
    tmp_path: Path, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index in range(6):
        (tmp_path / f"in-{index}.png").write_bytes(encoded(seed=index))
    monkeypatch.setattr("lfm_scan.distributed.scan.shape_pipeline", staged_on_cpus)
    before = _settled()

    gauges = ("worker_memory_bytes", "decoder_memory_bytes")
    with _Watch() as watch:
        outcome = lfm_scan.scan(
            ScanConfig(
                (str(tmp_path / "in-*.png"),),
                output=str(tmp_path / "run"),
                weights=str(tiny_weights),
                compute=ComputeConfig(shard_size=3),
            )
        )
        watch.wait_for(*gauges)

    assert outcome.report is not None
    assert set(outcome.report["seconds"]) == {"fetch", "decode", "score", "commit", "other"}
    assert outcome.report["batches"] == {"1": 6}
    assert outcome.report["peak_decoder_bytes"] > 0
    _assert_added(before, "stage_seconds_total", outcome.report["seconds"])
    _assert_added(before, "images_total", {"ok": 6})
    assert min(watch.most[name] for name in gauges) > 20 * 2**20
    assert "usage" not in lfm_scan.read_results(tmp_path / "run").columns


def test_json_logs_tell_a_scan_from_its_opening_to_its_end(
    tmp_path: Path, tiny_weights: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for index in range(4):
        (tmp_path / f"in-{index}.png").write_bytes(encoded(seed=index))
    (tmp_path / "in-bad.png").write_bytes(b"\x89PNG\r\n\x1a\nnot really")
    arguments = ["scan", str(tmp_path / "in-*.png"), "-o", str(tmp_path / "run"), "--weights", str(tiny_weights)]
    arguments += ["--shard-size", "5", "--log-format", "json"]

    codes = [main(arguments), main(arguments), main([*arguments, "--threshold", "0.9"])]
    said = capfd.readouterr()
    events = [json.loads(line) for line in said.err.splitlines()]
    by_name = {each["event"]: each for each in events}

    assert codes == [0, 0, 1]
    assert said.out == ""
    names = [each["event"] for each in events if each["event"] != "listing"]
    assert names == ["opened", "planned", "shard_done", "merging", "finished", "left_alone", "error"]
    run_id = by_name["opened"]["run_id"]
    assert {each["run_id"] for each in events if each["event"] != "error"} == {run_id}
    assert (by_name["planned"]["num_rows"], by_name["planned"]["num_shards"]) == (5, 1)
    done = by_name["shard_done"]
    assert (done["shard"], done["num_rows"], done["num_failed"], done["num_rows_done"]) == (0, 5, 1, 5)
    assert done["failures"][0]["uri"] == str(tmp_path / "in-bad.png")
    assert by_name["finished"]["summary"]["by_status"] == {"ok": 4, "truncated": 1}
    assert by_name["left_alone"]["summary"] == by_name["finished"]["summary"]
    assert (by_name["error"]["level"], "threshold" in by_name["error"]["message"]) == ("error", True)
