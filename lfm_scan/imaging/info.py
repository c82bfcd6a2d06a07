"""What is known of an image apart from its pixels."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """Facts read from an image file; a fact the file does not tell is None.

    Attributes:
        format: JPEG, PNG, WEBP, AVIF, GIF, TIFF or BMP.
        mode: Pillow's name of the colour mode as stored: RGB, L, P, CMYK, I;16, ...
        width: Stored width in pixels, before any EXIF rotation.
        height: Stored height in pixels, before any EXIF rotation.
        lossy: Whether the image, as far as file and pixels tell, was ever saved by a lossy codec.
        jpeg_quality: Estimated quality 1 to 100 on the IJG scale, of JPEG files and of traces of JPEG.
        exif_orientation: 1 to 8.
        num_frames: Frames or pages in the file, 65,535 if there are more.
        lossy_evidence: What lossy is concluded from, a `LossyEvidence`, if it is true.
    """

    format: str | None = None
    mode: str | None = None
    width: int | None = None
    height: int | None = None
    lossy: bool | None = None
    jpeg_quality: int | None = None
    exif_orientation: int | None = None
    num_frames: int | None = None
    lossy_evidence: str | None = None


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """An RGB image and the facts of the file it came from.

    Attributes:
        image: Mode RGB, 8 bits a channel, at its stored size and orientation.
        info: What the file says.
        truncated: Whether the end of the file is missing, and with it a part of the image.
    """

    image: Image.Image
    info: ImageInfo
    truncated: bool = False
