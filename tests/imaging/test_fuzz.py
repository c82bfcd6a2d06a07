"""Damaged files: whatever the bytes, a decode returns or raises ImageError."""

from __future__ import annotations

import random
from typing import Final

import pytest

from lfm_scan.errors import ImageError
from lfm_scan.imaging import ImageLimits, decode_bytes
from lfm_scan.status import Status
from tests.awkward import animation, encode, exif_rotated_jpeg, multi_picture_jpeg, png_16_bit_rgb, scene

_LIMITS: Final = ImageLimits(max_image_pixels=2_000_000)
_OUTCOMES: Final = {
    Status.EMPTY,
    Status.UNSUPPORTED,
    Status.CORRUPT,
    Status.TRUNCATED,
    Status.TOO_LARGE,
    Status.TOO_SMALL,
}
_MUTATIONS_PER_SEED: Final = 18


def seeds() -> dict[str, bytes]:
    """Return a small good file of every kind."""
    import numpy as np

    small = scene(64, 64)
    samples = np.asarray(small).astype(np.uint16) << 8
    return {
        "jpeg": encode(small, "JPEG"),
        "jpeg-progressive": encode(small, "JPEG", progressive=True),
        "jpeg-exif": exif_rotated_jpeg(6, 64, 64),
        "jpeg-mpo": multi_picture_jpeg(),
        "png": encode(small, "PNG"),
        "png-palette": encode(small.quantize(9), "PNG", transparency=b"\x00\x80"),
        "png-16": png_16_bit_rgb(samples),
        "png-animated": animation("PNG"),
        "gif-animated": animation("GIF"),
        "webp": encode(small, "WEBP"),
        "webp-lossless": encode(small, "WEBP", lossless=True),
        "webp-animated": animation("WEBP"),
        "tiff-raw": encode(small, "TIFF"),
        "tiff-lzw": encode(small, "TIFF", compression="tiff_lzw"),
        "tiff-jpeg": encode(small, "TIFF", compression="jpeg"),
        "avif": encode(small, "AVIF", speed=10),
        "bmp": encode(small.convert("P"), "BMP"),
    }


def mutate(data: bytes, others: list[bytes], chance: random.Random) -> bytes:
    """Return a damaged copy: bits flipped, a part cut out, or a part of another file put in."""
    damaged = bytearray(data)
    match chance.randrange(4):
        case 0:  # anywhere
            for _ in range(chance.choice((1, 4, 40))):
                damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        case 1:  # in the header, where sizes and offsets are
            for _ in range(chance.choice((1, 3))):
                damaged[chance.randrange(min(64, len(damaged)))] = chance.choice((0, 1, 0x7F, 0x80, 0xFF))
        case 2:
            start = chance.randrange(len(damaged))
            del damaged[start : start + chance.choice((1, 16, len(damaged)))]
        case 3:
            other = chance.choice(others)
            start = chance.randrange(len(damaged))
            damaged[start : start + 64] = other[chance.randrange(len(other)) :][: chance.choice((8, 512))]
    return bytes(damaged)


def outcome(data: bytes) -> Status:
    """Return the status of a decode; anything but ImageError flies."""
    try:
        decoded = decode_bytes(data, _LIMITS)
    except ImageError as exc:
        failure = exc
    else:
        assert decoded.image.mode == "RGB"
        return Status.OK
    assert failure.status in _OUTCOMES
    assert failure.message
    return failure.status


@pytest.mark.parametrize("name", list(seeds()))
def test_a_damaged_file_decodes_or_raises_image_error(name: str) -> None:
    good = seeds()
    assert outcome(good[name]) == Status.OK
    chance = random.Random(name)
    found = {outcome(mutate(good[name], list(good.values()), chance)) for _ in range(_MUTATIONS_PER_SEED)}
    assert found - {Status.OK}, "no mutation did any damage"
