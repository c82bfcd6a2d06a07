from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from lfm_scan.bench.config import BenchConfig
from lfm_scan.bench.images import given_group, made_photograph, write_distinct
from lfm_scan.errors import ConfigError, NotFoundError, RunError
from lfm_scan.imaging import ImageLimits, get_policy
from lfm_scan.scoring.prepare import prepare_bytes
from lfm_scan.status import Status
from tests.images import encoded, write_pictures

_POLICY = get_policy("crop256")


@pytest.mark.parametrize("fmt", ["PNG", "JPEG", "WEBP", "AVIF", "GIF", "TIFF", "BMP"])
def test_copies_differ_in_their_bytes_and_not_in_their_pixels(fmt: str, tmp_path: Path) -> None:
    files = [encoded(fmt, seed=seed) for seed in range(2)]

    copies = [path.read_bytes() for path in write_distinct(tmp_path, files, 5)]

    assert len({hashlib.sha256(data).digest() for data in copies}) == 5
    for index, data in enumerate(copies):
        copy, original = (prepare_bytes(each, _POLICY, ImageLimits()) for each in (data, files[index % 2]))
        assert copy.status == Status.OK
        assert copy.pixels is not None
        assert original.pixels is not None
        assert np.array_equal(copy.pixels, original.pixels)


def test_made_images_are_as_hard_to_code_as_photographs() -> None:
    image = made_photograph(800, 600, seed=0)

    assert image.size == (800, 600)
    assert image.tobytes() == made_photograph(800, 600, seed=0).tobytes() != made_photograph(800, 600, 1).tobytes()
    pixels = np.asarray(image, np.float64)
    assert 15 < pixels.std() < 90
    assert 1 < np.abs(np.diff(pixels, axis=1)).mean() < 20


def test_given_images_are_those_that_decode(tmp_path: Path) -> None:
    paths = write_pictures(tmp_path, 5)
    (tmp_path / "broken.png").write_bytes(encoded()[:100])

    group = given_group(BenchConfig(images=str(tmp_path)), ImageLimits(), _POLICY)

    assert sorted(each.uri for each in group.inputs) == sorted(map(str, paths))
    assert sorted(group.files) == sorted(path.read_bytes() for path in paths)
    assert group.num_left_out == 1


def test_given_images_of_which_none_decodes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        given_group(BenchConfig(images=str(tmp_path)), ImageLimits(), _POLICY)
    (tmp_path / "x.png").write_bytes(b"no image")
    with pytest.raises(RunError, match="none of 1 inputs there"):
        given_group(BenchConfig(images=str(tmp_path)), ImageLimits(), _POLICY)


@pytest.mark.parametrize("seconds", [0.0, -1.0, 601.0])
def test_times_that_make_no_sense_are_refused(seconds: float) -> None:
    with pytest.raises(ConfigError, match="--seconds"):
        BenchConfig(seconds=seconds)
