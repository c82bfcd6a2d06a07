"""The images to measure with: made here, or some of the user's."""

from __future__ import annotations

import io
import itertools
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image

from lfm_scan.bench.config import BenchConfig
from lfm_scan.errors import ImageError, RunError
from lfm_scan.estimate.survey import reservoir
from lfm_scan.imaging import ImageLimits, PreprocessPolicy
from lfm_scan.options import InputConfig
from lfm_scan.scoring.isolated import EncodedImage, IsolatedDecoder
from lfm_scan.sources.fetch import Fetcher
from lfm_scan.sources.inputs import Input
from lfm_scan.sources.listing import check_sources
from lfm_scan.sources.select import list_inputs
from lfm_scan.status import Status

_MADE: Final = (("PNG", 512, 512), ("JPEG", 1600, 1200), ("JPEG", 4000, 3000))
_NUM_MADE: Final = 3
_JPEG_QUALITY: Final = 90
_DETAIL: Final = {64: 0.8, 16: 0.4, 4: 0.15}
"""Size of details in pixels, and how much of the image they make up; with grain, a JPEG takes 0.24 bytes a pixel."""
_GRAIN: Final = 4
_NUM_GIVEN: Final = 32
_MAX_GIVEN_BYTES: Final = 512 * 2**20
_MAX_LISTED: Final = 10_000
"""A bench is no estimate: of a large source, it takes the images from its beginning."""


@dataclass(frozen=True)
class Group:
    """Images that are measured together.

    Attributes:
        name: What tells them from others.
        inputs: Where they lie.
        files: Their bytes, all of which decode.
        num_left_out: Images that were looked at and do not decode.
    """

    name: str
    inputs: tuple[Input, ...]
    files: tuple[bytes, ...]
    num_left_out: int = 0

    @property
    def mean_bytes(self) -> float:
        """Of a file."""
        return sum(map(len, self.files)) / len(self.files)


def make_groups(folder: Path) -> list[Group]:
    """Write images of three sizes below a folder and return them, the size in the middle being the most common."""
    groups = []
    for fmt, width, height in _MADE:
        files = tuple(_encoded(fmt, width, height, seed) for seed in range(_NUM_MADE))
        below = folder / f"{fmt}-{width}x{height}"
        paths = write_distinct(below, files, len(files))
        inputs = tuple(Input(uri=str(path), size_bytes=path.stat().st_size) for path in paths)
        groups.append(Group(f"{fmt} {width}x{height}", inputs, files))
    return groups


def given_group(config: BenchConfig, limits: ImageLimits, policy: PreprocessPolicy) -> Group:
    """Return some of the images that the user names.

    Raises:
        RunError: If none of them decodes.
        StorageError: If they cannot be listed.
    """
    source = config.images or ""
    check_sources([source], config.storage)
    listed = itertools.islice(list_inputs([source], InputConfig(), config.storage), _MAX_LISTED)
    chosen = reservoir(listed, _NUM_GIVEN, seed=0)
    fetcher = Fetcher(config.storage, InputConfig(), limits.max_image_bytes, config.compute.fetch_threads)
    inputs: list[Input] = []
    files: list[bytes] = []
    num_left_out = 0
    with IsolatedDecoder(policy.id, limits) as decoder:
        for each, outcome in zip(chosen, fetcher.fetch(chosen), strict=True):
            if sum(map(len, files)) > _MAX_GIVEN_BYTES:
                break
            if isinstance(outcome, ImageError) or not _decodes(decoder, outcome.data):
                num_left_out += 1
                continue
            inputs.append(each)
            files.append(outcome.data)
    if not files:
        raise RunError(f"--images {source}: none of {len(chosen)} inputs there is an image that can be scored")
    return Group("the images given", tuple(inputs), tuple(files), num_left_out)


def write_distinct(folder: Path, files: Sequence[bytes], count: int) -> list[Path]:
    """Write so many files, the same few over and over, no two with the same bytes: a scan scores equal bytes once.

    They differ in a box that decoders skip, behind the end of the image.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for index, data in zip(range(count), itertools.cycle(files), strict=False):
        path = folder / f"{index:06}"
        path.write_bytes(data + struct.pack(">I4sQ", 16, b"free", index))  # an ISO box, so that AVIF stays whole too
        paths.append(path)
    return paths


def _decodes(decoder: IsolatedDecoder, data: bytes) -> bool:
    (prepared,) = decoder.prepare_all([EncodedImage("bench", data)])
    return prepared.status == Status.OK


def _encoded(fmt: str, width: int, height: int, seed: int) -> bytes:
    file = io.BytesIO()
    options = {"quality": _JPEG_QUALITY} if fmt == "JPEG" else {}
    made_photograph(width, height, seed).save(file, fmt, **options)
    return file.getvalue()


def made_photograph(width: int, height: int, seed: int) -> Image.Image:
    """Return an RGB image about as hard to code as a photograph: detail at several scales, and noise."""
    random = np.random.default_rng(seed)
    image = Image.new("RGB", (width, height), (128, 128, 128))
    for detail_px, weight in _DETAIL.items():
        grid = random.integers(0, 256, (height // detail_px + 1, width // detail_px + 1, 3), dtype=np.uint8)
        image = Image.blend(image, Image.fromarray(grid).resize((width, height), Image.Resampling.BILINEAR), weight)
    grain = random.integers(-_GRAIN, _GRAIN + 1, (height, width, 1), dtype=np.int16)
    return Image.fromarray(np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8))
