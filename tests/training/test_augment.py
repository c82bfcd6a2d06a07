"""Augmentations know nothing of labels, are alike within a pair, and do to pixels what they say."""

from __future__ import annotations

import inspect
import io
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from lfm_scan.errors import ConfigError
from lfm_scan.training.augment import (
    KERNELS,
    MARGIN_PX,
    Augmentation,
    AugmentConfig,
    Coding,
    draw_augmentation,
)
from lfm_scan.training.recipe import Recipe
from tests.images import picture

CROP = Recipe(preprocess="crop256", crop_px=128)
RESIZE = Recipe(crop_px=224)
EVERYTHING = AugmentConfig(
    augment_rescale=0.5, augment_blur=0.5, augment_noise=0.5, augment_jpeg=0.5, jpeg_twice=0.5, augment_webp=0.5
)
NOTHING = Augmentation(
    left=0.0,
    top=0.0,
    mirror=False,
    scale=None,
    kernel=Image.Resampling.BICUBIC,
    blur_sigma=None,
    noise_sigma=None,
    noise_seed=0,
    codings=(),
)


def _plans(config: AugmentConfig, count: int, recipe: Recipe = CROP) -> list[Augmentation]:
    return [draw_augmentation(config, recipe, 0, 0, f"/{number}.png") for number in range(count)]


def _apply(image: Image.Image, recipe: Recipe = CROP, **changes: Any) -> NDArray[np.int64]:  # noqa: ANN401
    return replace(NOTHING, **changes).apply(image, recipe).astype(np.int64)


def _reference(fmt: str, window: NDArray[Any], **options: object) -> NDArray[np.int64]:
    buffer = io.BytesIO()
    Image.fromarray(window.astype(np.uint8)).save(buffer, fmt, **options)
    with Image.open(buffer) as image:
        return np.asarray(image.convert("RGB")).astype(np.int64)


def test_a_plan_is_drawn_from_seed_epoch_and_pair_and_there_is_no_way_to_tell_it_the_label() -> None:
    assert list(inspect.signature(draw_augmentation).parameters) == ["config", "recipe", "seed", "epoch", "group"]
    plan = draw_augmentation(EVERYTHING, CROP, 1, 2, "s/x")

    assert draw_augmentation(EVERYTHING, CROP, 1, 2, "s/x") == plan
    others = [draw_augmentation(EVERYTHING, CROP, *key) for key in ((0, 2, "s/x"), (1, 1, "s/x"), (1, 2, "s/y"))]
    assert all(other.left != plan.left for other in others)


def test_turning_one_augmentation_on_changes_no_other() -> None:
    for plain, blurred in zip(
        _plans(AugmentConfig(augment_jpeg=1.0), 20),
        _plans(AugmentConfig(augment_jpeg=1.0, augment_blur=1.0), 20),
        strict=True,
    ):
        assert blurred.blur_sigma is not None
        assert replace(blurred, blur_sigma=None) == plain


def test_everything_is_off_unless_asked_for() -> None:
    for plan in _plans(AugmentConfig(), 50):
        assert (plan.scale, plan.blur_sigma, plan.noise_sigma, plan.codings) == (None, None, None, ())


def test_each_is_done_as_often_as_it_should_be_and_within_its_range() -> None:
    config = AugmentConfig(
        augment_rescale=0.25,
        rescale=(0.5, 2.0),
        augment_blur=0.5,
        blur_sigma=(1.0, 2.0),
        augment_noise=0.75,
        noise_sigma=(3.0, 4.0),
        augment_jpeg=0.5,
        jpeg_quality=(80, 83),
        jpeg_twice=0.5,
        augment_webp=0.25,
        webp_quality=(50, 51),
    )
    plans = _plans(config, 4000)

    def share(values: list[object]) -> float:
        return sum(value is not None for value in values) / len(plans)

    assert share([plan.scale for plan in plans]) == pytest.approx(0.25, abs=0.03)
    assert share([plan.blur_sigma for plan in plans]) == pytest.approx(0.5, abs=0.03)
    assert share([plan.noise_sigma for plan in plans]) == pytest.approx(0.75, abs=0.03)
    assert sum(plan.mirror for plan in plans) / len(plans) == pytest.approx(0.5, abs=0.03)
    formats = Counter("".join(coding.format[0] for coding in plan.codings) for plan in plans)
    expected = {"": 0.375, "W": 0.125, "J": 0.1875, "JW": 0.0625, "JJ": 0.1875, "JJW": 0.0625}
    assert {key: count / len(plans) for key, count in formats.items()} == pytest.approx(expected, abs=0.03)
    scales = [plan.scale for plan in plans if plan.scale is not None]
    assert all(0.5 <= scale <= 2 for scale in scales)
    assert np.mean(np.log2(scales)) == pytest.approx(0, abs=0.1)
    assert all(1 <= plan.blur_sigma <= 2 for plan in plans if plan.blur_sigma is not None)
    assert all(3 <= plan.noise_sigma <= 4 for plan in plans if plan.noise_sigma is not None)
    codings = [coding for plan in plans for coding in plan.codings]
    assert {coding.quality for coding in codings if coding.format == "JPEG"} == {80, 81, 82, 83}
    assert {coding.quality for coding in codings if coding.format == "WEBP"} == {50, 51}
    assert {coding.subsampling for coding in codings if coding.format == "JPEG"} == {"4:4:4", "4:2:0"}
    assert {coding.grid for coding in codings} == {(column, row) for column in range(16) for row in range(16)}
    assert {plan.kernel for plan in plans} == set(KERNELS)


def test_nothing_but_the_crop_leaves_pixels_as_they_are() -> None:
    image = picture(200, 180)
    pixels = np.asarray(image)

    np.testing.assert_array_equal(_apply(image), pixels[:128, :128])
    np.testing.assert_array_equal(_apply(image, left=0.999, top=0.5), pixels[26:154, 72:200])
    np.testing.assert_array_equal(_apply(image, left=0.5, mirror=True), pixels[:128, 36:164][:, ::-1])
    np.testing.assert_array_equal(_apply(picture(128, 128), left=0.9, top=0.9), np.asarray(picture(128, 128)))


def test_the_resize_policy_comes_before_the_crop() -> None:
    image = picture(400, 300)
    whole = np.asarray(image.resize((256, 256), Image.Resampling.BILINEAR))

    np.testing.assert_array_equal(_apply(image, RESIZE, left=0.5, top=0.99), whole[32:256, 16:240])


def test_crops_lie_everywhere_at_odd_and_even_offsets_alike() -> None:
    column, row = np.meshgrid(np.arange(137), np.arange(137))
    where = Image.fromarray(np.stack([column, row, row], axis=-1).astype(np.uint8))
    corners = Counter(
        tuple(plan.apply(where, replace(CROP, flip=False))[0, 0, :2].tolist())
        for plan in _plans(AugmentConfig(), 3000, replace(CROP, flip=False))
    )

    assert set(corners) == {(left, top) for left in range(10) for top in range(10)}
    odd = sum(count for (left, _), count in corners.items() if left % 2)
    assert odd / 3000 == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("scale", [0.7531, 1.3177])  # of no simple ratio: its ties could round either way
def test_rescaling_the_window_is_rescaling_the_whole_image(kernel: Image.Resampling, scale: float) -> None:
    image = picture(300, 260)
    width, height = round(300 * scale), round(260 * scale)
    whole = np.asarray(image.resize((width, height), kernel)).astype(np.int64)
    left, top = int(0.4 * (width - 128 + 1)), int(0.7 * (height - 128 + 1))

    crop = _apply(image, scale=scale, kernel=kernel, left=0.4, top=0.7)

    difference = np.abs(crop - whole[top : top + 128, left : left + 128])
    # Pillow has the window's place in single precision: where two pixels are equally near, either may be taken.
    has_ties = kernel in (Image.Resampling.NEAREST, Image.Resampling.BOX) and scale > 1
    assert difference.max() <= 1 or has_ties
    assert (difference > 0).mean() < 0.03


def test_no_rescale_makes_an_image_smaller_than_the_crop() -> None:
    image = picture(200, 150)

    crop = _apply(image, scale=0.1, left=0.99)

    whole = np.asarray(image.resize((171, 128), Image.Resampling.BICUBIC)).astype(np.int64)
    assert np.abs(crop - whole[:, 43:]).max() <= 1


@pytest.mark.parametrize(("quality", "subsampling"), [(90, "4:4:4"), (90, "4:2:0"), (50, "4:4:4")])
@pytest.mark.parametrize("grid", [(0, 0), (3, 5), (8, 15)])
def test_jpeg_is_a_save_of_the_surroundings_with_its_grid_where_the_plan_has_it(
    quality: int, subsampling: str, grid: tuple[int, int]
) -> None:
    image = picture(300, 300)
    left = top = int(0.5 * (300 - 128 + 1))
    surroundings = np.asarray(image)[top - 16 + grid[1] : top + 144, left - 16 + grid[0] : left + 144]
    reference = _reference("JPEG", surroundings, quality=quality, subsampling=subsampling)

    crop = _apply(image, left=0.5, top=0.5, codings=(Coding("JPEG", quality, subsampling, grid),))

    np.testing.assert_array_equal(crop, reference[16 - grid[1] : 144 - grid[1], 16 - grid[0] : 144 - grid[0]])
    assert np.abs(crop - np.asarray(image)[top : top + 128, left : left + 128]).mean() > 0.5


@pytest.mark.parametrize("grid", [(0, 0), (5, 11)])
def test_the_dct_of_what_jpeg_coded_lies_on_the_lattice_of_its_quality_on_its_grid_alone(grid: tuple[int, int]) -> None:
    quality = 60
    grey = Image.fromarray(np.asarray(picture(200, 200))[:, :, 0]).convert("RGB")

    crop = _apply(grey, left=0.5, top=0.5, codings=(Coding("JPEG", quality, "4:4:4", grid),))[:, :, 0]

    # The crop begins 16 pixels into the window, so its first whole block is at the grid's place modulo 8.
    on_grid, off_grid = (
        _distance_from_lattice(crop[(grid[1] + row) % 8 :, (grid[0] + column) % 8 :], step=13)  # 16 at quality 60
        for row, column in ((0, 0), (3, 2))
    )
    assert on_grid < 0.05
    assert off_grid > 0.15


def _distance_from_lattice(pixels: NDArray[np.int64], step: int) -> float:
    """Return how far the blocks' DC coefficients are from multiples of a step, in steps: 0.25 on average by chance."""
    rows, columns = pixels.shape[0] // 8, pixels.shape[1] // 8
    blocks = pixels[: rows * 8, : columns * 8].reshape(rows, 8, columns, 8).astype(float)
    coefficients = (blocks.mean(axis=(1, 3)) - 128) * 8 / step
    return float(np.abs(coefficients - np.rint(coefficients)).mean())


def test_two_passes_of_jpeg_are_each_on_their_own_grid() -> None:
    image = picture(300, 300)
    first, second = Coding("JPEG", 70, "4:2:0", (2, 3)), Coding("JPEG", 90, "4:4:4", (9, 14))
    corner = int(0.5 * (300 - 128 + 1)) - MARGIN_PX
    window = np.asarray(image)[corner : corner + 160, corner : corner + 160].astype(np.int64)
    for coding in (first, second):
        column, row = coding.grid
        window[row:, column:] = _reference(
            "JPEG", window[row:, column:], quality=coding.quality, subsampling=coding.subsampling
        )

    np.testing.assert_array_equal(_apply(image, left=0.5, top=0.5, codings=(first, second)), window[16:144, 16:144])


def test_webp_is_a_lossy_save() -> None:
    image = picture(160, 160)
    window = np.pad(np.asarray(image), ((16, 16), (16, 16), (0, 0)), mode="reflect")[:160, :160]

    crop = _apply(image, codings=(Coding("WEBP", 60, "4:2:0", (0, 0)),))

    np.testing.assert_array_equal(crop, _reference("WEBP", window, quality=60)[16:144, 16:144])


def test_an_image_as_small_as_the_crop_is_coded_with_its_mirror_image_around_it() -> None:
    image = picture(128, 128)
    window = np.pad(np.asarray(image), ((16, 16), (16, 16), (0, 0)), mode="reflect")

    crop = _apply(image, codings=(Coding("JPEG", 80, "4:2:0", (0, 0)),))

    np.testing.assert_array_equal(crop, _reference("JPEG", window, quality=80, subsampling="4:2:0")[16:144, 16:144])


def test_blur_spreads_a_point_by_its_sigma_also_at_the_edge() -> None:
    point = np.zeros((200, 200, 3), np.uint8)
    point[64, 64] = 255
    spread = _apply(Image.fromarray(point), blur_sigma=2.0)[:, :, 0].astype(float)
    offsets = np.arange(128) - 64
    assert np.sqrt((spread.sum(axis=0) * offsets**2).sum() / spread.sum()) == pytest.approx(2.0, abs=0.25)

    image = picture(300, 300)
    left = int(0.5 * 173)
    window = Image.fromarray(np.asarray(image)[left - 16 : left + 144, left - 16 : left + 144])
    expected = np.asarray(window.filter(ImageFilter.GaussianBlur(1.5)))[16:144, 16:144]
    np.testing.assert_array_equal(_apply(image, left=0.5, top=0.5, blur_sigma=1.5), expected)


def test_noise_has_its_sigma_and_no_mean_and_is_the_same_within_a_pair() -> None:
    flat = Image.fromarray(np.full((256, 256, 3), 128, np.uint8))
    noise = _apply(flat, noise_sigma=4.0, noise_seed=1) - 128

    assert noise.std() == pytest.approx(4.0, abs=0.05)
    assert abs(noise.mean()) < 0.05
    assert abs(np.corrcoef(noise[:, :, 0].ravel(), noise[:, :, 1].ravel())[0, 1]) < 0.03
    grey = Image.fromarray(np.full((256, 256, 3), 90, np.uint8))
    np.testing.assert_array_equal(_apply(grey, noise_sigma=4.0, noise_seed=1) - 90, noise)
    assert _apply(Image.new("RGB", (128, 128)), noise_sigma=60.0).min() == 0


@pytest.mark.parametrize("recipe", [CROP, RESIZE])
@pytest.mark.parametrize("size", [(256, 256), (257, 301), (128, 129)])
def test_any_plan_gives_a_crop_of_bytes_and_leaves_the_image_alone(recipe: Recipe, size: tuple[int, int]) -> None:
    image = picture(*size)
    before = image.tobytes()

    for plan in _plans(EVERYTHING, 40, recipe):
        crop = plan.apply(image, recipe)
        assert (crop.shape, crop.dtype) == ((recipe.crop_px, recipe.crop_px, 3), np.dtype(np.uint8))
        assert crop.flags.c_contiguous
        np.testing.assert_array_equal(plan.apply(image, recipe), crop)
    assert image.tobytes() == before


def test_an_image_smaller_than_the_crop_is_an_error() -> None:
    with pytest.raises(ValueError, match="127x300: smaller than the crop of 128 pixels"):
        _apply(picture(127, 300))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"augment_jpeg": 1.5}, "--augment-jpeg is a probability"),
        ({"jpeg_twice": -0.1}, "--jpeg-twice is a probability"),
        ({"augment_blur": float("nan")}, "--augment-blur is a probability"),
        ({"jpeg_quality": (90, 80)}, "--jpeg-quality takes the smallest and the largest value"),
        ({"jpeg_quality": (0, 80)}, "between 1 and 100"),
        ({"rescale": (0.0, 1.0)}, "--rescale takes"),
        ({"noise_sigma": (0.0, float("inf"))}, "--noise-sigma takes"),
    ],
)
def test_a_setting_out_of_range_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AugmentConfig(**changes)
