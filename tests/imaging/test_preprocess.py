"""What each policy does to the pixels."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from lfm_scan.errors import ConfigError, ImageError
from lfm_scan.imaging import POLICIES, DecodedImage, ImageInfo, get_policy
from lfm_scan.status import Status


def decoded(width: int, height: int) -> DecodedImage:
    """Return an image whose red and green name the column and row, modulo 256."""
    row, column = np.mgrid[0:height, 0:width]
    channels = np.stack([column % 256, row % 256, (row // 256) * 16 + column // 256], axis=-1)
    return DecodedImage(Image.fromarray(channels.astype(np.uint8), "RGB"), ImageInfo(width=width, height=height))


@pytest.mark.parametrize(
    ("surplus", "offset"), [(0, 0), (1, 0), (2, 1), (3, 2), (4, 2), (5, 2), (6, 3), (7, 4), (9, 4), (11, 6), (100, 50)]
)
def test_the_crop_starts_at_half_the_surplus_rounded_half_to_even(surplus: int, offset: int) -> None:
    across = get_policy("crop256")(decoded(256 + surplus, 300))
    assert across[0, 0, 0] == offset
    down = get_policy("crop256")(decoded(300, 256 + surplus))
    assert down[0, 0, 1] == offset


def test_the_crop_is_the_pixels_as_they_are() -> None:
    image = decoded(301, 257)
    np.testing.assert_array_equal(get_policy("crop256")(image), np.asarray(image.image)[0:256, 22:278])


@pytest.mark.parametrize("size", [(512, 384), (300, 1000), (48, 48), (257, 301), (256, 256)])
def test_the_resize_is_pillows_bilinear(size: tuple[int, int]) -> None:
    image = decoded(*size)
    expected = np.asarray(image.image.resize((256, 256), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(get_policy("resize256")(image), expected)


def test_shrinking_averages_over_the_widened_kernel() -> None:
    # Stripes one pixel wide: plain bilinear at 4:1 would pick single stripes, antialiasing makes them grey.
    stripes = np.zeros((1024, 1024, 3), np.uint8)
    stripes[:, ::2] = 255
    out = get_policy("resize256")(DecodedImage(Image.fromarray(stripes), ImageInfo()))
    assert np.abs(out[8:-8, 8:-8].astype(int) - 127.5).max() < 2


@pytest.mark.parametrize("policy_id", POLICIES)
def test_every_policy_delivers_256_pixels_of_bytes(policy_id: str) -> None:
    out = get_policy(policy_id)(decoded(403, 259))
    assert out.shape == (256, 256, 3)
    assert out.dtype == np.dtype(np.uint8)


@pytest.mark.parametrize("size", [(255, 1000), (1000, 255), (255, 255)])
def test_an_image_smaller_than_the_crop_is_too_small(size: tuple[int, int]) -> None:
    with pytest.raises(ImageError) as caught:
        get_policy("crop256")(decoded(*size))
    assert caught.value.status == Status.TOO_SMALL
    assert caught.value.message == f"{size[0]}x{size[1]}: policy crop256 needs 256 pixels a side"
    assert caught.value.info == ImageInfo(width=size[0], height=size[1])


def test_a_policy_knows_whether_it_resamples() -> None:
    assert not get_policy("crop256").resamples(1000, 300)
    assert not get_policy("resize256").resamples(256, 256)
    assert get_policy("resize256").resamples(256, 257)
    assert get_policy("resize256").resamples(48, 48)


def test_a_policy_is_found_by_its_id_alone() -> None:
    assert {policy_id: get_policy(policy_id).id for policy_id in POLICIES} == {
        "resize256": "resize256",
        "crop256": "crop256",
    }
    with pytest.raises(ConfigError, match="no preprocess policy 'crop224'; there are resize256, crop256"):
        get_policy("crop224")
