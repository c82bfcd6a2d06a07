"""Every kind of source over S3: the same images get the same scores, and each row names its exact origin."""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.server
import io
import json
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote_plus

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import lfm_scan
from lfm_scan.config import ScanConfig
from lfm_scan.options import InputConfig, StorageConfig
from tests.images import encoded
from tests.servers import S3Server

pytestmark = pytest.mark.usefixtures("local_ray")

_NUM_PICTURES = 12


@pytest.fixture(scope="module")
def pictures() -> dict[str, bytes]:
    """Names and contents of images, one name awkward."""
    names = [f"{index:02}.{'png' if index % 2 else 'jpg'}" for index in range(_NUM_PICTURES - 1)] + ["a b+%41.png"]
    return {
        name: encoded("JPEG" if name.endswith("jpg") else "PNG", seed=index) for index, name in enumerate(sorted(names))
    }


@pytest.fixture(scope="module")
def expected(pictures: dict[str, bytes], tiny_weights: Path) -> dict[str, float | None]:
    results = lfm_scan.Scorer(tiny_weights).score(pictures.values())
    return {name: result.logit for name, result in zip(pictures, results, strict=True)}


@pytest.fixture
def bucket(s3_server: S3Server, s3_bucket: str, pictures: dict[str, bytes]) -> str:
    """A bucket that holds the images in every way."""

    def put(key: str, data: bytes) -> None:
        s3_server.put(s3_bucket, key, data)

    for name, data in pictures.items():
        put(f"objects/{name}", data)
    for mode, suffix in (("w", "tar"), ("w:gz", "tar.gz")):
        put(f"shards/x.{suffix}", _tar(pictures, mode))
    cells = pa.array([{"bytes": data, "path": name} for name, data in pictures.items()])
    labels = pa.array(range(len(pictures)))
    put("tables/x.parquet", _parquet(pa.table({"image": cells, "label": labels}), row_group_size=5))
    uris = [f"s3://{s3_bucket}/objects/{name}" for name in pictures]
    rows = zip(uris, range(len(uris)), strict=True)
    put("lists/x.csv", "\n".join(["uri,label", *(f'"{uri}",{label}' for uri, label in rows)]).encode())
    put("lists/x.jsonl", "\n".join(json.dumps({"url": f"../objects/{name}"[3:]}) for name in pictures).encode())
    put("objects/list.txt", "\n".join(pictures).encode())
    put("lists/uris.parquet", _parquet(pa.table({"uri": uris, "label": labels})))
    _put_inventory(s3_server, s3_bucket, pictures)
    return s3_bucket


def _tar(files: dict[str, bytes], mode: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for index, (name, data) in enumerate(files.items()):
            member = tarfile.TarInfo(f"deep/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
            label = tarfile.TarInfo(f"deep/{name.partition('.')[0]}.cls")
            label.size = len(str(index))
            archive.addfile(label, io.BytesIO(str(index).encode()))
    return buffer.getvalue()


def _parquet(table: pa.Table, **options: int) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **options)
    return buffer.getvalue()


def _put_inventory(server: S3Server, bucket: str, pictures: dict[str, bytes]) -> None:
    lines = [f'"{bucket}","{quote_plus(f"objects/{name}", safe="/")}","{len(data)}"' for name, data in pictures.items()]
    data = gzip.compress("\n".join(lines).encode())
    server.put(bucket, "inventory/data/1.csv.gz", data)
    manifest = {
        "sourceBucket": bucket,
        "destinationBucket": f"arn:aws:s3:::{bucket}",
        "version": "2016-11-30",
        "creationTimestamp": "1795219200000",
        "fileFormat": "CSV",
        "fileSchema": "Bucket, Key, Size",
        "files": [{"key": "inventory/data/1.csv.gz", "size": len(data), "MD5checksum": hashlib.md5(data).hexdigest()}],
    }
    server.put(bucket, "inventory/manifest.json", json.dumps(manifest).encode())


@pytest.fixture
def config(s3_server: S3Server, tiny_weights: Path, tmp_path: Path) -> ScanConfig:
    storage = StorageConfig(endpoint_url=s3_server.endpoint_url)
    return ScanConfig(("set below",), output=str(tmp_path / "run"), weights=str(tiny_weights), storage=storage)


def _logits(config: ScanConfig, output: str, source: str, inputs: InputConfig | None = None) -> pd.DataFrame:
    config = replace(config, sources=(source,), output=f"{config.output}-{output}", inputs=inputs or InputConfig())
    lfm_scan.scan(config)
    return lfm_scan.read_results(config.output)


def test_every_kind_of_source_gives_the_same_scores(
    config: ScanConfig, bucket: str, pictures: dict[str, bytes], expected: dict[str, float | None]
) -> None:
    root = f"s3://{bucket}"
    objects = [f"{root}/objects/{name}" for name in pictures]
    origins = {
        "objects/*.*g": objects,
        "shards/x.tar": [f"{root}/shards/x.tar#deep/{name}" for name in pictures],
        "shards/{x,y}.tar.gz".replace("{x,y}", "x"): [f"{root}/shards/x.tar.gz#deep/{name}" for name in pictures],
        "tables/*.parquet": [f"{root}/tables/x.parquet#row={index}" for index in range(len(pictures))],
        "lists/x.csv": objects,
        "lists/uris.parquet": objects,
        "objects/list.txt": objects,
        "inventory/manifest.json": objects,
    }
    by_name: list[dict[str, float]] = []
    for index, (source, uris) in enumerate(origins.items()):
        frame = _logits(config, str(index), f"{root}/{source}")
        names = dict(zip(uris, pictures, strict=True))
        by_name.append({names[uri]: logit for uri, logit in zip(frame["uri"], frame["logit"], strict=True)})
        assert by_name[-1] == by_name[0], source
        assert set(frame["sha256"]) == {hashlib.sha256(data).hexdigest() for data in pictures.values()}, source
        assert frame["uri"].is_unique
    assert by_name[0] == pytest.approx(expected, abs=1e-3)


def test_columns_are_carried_into_the_results(config: ScanConfig, bucket: str) -> None:
    labels = list(range(_NUM_PICTURES))
    csv = _logits(config, "csv", f"s3://{bucket}/lists/x.csv", InputConfig(carry=("label",)))
    table = _logits(config, "table", f"s3://{bucket}/tables/x.parquet", InputConfig(carry=("label",)))
    shards = _logits(config, "shards", f"s3://{bucket}/shards/x.tar", InputConfig(carry=("cls",)))

    assert csv["label"].tolist() == list(map(str, labels))
    assert sorted(table["label"]) == labels
    assert table["label"].dtype == "int64"
    assert shards["cls"].tolist() == list(map(str, labels))
    assert csv.columns[-1] == "label"


def test_urls_of_a_manifest_are_fetched_and_a_missing_one_costs_one_row(
    config: ScanConfig, pictures: dict[str, bytes], expected: dict[str, float | None], tmp_path: Path, web: str
) -> None:
    folder = tmp_path / "web"
    folder.mkdir()
    names = [name for name in pictures if " " not in name]
    for name in names:
        (folder / name).write_bytes(pictures[name])
    manifest = tmp_path / "urls.csv"
    manifest.write_text("\n".join(["url", *(f"{web}/{name}" for name in [*names, "gone.png"])]))

    frame = _logits(config, "web", str(manifest)).set_index("uri")

    assert frame.loc[f"{web}/gone.png", "status"] == "missing"
    scored = frame.drop(index=f"{web}/gone.png")
    assert scored["logit"].to_dict() == pytest.approx({f"{web}/{name}": expected[name] for name in names}, abs=1e-3)


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """A web server for tmp_path/web; gives its URL."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Keep quiet."""

    handler = functools.partial(Handler, directory=str(tmp_path / "web"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join(5)
