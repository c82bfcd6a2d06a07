"""The written rule of every colour mode, checked on pixel values; limits; and which status a broken file gets."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from lfm_scan.errors import ImageError
from lfm_scan.imaging import DecodedImage, ImageInfo, ImageLimits, decode_bytes, decode_image, get_policy
from lfm_scan.scoring.prepare import prepare_bytes
from lfm_scan.status import Status
from tests.awkward import (
    animation,
    awkward_files,
    encode,
    exif_rotated_jpeg,
    flipped,
    lab_tiff,
    multi_picture_jpeg,
    png,
    png_16_bit_rgb,
    scene,
    without_end,
    ycck_jpeg,
)
from tests.waiting import PATIENCE_S


def pixels(decoded: DecodedImage) -> np.ndarray:
    assert decoded.image.mode == "RGB"
    return np.asarray(decoded.image)


def refused(data: bytes, limits: ImageLimits | None = None) -> ImageError:
    with pytest.raises(ImageError) as caught:
        decode_bytes(data, limits)
    return caught.value


# --- Colour modes ---


@pytest.mark.parametrize("fmt", ["PNG", "BMP", "TIFF"])
def test_rgb_is_taken_as_it_is(fmt: str) -> None:
    decoded = decode_bytes(encode(scene(), fmt))
    np.testing.assert_array_equal(pixels(decoded), np.asarray(scene()))
    assert decoded.info.mode == "RGB"


def test_a_jpeg_decodes_as_pillow_decodes_it() -> None:
    data = encode(scene(), "JPEG", quality=90)
    np.testing.assert_array_equal(pixels(decode_bytes(data)), np.asarray(Image.open(io.BytesIO(data))))


def test_grey_fills_all_three_channels() -> None:
    grey = scene(mode="L")
    expected = np.repeat(np.asarray(grey)[..., None], 3, axis=-1)
    np.testing.assert_array_equal(pixels(decode_bytes(encode(grey, "PNG"))), expected)


def test_one_bit_becomes_black_and_white() -> None:
    bits = scene(mode="1")
    expected = np.repeat(np.asarray(bits)[..., None], 3, axis=-1).astype(np.uint8) * 255
    np.testing.assert_array_equal(pixels(decode_bytes(encode(bits, "PNG"))), expected)


def test_a_palette_gives_its_colours() -> None:
    palette = scene().quantize(17)
    colours = np.array(palette.getpalette()).reshape(-1, 3)
    decoded = decode_bytes(encode(palette, "PNG"))
    assert decoded.info.mode == "P"
    np.testing.assert_array_equal(pixels(decoded), colours[np.asarray(palette)])


@pytest.mark.parametrize("transparency", [0, b"\x00" * 17, bytes(range(17))])
def test_a_palette_with_transparency_gives_the_colours_beneath(transparency: int | bytes) -> None:
    palette = scene().quantize(17)
    colours = np.array(palette.getpalette()).reshape(-1, 3)
    decoded = decode_bytes(encode(palette, "PNG", transparency=transparency))
    np.testing.assert_array_equal(pixels(decoded), colours[np.asarray(palette)])


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_alpha_is_dropped_and_the_colours_beneath_stay(mode: str) -> None:
    opaque = scene(mode=mode)
    alpha = np.zeros((256, 256), np.uint8)
    alpha[:, 128:] = 99
    see_through = opaque.copy()
    see_through.putalpha(Image.fromarray(alpha))
    decoded = decode_bytes(encode(see_through, "PNG"))
    assert decoded.info.mode == see_through.mode
    np.testing.assert_array_equal(pixels(decoded), np.asarray(opaque.convert("RGB")))


@pytest.mark.parametrize(("mode", "key"), [("RGB", (1, 2, 3)), ("L", 7)])
def test_a_transparent_colour_of_a_png_is_an_ordinary_colour(mode: str, key: object) -> None:
    decoded = decode_bytes(encode(scene(mode=mode), "PNG", transparency=key))
    np.testing.assert_array_equal(pixels(decoded), np.asarray(scene(mode=mode).convert("RGB")))


def ramp_16_bit() -> np.ndarray:
    """Return all 65,536 values, (256, 256) uint16."""
    return np.arange(65_536, dtype=np.uint16).reshape(256, 256)


@pytest.mark.parametrize(("fmt", "mode"), [("PNG", "I;16"), ("TIFF", "I;16"), ("TIFF", "I;16B")])
def test_16_bit_grey_gives_its_high_byte(fmt: str, mode: str) -> None:
    raw = ramp_16_bit().astype(">u2" if mode == "I;16B" else "<u2").tobytes()
    decoded = decode_bytes(encode(Image.frombytes(mode, (256, 256), raw), fmt))
    assert decoded.info.mode == mode
    expected = np.repeat((ramp_16_bit() >> 8)[..., None], 3, axis=-1)
    np.testing.assert_array_equal(pixels(decoded), expected)


def test_16_bit_rgb_gives_its_high_bytes() -> None:
    samples = np.stack([ramp_16_bit(), ramp_16_bit()[::-1], ramp_16_bit().T], axis=-1)
    np.testing.assert_array_equal(pixels(decode_bytes(png_16_bit_rgb(samples))), samples >> 8)


def test_cmyk_is_converted_without_colour_management() -> None:
    cyan, magenta, yellow, black = ink = (10, 200, 100, 50)
    decoded = decode_bytes(encode(Image.new("CMYK", (64, 64), ink), "JPEG", quality=100))
    assert decoded.info.mode == "CMYK"
    expected = [(255 - value) * (255 - black) / 255 for value in (cyan, magenta, yellow)]
    assert np.abs(pixels(decoded) - np.array(expected)).max() <= 3


def test_ycck_is_converted_through_cmyk() -> None:
    # Adobe stores inks inverted, so the file holds Y 128, Cb 128, Cr 200, K 255, and Pillow reads the inks as the red,
    # green and blue of that YCbCr colour (JFIF's formula) over no black.
    data = bytearray(encode(Image.new("CMYK", (64, 64), (127, 127, 55, 0)), "JPEG", quality=100))
    data[data.index(b"Adobe\x00") + 11] = 2
    inks = np.array([128 + 1.402 * 72, 128 - 0.714136 * 72, 128])
    assert np.abs(pixels(decode_bytes(bytes(data))) - (255 - inks)).max() <= 3
    assert decode_bytes(ycck_jpeg()).info.mode == "CMYK"


@pytest.mark.parametrize("mode", ["I", "F", "LAB"])
def test_modes_without_a_defined_rgb_form_are_refused(mode: str) -> None:
    data = lab_tiff() if mode == "LAB" else encode(scene(mode=mode), "TIFF")
    error = refused(data)
    assert error.status == Status.UNSUPPORTED
    assert error.message == f"colour mode {mode} has no defined 8-bit RGB form"
    assert error.info is not None
    assert (error.info.format, error.info.mode, error.info.width) == ("TIFF", mode, 256)


def test_an_hsv_image_in_memory_is_refused() -> None:
    with pytest.raises(ImageError, match="colour mode HSV"):
        decode_image(scene(mode="HSV"))


# --- Orientation, frames, facts ---


def test_exif_orientation_is_recorded_and_not_applied() -> None:
    turned, straight = decode_bytes(exif_rotated_jpeg(6)), decode_bytes(encode(scene(320, 256), "JPEG"))
    assert turned.info.exif_orientation == 6
    assert straight.info.exif_orientation is None
    assert (turned.info.width, turned.info.height) == turned.image.size == (320, 256)
    np.testing.assert_array_equal(pixels(turned), pixels(straight))


@pytest.mark.parametrize("orientation", [0, 9, 4711])
def test_an_exif_orientation_that_does_not_exist_is_not_recorded(orientation: int) -> None:
    assert decode_bytes(exif_rotated_jpeg(orientation)).info.exif_orientation is None


def test_broken_exif_does_not_cost_the_image() -> None:
    data = encode(scene(), "JPEG", exif=b"Exif\x00\x00MM\x00\x2a\x00\x00\xff\xff rubbish")
    assert decode_bytes(data).info.exif_orientation is None


@pytest.mark.parametrize("fmt", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_of_an_animation_the_first_frame_counts(fmt: str) -> None:
    decoded = decode_bytes(animation(fmt))
    assert decoded.info.num_frames == 3
    # The others are black and white: at least 100 levels away on average.
    assert np.abs(pixels(decoded).astype(int) - np.asarray(scene())).mean() < 12


@pytest.mark.parametrize("fmt", ["GIF", "WEBP", "AVIF"])
def test_an_animation_decodes_as_its_first_frame_alone(fmt: str) -> None:
    # Counting the frames of a GIF goes through them; the first is to be the one that stays.
    data = animation(fmt)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(pixels(decode_bytes(data)), expected)


def test_no_more_frames_are_counted_than_a_result_can_hold() -> None:
    data = bytearray(animation("PNG"))
    start = data.index(b"acTL")
    struct.pack_into(">I", data, start + 4, 2**31)
    struct.pack_into(">I", data, start + 12, zlib.crc32(data[start : start + 12]))
    assert decode_bytes(bytes(data)).info.num_frames == 65_535


def test_of_a_multi_picture_jpeg_the_first_picture_counts() -> None:
    decoded = decode_bytes(multi_picture_jpeg())
    assert (decoded.info.format, decoded.info.num_frames, decoded.image.size) == ("JPEG", 2, (256, 256))


def test_an_image_turned_to_a_later_frame_is_scored_by_its_first() -> None:
    with Image.open(io.BytesIO(animation("TIFF"))) as image:
        image.seek(2)
        decoded = decode_image(image)
    np.testing.assert_array_equal(pixels(decoded), np.asarray(scene()))


def test_an_image_made_in_memory_has_no_file_to_tell_of() -> None:
    decoded = decode_image(scene())
    assert decoded.info == ImageInfo(mode="RGB", width=256, height=256, num_frames=1)
    np.testing.assert_array_equal(pixels(decoded), np.asarray(scene()))


def test_an_rgb_image_is_not_copied() -> None:
    image = scene()
    assert decode_image(image).image is image


def test_decoding_does_not_change_the_callers_image() -> None:
    image = scene(mode="RGBA")
    before = image.copy()
    decode_image(image)
    assert image == before


def test_the_facts_of_a_jpeg() -> None:
    assert decode_bytes(exif_rotated_jpeg(3)).info == ImageInfo(
        format="JPEG",
        mode="RGB",
        width=320,
        height=256,
        lossy=True,
        lossy_evidence="codec",
        jpeg_quality=75,
        exif_orientation=3,
        num_frames=1,
    )


# --- Limits ---


def test_a_file_over_the_byte_limit_is_too_large() -> None:
    data = encode(scene(64, 64), "PNG")
    assert decode_bytes(data, ImageLimits(max_image_bytes=len(data))).image.size == (64, 64)
    error = refused(data, ImageLimits(max_image_bytes=len(data) - 1))
    assert error.status == Status.TOO_LARGE
    assert error.message == f"{len(data):,} bytes, the limit is {len(data) - 1:,} (--max-image-bytes)"


def test_an_image_over_the_pixel_limit_is_too_large() -> None:
    data = encode(scene(100, 50), "PNG")
    assert decode_bytes(data, ImageLimits(max_image_pixels=5000)).image.size == (100, 50)
    error = refused(data, ImageLimits(max_image_pixels=4999))
    assert error.status == Status.TOO_LARGE
    assert error.message == "100x50 is 5,000 pixels, the limit is 4,999 (--max-image-pixels)"
    assert error.info is not None
    assert (error.info.width, error.info.height) == (100, 50)


def test_the_shorter_side_decides_what_is_too_small() -> None:
    assert decode_bytes(encode(scene(48, 300), "PNG")).image.size == (48, 300)
    error = refused(encode(scene(300, 47), "PNG"))
    assert error.status == Status.TOO_SMALL
    assert error.message == "300x47: the shorter side must have 48 pixels"


def test_limits_hold_for_images_in_memory() -> None:
    with pytest.raises(ImageError, match="too_large"):
        decode_image(scene(100, 50), ImageLimits(max_image_pixels=4999))
    with pytest.raises(ImageError, match="too_small"):
        decode_image(Image.new("RGB", (0, 0)))


_MEASURE = """
import json, re, sys
from lfm_scan.imaging import decode_bytes
from lfm_scan.errors import ImageError

def peak_mib():
    # Not ru_maxrss: across fork and exec it keeps the peak of pytest.
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024

files = [open(path, "rb").read() for path in sys.argv[1:]]
*bombs, warm_up, control = files
decode_bytes(warm_up)
before, statuses = peak_mib(), []
for data in bombs:
    try:
        decode_bytes(data)
    except ImageError as exc:
        statuses.append(exc.status)
bombs_mib = peak_mib() - before
decode_bytes(control)
print(json.dumps([statuses, bombs_mib, peak_mib() - before]))
"""


def test_bombs_are_refused_before_they_take_memory(tmp_path: Path) -> None:
    names = ["claims-50000x50000.png", "claims-9000x9000.png", "claims-65500x65500.jpg", "text-bomb.png"]
    contents = [awkward_files()[name].data for name in names]
    control = encode(Image.new("L", (5000, 5000)), "PNG")  # honest; decoding it takes about 100 MB
    paths = []
    for index, data in enumerate([*contents, encode(scene(), "JPEG"), control]):
        paths.append(tmp_path / str(index))
        paths[-1].write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, *map(str, paths)],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=True,
    )
    statuses, bombs_mib, control_mib = json.loads(done.stdout)
    assert statuses == ["too_large"] * 4
    assert bombs_mib < 24
    assert control_mib > 60


@pytest.mark.parametrize(("kind", "payload"), [(b"zTXt", b"a\0\0"), (b"iTXt", b"a\0\1\0\0\0"), (b"iCCP", b"a\0\0")])
def test_a_png_whose_text_would_fill_the_memory_is_too_large(kind: bytes, payload: bytes) -> None:
    rows = zlib.compress(bytes(257 * 256))
    bomb = (kind, payload + zlib.compress(bytes(64 * 2**20), 9))
    error = refused(png((256, 256, 8, 0), bomb, (b"IDAT", rows)))
    assert error.status == Status.TOO_LARGE
    assert error.message.startswith("its text or colour profile is past the decoder's own bound (Decompressed data too")
    many = [(kind, payload + zlib.compress(bytes(1_000_000), 9))] * 70
    if kind != b"iCCP":  # of profiles, the last counts
        error = refused(png((256, 256, 8, 0), *many, (b"IDAT", rows)))
        assert error.status == Status.TOO_LARGE
        assert "Too much memory used in text chunks" in error.message


# --- Files without their end ---


@pytest.mark.parametrize(
    ("fmt", "options"),
    [
        ("JPEG", {"quality": 90}),
        ("PNG", {}),
        ("GIF", {"interlace": 0}),
        ("BMP", {}),
        ("TIFF", {}),
        ("JPEG", {"progressive": 1}),
    ],
)
def test_what_is_there_of_a_file_is_decoded_on_request(fmt: str, options: dict[str, int]) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8))
    whole = encode(noise, fmt, **options)
    cut = without_end(whole, 0.7)
    assert refused(cut).status == Status.TRUNCATED
    decoded = decode_bytes(cut, ImageLimits(score_truncated=True))
    expected = decode_bytes(whole, ImageLimits(score_truncated=True))
    assert (decoded.truncated, expected.truncated) == (True, False)
    assert decoded.info == expected.info
    # A BMP is stored from the bottom, and a progressive JPEG loses detail everywhere.
    kept = slice(96, 256) if fmt == "BMP" else slice(0, 160)
    if not options.get("progressive"):
        np.testing.assert_array_equal(pixels(decoded)[kept], pixels(expected)[kept])
    assert (pixels(decoded) != pixels(expected)).any()
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.parametrize("fmt", ["WEBP", "AVIF"])
def test_where_a_decoder_needs_the_whole_file_it_stays_truncated(fmt: str) -> None:
    cut = without_end(encode(scene(), fmt), 0.6)
    error = refused(cut, ImageLimits(score_truncated=True))
    assert (error.status, error.message) == (Status.TRUNCATED, refused(cut).message)


def test_a_damaged_file_that_has_its_end_is_corrupt_even_where_truncated_ones_are_scored() -> None:
    limits = ImageLimits(score_truncated=True)
    assert refused(awkward_files()["bad-crc.png"].data, limits).status == Status.CORRUPT


def test_a_jpeg_that_was_cut_and_ended_again_passes_for_a_whole_one() -> None:
    # A limit to know of, not a wish: libjpeg fills in grey and only warns, and Pillow keeps the warning to itself.
    whole = encode(scene(), "JPEG", quality=90)
    decoded = decode_bytes(without_end(whole, 0.5) + b"\xff\xd9")
    assert not decoded.truncated
    assert (pixels(decoded)[-8:] == pixels(decoded)[-1, -1]).all()


# --- Broken files ---


@pytest.mark.parametrize("policy_id", ["crop256", "resize256"])
@pytest.mark.parametrize("name", list(awkward_files()))
def test_every_awkward_file_ends_as_the_right_status(name: str, policy_id: str) -> None:
    file = awkward_files()[name]
    prepared = prepare_bytes(file.data, get_policy(policy_id), ImageLimits())
    assert prepared.status == file.status(policy_id), prepared.error
    assert (prepared.pixels is None) == (prepared.status != Status.OK) == (prepared.error is not None)


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.95])
@pytest.mark.parametrize(
    ("fmt", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
        ("GIF", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("AVIF", {}),
    ],
)
def test_a_file_without_its_end_is_truncated(fmt: str, options: dict[str, bool], keep: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    error = refused(without_end(encode(Image.fromarray(noise), fmt, **options), keep))
    assert error.status == Status.TRUNCATED
    assert "the end of the file is missing" in error.message


@pytest.mark.parametrize("fmt", ["PNG", "WEBP", "AVIF"])
def test_a_damaged_file_with_its_end_is_corrupt(fmt: str) -> None:
    data = encode(scene(), fmt)
    position = {"PNG": data.find(b"IDAT") + 4, "WEBP": 22, "AVIF": 40}[fmt]
    error = refused(flipped(data, position))
    assert error.status == Status.CORRUPT
    assert error.message.startswith("cannot be decoded: ")


def test_a_failure_after_the_header_keeps_the_headers_facts() -> None:
    error = refused(without_end(encode(scene(300, 260), "JPEG", quality=80), 0.7))
    assert error.status == Status.TRUNCATED
    assert error.info == ImageInfo("JPEG", "RGB", 300, 260, lossy=True, jpeg_quality=80, lossy_evidence="codec")


def test_content_decides_and_not_a_decoder_that_happens_to_accept_it() -> None:
    for data, found in ((b"P6 64 64 255\n" + bytes(64 * 64 * 3), "unknown"), (encode(scene(64, 64), "ICO"), "ICO")):
        assert Image.open(io.BytesIO(data)).size == (64, 64)
        error = refused(data)
        assert error.status == Status.UNSUPPORTED
        assert found in error.message


def test_unsupported_content_is_named() -> None:
    error = refused(b"%PDF-1.7")
    assert error.message == "PDF content; readable are JPEG, PNG, WEBP, AVIF, GIF, TIFF, BMP"
    assert error.info == ImageInfo(format="PDF")


def test_an_empty_file_is_empty() -> None:
    error = refused(b"")
    assert (error.status, error.message) == (Status.EMPTY, "the file has no bytes")


def test_a_png_without_pixels_is_not_ok() -> None:
    assert refused(png((64, 64, 8, 2))).status in (Status.TRUNCATED, Status.CORRUPT)
