"""From bytes to the model's input, or to the reason why not: the half of scoring that needs no model."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from PIL import Image

from lfm_scan.errors import AccessDeniedError, ImageError, NotFoundError, OversizeError, StorageError, UnreachableError
from lfm_scan.imaging import ImageInfo, ImageLimits, PreprocessPolicy, decode_bytes, decode_image
from lfm_scan.status import Status

_SCORED_TRUNCATED: Final = "scored although the end of the file is missing (--score-truncated)"


@dataclass(frozen=True, slots=True)
class Prepared:
    """One image on its way to the model.

    Attributes:
        info: Facts of the file; a failed one may have few.
        status: ok, or why there are no pixels.
        error: What is wrong, if status is not ok; of an ok one, that its end is missing.
        pixels: (256, 256, 3) uint8 RGB, or None.
        sha256: Of the file, or None if there is none.
        size_bytes: Of the file, or None.
    """

    info: ImageInfo
    status: Status
    error: str | None
    pixels: np.ndarray | None
    sha256: str | None = None
    size_bytes: int | None = None

    @property
    def truncated(self) -> bool:
        """Whether there are pixels although the end of the file is missing."""
        return self.status == Status.OK and self.error is not None

    @classmethod
    def failed(cls, error: ImageError) -> Prepared:
        """Return the outcome for an image that cannot be scored."""
        # A decoder may quote the file; a lone surrogate in it is no Parquet string.
        message = error.message.encode("utf-8", "backslashreplace").decode()
        return cls(error.info or ImageInfo(), error.status, message, None)


def prepare_bytes(data: bytes, policy: PreprocessPolicy, limits: ImageLimits) -> Prepared:
    """Decode and preprocess a file in this process. A bad image is an outcome, never an exception.

    For files of strangers use `IsolatedDecoder`: here a decoder that crashes or hangs takes the program with it, and
    max_decode_seconds and max_decode_bytes do not hold.
    """
    try:
        prepared = prepare_content(data, policy, limits)
    except MemoryError:
        prepared = Prepared.failed(
            ImageError(Status.TOO_LARGE, "decoding it ran out of memory: lower --max-image-pixels")
        )
    return replace(prepared, sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data))


def prepare_content(data: bytes, policy: PreprocessPolicy, limits: ImageLimits) -> Prepared:
    """Decode and preprocess a file, without its sha256 and size.

    Raises:
        MemoryError: If there is not enough for it.
    """
    try:
        decoded = decode_bytes(data, limits)
        note = _SCORED_TRUNCATED if decoded.truncated else None
        return Prepared(decoded.info, Status.OK, note, policy(decoded))
    except ImageError as exc:
        return Prepared.failed(exc)


def prepare_image(image: Image.Image, policy: PreprocessPolicy, limits: ImageLimits) -> Prepared:
    """Preprocess an image that Pillow has opened."""
    try:
        decoded = decode_image(image, limits)
        return Prepared(decoded.info, Status.OK, None, policy(decoded))
    except ImageError as exc:
        return Prepared.failed(exc)


def image_error(exc: StorageError) -> ImageError:
    """Return what a store's refusal means for one image."""
    match exc:
        case NotFoundError():
            status = Status.MISSING
        case AccessDeniedError():
            status = Status.DENIED
        case OversizeError():
            return ImageError(Status.TOO_LARGE, f"{exc} (--max-image-bytes)")
        case UnreachableError():
            status = Status.TIMEOUT
        case _:
            status = Status.ERROR
    return ImageError(status, str(exc))
