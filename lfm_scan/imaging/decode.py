"""Bytes to an RGB image. Pillow is the reference decoder.

The rule for each mode, so that a score is reproducible elsewhere:

| stored as | becomes RGB by |
|---|---|
| RGB, YCbCr JPEG | as it is |
| grey, 1-bit | the value in all three channels |
| palette | its colours |
| alpha (RGBA, LA, palette with transparency) | dropped: the colours beneath are what a generator drew |
| 16 bits a channel | the high byte |
| CMYK, YCCK | Pillow's conversion, without colour management |
| 32-bit integer, float, LAB, HSV | refused as unsupported: their range or conversion is a guess |

ICC profiles are ignored. EXIF orientation is recorded and not applied: LFM looks at the stored pixel grid, and
so does the authors' code. Of an animation or a multi-page file, the first frame.
"""

from __future__ import annotations

import io
import struct
import warnings
from dataclasses import replace
from typing import Final

import numpy as np
from PIL import Image, UnidentifiedImageError

from lfm_scan.errors import ImageError
from lfm_scan.imaging.frames import count_frames
from lfm_scan.imaging.info import DecodedImage, ImageInfo
from lfm_scan.imaging.leniency import PILLOW
from lfm_scan.imaging.lossy import estimate_jpeg_quality, is_lossy, lossy_evidence
from lfm_scan.imaging.sniff import READABLE, is_cut_short, sniff
from lfm_scan.imaging.traces import find_jpeg_traces
from lfm_scan.options import ImageLimits
from lfm_scan.status import LossyEvidence, Status

_EXIF_ORIENTATION: Final = 0x0112
_CONVERTED: Final = frozenset({"RGB", "L", "1", "P", "RGBA", "RGBX", "LA", "La", "PA", "RGBa", "CMYK", "YCbCr"})
_HIGH_BYTE: Final = frozenset({"I;16", "I;16L", "I;16B", "I;16N"})
# What Pillow's decoders raise on bytes they cannot read, found by fuzzing them; anything else is our bug.
_DECODER_ERRORS: Final = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    EOFError,
    OverflowError,
    AttributeError,
    RuntimeError,
    struct.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
# What Pillow says of compressed text that would fill the memory.
_TEXT_BOMBS: Final = ("PngImagePlugin.MAX_TEXT_CHUNK", "Too much memory used in text chunks")


def recognise(data: bytes, limits: ImageLimits) -> str:
    """Return the format of a file worth decoding, by its first bytes and its size alone; no decoder is asked.

    Raises:
        ImageError: With status empty, too_large or unsupported.
    """
    if not data:
        raise ImageError(Status.EMPTY, "the file has no bytes")
    if len(data) > limits.max_image_bytes:
        raise ImageError(
            Status.TOO_LARGE, f"{len(data):,} bytes, the limit is {limits.max_image_bytes:,} (--max-image-bytes)"
        )
    fmt = sniff(data)
    if fmt is None or fmt not in READABLE:
        found = f"{fmt} content" if fmt else "not an image: unknown content"
        raise ImageError(Status.UNSUPPORTED, f"{found}; readable are {', '.join(READABLE)}", ImageInfo(format=fmt))
    return fmt


def decode_bytes(data: bytes, limits: ImageLimits | None = None, *, traces: bool = True) -> DecodedImage:
    """Decode an image file.

    A file whose end is missing is refused, or with `limits.score_truncated` decoded as far as it goes. A JPEG that was
    cut and then given an end mark passes for a whole one: its decoder fills the rest with grey and does not tell.

    Args:
        data: The whole file.
        limits: Bounds, checked from the header before any pixel is decoded.
        traces: Search the pixels for traces of JPEG, which takes longer than most decodes. Without it, lossy says what
            the file says.

    Raises:
        ImageError: With status empty, unsupported, corrupt, truncated, too_large or too_small, and whatever was
            learned of the file before it failed.
    """
    limits = limits or ImageLimits()
    fmt = recognise(data, limits)
    try:
        with PILLOW.strict():
            return _decode(data, fmt, limits, traces)
    except ImageError as exc:
        if exc.status != Status.TRUNCATED or not limits.score_truncated:
            raise
        as_a_whole = exc
    try:
        with PILLOW.lenient():
            return replace(_decode(data, fmt, limits, traces), truncated=True)
    except ImageError:
        raise as_a_whole from None


def decode_image(image: Image.Image, limits: ImageLimits | None = None) -> DecodedImage:
    """Turn an opened Pillow image into RGB under the same rules and limits.

    Args:
        image: Opened, not necessarily loaded. It is not closed, stays at its first frame, and if it is RGB already, it
            is the one returned.
        limits: Bounds, checked before its pixels are loaded.

    Raises:
        ImageError: As `decode_bytes`.
    """
    with PILLOW.strict():
        return _decode_opened(image, limits or ImageLimits(), None, traces=True)


def _decode(data: bytes, fmt: str, limits: ImageLimits, traces: bool) -> DecodedImage:
    info = ImageInfo(format=fmt)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd metadata; the row tells what matters
            with Image.open(io.BytesIO(data), formats=[fmt]) as image:
                return _decode_opened(image, limits, data, traces=traces)
    except (UnidentifiedImageError, *_DECODER_ERRORS) as exc:
        raise _translate(exc, data, info, limits) from exc


def _decode_opened(image: Image.Image, limits: ImageLimits, data: bytes | None, *, traces: bool) -> DecodedImage:
    info = _header_info(image, data)
    _check_size(image, info, limits)
    try:
        image.seek(0)
        image.load()
        # Some facts are only known once the pixels are loaded: metadata may trail them.
        info = replace(
            info,
            lossy=is_lossy(image, data),
            lossy_evidence=lossy_evidence(image, data),
            exif_orientation=_exif_orientation(image),
            num_frames=_num_frames(image, data),
        )
        rgb = _to_rgb(image, info)
    except _DECODER_ERRORS as exc:
        raise _translate(exc, data or b"", info, limits) from exc
    return DecodedImage(rgb, _with_traces(info, rgb) if traces else info)


def _header_info(image: Image.Image, data: bytes | None) -> ImageInfo:
    quality = None
    if image.format in ("JPEG", "MPO"):
        tables = getattr(image, "quantization", None) or {}
        quality = estimate_jpeg_quality(tables[0]) if 0 in tables else None
    return ImageInfo(
        # A multi-picture JPEG is a JPEG to its reader.
        format="JPEG" if image.format == "MPO" else image.format,
        mode=image.mode,
        width=image.width,
        height=image.height,
        lossy=is_lossy(image, data),
        lossy_evidence=lossy_evidence(image, data),
        jpeg_quality=quality,
    )


def _with_traces(info: ImageInfo, rgb: Image.Image) -> ImageInfo:
    """Add what the pixels tell where the file does not."""
    if info.lossy:
        return info
    traces = find_jpeg_traces(rgb)
    if traces is None:
        return info
    return replace(info, lossy=True, lossy_evidence=LossyEvidence.TRACES, jpeg_quality=traces.quality)


def _exif_orientation(image: Image.Image) -> int | None:
    try:
        value = image.getexif().get(_EXIF_ORIENTATION)
    except _DECODER_ERRORS:
        return None  # broken EXIF in a good image is not worth a row
    return value if isinstance(value, int) and 1 <= value <= 8 else None


def _num_frames(image: Image.Image, data: bytes | None) -> int:
    try:
        return count_frames(image, data)
    except _DECODER_ERRORS:
        return 1  # the first frame decoded; a broken later one does not matter to us


def _check_size(image: Image.Image, info: ImageInfo, limits: ImageLimits) -> None:
    width, height = image.size
    if width * height > limits.max_image_pixels:
        raise ImageError(
            Status.TOO_LARGE,
            f"{width}x{height} is {width * height:,} pixels, the limit is {limits.max_image_pixels:,} "
            "(--max-image-pixels)",
            info,
        )
    if min(width, height) < limits.min_side_px:
        raise ImageError(
            Status.TOO_SMALL, f"{width}x{height}: the shorter side must have {limits.min_side_px} pixels", info
        )


def _to_rgb(image: Image.Image, info: ImageInfo) -> Image.Image:
    if image.mode in _HIGH_BYTE:
        high = (np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)
        return Image.fromarray(high, "L").convert("RGB")
    if image.mode not in _CONVERTED:
        raise ImageError(Status.UNSUPPORTED, f"colour mode {image.mode} has no defined 8-bit RGB form", info)
    if image.mode == "RGB":
        image.load()  # counting frames may have rewound it
        return image
    if image.mode in {"P", "PA"}:
        # Straight to RGB would composite nothing but may warn of byte transparency; via RGBA it never does.
        image = image.convert("RGBA")
    return image.convert("RGB")


def _translate(exc: BaseException, data: bytes, info: ImageInfo, limits: ImageLimits) -> ImageError:
    """Turn what a decoder raised into the status a reader can act on."""
    if isinstance(exc, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return ImageError(
            Status.TOO_LARGE,
            f"its header claims more than {limits.max_image_pixels:,} pixels (--max-image-pixels)",
            info,
        )
    reason = str(exc).splitlines()[0][:200] if str(exc) else type(exc).__name__
    if any(bomb in reason for bomb in _TEXT_BOMBS):
        return ImageError(
            Status.TOO_LARGE, f"its text or colour profile is past the decoder's own bound ({reason})", info
        )
    if isinstance(exc, UnidentifiedImageError):
        reason = "its header cannot be read"
    if is_cut_short(data, info.format or "") or "truncated" in reason.lower():
        return ImageError(Status.TRUNCATED, f"the end of the file is missing ({reason})", info)
    return ImageError(Status.CORRUPT, f"cannot be decoded: {reason}", info)
