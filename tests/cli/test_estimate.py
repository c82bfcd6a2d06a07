from __future__ import annotations

import io
import json
import re
import urllib.parse
from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console

from lfm_scan.cli.estimate import print_estimate
from lfm_scan.cli.main import main
from lfm_scan.estimate.estimate import Cost, Estimate, Machines, Requests, Shares, Work
from lfm_scan.estimate.requests import requests_of_run
from lfm_scan.estimate.statistics import Interval, share_of
from tests.faults import FaultProxy, Record
from tests.images import encoded, write_pictures
from tests.scanning import lfm_scan
from tests.servers import S3Server


def _estimate(**changes: object) -> Estimate:
    known = {
        "sources": ("s3://photos/2026/",),
        "num_inputs": 5_000_000,
        "num_sampled": 200,
        "seed": 0,
        "size_bytes": Interval.exactly(3 * 2**40),
        "num_unsized": 0,
        "listing_s": 200.0,
        "shares": Shares(
            by_status={"ok": share_of(199, 200, 5_000_000), "corrupt": share_of(1, 200, 5_000_000)},
            unassessable={"lossy": share_of(193, 200, 5_000_000)},
            assessable=share_of(6, 200, 5_000_000),
            failing=share_of(1, 200, 5_000_000),
        ),
        "machines": Machines(cores=64, gpus=0, gpu_images_per_s=None, gpu_rate_is_measured=False),
        "work": Work(
            fetch_ms=1.2,
            decode_ms=14.5,
            score_ms=20.0,
            core_hours=Interval(49.6, 47.0, 52.1),
            gpu_hours=None,
            wall_s=Interval(2790.0, 2640.0, 2930.0),
            feed_wall_s=None,
            limited_by="cores",
            gpu_images_per_s_needed=None,
        ),
        "requests": Requests(
            listing={"LIST": 5010}, image_gets=5_000_000, num_by_ranges=0, run=requests_of_run(5_000_000, 64)
        ),
        "cost": Cost(
            parts={"cores": Interval(1.98, 1.88, 2.08), "gets": Interval.exactly(2.01)},
            total=Interval(3.99, 3.89, 4.09),
            missing=("puts", "bytes"),
        ),
    }
    return Estimate(**{**known, **changes})  # type: ignore[arg-type]


def _printed(found: Estimate) -> str:
    file = io.StringIO()
    print_estimate(found, Console(file=file, width=100, highlight=False))
    return re.sub(r"\s+", " ", file.getvalue())


def test_an_estimate_warns_of_a_bucket_of_jpegs_before_anybody_pays() -> None:
    text = _printed(_estimate())

    assert "5,000,000 images counted, a sample of 200 measured here" in text
    assert "only 3 % (2 % to 6 %) of the images have a score that means something" in text
    assert "lossy 96 % (94 % to 98 %)" in text
    assert "Failing 0.5 % (0.1 % to 2 %)" in text
    assert "46 min 30 s (44 min 00 s to 48 min 50 s) on 64 cores" in text
    assert "50 (47 to 52) of work: fetch 1.2, decode 14.5, score 20.0 ms an image" in text
    assert "3.0 TiB, as listed" in text
    assert "5,000,000 GET for images 5,010 LIST to list the sources" in text
    assert "3.99 (3.89 to 4.09): cores 1.98, gets 2.01; without puts, bytes" in text


def test_a_gpu_of_unknown_rate_is_called_unknown() -> None:
    work = Work(
        fetch_ms=1.2,
        decode_ms=14.5,
        score_ms=None,
        core_hours=Interval(20.0, 19.0, 21.0),
        gpu_hours=None,
        wall_s=None,
        feed_wall_s=Interval(1000.0, 900.0, 1100.0),
        limited_by="cores",
        gpu_images_per_s_needed=2500.0,
    )
    machines = Machines(cores=64, gpus=2, gpu_images_per_s=None, gpu_rate_is_measured=False)

    text = _printed(_estimate(machines=machines, work=work, cost=Cost(parts={}, total=None, missing=("cores",))))

    assert "Time not known on 64 cores and 2 GPUs without a GPU's rate (--gpu-images-per-s)" in text
    assert "the cores alone take 16 min 40 s (15 min 00 s to 18 min 20 s)" in text
    assert "GPU-hours not known: give --gpu-images-per-s, or run this where a GPU is; 2,500 images/s each" in text
    assert "Cost no prices given" in text


def test_names_of_sources_cannot_command_the_terminal() -> None:
    assert "\x1b" not in _printed(_estimate(sources=("/tmp/\x1b[31m[bold]x",)))


def test_an_estimate_from_the_command_line(
    tmp_path: Path, tiny_weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "images"
    write_pictures(folder, 6)
    report = tmp_path / "estimate.json"

    code = main(["estimate", str(folder), "--weights", str(tiny_weights), "--cores", "4", "--json", str(report)])

    assert code == 0
    assert "6 images counted, all of them measured here" in re.sub(r"\s+", " ", capsys.readouterr().out)
    figures = json.loads(report.read_text())
    assert figures["num_inputs"] == 6
    assert figures["machines"]["cores"] == 4
    assert figures["shares"]["unassessable"]["lossy"] == {"value": 0.5, "low": 0.5, "high": 0.5}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "--sources"),
        (["/no/such/folder"], 1, "/no/such/folder"),
        (["{folder}"], 1, "nothing there to scan"),
        (["{folder}", "--sample", "0"], 2, "--sample must be at least 1"),
        (["{folder}", "--json", "/no/such/folder/x.json"], 2, "--json /no/such/folder/x.json"),
    ],
)
def test_what_cannot_be_estimated_is_named(
    arguments: list[str], code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["estimate", *(each.format(folder=tmp_path) for each in arguments)]) == code
    captured = capsys.readouterr()
    assert message in captured.err + captured.out


@pytest.mark.usefixtures("joined_ray")
def test_a_scan_makes_the_requests_that_were_estimated(
    tmp_path: Path, tiny_weights: Path, s3_server: S3Server, s3_bucket: str
) -> None:
    for index in range(21):
        s3_server.put(s3_bucket, f"in/{index:02}.png", encoded(seed=index, size=(256, 256)))
    source, report = f"s3://{s3_bucket}/in/", tmp_path / "estimate.json"
    with FaultProxy(s3_server.endpoint_url) as proxy:
        common = ("--weights", tiny_weights, "--endpoint-url", proxy.endpoint_url, "--shard-size", 3)
        estimated = lfm_scan("estimate", source, *common, "--sample", 4, "--json", report, env=s3_server.env)
        assert estimated.returncode == 0, estimated.stderr
        before = len(proxy.journal)
        scanned = lfm_scan("scan", source, *common, "--output", f"s3://{s3_bucket}/run", env=s3_server.env)
        assert scanned.returncode == 0, scanned.stderr
        made = _requests(proxy.journal[before:], s3_bucket)

    figures = json.loads(report.read_text())
    run, listing = figures["requests"]["run"], figures["requests"]["listing"]
    assert made["PUT"] == run["num_puts"] == 4 + 1 + 7 + 1
    assert made["LIST source"] == listing["LIST"]
    assert made["LIST run"] == run["num_lists"] == 2
    assert made["GET source"] == figures["requests"]["image_gets"] == 21
    assert made["HEAD"] == listing.get("HEAD", 0)
    assert run["num_gets"] - 7 < made["GET run"] <= run["num_gets"]  # workers keep the plan's one file


def _requests(journal: list[Record], bucket: str) -> Counter[str]:
    """Count requests by what they are; signs of life, which depend on time, are left out."""
    made: Counter[str] = Counter()
    for record in journal:
        query = dict(urllib.parse.parse_qsl(record.query, keep_blank_values=True))
        key = query.get("prefix") if "list-type" in query else record.path.removeprefix(f"/{bucket}/")
        if (key or "").startswith("run/drivers/"):
            continue
        where = " run" if (key or "").startswith("run/") else " source"
        kind = "LIST" if "list-type" in query else record.method
        made[kind + (where if kind in ("LIST", "GET") else "")] += 1
    return made
