"""Lossy or not, and the quality of a JPEG: as far as the file tells."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from lfm_scan.imaging import decode_bytes, decode_image
from lfm_scan.imaging.lossy import estimate_jpeg_quality
from tests.awkward import animation, encode, multi_picture_jpeg, scene
from tests.imaging.test_traces import photograph


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:0"])
def test_the_estimated_quality_is_the_one_it_was_saved_with(subsampling: str) -> None:
    picture = scene(64, 64)
    files = {q: encode(picture, "JPEG", quality=q, subsampling=subsampling) for q in range(1, 101)}
    assert {q: decode_bytes(data).info.jpeg_quality for q, data in files.items()} == {q: q for q in range(1, 101)}


@pytest.mark.parametrize("options", [{"progressive": True}, {"optimize": True}])
def test_the_estimate_does_not_depend_on_the_coding(options: dict[str, bool]) -> None:
    assert decode_bytes(encode(scene(), "JPEG", quality=83, **options)).info.jpeg_quality == 83


def test_the_quality_of_grey_and_cmyk_is_estimated_too() -> None:
    for mode in ("L", "CMYK"):
        assert decode_bytes(encode(scene(mode=mode), "JPEG", quality=64)).info.jpeg_quality == 64


def test_a_foreign_table_gets_the_nearest_quality() -> None:
    table = Image.open(io.BytesIO(encode(scene(64, 64), "JPEG", quality=85))).quantization[0]  # type: ignore[attr-defined]
    foreign = np.array(table)
    foreign[::7] += 1
    estimate = estimate_jpeg_quality(foreign.tolist())
    assert estimate is not None
    assert 80 <= estimate <= 85


def test_a_table_that_is_none_gets_no_quality() -> None:
    assert estimate_jpeg_quality([1, 2, 3]) is None


def with_alpha() -> Image.Image:
    image = scene(mode="RGBA")
    image.putpixel((0, 0), (1, 2, 3, 0))
    return image


def png_from_imagemagick() -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text("jpeg:sampling-factor", "2x2,1x1,1x1")
    return encode(scene(), "PNG", pnginfo=info)


def png_with_comment() -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "no jpeg: here")
    return encode(scene(), "PNG", pnginfo=info)


@pytest.mark.parametrize(
    ("data", "lossy"),
    [
        pytest.param(encode(scene(), "JPEG"), True, id="jpeg"),
        pytest.param(encode(scene(), "JPEG", quality=100), True, id="jpeg at quality 100"),
        pytest.param(multi_picture_jpeg(), True, id="mpo"),
        pytest.param(encode(scene(), "AVIF"), True, id="avif"),
        pytest.param(encode(scene(), "WEBP"), True, id="webp lossy"),
        pytest.param(encode(scene(), "WEBP", lossless=True), False, id="webp lossless"),
        pytest.param(encode(with_alpha(), "WEBP"), True, id="webp lossy with alpha"),
        pytest.param(encode(with_alpha(), "WEBP", lossless=True), False, id="webp lossless with alpha"),
        pytest.param(encode(scene(), "WEBP", exif=b"Exif\x00\x00MM\x00*"), True, id="webp lossy with exif"),
        pytest.param(animation("WEBP"), True, id="webp animated lossy"),
        pytest.param(animation("WEBP", lossless=True), False, id="webp animated lossless"),
        pytest.param(encode(scene(), "PNG"), False, id="png"),
        pytest.param(png_from_imagemagick(), True, id="png that was a jpeg"),
        pytest.param(png_with_comment(), False, id="png with a comment"),
        pytest.param(encode(scene(), "GIF"), False, id="gif"),
        pytest.param(encode(scene(), "BMP"), False, id="bmp"),
        pytest.param(encode(scene(), "TIFF"), False, id="tiff raw"),
        pytest.param(encode(scene(), "TIFF", compression="tiff_lzw"), False, id="tiff lzw"),
        pytest.param(encode(scene(), "TIFF", compression="jpeg"), True, id="tiff jpeg"),
    ],
)
def test_a_lossy_codec_shows_in_the_file(data: bytes, lossy: bool) -> None:
    info = decode_bytes(data).info
    assert info.lossy is lossy
    from_imagemagick = data == png_from_imagemagick()
    assert info.lossy_evidence == (None if not lossy else "note" if from_imagemagick else "codec")


@pytest.mark.parametrize(
    ("fmt", "options"),
    [("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {}), ("BMP", {}), ("PNG", {"optimize": True})],
)
def test_a_lossless_file_whose_pixels_were_a_jpeg_is_lossy(fmt: str, options: dict[str, bool]) -> None:
    jpeg = Image.open(io.BytesIO(encode(photograph(), "JPEG", quality=85)))
    info = decode_bytes(encode(jpeg, fmt, **options)).info
    assert (info.format, info.lossy, info.lossy_evidence, info.jpeg_quality) == (fmt, True, "traces", 85)


def test_a_transparent_or_16_bit_png_whose_pixels_were_a_jpeg_is_lossy() -> None:
    jpeg = Image.open(io.BytesIO(encode(photograph(), "JPEG", quality=85)))
    grey = np.asarray(jpeg.convert("L")).astype(np.uint16)
    for image in (jpeg.convert("RGBA"), Image.fromarray(grey << 8 | grey)):
        info = decode_bytes(encode(image, "PNG")).info
        assert (info.mode, info.lossy_evidence) == (image.mode, "traces")


def test_a_pillow_image_shows_that_it_was_a_jpeg() -> None:
    jpeg = Image.open(io.BytesIO(encode(photograph(), "JPEG", quality=85)))
    info = decode_image(jpeg.convert("RGB")).info
    assert (info.format, info.lossy, info.lossy_evidence) == (None, True, "traces")
    assert decode_image(photograph()).info.lossy is None


def test_a_jpeg_is_told_by_its_codec_and_its_own_table() -> None:
    twice = Image.open(io.BytesIO(encode(photograph(), "JPEG", quality=70)))
    info = decode_bytes(encode(twice, "JPEG", quality=95)).info
    assert (info.lossy_evidence, info.jpeg_quality) == ("codec", 95)


def test_only_jpeg_files_have_a_jpeg_quality() -> None:
    for data in (encode(scene(), "PNG"), encode(scene(), "WEBP"), encode(scene(), "TIFF", compression="jpeg")):
        assert decode_bytes(data).info.jpeg_quality is None
