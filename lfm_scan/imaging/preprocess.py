"""Named preprocess policies: how an RGB image becomes the 256x256 input of the model.

The id is stored with every score, because how an image was preprocessed decides what its score means. A policy
never changes what it does: another rule is another id.

Odd sizes: both policies deliver 256x256, so NPR always sees even sizes. `crop256` takes its offset as torchvision's
CenterCrop does, half of the surplus rounded half to even.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from PIL import Image

from lfm_scan.errors import ConfigError, ImageError
from lfm_scan.imaging.info import DecodedImage
from lfm_scan.status import Status

SIDE_PX: Final = 256


@dataclass(frozen=True)
class PreprocessPolicy:
    """One way from an image to the model's input.

    Attributes:
        id: What is stored with the score.
        description: One line for help and reports.
        min_side_px: Shortest side of an image it can take.
        resamples: Whether it changes pixel values of an image of (width, height).
    """

    id: str
    description: str
    min_side_px: int
    resamples: Callable[[int, int], bool]
    _transform: Callable[[Image.Image], Image.Image]

    def __call__(self, decoded: DecodedImage) -> np.ndarray:
        """Return (256, 256, 3) uint8, RGB.

        Raises:
            ImageError: With status too_small if the image is smaller than the policy can take.
        """
        image = decoded.image
        if min(image.size) < self.min_side_px:
            raise ImageError(
                Status.TOO_SMALL,
                f"{image.width}x{image.height}: policy {self.id} needs {self.min_side_px} pixels a side",
                decoded.info,
            )
        return np.asarray(self._transform(image))


def _resize(image: Image.Image) -> Image.Image:
    # Pillow's bilinear widens its kernel when it shrinks (antialiasing), as torchvision's Resize has it.
    return image.resize((SIDE_PX, SIDE_PX), Image.Resampling.BILINEAR)


def _centre_crop(image: Image.Image) -> Image.Image:
    left, top = round((image.width - SIDE_PX) / 2), round((image.height - SIDE_PX) / 2)
    return image.crop((left, top, left + SIDE_PX, top + SIDE_PX))


POLICIES: Final = {
    policy.id: policy
    for policy in (
        PreprocessPolicy(
            id="resize256",
            description="resize to 256x256, bilinear with antialiasing: the paper's protocol",
            min_side_px=1,
            resamples=lambda width, height: (width, height) != (SIDE_PX, SIDE_PX),
            _transform=_resize,
        ),
        PreprocessPolicy(
            id="crop256",
            description="the centre 256x256 pixels as they are, no resize",
            min_side_px=SIDE_PX,
            resamples=lambda width, height: False,
            _transform=_centre_crop,
        ),
    )
}


def get_policy(policy_id: str) -> PreprocessPolicy:
    """Return the policy of that id.

    Raises:
        ConfigError: If there is none.
    """
    try:
        return POLICIES[policy_id]
    except KeyError:
        raise ConfigError(f"no preprocess policy {policy_id!r}; there are {', '.join(POLICIES)}") from None
