"""Traces of JPEG in pixels: found at every offset and usual quality, and never in what only looks like 8x8 blocks."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from lfm_scan.imaging import decode_bytes
from lfm_scan.imaging.traces import MIN_COMBS, MIN_PROMINENCE, Traces, find_jpeg_traces, measure_traces
from tests.awkward import encode


def photograph(width: int = 256, height: int = 256, seed: int = 0) -> Image.Image:
    """Return what photographs are like: a spectrum that falls with frequency, different colours, a little noise."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    shape = (height, width // 2 + 1, 3)
    spectrum = (rng.normal(size=shape) + 1j * rng.normal(size=shape)) / (frequency + 0.004)[..., None] ** 1.2
    planes = np.fft.irfft2(spectrum, s=(height, width), axes=(0, 1))
    planes[..., 1:] += planes[..., :1]
    planes *= 45 / planes.std()
    noisy = planes + 128 + rng.normal(size=planes.shape)
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def through_jpeg(image: Image.Image, **options: object) -> Image.Image:
    return Image.open(io.BytesIO(encode(image, "JPEG", **options))).convert("RGB")


def found(image: Image.Image) -> Traces:
    traces = find_jpeg_traces(image)
    assert traces is not None
    return traces


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:0"])
@pytest.mark.parametrize("quality", [98, 95, 90, 85, 75, 60])
def test_a_picture_that_was_a_jpeg_shows_it_and_its_quality(quality: int, subsampling: str) -> None:
    for seed in range(3):
        traces = found(through_jpeg(photograph(seed=seed), quality=quality, subsampling=subsampling))
        assert (traces.offset, traces.quality) == ((0, 0), quality)


@pytest.mark.parametrize("options", [{"progressive": True}, {"optimize": True}])
def test_the_coding_of_the_jpeg_does_not_matter(options: dict[str, bool]) -> None:
    assert found(through_jpeg(photograph(), quality=83, **options)).quality == 83


def test_a_grey_jpeg_is_found() -> None:
    assert found(through_jpeg(photograph().convert("L"), quality=80)).quality == 80


def test_the_grid_of_a_crop_is_found_at_each_of_its_64_offsets() -> None:
    jpeg = through_jpeg(photograph(200, 200), quality=88)
    for left in range(8):
        for top in range(8):
            traces = found(jpeg.crop((left, top, left + 180, top + 180)))
            assert (traces.offset, traces.quality) == ((-left % 8, -top % 8), 88)


@pytest.mark.parametrize("size", [(1300, 1100), (8000, 64), (70, 7000), (525, 520)])
def test_large_and_elongated_pictures_are_judged_by_a_sample(size: tuple[int, int]) -> None:
    picture = photograph(*size)
    traces = found(through_jpeg(picture, quality=90).crop((3, 5, *size)))
    assert (traces.offset, traces.quality) == ((5, 3), 90)
    assert find_jpeg_traces(picture) is None


def test_a_jpeg_pasted_into_a_screenshot_is_found() -> None:
    screen = Image.new("RGB", (700, 500), (240, 240, 240))
    screen.paste(through_jpeg(photograph(seed=4), quality=85), (211, 102))
    assert found(screen).offset == (211 % 8, 102 % 8)


def test_of_two_jpegs_one_after_the_other_at_least_one_is_found() -> None:
    for first, second in [(75, 95), (95, 75), (90, 90)]:
        twice = through_jpeg(through_jpeg(photograph(), quality=first).crop((3, 6, 256, 256)), quality=second)
        assert found(twice).offset in {(0, 0), (5, 2)}


def test_a_table_that_is_no_standard_one_has_no_quality() -> None:
    tables = [[5 + (7 * index) % 11 for index in range(64)]] * 2
    traces = found(through_jpeg(photograph(), qtables=tables))
    assert traces.num_combs > 40
    assert traces.quality is None


def test_a_picture_that_was_never_a_jpeg_shows_nothing() -> None:
    for seed in range(20):
        traces = measure_traces(photograph(200 + 7 * seed, 300, seed))
        assert traces is not None
        assert traces.num_combs <= 3


def drawing() -> Image.Image:
    rng = np.random.default_rng(1)
    image = Image.new("RGB", (400, 320), (250, 250, 250))
    draw = ImageDraw.Draw(image)
    for _ in range(25):
        x, y, width, height = (int(value) for value in rng.integers((0, 0, 5, 5), (400, 320, 120, 120)))
        colour = (int(rng.integers(256)), int(rng.integers(256)), int(rng.integers(256)))
        (draw.rectangle if width % 2 else draw.ellipse)((x, y, x + width, y + height), fill=colour)
    return image


def text(mode: str) -> Image.Image:
    rng = np.random.default_rng(2)
    image = Image.new("RGB", (400, 320), "white")
    draw = ImageDraw.Draw(image)
    draw.fontmode = mode
    for y in range(4, 320, 17):
        letters = "".join(chr(code) for code in rng.integers(97, 123, 90))
        draw.text((4, y), letters, fill="black", font=ImageFont.load_default(13))
    return image


def pixel_art(scale: int, num_colours: int) -> Image.Image:
    rng = np.random.default_rng(3)
    palette = rng.integers(0, 256, (num_colours, 3), dtype=np.uint8)
    small = Image.fromarray(palette[rng.integers(0, num_colours, (256 // scale, 256 // scale))])
    return small.resize((small.width * scale, small.height * scale), Image.Resampling.NEAREST)


def gradient() -> Image.Image:
    y, x = np.mgrid[0:300, 0:300]
    return Image.fromarray(np.stack([x * 0.7 + y * 0.1, y * 0.8, 255 - x * 0.8], axis=-1).astype(np.uint8))


def dithered() -> Image.Image:
    matrix = np.zeros((1, 1), dtype=int)
    while len(matrix) < 8:
        matrix = np.block([[4 * matrix, 4 * matrix + 2], [4 * matrix + 3, 4 * matrix + 1]])
    threshold = np.tile((matrix + 0.5) / 64, (32, 32))[..., None]
    levels = np.floor(np.asarray(photograph()) / 255 * 5 + threshold)
    return Image.fromarray((levels * 51).astype(np.uint8))


def tiled(num_tiles: int) -> Image.Image:
    rng = np.random.default_rng(5)
    tiles = rng.integers(0, 256, (num_tiles, 8, 8), dtype=np.uint8)
    pixels = tiles[rng.integers(0, num_tiles, (32, 32))].swapaxes(1, 2).reshape(256, 256)
    return Image.fromarray(pixels).convert("RGB")


def on_a_grid() -> Image.Image:
    """Return what an upsampling network may leave: a faint pattern that repeats every 8 pixels, and steps at it."""
    rng = np.random.default_rng(6)
    picture = np.asarray(photograph(seed=6)).astype(float)
    picture += np.tile(rng.normal(0, 4, (8, 8)), (32, 32))[..., None]
    picture += np.kron(rng.normal(0, 4, (32, 32)), np.ones((8, 8)))[..., None]
    return Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))


def sine() -> Image.Image:
    y, x = np.mgrid[0:300, 0:300]
    waves = 128 + 60 * np.sin(x * np.pi / 4) * np.cos(y * np.pi / 4)
    return Image.fromarray(waves.astype(np.uint8)).convert("RGB")


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(drawing, id="flat colours"),
        pytest.param(lambda: text("L"), id="text"),
        pytest.param(lambda: text("1"), id="text of two colours"),
        pytest.param(lambda: pixel_art(8, 8), id="pixel art by 8"),
        pytest.param(lambda: pixel_art(4, 8), id="pixel art by 4"),
        pytest.param(lambda: pixel_art(1, 16), id="pixel art"),
        pytest.param(gradient, id="gradient"),
        pytest.param(dithered, id="dithered by 8x8"),
        pytest.param(lambda: photograph().convert("1").convert("RGB"), id="bilevel"),
        pytest.param(lambda: photograph().quantize(16).convert("RGB"), id="palette"),
        pytest.param(lambda: tiled(12), id="tiles of 8"),
        pytest.param(lambda: tiled(1000), id="many tiles of 8"),
        pytest.param(lambda: pixel_art(8, 4000), id="mosaic of 8"),
        pytest.param(on_a_grid, id="a network's grid of 8"),
        pytest.param(sine, id="waves of 8"),
        pytest.param(lambda: Image.new("RGB", (256, 256), "teal"), id="one colour"),
        pytest.param(lambda: photograph(32, 32).resize((256, 256), Image.Resampling.BICUBIC), id="enlarged by 8"),
    ],
)
def test_a_layout_of_8_pixels_or_few_colours_is_no_jpeg(make: Callable[[], Image.Image]) -> None:
    assert find_jpeg_traces(make()) is None


def test_combs_that_are_everywhere_are_no_jpeg() -> None:
    traces = measure_traces(text("1"))
    assert traces is not None
    assert traces.num_combs >= MIN_COMBS
    assert traces.prominence < MIN_PROMINENCE
    assert not traces.are_jpeg


def test_a_jpeg_that_was_resized_is_not_seen() -> None:
    jpeg = through_jpeg(photograph(400, 400), quality=75)
    for side in (200, 300, 500):
        assert find_jpeg_traces(jpeg.resize((side, side), Image.Resampling.LANCZOS)) is None


@pytest.mark.parametrize("size", [(1, 1), (15, 4000), (16, 16), (17, 31), (48, 48), (1, 300_000), (300_000, 20)])
def test_no_size_is_too_odd(size: tuple[int, int]) -> None:
    assert find_jpeg_traces(Image.new("RGB", size, "grey")) is None


def test_a_small_picture_may_be_too_small_to_tell_and_a_tiny_one_is() -> None:
    assert found(through_jpeg(photograph(96, 96), quality=90)).quality == 90
    assert measure_traces(through_jpeg(photograph(15, 96), quality=90)) is None


def test_looking_changes_nothing() -> None:
    image = through_jpeg(photograph(), quality=90)
    before = image.copy()
    found(image)
    assert image == before


def test_a_decode_may_leave_out_the_search() -> None:
    once_jpeg = encode(through_jpeg(photograph(), quality=75), "PNG")

    assert decode_bytes(once_jpeg).info.lossy
    without = decode_bytes(once_jpeg, traces=False).info
    assert (without.lossy, without.lossy_evidence, without.jpeg_quality) == (False, None, None)
