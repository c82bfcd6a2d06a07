"""From files to the crops that are the real half of the pairs.

Every crop is a part of a photograph, scaled down. That removes the traces of its JPEG file, which a network would not
draw and which would then tell the classes apart. Some are scaled once more: the fakes are drawn from what comes out, so
that this says nothing about the label, and a detector learns that photographs, too, are interpolated.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter

from lfm_scan.errors import ImageError
from lfm_scan.imaging import decode_bytes
from lfm_scan.sources.fetch import Fetcher
from lfm_scan.sources.inputs import Input
from lfm_scan.status import Status
from lfm_scan.storage import Fetched
from lfm_scan.synth.config import SynthConfig
from lfm_scan.training.samples import Split

KERNELS: Final = (
    Image.Resampling.BOX,
    Image.Resampling.BILINEAR,
    Image.Resampling.HAMMING,
    Image.Resampling.BICUBIC,
    Image.Resampling.LANCZOS,
)
"""All of Pillow's that average when they scale down; NEAREST would keep the file's own pixels, and its traces."""

_ENLARGING_KERNELS: Final = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)
"""Those that people enlarge photographs with; the others would repeat pixels, as generators do."""

_RESCALE_RANGE: Final = (0.6, 1.5)
"""Least and largest factor of the second scaling."""

MIN_CONTRAST: Final = 5.0
"""Standard deviation of grey levels below which a crop is sky or blur, with nothing in it to learn from."""

_MAX_TRIES: Final = 20
_FETCH_THREADS: Final = 4
_SPLIT_STEPS: Final = 2**32


@dataclass(frozen=True, kw_only=True)
class Photograph:
    """A file that was to be a photograph.

    Attributes:
        uri: Where it lies.
        status: ok, or why it cannot be used.
        error: What is wrong, if status is not ok, or why an ok one gives no crops.
        sha256: Of the file; None where there are no bytes.
        image: RGB, or None.
    """

    uri: str
    status: Status = Status.OK
    error: str | None = None
    sha256: str | None = None
    image: Image.Image | None = None

    @property
    def key(self) -> str:
        """What its crops are called by: the same wherever the file lies."""
        return (self.sha256 or "")[:16]

    def split(self, config: SynthConfig) -> Split:
        """Return what its pairs are for: by its bytes alone, so that more photographs move none of them."""
        draw = self.random(config, "split").integers(_SPLIT_STEPS) / _SPLIT_STEPS
        return Split.VALIDATION if draw < config.validation_share else Split.TRAIN

    def random(self, config: SynthConfig, use: str) -> np.random.Generator:
        """Return random numbers that depend on the seed, the photograph's bytes and the use alone."""
        digest = hashlib.sha256(f"{config.seed}/{self.sha256}/{use}".encode()).digest()
        return np.random.default_rng(int.from_bytes(digest))


def read_photographs(inputs: Sequence[Input], config: SynthConfig) -> Iterator[Photograph]:
    """Yield each input's photograph, in order; one that cannot be used says why.

    Raises:
        OutageError: If a store answers nobody.
    """
    fetcher = Fetcher(config.storage, config.inputs, config.limits.max_image_bytes, _FETCH_THREADS)
    for planned, fetched in zip(inputs, fetcher.fetch(inputs), strict=True):
        yield _decode(planned.uri, fetched, config)


def cut_crops(photograph: Photograph, config: SynthConfig, num_crops: int) -> NDArray[np.uint8]:
    """Cut square crops at random places, scaled down by random factors with random kernels, some of them twice.

    Crops without contrast are passed over, so there may be fewer, or none. The first n of more are the same.

    Args:
        photograph: With an image.
        config: Their size, how much they are scaled down, and how many are scaled again or varied.
        num_crops: At most so many.

    Returns:
        (N, crop_px, crop_px, 3) uint8.
    """
    rng = photograph.random(config, "crops")
    found: list[NDArray[np.uint8]] = []
    for _ in range(num_crops * _MAX_TRIES):
        if len(found) == num_crops:
            break
        crop = _cut(photograph, config, rng)
        if crop.mean(axis=2).std() >= MIN_CONTRAST:
            found.append(crop)
    return np.stack(found) if found else np.empty((0, config.crop_px, config.crop_px, 3), np.uint8)


def without_duplicates(photographs: Iterable[Photograph]) -> Iterator[Photograph]:
    """Pass photographs on; of those with the same bytes only the first keeps its image."""
    first: dict[str, str] = {}
    for each in photographs:
        if each.sha256 is None or each.image is None or first.setdefault(each.sha256, each.uri) == each.uri:
            yield each
        else:
            yield replace(each, image=None, error=f"has the same bytes as {first[each.sha256]}, which is used")


def _decode(uri: str, fetched: Fetched | ImageError, config: SynthConfig) -> Photograph:
    if isinstance(fetched, ImageError):
        return _unusable(uri, fetched)
    sha256 = hashlib.sha256(fetched.data).hexdigest()
    try:
        image = decode_bytes(fetched.data, config.limits).image
    except ImageError as exc:
        return replace(_unusable(uri, exc), sha256=sha256)
    except MemoryError:
        too_large = ImageError(Status.TOO_LARGE, "decoding it ran out of memory: lower --max-image-pixels")
        return replace(_unusable(uri, too_large), sha256=sha256)
    if min(image.size) < config.min_side_px:
        too_small = ImageError(
            Status.TOO_SMALL,
            f"{image.width}x{image.height}: the shorter side must have {config.min_side_px:g} pixels, --crop-px "
            f"{config.crop_px} times --min-shrink {config.min_shrink:g}",
        )
        return replace(_unusable(uri, too_small), sha256=sha256)
    return Photograph(uri=uri, sha256=sha256, image=image)


def _unusable(uri: str, error: ImageError) -> Photograph:
    # A decoder may quote the file; a lone surrogate in it is no Parquet string.
    message = error.message.encode("utf-8", "backslashreplace").decode()
    return Photograph(uri=uri, status=error.status, error=message)


def _cut(photograph: Photograph, config: SynthConfig, rng: np.random.Generator) -> NDArray[np.uint8]:
    image = photograph.image
    assert image is not None  # noqa: S101 - `cut_crops` says so
    factor = _second_factor(min(image.size), config, rng)
    first_px = round(config.crop_px / factor)
    shrink = rng.uniform(config.min_shrink, max(config.min_shrink, min(config.max_shrink, min(image.size) / first_px)))
    side = min(shrink * first_px, *image.size)
    left, top = rng.uniform(0, image.width - side), rng.uniform(0, image.height - side)
    box = (left, top, min(left + side, image.width), min(top + side, image.height))  # sums round
    crop = image.resize((first_px, first_px), _any_of(KERNELS, rng), box=box)
    if rng.random() < config.vary_share:
        crop = _vary(crop, rng)
    if first_px != config.crop_px:
        kernels = KERNELS if factor < 1 else _ENLARGING_KERNELS
        crop = crop.resize((config.crop_px, config.crop_px), _any_of(kernels, rng))
    return np.asarray(crop)


def _second_factor(shorter_px: int, config: SynthConfig, rng: np.random.Generator) -> float:
    """Return by how much a crop is scaled the second time: 1 for not, no less than the photograph has pixels for."""
    if rng.random() >= config.rescale_share:
        return 1.0
    least, largest = _RESCALE_RANGE
    return math.exp(rng.uniform(math.log(max(least, config.min_side_px / shorter_px)), math.log(largest)))


def _vary(crop: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Return a crop with another sharpness and other tones: gamma, saturation and contrast."""
    if rng.random() < 0.5:
        crop = crop.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.5)))
    else:
        crop = crop.filter(ImageFilter.UnsharpMask(rng.uniform(0.5, 2), int(rng.integers(30, 150)), 2))
    gamma = math.exp(rng.uniform(-0.6, 0.6))
    crop = crop.point([round(255 * (level / 255) ** gamma) for level in range(256)] * 3)
    crop = ImageEnhance.Color(crop).enhance(rng.uniform(0.3, 1.8))
    return ImageEnhance.Contrast(crop).enhance(rng.uniform(0.7, 1.6))


def _any_of(kernels: Sequence[Image.Resampling], rng: np.random.Generator) -> Image.Resampling:
    return kernels[int(rng.integers(len(kernels)))]
