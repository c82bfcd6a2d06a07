"""The published checkpoint through whole scans of the development images, from a folder and from S3."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest

from lfm_scan import StorageConfig, read_results
from tests.scanning import lfm_scan
from tests.servers import S3Server

pytestmark = pytest.mark.usefixtures("joined_ray")

_TOLERANCE = 1e-3


@pytest.fixture
def s3_images(dev_data: Path, s3_server: S3Server, s3_bucket: str) -> tuple[str, StorageConfig]:
    """A bucket that holds the development images under dev/, and how to reach it."""
    client = s3_server.client()

    def upload(path: Path) -> None:
        key = f"dev/{path.relative_to(dev_data / 'dev')}"
        client.put_object(Bucket=s3_bucket, Key=key, Body=path.read_bytes())

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(upload, (path for path in (dev_data / "dev").rglob("*") if path.is_file())))
    return s3_bucket, StorageConfig(endpoint_url=s3_server.endpoint_url)


def test_every_development_image_in_a_folder_gets_the_logit_of_the_authors_protocol(
    dev_data: Path, published_weights: Path, tmp_path: Path
) -> None:
    _scan(dev_data / "dev", tmp_path / "run", "resize256", published_weights)

    _check(_by_path(read_results(tmp_path / "run"), f"{dev_data / 'dev'}{os.sep}"), dev_data, "logit_resize256")


def test_every_development_image_in_s3_gets_the_authors_logit_of_its_centre(
    dev_data: Path, published_weights: Path, s3_images: tuple[str, StorageConfig]
) -> None:
    bucket, storage = s3_images
    source, run = f"s3://{bucket}/dev/", f"s3://{bucket}/run"
    _scan(source, run, "crop256", published_weights, "--endpoint-url", storage.endpoint_url)

    _check(_by_path(read_results(run, storage=storage), source), dev_data, "logit_centercrop256")


def _scan(source: object, run: object, policy: str, weights: Path, *more: object) -> None:
    # 300 of the images have 32x32 pixels, which the authors' protocol enlarges: allow it, so that all can be compared.
    options = ("--weights", weights, "--preprocess", policy, "--min-side-px", 1)
    done = lfm_scan("scan", source, "--output", run, *options, *more)
    assert done.returncode == 0, done.stderr


def _check(rows: pd.DataFrame, dev_data: Path, column: str) -> None:
    expected = pd.read_csv(dev_data / "dev.csv").set_index("path")
    logits = expected[column]
    assert len(rows) == len(expected) == 1058
    # CycleGAN's photographs were JPEG files before they became these PNGs; no other PNG was.
    is_jpeg, was_jpeg = expected["format"] == "JPEG", expected.index.str.startswith("cyclegan_pairs/0_real/")
    rows = rows.loc[expected.index]
    assert (rows["sha256"] == expected["sha256"]).all()
    assert (rows["width"] == expected["width"]).all()
    assert (rows["format"] == expected["format"]).all()
    assert (rows["logit"].isna() == logits.isna()).all()
    assert (rows.loc[logits.isna(), "status"] == "too_small").all()
    assert (rows["logit"] - logits).abs().max() < _TOLERANCE
    assert (rows["lossy"] == (is_jpeg | was_jpeg)).all()
    assert (rows.loc[is_jpeg, "lossy_evidence"] == "codec").all()
    assert (rows.loc[was_jpeg, "lossy_evidence"] == "traces").all()
    assert not rows.loc[rows["lossy"], "assessable"].any()


def _by_path(rows: pd.DataFrame, prefix: str) -> pd.DataFrame:
    return rows.assign(path=rows["uri"].str.removeprefix(prefix)).set_index("path")
