"""What a file is, and whether its end is there, by its content: a name proves nothing."""

from __future__ import annotations

import struct
from typing import Final

READABLE: Final = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "TIFF", "BMP")
"""Pillow's names of the formats the program reads; no other decoder is ever tried."""

_ISO_BRANDS: Final = {
    b"avif": "AVIF",
    b"avis": "AVIF",
    b"heic": "HEIC",
    b"heix": "HEIC",
    b"hevc": "HEIC",
    b"mif1": "HEIF",
    b"msf1": "HEIF",
    b"crx ": "CR3 raw",
    b"isom": "MP4 video",
    b"mp42": "MP4 video",
    b"qt  ": "QuickTime video",
}
_OTHERS: Final = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
    (b"II+\x00", "TIFF"),
    (b"MM\x00+", "TIFF"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\x00\x00\x00\x0cJXL ", "JPEG XL"),
    (b"\x00\x00\x00\x0cjP  ", "JPEG 2000"),
    (b"8BPS", "Photoshop"),
    (b"%PDF", "PDF"),
    (b"<svg", "SVG"),
    (b"<?xml", "XML or SVG"),
    (b"\x00\x00\x01\x00", "ICO"),
    (b"v/1\x01", "OpenEXR"),
    (b"PK\x03\x04", "ZIP archive"),
    (b"\x1f\x8b", "gzip archive"),
)
_BMP_HEADER_SIZES: Final = (12, 16, 40, 52, 56, 64, 108, 124)


def sniff(data: bytes) -> str | None:
    """Return the name of the content's format, readable or merely recognised, or None."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[4:8] == b"ftyp":
        return _sniff_iso(data)
    if data[:2] == b"BM" and len(data) >= 18 and struct.unpack_from("<I", data, 14)[0] in _BMP_HEADER_SIZES:
        return "BMP"
    return next((name for magic, name in _OTHERS if data.startswith(magic)), None)


def _sniff_iso(data: bytes) -> str:
    """Name an ISO media file by its major brand; a generic one may still list avif as compatible."""
    box_bytes = min(struct.unpack_from(">I", data)[0], 256)
    major = data[8:12]
    compatible = {data[start : start + 4] for start in range(16, box_bytes - 3, 4)}
    if major in (b"mif1", b"msf1") and compatible & {b"avif", b"avis"}:
        return "AVIF"
    return _ISO_BRANDS.get(major, "ISO media file")


def is_cut_short(data: bytes, fmt: str) -> bool:
    """Tell whether a file that would not decode has lost its end, from the format's own end mark or length.

    Only meaningful for a file that failed: a whole image may carry trailing bytes, or lack an end mark that its
    decoder does not need.
    """
    match fmt:
        case "JPEG":
            return b"\xff\xd9" not in data[-1024:]
        case "PNG":
            return b"IEND" not in data[-1024:]
        case "GIF":
            return not data.rstrip(b"\x00").endswith(b";")
        case "WEBP":
            return len(data) < 12 or struct.unpack_from("<I", data, 4)[0] + 8 > len(data)
        case "BMP":
            return len(data) < 6 or struct.unpack_from("<I", data, 2)[0] > len(data)
        case "AVIF":
            return _iso_is_cut_short(data)
        case _:
            return False


def _iso_is_cut_short(data: bytes) -> bool:
    position = 0
    while position + 8 <= len(data):
        box_bytes = struct.unpack_from(">I", data, position)[0]
        if box_bytes == 1 and position + 16 <= len(data):
            box_bytes = struct.unpack_from(">Q", data, position + 8)[0]
        if box_bytes == 0:
            return False
        if box_bytes < 8:
            return False
        position += box_bytes
    return position != len(data)
