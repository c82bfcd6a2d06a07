"""Training augmentations: drawn from (seed, epoch, pair) and never from the label, then done to the pixels.

The order is resize policy, rescale, window, blur, noise, JPEG, WebP, crop, mirror, and each place has its reason:

- The policy comes first, because it is what the scanner does to an image before the network sees it.
- JPEG and WebP code blocks of 8x8 or 16x16 pixels, whose grid starts at the corner of the file. A scanned crop lies
  anywhere on that grid. Coding the final crop would put the grid at its corner every time, and the network would learn
  a place that means nothing. So a window somewhat larger than the crop is coded, with the grid at any of its 16x16
  places, and the crop is cut from it. Each pass has a grid of its own: a file that was cropped and saved again has two.
- Blur and noise come before the codecs, as a camera or an editor comes before the file.
- The window is also why the edge of a crop is like its inside: what blurs or codes it is the image around it, mirrored
  where the image ends.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from PIL import Image, ImageFilter

from lfm_scan.errors import ConfigError
from lfm_scan.options import flag_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lfm_scan.training.recipe import Recipe

KERNELS: Final = (
    Image.Resampling.NEAREST,
    Image.Resampling.BOX,
    Image.Resampling.BILINEAR,
    Image.Resampling.HAMMING,
    Image.Resampling.BICUBIC,
    Image.Resampling.LANCZOS,
)
"""Listed, and not all that Pillow knows: a new one in it would change what a seed draws."""

MARGIN_PX: Final = 16
"""Of the window around the crop: a whole block of JPEG with halved chroma, or of WebP."""

_MAX_QUALITY: Final = 100
_NUM_DRAWS: Final = 32


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """What is done to training images, to both classes and within a pair alike; each with a probability, 0 is never.

    Attributes:
        augment_rescale: Probability of resizing by a factor, by nearest, box, bilinear, hamming, bicubic or Lanczos.
        rescale: Smallest and largest factor, drawn on a logarithmic scale; no image becomes smaller than the crop.
        augment_blur: Probability of a Gaussian blur.
        blur_sigma: Smallest and largest standard deviation, in pixels.
        augment_noise: Probability of Gaussian noise, in each pixel and channel its own.
        noise_sigma: Smallest and largest standard deviation, in levels of 255.
        augment_jpeg: Probability of a JPEG pass, with whole (4:4:4) or halved (4:2:0) chroma by chance. It hides what
            LFM looks for.
        jpeg_quality: Lowest and highest quality, 1 to 100.
        jpeg_twice: Probability that a second JPEG pass follows, of another quality and on another grid.
        augment_webp: Probability of a lossy WebP pass, after those of JPEG.
        webp_quality: Lowest and highest quality, 1 to 100.
    """

    augment_rescale: float = 0.0
    rescale: tuple[float, float] = (0.5, 1.5)
    augment_blur: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 1.5)
    augment_noise: float = 0.0
    noise_sigma: tuple[float, float] = (0.5, 4.0)
    augment_jpeg: float = 0.0
    jpeg_quality: tuple[int, int] = (70, 98)
    jpeg_twice: float = 0.0
    augment_webp: float = 0.0
    webp_quality: tuple[int, int] = (70, 98)

    def __post_init__(self) -> None:
        for name in ("augment_rescale", "augment_blur", "augment_noise", "augment_jpeg", "jpeg_twice", "augment_webp"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{flag_of(name)} is a probability, 0 to 1, got {getattr(self, name)}")
        for name, least, most in (
            ("rescale", 0.1, 4),
            ("blur_sigma", 0, 10),
            ("noise_sigma", 0, 64),
            ("jpeg_quality", 1, _MAX_QUALITY),
            ("webp_quality", 1, _MAX_QUALITY),
        ):
            low, high = getattr(self, name)
            if not least <= low <= high <= most:
                raise ConfigError(
                    f"{flag_of(name)} takes the smallest and the largest value, between {least} and {most}, got "
                    f"{low} {high}"
                )


@dataclass(frozen=True, slots=True)
class Coding:
    """One pass through a lossy codec.

    Attributes:
        format: JPEG or WEBP.
        quality: 1 to 100.
        subsampling: Of JPEG's chroma, 4:4:4 or 4:2:0; WebP knows 4:2:0 only.
        grid: Column and row of the window, 0 to 15, at which the first block starts.
    """

    format: str
    quality: int
    subsampling: str
    grid: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Augmentation:
    """What is to be done to one image; None and () are nothing.

    Attributes:
        left: Where the crop lies between left and right end, in [0, 1).
        top: Where it lies between top and bottom, in [0, 1).
        mirror: Whether left and right change places.
        scale: Factor of the rescale.
        kernel: Of the rescale.
        blur_sigma: In pixels.
        noise_sigma: In levels.
        noise_seed: Of the noise.
        codings: Passes through codecs, in their order.
    """

    left: float
    top: float
    mirror: bool
    scale: float | None
    kernel: Image.Resampling
    blur_sigma: float | None
    noise_sigma: float | None
    noise_seed: int
    codings: tuple[Coding, ...]

    def apply(self, image: Image.Image, recipe: Recipe) -> NDArray[np.uint8]:
        """Return the crop of an image that the network is to see, (crop_px, crop_px, 3).

        Args:
            image: RGB. It is not changed.
            recipe: Says which preprocess policy comes first, and how large the crop is.

        Raises:
            ValueError: If the image is smaller than the crop and the policy keeps its size.
        """
        crop_px = recipe.crop_px
        if recipe.preprocess == "resize256":
            image = image.resize((256, 256), Image.Resampling.BILINEAR)
        if min(image.size) < crop_px:
            raise ValueError(f"{image.width}x{image.height}: smaller than the crop of {crop_px} pixels")
        margin_px = MARGIN_PX if self.blur_sigma is not None or self.codings else 0
        window = self._window(image, crop_px, margin_px)
        if self.blur_sigma is not None:
            window = np.asarray(Image.fromarray(window).filter(ImageFilter.GaussianBlur(self.blur_sigma)))
        if self.noise_sigma is not None:
            window = self._noisy(window, crop_px, margin_px)
        for coding in self.codings:
            window = _coded(window, coding)
        crop = window[margin_px : margin_px + crop_px, margin_px : margin_px + crop_px]
        return np.ascontiguousarray(crop[:, ::-1] if self.mirror else crop)

    def _window(self, image: Image.Image, crop_px: int, margin_px: int) -> NDArray[np.uint8]:
        """Return the crop and so many pixels around it, mirrored where the image ends; rescaled, but nothing else."""
        width, height = self._scaled(image.size, crop_px)
        left, top = int(self.left * (width - crop_px + 1)), int(self.top * (height - crop_px + 1))
        box = (
            max(0, left - margin_px),
            max(0, top - margin_px),
            min(width, left + crop_px + margin_px),
            min(height, top + crop_px + margin_px),
        )
        if (width, height) == image.size:
            window = np.asarray(image.crop(box))
        else:
            # Only the window, so that a large photograph costs no more than a small one.
            across, down = image.width / width, image.height / height
            source = (box[0] * across, box[1] * down, box[2] * across, box[3] * down)
            size = (box[2] - box[0], box[3] - box[1])
            window = np.asarray(image.resize(size, self.kernel, box=source))
        missing = (
            (margin_px - (top - box[1]), margin_px - (box[3] - top - crop_px)),
            (margin_px - (left - box[0]), margin_px - (box[2] - left - crop_px)),
            (0, 0),
        )
        return np.pad(window, missing, mode="reflect")

    def _scaled(self, size: tuple[int, int], crop_px: int) -> tuple[int, int]:
        """Return width and height after the rescale: at least the crop, in the same proportion."""
        if self.scale is None:
            return size
        scale = max(self.scale, crop_px / min(size))
        return max(crop_px, round(size[0] * scale)), max(crop_px, round(size[1] * scale))

    def _noisy(self, window: NDArray[np.uint8], crop_px: int, margin_px: int) -> NDArray[np.uint8]:
        side = crop_px + 2 * margin_px
        noise = np.random.default_rng(self.noise_seed).standard_normal((side, side, 3), dtype=np.float32)
        noisy = np.rint(window + np.float32(self.noise_sigma) * noise)
        return np.clip(noisy, 0, 255).astype(np.uint8)


def draw_augmentation(config: AugmentConfig, recipe: Recipe, seed: int, epoch: int, group: str) -> Augmentation:
    """Return what is to be done to the images of a pair, or to one that has none.

    Nothing else decides, least of all the label. Each choice has a random number of its own, drawn whether it is needed
    or not, so that turning one augmentation on or off changes no other.

    Args:
        config: Probabilities and ranges.
        recipe: Says whether crops are mirrored.
        seed: Of the training.
        epoch: From 0.
        group: The pair, or the URI of an image without one.
    """
    digest = hashlib.blake2b(f"{seed} {epoch} {group}".encode(), digest_size=16).digest()
    generator = np.random.default_rng(int.from_bytes(digest, "little"))
    draw = iter(generator.random(_NUM_DRAWS).tolist())
    left, top, is_mirrored = next(draw), next(draw), next(draw) < 0.5
    is_rescaled, scale = next(draw) < config.augment_rescale, _between(next(draw), *np.log(config.rescale))
    kernel = KERNELS[int(next(draw) * len(KERNELS))]
    is_blurred, blur_sigma = next(draw) < config.augment_blur, _between(next(draw), *config.blur_sigma)
    is_noisy, noise_sigma = next(draw) < config.augment_noise, _between(next(draw), *config.noise_sigma)
    noise_seed = int(next(draw) * 2**53)
    is_jpeg, is_jpeg_twice, is_webp = (
        next(draw) < probability for probability in (config.augment_jpeg, config.jpeg_twice, config.augment_webp)
    )
    jpeg, again = (_coding("JPEG", config.jpeg_quality, *(next(draw) for _ in range(4))) for _ in range(2))
    webp = _coding("WEBP", config.webp_quality, *(next(draw) for _ in range(4)))
    chosen = ((jpeg, is_jpeg), (again, is_jpeg and is_jpeg_twice), (webp, is_webp))
    return Augmentation(
        left=left,
        top=top,
        mirror=recipe.flip and is_mirrored,
        scale=float(np.exp(scale)) if is_rescaled else None,
        kernel=kernel,
        blur_sigma=blur_sigma if is_blurred else None,
        noise_sigma=noise_sigma if is_noisy else None,
        noise_seed=noise_seed,
        codings=tuple(coding for coding, is_chosen in chosen if is_chosen),
    )


def _between(draw: float, low: float, high: float) -> float:
    return float(low + draw * (high - low))


def _coding(fmt: str, qualities: tuple[int, int], *draws: float) -> Coding:
    quality, subsampling, column, row = draws
    low, high = qualities
    return Coding(
        fmt,
        low + int(quality * (high - low + 1)),
        "4:2:0" if fmt == "WEBP" or subsampling < 0.5 else "4:4:4",
        (int(column * MARGIN_PX), int(row * MARGIN_PX)),
    )


def _coded(window: NDArray[np.uint8], coding: Coding) -> NDArray[np.uint8]:
    """Return a window after a codec; left of and above its grid, which no crop reaches, as it was."""
    column, row = coding.grid
    buffer = io.BytesIO()
    image = Image.fromarray(window[row:, column:])
    if coding.format == "JPEG":
        image.save(buffer, "JPEG", quality=coding.quality, subsampling=coding.subsampling)
    else:
        image.save(buffer, "WEBP", quality=coding.quality)
    coded = window.copy()
    with Image.open(buffer) as decoded:
        coded[row:, column:] = np.asarray(decoded.convert("RGB"))
    return coded
