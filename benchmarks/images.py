"""Real JPEG files for benchmarks, as many as it takes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Final

from PIL import Image

_ROOT: Final = Path(__file__).resolve().parents[1]
_MIN_SIDE_PX: Final = 48

FOLDERS: Final = [
    path for path in (_ROOT / "examples" / "images", _ROOT.parent / "shared" / "data" / "dev") if path.is_dir()
]
"""Where files come from unless folders are named: the examples and, if they are there, the development images."""


def write_jpegs(folder: Path, sources: Sequence[Path], num_images: int) -> None:
    """Write so many JPEG files, whose bytes all differ: each gets a comment of its own.

    Args:
        folder: To make.
        sources: Folders with JPEG files; they are repeated as often as it takes.
        num_images: How many.
    """
    folder.mkdir()
    paths = sorted(path for source in sources for path in source.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    usable = [data for data in (path.read_bytes() for path in paths) if _is_usable(data)]
    if not usable:
        raise SystemExit(f"no JPEG files in {', '.join(map(str, sources))}: name folders that have some")
    for number, data in enumerate(islice(cycle(usable), num_images)):
        comment = f"{number:08}".encode()
        segment = b"\xff\xfe" + (2 + len(comment)).to_bytes(2, "big") + comment
        (folder / f"{number:06}.jpg").write_bytes(data[:2] + segment + data[2:])


def _is_usable(data: bytes) -> bool:
    with Image.open(io.BytesIO(data)) as image:
        return image.format == "JPEG" and image.mode == "RGB" and min(image.size) >= _MIN_SIDE_PX
