"""Scans that build on an earlier one: what is new since, what failed, what was scored already."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import lfm_scan
from lfm_scan.config import ScanConfig
from lfm_scan.errors import ConfigError, RunError
from lfm_scan.options import InputConfig, StorageConfig
from tests.images import encoded, write_pictures
from tests.servers import S3Server

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    write_pictures(folder, 8)
    return folder


@pytest.fixture
def first(pictures: Path, tiny_weights: Path, tmp_path: Path) -> ScanConfig:
    return ScanConfig((str(pictures),), output=str(tmp_path / "first"), weights=str(tiny_weights))


def _after(first: ScanConfig, **inputs: Any) -> ScanConfig:  # noqa: ANN401
    sources = () if "retry_failed" in inputs else first.sources
    return replace(first, sources=sources, output=f"{first.output}-next", inputs=InputConfig(**inputs))


def test_since_takes_what_is_new_or_changed(first: ScanConfig, pictures: Path) -> None:
    lfm_scan.scan(first)
    (pictures / "new.png").write_bytes(encoded(seed=99))
    (pictures / "even/0001.png").write_bytes(encoded(seed=98))
    (pictures / "even/0000.jpg").unlink()
    os.utime(pictures / "odd/0002.jpg", (1, 1))

    lfm_scan.scan(_after(first, since=first.output))

    frame = lfm_scan.read_results(f"{first.output}-next")
    assert frame["uri"].tolist() == [f"{pictures}/{name}" for name in ("even/0001.png", "new.png", "odd/0002.jpg")]


def test_nothing_new_is_a_finished_run_without_rows(first: ScanConfig) -> None:
    lfm_scan.scan(first)

    outcome = lfm_scan.scan(_after(first, since=first.output))

    assert outcome.summary.num_rows == 0
    assert lfm_scan.read_results(f"{first.output}-next").empty
    assert lfm_scan.scan(_after(first, since=first.output)).already_finished


def test_since_goes_by_etag_on_s3(s3_server: S3Server, s3_bucket: str, first: ScanConfig) -> None:
    for index in range(4):
        s3_server.put(s3_bucket, f"in/{index}.png", encoded(seed=index))
    storage = StorageConfig(endpoint_url=s3_server.endpoint_url)
    first = replace(first, sources=(f"s3://{s3_bucket}/in/",), output=f"s3://{s3_bucket}/first", storage=storage)
    lfm_scan.scan(first)
    s3_server.put(s3_bucket, "in/1.png", encoded(seed=1))  # the same bytes again: a newer object, not a changed one
    s3_server.put(s3_bucket, "in/2.png", encoded(seed=22))

    lfm_scan.scan(_after(first, since=first.output))

    frame = lfm_scan.read_results(f"{first.output}-next", storage=storage)
    assert frame["uri"].tolist() == [f"s3://{s3_bucket}/in/2.png"]


def test_retry_takes_what_may_end_otherwise_and_nothing_else(first: ScanConfig, pictures: Path, tmp_path: Path) -> None:
    (pictures / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nnot really")
    (pictures / "text.txt").write_text("hello")
    (pictures / "link.png").symlink_to(tmp_path / "elsewhere.png")
    lfm_scan.scan(first)
    frame = lfm_scan.read_results(first.output).set_index("uri")
    assert frame.loc[f"{pictures}/link.png", "status"] == "missing"
    (tmp_path / "elsewhere.png").write_bytes(encoded(seed=5))

    lfm_scan.scan(_after(first, retry_failed=first.output))

    again = lfm_scan.read_results(f"{first.output}-next")
    assert again["uri"].tolist() == [f"{pictures}/link.png"]
    assert again["status"].tolist() == ["ok"]


def test_retry_opens_an_archive_that_could_not_be_read(first: ScanConfig, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    archive = shutil.make_archive(str(tmp_path / "x"), "tar", pictures)
    os.rename(archive, tmp_path / "hidden")
    os.symlink(tmp_path / "hidden", archive)
    hidden = (tmp_path / "hidden").rename(tmp_path / "gone")
    first = replace(first, sources=(str(pictures), f"{tmp_path}/*.tar"))
    lfm_scan.scan(first)
    before = lfm_scan.read_results(first.output).set_index("uri")
    assert before.loc[archive, "status"] == "missing"
    hidden.rename(tmp_path / "hidden")

    lfm_scan.scan(_after(first, retry_failed=first.output))

    again = lfm_scan.read_results(f"{first.output}-next")
    assert len(again) == 8
    assert (again["status"] == "ok").all()
    assert all(uri.startswith(f"{archive}#") for uri in again["uri"])


def test_reuse_gives_the_same_rows_without_decoding(first: ScanConfig, pictures: Path, tmp_path: Path) -> None:
    lfm_scan.scan(first)
    shutil.copy(pictures / "even/0001.png", pictures / "copy.png")
    (pictures / "new.png").write_bytes(encoded(seed=99))
    # A score that the model would never give shows where the next run took it from.
    marked = lfm_scan.read_results(first.output)
    marked["logit"] += 100
    (result,) = (Path(first.output) / "results").iterdir()
    marked.to_parquet(result, index=False)

    lfm_scan.scan(_after(first, reuse=first.output))

    frame = lfm_scan.read_results(f"{first.output}-next").set_index("uri")
    old = marked.set_index("uri")
    told_by_bytes = ["sha256", "format", "mode", "width", "height", "lossy", "jpeg_quality", "status", "logit"]
    pd.testing.assert_frame_equal(frame.loc[old.index, told_by_bytes], old[told_by_bytes])
    logits = frame["logit"].to_dict()
    assert logits[f"{pictures}/copy.png"] == old["logit"].to_dict()[f"{pictures}/even/0001.png"]
    assert logits[f"{pictures}/new.png"] < 90


def test_scores_of_another_kind_are_not_reused(first: ScanConfig) -> None:
    lfm_scan.scan(first)

    with pytest.raises(ConfigError, match="preprocess was 'crop256', now 'resize256'"):
        lfm_scan.scan(replace(_after(first, reuse=first.output), preprocess="resize256"))


def test_a_run_that_has_not_finished_is_nothing_to_build_on(first: ScanConfig, tmp_path: Path) -> None:
    lfm_scan.scan(first)
    (Path(first.output) / "_SUCCESS.json").unlink()

    for inputs in ({"since": first.output}, {"reuse": first.output}, {"retry_failed": first.output}):
        with pytest.raises(RunError, match="has not finished"):
            lfm_scan.scan(_after(first, **inputs))
    with pytest.raises(RunError, match="is no run directory"):
        lfm_scan.scan(_after(first, since=str(tmp_path / "nowhere")))


def test_identical_bytes_are_scored_once_a_shard(first: ScanConfig, pictures: Path) -> None:
    for index in range(6):
        shutil.copy(pictures / "even/0001.png", pictures / f"copy{index}.png")
    (pictures / "empty1").touch()
    (pictures / "empty2").touch()
    config = replace(first, compute=replace(first.compute, shard_size=100))

    lfm_scan.scan(config)

    frame = lfm_scan.read_results(first.output).set_index("uri")
    copies = frame.loc[[f"{pictures}/copy{index}.png" for index in range(6)]]
    original = frame.loc[f"{pictures}/even/0001.png"]
    assert (copies["logit"] == original["logit"]).all()
    assert (copies["width"] == original["width"]).all()
    assert frame.loc[f"{pictures}/empty2", "status"] == "empty"
