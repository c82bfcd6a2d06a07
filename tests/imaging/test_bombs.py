"""Files that are small and mean to cost much: each has its outcome within a few seconds and a bounded memory.

The bounds are the decoder process's own: past them the kernel ends it, and the status would be timeout or too_large.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from typing import Final

import pytest

from lfm_scan.imaging import ImageLimits
from lfm_scan.scoring.isolated import EncodedImage, IsolatedDecoder
from lfm_scan.scoring.prepare import Prepared
from lfm_scan.status import Status
from tests.awkward import encode, png, scene

_LIMITS: Final = ImageLimits(max_decode_seconds=5, max_decode_bytes=256 * 2**20)


def prepare(data: bytes, limits: ImageLimits = _LIMITS) -> Prepared:
    with IsolatedDecoder("resize256", limits) as decoder:
        [prepared] = decoder.prepare_all([EncodedImage("bomb", data)])
    return prepared


def gif_of_tiny_frames(num_frames: int) -> bytes:
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00"
    return encode(scene(64, 64, "P"), "GIF").rstrip(b";") + frame * (num_frames - 1) + b";"


def webp_of_frames(num_frames: int) -> bytes:
    data = encode(scene(64, 64), "WEBP", save_all=True, append_images=[scene(64, 64, "L").convert("RGB")])
    start = data.index(b"ANMF")
    frame = data[start : start + 8 + struct.unpack_from("<I", data, start + 4)[0]]
    body = data[8:start] + frame * num_frames
    return b"RIFF" + struct.pack("<I", len(body)) + body


def tiff(num_pages: int = 1, tags: bytes = b"", next_page: int = 0) -> bytes:
    """Return a TIFF whose first page has such tags besides its own, and repeats itself in further pages."""
    data = bytearray(encode(scene(64, 64), "TIFF"))
    (start,) = struct.unpack_from("<I", data, 4)
    (num_tags,) = struct.unpack_from("<H", data, start)
    own = bytes(data[start + 2 : start + 2 + 12 * num_tags])
    page = struct.pack("<H", num_tags + len(tags) // 12) + own + tags
    first = len(data)
    struct.pack_into("<I", data, 4, first)
    step = len(page) + 4
    links = [first + step * (number + 1) for number in range(num_pages - 1)] + [next_page and first]
    return bytes(data) + b"".join(page + struct.pack("<I", link) for link in links)


def tag(number: int, kind: int, count: int, offset: int) -> bytes:
    return struct.pack("<HHII", number, kind, count, offset)


def jpeg_of_scans(num_scans: int) -> bytes:
    """Return a progressive JPEG whose first scan is followed by scans that refine nothing, each over all the image."""
    data = encode(scene(2048, 2048), "JPEG", progressive=True)
    second = data.index(b"\xff\xda", data.index(b"\xff\xda") + 2)
    return data[:second] + b"\xff\xda\x00\x08\x01\x01\x00\x01\x3f\x00\x00\x00\x00" * num_scans + b"\xff\xd9"


def jpeg_of_segments(num_segments: int, marker: int) -> bytes:
    data = encode(scene(64, 64), "JPEG")
    return (
        data[:2]
        + (bytes((0xFF, marker)) + struct.pack(">H", 102) + b"Exif\0\0MM" + bytes(92)) * num_segments
        + data[2:]
    )


def png_of_chunks(kind: bytes, payload: bytes, num_chunks: int) -> bytes:
    return png((64, 64, 8, 0), *[(kind, payload)] * num_chunks, (b"IDAT", zlib.compress(bytes(65 * 64))))


@pytest.mark.parametrize(
    ("make", "num_frames"),
    [
        (lambda: gif_of_tiny_frames(100_000), 65_535),
        (lambda: webp_of_frames(10_000), 10_000),
        (lambda: tiff(100_000), 65_535),
        (lambda: tiff(next_page=1), 1),
        (lambda: tiff(3, next_page=1), 3),
        (lambda: tiff(tags=b"".join(tag(33_000 + number, 1, 4, 0) for number in range(15_000))), 1),
        (lambda: tiff(tags=tag(50_000, 1, 2**32 - 1, 8)), 1),
        (lambda: tiff(tags=tag(50_000, 5, 2**32 - 1, 8)), 1),
        (lambda: tiff(tags=b"".join(tag(1000 + number, 5, 2**20, 8) for number in range(1000))) + bytes(2**23), 1),
        *((lambda marker=marker: jpeg_of_segments(10_000, marker), 1) for marker in (0xE1, 0xE2, 0xED, 0xEF, 0xFE)),
        (lambda: png_of_chunks(b"abCd", b"", 100_000), 1),
        (lambda: png_of_chunks(b"tEXt", b"a\0b", 100_000), 1),
        (lambda: png_of_chunks(b"eXIf", b"MM\0*" + bytes(2**24), 1), 1),
    ],
)
def test_metadata_without_end_costs_little_and_not_the_image(make: Callable[[], bytes], num_frames: int) -> None:
    prepared = prepare(make())
    assert (prepared.status, prepared.error, prepared.info.num_frames) == (Status.OK, None, num_frames)


def test_a_scan_bomb_is_ended_by_the_clock() -> None:
    assert prepare(jpeg_of_scans(10)).status == Status.OK
    data = jpeg_of_scans(20_000)
    assert len(data) < 2**20
    assert prepare(data, ImageLimits(max_decode_seconds=0.5)).status == Status.TIMEOUT


def test_profiles_that_are_decompressed_again_and_again_are_ended_by_the_clock() -> None:
    data = png_of_chunks(b"iCCP", b"a\0\0" + zlib.compress(bytes(1_000_000), 9), 5000)
    assert prepare(data, ImageLimits(max_decode_seconds=0.5)).status == Status.TIMEOUT


def test_segments_that_would_fill_the_memory_are_too_large() -> None:
    assert prepare(jpeg_of_segments(400_000, 0xE2), ImageLimits(max_decode_bytes=64 * 2**20)).status == Status.TOO_LARGE
