"""Counting pages by the chain of directories gives what reading them all gives, and ends whatever the chain is."""

from __future__ import annotations

import io
import struct

import pytest
from PIL import Image

from lfm_scan.imaging import decode_bytes
from lfm_scan.imaging.frames import MAX_FRAMES, count_tiff_pages
from tests.awkward import encode, scene


def pages(num_pages: int, **options: object) -> bytes:
    others = [scene(64, 64)] * (num_pages - 1)
    return encode(scene(64, 64), "TIFF", save_all=True, append_images=others, **options)


def chain(num_pages: int, order: str = "<") -> bytes:
    """Return nothing but a chain of empty directories."""
    header = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    links = [8 + 6 * (number + 1) for number in range(num_pages - 1)] + [0]
    return header + b"".join(struct.pack(order + "HI", 0, link) for link in links)


@pytest.mark.parametrize("options", [{}, {"big_tiff": True}])
@pytest.mark.parametrize("num_pages", [1, 2, 7])
def test_every_page_is_counted(num_pages: int, options: dict[str, object]) -> None:
    data = pages(num_pages, **options)
    with Image.open(io.BytesIO(data)) as image:
        assert getattr(image, "n_frames", None) == num_pages
    assert count_tiff_pages(data) == num_pages
    assert decode_bytes(data).info.num_frames == num_pages


@pytest.mark.parametrize("order", ["<", ">"])
def test_either_byte_order_is_read(order: str) -> None:
    assert count_tiff_pages(chain(300, order)) == 300


@pytest.mark.parametrize("back_to", [0, 1, 2])
def test_a_chain_that_comes_back_to_itself_ends_there(back_to: int) -> None:
    data = bytearray(chain(3))
    struct.pack_into("<I", data, len(data) - 4, 8 + 6 * back_to)
    assert count_tiff_pages(bytes(data)) == 3


@pytest.mark.parametrize("end", [25, 26, 10**6, 2**32 - 1])
def test_a_chain_that_leaves_the_file_ends_there(end: int) -> None:
    data = bytearray(chain(3))
    struct.pack_into("<I", data, len(data) - 4, end)
    assert count_tiff_pages(bytes(data)) == 3


@pytest.mark.parametrize("offset", [2**63 - 1, 2**63, 2**64 - 1])
def test_offsets_past_all_memory_end_the_chain(offset: int) -> None:
    assert count_tiff_pages(b"II+\0\x08\0\0\0" + struct.pack("<Q", offset)) == 1


def test_a_chain_without_end_is_not_followed_for_ever() -> None:
    assert count_tiff_pages(chain(MAX_FRAMES + 10)) == MAX_FRAMES == 65_535
