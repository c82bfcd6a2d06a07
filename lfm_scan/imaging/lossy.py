"""Was this file ever saved by a lossy codec, and by how much? As far as its container tells.

A PNG made from a JPEG usually says nothing of it: False means "no sign", never "proven". Its pixels may: see `traces`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

import numpy as np
from PIL import Image

from lfm_scan.status import LossyEvidence

_TIFF_COMPRESSION_TAG: Final = 259
_TIFF_LOSSY_COMPRESSIONS: Final = frozenset({6, 7, 34892, 50001})  # both JPEGs, lossy DNG, WebP
_BMP_JPEG_COMPRESSION: Final = 4
_WITH_LOSSY_CODECS: Final = frozenset({"JPEG", "MPO", "AVIF", "WEBP", "TIFF", "BMP"})

# Annex K.1 of the JPEG standard, natural order: what libjpeg scales by quality.
_STANDARD_LUMINANCE: Final = np.array(
    [
        [16, 11, 10, 16, 24, 40, 51, 61],
        [12, 12, 14, 19, 26, 58, 60, 55],
        [14, 13, 16, 24, 40, 57, 69, 56],
        [14, 17, 22, 29, 51, 87, 80, 62],
        [18, 22, 37, 56, 68, 109, 103, 77],
        [24, 35, 55, 64, 81, 104, 113, 92],
        [49, 64, 78, 87, 103, 121, 120, 101],
        [72, 92, 95, 98, 112, 100, 103, 99],
    ],
    dtype=np.int64,
).ravel()


def _scaled_tables() -> np.ndarray:
    """Return the luminance table at quality 1 to 100, (100, 64), by libjpeg's jpeg_quality_scaling."""
    quality = np.arange(1, 101)
    percent = np.where(quality < 50, 5000 // quality, 200 - 2 * quality)
    return np.clip((_STANDARD_LUMINANCE * percent[:, None] + 50) // 100, 1, 255)


TABLES: Final = _scaled_tables()
"""Luminance tables of quality 1 to 100, (100, 64), natural order, as libjpeg scales them."""


def estimate_jpeg_quality(luminance_table: Sequence[int]) -> int | None:
    """Return the IJG quality, 1 to 100, whose luminance table is nearest; exact for files libjpeg wrote.

    Args:
        luminance_table: 64 quantisation steps in natural order.
    """
    table = np.asarray(luminance_table)
    if table.shape != (64,):
        return None
    # Compared as ratios: camera tables differ in shape, and a step of 2 for 1 matters more than 62 for 61.
    distance = np.abs(np.log(np.maximum(table, 1)) - np.log(TABLES)).sum(axis=1)
    # The low qualities saturate at 255 and tie; the highest quality of a tie is the mildest claim.
    return int(100 - distance[::-1].argmin())


def is_lossy(image: Image.Image, data: bytes | None) -> bool | None:
    """Tell whether a lossy codec was at work, or None where the source cannot say.

    AVIF counts as lossy: its lossless mode is rare and the container does not declare it. GIF and palette PNG count
    as lossless: their palette is a loss of colours, not of a codec.

    Args:
        image: As opened by Pillow, its metadata read.
        data: The file, if there is one.
    """
    match image.format:
        case "JPEG" | "MPO" | "AVIF":
            return True
        case "WEBP":
            return None if data is None else _webp_is_lossy(data)
        case "TIFF":
            tags = getattr(image, "tag_v2", {})
            return tags.get(_TIFF_COMPRESSION_TAG) in _TIFF_LOSSY_COMPRESSIONS
        case "BMP":
            return image.info.get("compression") == _BMP_JPEG_COMPRESSION
        case None:
            return None
        case _:
            # ImageMagick leaves properties such as jpeg:sampling-factor in a PNG it made from a JPEG.
            return any(isinstance(key, str) and key.lower().startswith("jpeg:") for key in image.info)


def lossy_evidence(image: Image.Image, data: bytes | None) -> LossyEvidence | None:
    """Return what in the file says that it is lossy, or None if it is not or cannot say; arguments as `is_lossy`."""
    if not is_lossy(image, data):
        return None
    return LossyEvidence.CODEC if image.format in _WITH_LOSSY_CODECS else LossyEvidence.NOTE


def _webp_is_lossy(data: bytes) -> bool:
    """Walk the RIFF chunks: VP8 is the lossy codec, VP8L the lossless one; frames of an animation nest them."""
    end = min(len(data), struct.unpack_from("<I", data, 4)[0] + 8) if len(data) >= 12 else 0
    position = 12
    while position + 8 <= end:
        kind, chunk_bytes = data[position : position + 4], struct.unpack_from("<I", data, position + 4)[0]
        if kind == b"VP8 ":
            return True
        if kind == b"VP8L":
            return False
        # An ANMF frame has 16 bytes of its own before the chunks inside it.
        position += 8 + (16 if kind == b"ANMF" else chunk_bytes + chunk_bytes % 2)
    return False
