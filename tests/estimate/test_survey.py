from __future__ import annotations

import io
import tarfile
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lfm_scan.errors import ConfigError, NotFoundError
from lfm_scan.estimate.config import EstimateConfig
from lfm_scan.estimate.survey import reservoir, survey
from lfm_scan.options import ImageLimits, InputConfig, StorageConfig
from tests.faults import FaultProxy
from tests.images import encoded, write_pictures
from tests.servers import S3Server


def test_a_reservoir_keeps_the_order_and_all_of_few() -> None:
    assert reservoir("abc", 5, seed=0) == ["a", "b", "c"]
    chosen = reservoir(range(1000), 50, seed=0)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == 50
    assert chosen == reservoir(range(1000), 50, seed=0) != reservoir(range(1000), 50, seed=1)


def test_every_item_is_as_likely_to_be_in_the_sample() -> None:
    counts = Counter(item for seed in range(4000) for item in reservoir(range(20), 5, seed))

    # Binomial: 4000 draws at 1/4, a standard deviation of 27.4.
    assert sum(counts.values()) == 20_000
    assert all(abs(counts[item] - 1000) < 5 * 27.4 for item in range(20))


def test_a_folder_is_counted_as_it_is(tmp_path: Path) -> None:
    paths = write_pictures(tmp_path, 30)
    sizes = {str(path): path.stat().st_size for path in paths}

    found = survey(EstimateConfig((str(tmp_path),), sample=7))

    assert (found.num_inputs, found.size_bytes, found.num_unsized) == (30, sum(sizes.values()), 0)
    assert (found.num_gets, found.num_by_ranges, found.fetch_bytes) == (30, 0, sum(sizes.values()))
    assert len(found.sample) == 7
    assert all(sizes[each.uri] == each.size_bytes for each in found.sample)


def test_filters_and_limits_of_the_scan_hold(tmp_path: Path) -> None:
    pngs = [path for path in write_pictures(tmp_path, 12) if path.suffix == ".png"]
    largest = max(path.stat().st_size for path in pngs)
    read = [path.stat().st_size for path in pngs if path.stat().st_size < largest]

    found = survey(
        EstimateConfig(
            (str(tmp_path),), inputs=InputConfig(suffix=(".png",)), limits=ImageLimits(max_image_bytes=largest - 1)
        )
    )

    assert found.num_inputs == len(pngs) == 6
    assert found.num_gets == len(read)
    assert found.fetch_bytes == sum(read)
    assert found.size_bytes > found.fetch_bytes


def test_members_of_an_archive_are_counted_with_the_requests_that_fetch_them(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        for index in range(5):
            data = encoded(seed=index)
            member = tarfile.TarInfo(f"{index}.png")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))

    found = survey(EstimateConfig((str(tmp_path / "images.tar"),)))

    assert found.num_inputs == 5
    assert found.num_gets == 1  # they lie side by side


def test_rows_of_parquet_are_counted_without_their_sizes(tmp_path: Path) -> None:
    table = pa.table({"image": pa.array([encoded(seed=index) for index in range(6)])})
    pq.write_table(table, tmp_path / "images.parquet")

    found = survey(EstimateConfig((str(tmp_path / "images.parquet"),)))

    assert (found.num_inputs, found.num_unsized, found.size_bytes) == (6, 6, 0)
    assert (found.num_gets, found.num_by_ranges) == (0, 6)


def test_a_source_without_objects_and_unusable_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="nothing there to scan"):
        survey(EstimateConfig((str(tmp_path),)))
    for settings in ({"sample": 0}, {"cores": 0}, {"gpus": -1}, {"gpu_images_per_s": 0.0}):
        with pytest.raises(ConfigError, match=next(iter(settings)).replace("_", "-")):
            EstimateConfig((str(tmp_path),), **settings)
    with pytest.raises(ConfigError, match="--reuse: what it saves"):
        EstimateConfig((str(tmp_path),), inputs=InputConfig(reuse="run"))


def test_requests_to_list_a_bucket_are_those_the_store_saw(s3_server: S3Server, s3_bucket: str) -> None:
    for index in range(5):
        s3_server.put(s3_bucket, f"in/{index}.png", b"x")
    with FaultProxy(s3_server.endpoint_url) as proxy:
        source = f"s3://{s3_bucket}/in/"
        found = survey(EstimateConfig((source,), storage=StorageConfig(endpoint_url=proxy.endpoint_url)))
        again = survey(EstimateConfig((source,), storage=StorageConfig(endpoint_url=proxy.endpoint_url)))

    assert found.num_inputs == 5
    assert found.requests["LIST"] == again.requests["LIST"] > 0
    assert sum(found.requests.values()) + sum(again.requests.values()) == len(proxy.journal)
