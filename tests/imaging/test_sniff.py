"""Formats are told by content, and a missing end by each format's own mark."""

from __future__ import annotations

import struct

import pytest

from lfm_scan.imaging.sniff import READABLE, is_cut_short, sniff
from tests.awkward import animation, awkward_files, encode, scene


@pytest.mark.parametrize("fmt", READABLE)
def test_what_pillow_writes_is_recognised(fmt: str) -> None:
    assert sniff(encode(scene(64, 64), fmt)) == fmt


def iso_file(major: bytes, *compatible: bytes) -> bytes:
    body = b"ftyp" + major + bytes(4) + b"".join(compatible)
    return struct.pack(">I", len(body) + 4) + body + bytes(64)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"GIF87a" + bytes(20), "GIF"),
        (b"MM\x00*" + bytes(20), "TIFF"),
        (iso_file(b"avif"), "AVIF"),
        (iso_file(b"avis"), "AVIF"),
        (iso_file(b"mif1", b"miaf", b"avif"), "AVIF"),
        (iso_file(b"mif1", b"heic"), "HEIF"),
        (iso_file(b"heic", b"mif1"), "HEIC"),
        (iso_file(b"isom", b"mp42"), "MP4 video"),
        (iso_file(b"zzzz"), "ISO media file"),
        (b"\xff\x0a" + bytes(20), "JPEG XL"),
        (b"8BPS" + bytes(20), "Photoshop"),
        (b"RIFF\x00\x00\x00\x00WAVE", None),
        (b"BM is how this sentence starts, no bitmap", None),
        (b"BM", None),
        (b"", None),
        (b"\xff", None),
        (b"\x00" * 8, None),
        (b"\x00\x00\x00\x08ftyp", "ISO media file"),
    ],
)
def test_content_is_named(data: bytes, expected: str | None) -> None:
    assert sniff(data) == expected


@pytest.mark.parametrize("fmt", READABLE)
def test_sniffing_never_fails_on_a_short_file(fmt: str) -> None:
    data = encode(scene(64, 64), fmt)
    for length in range(40):
        found = sniff(data[:length])
        assert found is None or not is_cut_short(data, fmt)
        is_cut_short(data[:length], fmt)


@pytest.mark.parametrize("fmt", [fmt for fmt in READABLE if fmt != "TIFF"])
def test_a_missing_end_shows(fmt: str) -> None:
    data = encode(scene(), fmt)
    assert not is_cut_short(data, fmt)
    assert is_cut_short(data[:-40], fmt)
    assert is_cut_short(data[: len(data) // 2], fmt)


def test_a_missing_end_of_an_animation_shows() -> None:
    for fmt in ("GIF", "WEBP", "PNG"):
        data = animation(fmt)
        assert not is_cut_short(data, fmt)
        assert is_cut_short(data[:-40], fmt)


def test_padding_after_the_end_is_not_a_missing_end() -> None:
    assert not is_cut_short(awkward_files()["picture.gif"].data + bytes(9), "GIF")
    assert not is_cut_short(awkward_files()["picture.avif"].data, "AVIF")
