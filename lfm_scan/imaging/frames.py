"""How many frames or pages a file has, without walking through them where walking is slow."""

from __future__ import annotations

import struct
from typing import Final

from PIL import Image

MAX_FRAMES: Final = 65_535
"""More are not counted: files can claim billions."""


def count_frames(image: Image.Image, data: bytes | None) -> int:
    """Return the number of frames or pages, at most `MAX_FRAMES`.

    Args:
        image: As opened by Pillow.
        data: The file, if there is one.
    """
    if image.format == "TIFF" and data is not None:
        return count_tiff_pages(data)
    return min(int(getattr(image, "n_frames", 1)), MAX_FRAMES)


def count_tiff_pages(data: bytes) -> int:
    """Follow the chain of a TIFF's directories to its end, out of the file, or back to one it has been at.

    Pillow would read all the tags of every page, and compare each page with all before it.
    """
    order = "<" if data.startswith(b"II") else ">"
    is_big = data[2:4] in (b"+\0", b"\0+")
    num_entries_at, next_at, entry_bytes = (
        (struct.Struct(order + "Q"), struct.Struct(order + "Q"), 20)
        if is_big
        else (struct.Struct(order + "H"), struct.Struct(order + "I"), 12)
    )
    seen: set[int] = set()
    try:
        (position,) = next_at.unpack_from(data, 8 if is_big else 4)
        while position and position not in seen and len(seen) < MAX_FRAMES:
            (num_entries,) = num_entries_at.unpack_from(data, position)
            (following,) = next_at.unpack_from(data, position + num_entries_at.size + num_entries * entry_bytes)
            seen.add(position)
            position = following
    except (struct.error, OverflowError):
        pass  # the rest of the chain is not in the file
    return max(1, len(seen))
