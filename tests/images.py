"""Small real image files for tests, made on the spot."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image


def picture(width: int = 260, height: int = 258, seed: int = 0) -> Image.Image:
    """Return an RGB image with structure at every scale: smooth waves, edges and a little noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / (7 + 3 * channel + seed % 5)) + np.cos(y / (11 + channel)) for channel in range(3)]
    base = np.stack(waves, axis=-1) * 50 + 128 + ((x // 32 + y // 32) % 2 * 30)[..., None]
    return Image.fromarray(np.clip(base + rng.normal(0, 6, base.shape), 0, 255).astype(np.uint8))


def encoded(fmt: str = "PNG", seed: int = 0, size: tuple[int, int] = (260, 258), **options: object) -> bytes:
    """Return an image file's bytes."""
    buffer = io.BytesIO()
    picture(*size, seed=seed).save(buffer, fmt, **options)
    return buffer.getvalue()


def write_pictures(folder: Path, count: int) -> list[Path]:
    """Write PNG and JPEG files by turns, spread over two folders; return their paths."""
    paths = []
    for index in range(count):
        fmt, suffix = ("PNG", "png") if index % 2 else ("JPEG", "jpg")
        path = folder / ("even" if index % 4 < 2 else "odd") / f"{index:04}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(fmt, seed=index))
        paths.append(path)
    return paths
