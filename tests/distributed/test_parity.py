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

_COLUMNS = {"resize256": "logit_resize256", "crop256": "logit_centercrop256"}
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


@pytest.mark.timeout(600)
@pytest.mark.parametrize("policy", list(_COLUMNS))
def test_every_development_image_gets_the_authors_logit_from_a_folder_and_from_s3(
    policy: str, dev_data: Path, published_weights: Path, s3_images: tuple[str, StorageConfig], tmp_path: Path
) -> None:
    bucket, storage = s3_images
    # 300 of the images have 32x32 pixels, which the authors' protocol enlarges: allow it, so that all can be compared.
    options = ["--weights", published_weights, "--preprocess", policy, "--min-side-px", 1]
    remote = f"s3://{bucket}/run"

    for arguments in (
        ["scan", dev_data / "dev", "--output", tmp_path / "run", *options],
        ["scan", f"s3://{bucket}/dev/", "--output", remote, *options, "--endpoint-url", storage.endpoint_url],
    ):
        done = lfm_scan(*arguments, timeout_s=400)
        assert done.returncode == 0, done.stderr

    local = _by_path(read_results(tmp_path / "run"), f"{dev_data / 'dev'}{os.sep}")
    stored = _by_path(read_results(remote, storage=storage), f"s3://{bucket}/dev/")
    expected = pd.read_csv(dev_data / "dev.csv").set_index("path")
    column = expected[_COLUMNS[policy]]
    assert len(local) == len(expected) == 1058
    # CycleGAN's photographs were JPEG files before they became these PNGs; no other PNG was.
    is_jpeg, was_jpeg = expected["format"] == "JPEG", expected.index.str.startswith("cyclegan_pairs/0_real/")
    for rows in (local.loc[expected.index], stored.loc[expected.index]):
        assert (rows["sha256"] == expected["sha256"]).all()
        assert (rows["width"] == expected["width"]).all()
        assert (rows["format"] == expected["format"]).all()
        assert (rows["logit"].isna() == column.isna()).all()
        assert (rows.loc[column.isna(), "status"] == "too_small").all()
        assert (rows["logit"] - column).abs().max() < _TOLERANCE
        assert (rows["lossy"] == (is_jpeg | was_jpeg)).all()
        assert (rows.loc[is_jpeg, "lossy_evidence"] == "codec").all()
        assert (rows.loc[was_jpeg, "lossy_evidence"] == "traces").all()
        assert not rows.loc[rows["lossy"], "assessable"].any()
    pd.testing.assert_series_equal(local["logit"].sort_index(), stored["logit"].sort_index())


def _by_path(rows: pd.DataFrame, prefix: str) -> pd.DataFrame:
    return rows.assign(path=rows["uri"].str.removeprefix(prefix)).set_index("path")
