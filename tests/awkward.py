"""Files that real collections hold and that break programs, each with the status it must end as.

Every one is made here, as small as it can be, from nothing but Pillow, zlib and struct.
"""

from __future__ import annotations

import functools
import io
import os
import struct
import unicodedata
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image

from lfm_scan.status import Status

SIDE_PX: Final = 256

DANGLING_LINK: Final = "link-to-nothing.png"
GOOD_LINK: Final = "link-to-good.png"
FOLDER_LOOP: Final = "loop"
NOT_UTF8: Final = b"caf\xe9.png"
PIPE: Final = "pipe.png"
BACKSLASH: Final = "back\\slash.png"
"""A name of its own on a file system and on S3; SeaweedFS turns it into a folder."""


@dataclass(frozen=True)
class Awkward:
    """One awkward file.

    Attributes:
        data: Its bytes.
        crop256: The status it ends as under that policy and the default limits.
        resize256: The same under the other policy.
    """

    data: bytes
    crop256: Status
    resize256: Status

    def status(self, policy_id: str) -> Status:
        """Return the status under a policy."""
        return {"crop256": self.crop256, "resize256": self.resize256}[policy_id]


def scene(width: int = SIDE_PX, height: int = SIDE_PX, mode: str = "RGB") -> Image.Image:
    """Return a smooth picture that compresses to little, with all channels different."""
    row, column = np.mgrid[0:height, 0:width]
    red, green = row * 255 // max(height - 1, 1), column * 255 // max(width - 1, 1)
    blue = ((row // 8 + column // 8) % 2) * 120 + 60
    image = Image.fromarray(np.stack([red, green, blue], axis=-1).astype(np.uint8), "RGB")
    return image if mode == "RGB" else image.convert(mode)


def encode(image: Image.Image, fmt: str, **options: Any) -> bytes:  # noqa: ANN401 - as Image.save has it
    """Return the image as a file."""
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def png(ihdr: tuple[int, int, int, int], *chunks: tuple[bytes, bytes]) -> bytes:
    """Return a PNG of an IHDR (width, height, bit depth, colour type), the chunks given, and IEND."""
    header = struct.pack(">IIBBBBB", *ihdr, 0, 0, 0)
    body = b"".join(_png_chunk(kind, data) for kind, data in ((b"IHDR", header), *chunks, (b"IEND", b"")))
    return b"\x89PNG\r\n\x1a\n" + body


def png_16_bit_rgb(samples_hwc: np.ndarray) -> bytes:
    """Return a PNG with 16 bits a channel, which Pillow reads but cannot write; (H, W, 3) uint16."""
    height, width, _ = samples_hwc.shape
    rows = b"".join(b"\x00" + row.astype(">u2").tobytes() for row in samples_hwc)
    return png((width, height, 16, 2), (b"IDAT", zlib.compress(rows, 9)))


def jpeg_claiming(width: int, height: int) -> bytes:
    """Return a small JPEG whose header claims another size."""
    data = bytearray(encode(scene(64, 64), "JPEG"))
    start = data.index(b"\xff\xc0")
    struct.pack_into(">HH", data, start + 5, height, width)
    return bytes(data)


def ycck_jpeg() -> bytes:
    """Return a four-channel JPEG whose Adobe marker declares the YCCK transform."""
    data = bytearray(encode(scene(mode="CMYK"), "JPEG"))
    marker = data.index(b"Adobe\x00")
    data[marker + 11] = 2
    return bytes(data)


def multi_picture_jpeg() -> bytes:
    """Return an MPO: what cameras write when a JPEG carries a second picture."""
    return encode(scene(), "MPO", save_all=True, append_images=[scene(64, 64)])


def animation(fmt: str, **options: Any) -> bytes:  # noqa: ANN401
    """Return three frames; the first is the scene, the others are black and white."""
    others = [Image.new("RGB", (SIDE_PX, SIDE_PX), colour) for colour in ("black", "white")]
    return encode(scene(), fmt, save_all=True, append_images=others, **options)


def exif_rotated_jpeg(orientation: int = 6, width: int = 320, height: int = 256) -> bytes:
    """Return a JPEG that asks its viewer to turn it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(scene(width, height), "JPEG", exif=exif)


def flipped(data: bytes, position: int, mask: int = 0xFF) -> bytes:
    """Return the data with bits of one byte flipped."""
    damaged = bytearray(data)
    damaged[position] ^= mask
    return bytes(damaged)


def without_end(data: bytes, keep: float) -> bytes:
    """Return the first part of a file."""
    return data[: int(len(data) * keep)]


def lab_tiff() -> bytes:
    """Return a TIFF in CIELAB."""
    return encode(Image.new("LAB", (SIDE_PX, SIDE_PX), (120, 10, 20)), "TIFF", compression="tiff_lzw")


@functools.cache
def awkward_files() -> dict[str, Awkward]:
    """Return every awkward file that is an ordinary one, by its name relative to the folder."""
    good_png, good_jpeg = encode(scene(), "PNG", optimize=True), encode(scene(), "JPEG", quality=75)
    ok: Callable[[bytes], Awkward] = functools.partial(Awkward, crop256=Status.OK, resize256=Status.OK)

    def bad(status: Status, data: bytes) -> Awkward:
        return Awkward(data, status, status)

    def below_crop(data: bytes) -> Awkward:
        return Awkward(data, Status.TOO_SMALL, Status.OK)

    gif = encode(scene(mode="P"), "GIF")
    bmp = encode(scene(mode="L"), "BMP")
    tiff = encode(scene(mode="L"), "TIFF")
    webp, webp_lossless = encode(scene(), "WEBP", quality=50), encode(scene(), "WEBP", lossless=True)
    avif = encode(scene(), "AVIF", quality=40, speed=10)
    idat = good_png.index(b"IDAT")
    palette = scene(mode="P")
    palette.info["transparency"] = bytes(range(256))
    rgb16 = np.asarray(scene()).astype(np.uint16) << 8 | 0x37
    grey16 = Image.fromarray((np.asarray(scene(mode="L")).astype(np.uint16) << 8) | 0x11)
    text_bomb = (b"zTXt", b"Comment\x00\x00" + zlib.compress(bytes(64 * 2**20), 9))
    grey_rows = zlib.compress(bytes(257 * 256), 9)

    files = {
        # Not images
        "empty.jpg": bad(Status.EMPTY, b""),
        "text.jpg": bad(Status.UNSUPPORTED, b"This is no picture at all.\n"),
        "page.png": bad(Status.UNSUPPORTED, b"<!DOCTYPE html><html><body>403 Forbidden</body></html>"),
        "error.xml.jpg": bad(Status.UNSUPPORTED, b'<?xml version="1.0"?><Error><Code>NoSuchKey</Code></Error>'),
        "drawing.svg": bad(Status.UNSUPPORTED, b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'),
        "paper.pdf": bad(Status.UNSUPPORTED, b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n%%EOF\n"),
        "archive.zip": bad(Status.UNSUPPORTED, b"PK\x03\x04" + bytes(40)),
        "phone.heic": bad(Status.UNSUPPORTED, struct.pack(">I", 24) + b"ftypheic" + bytes(4) + b"mif1heic" + bytes(64)),
        "zeros.png": bad(Status.UNSUPPORTED, bytes(512)),
        "one-byte.jpg": bad(Status.UNSUPPORTED, b"\xff"),
        "icon.ico": bad(Status.UNSUPPORTED, encode(scene(64, 64), "ICO")),
        "jpeg2000.jp2": bad(Status.UNSUPPORTED, encode(scene(64, 64), "JPEG2000")),
        # Broken
        "cut-at-3.jpg": bad(Status.TRUNCATED, good_jpeg[:3]),
        "cut-in-header.jpg": bad(Status.TRUNCATED, good_jpeg[:100]),
        "cut-at-half.jpg": bad(Status.TRUNCATED, without_end(good_jpeg, 0.5)),
        "cut-at-90-percent.jpg": bad(Status.TRUNCATED, without_end(good_jpeg, 0.9)),
        "cut-in-signature.png": bad(Status.TRUNCATED, good_png[:12]),
        "cut-at-half.png": bad(Status.TRUNCATED, without_end(good_png, 0.5)),
        "cut-at-half.webp": bad(Status.TRUNCATED, without_end(webp, 0.5)),
        "cut-at-half.gif": bad(Status.TRUNCATED, without_end(gif, 0.5)),
        "cut-at-half.bmp": bad(Status.TRUNCATED, without_end(bmp, 0.5)),
        "cut-at-half.tiff": bad(Status.TRUNCATED, without_end(tiff, 0.5)),
        "cut-at-half.avif": bad(Status.TRUNCATED, without_end(avif, 0.5)),
        "bad-crc.png": bad(Status.CORRUPT, flipped(good_png, idat - 5)),
        "bad-zlib.png": bad(Status.CORRUPT, flipped(good_png, idat + 4)),
        "bad-tables.jpg": bad(Status.CORRUPT, good_jpeg[:20] + bytes(200) + good_jpeg[220:]),
        # Too small, too large
        "1x1.png": bad(Status.TOO_SMALL, encode(scene(1, 1), "PNG")),
        "47x47.png": bad(Status.TOO_SMALL, encode(scene(47, 47), "PNG")),
        "2000x40.png": bad(Status.TOO_SMALL, encode(scene(2000, 40), "PNG")),
        "48x48.png": below_crop(encode(scene(48, 48), "PNG")),
        "255x255.png": below_crop(encode(scene(255, 255), "PNG")),
        "1000x255.jpg": below_crop(encode(scene(1000, 255), "JPEG")),
        "claims-50000x50000.png": bad(Status.TOO_LARGE, png((50_000, 50_000, 8, 2), (b"IDAT", grey_rows))),
        "claims-9000x9000.png": bad(Status.TOO_LARGE, png((9000, 9000, 8, 0), (b"IDAT", grey_rows))),
        "claims-65500x65500.jpg": bad(Status.TOO_LARGE, jpeg_claiming(65_500, 65_500)),
        "text-bomb.png": bad(Status.TOO_LARGE, png((256, 256, 8, 0), text_bomb, (b"IDAT", grey_rows))),
        # Colour modes
        "257x301.png": ok(encode(scene(257, 301), "PNG")),
        "grey-16-bit.png": ok(encode(grey16, "PNG")),
        "rgb-16-bit.png": ok(png_16_bit_rgb(rgb16)),
        "cmyk.jpg": ok(encode(scene(mode="CMYK"), "JPEG")),
        "ycck.jpg": ok(ycck_jpeg()),
        "grey.jpg": ok(encode(scene(mode="L"), "JPEG")),
        "progressive.jpg": ok(encode(scene(), "JPEG", progressive=True)),
        "palette-with-alpha.png": ok(encode(palette, "PNG")),
        "rgba.png": ok(encode(scene(mode="RGBA"), "PNG")),
        "la.png": ok(encode(scene(mode="LA"), "PNG")),
        "one-bit.png": ok(encode(scene(mode="1"), "PNG")),
        "float.tiff": bad(Status.UNSUPPORTED, encode(scene(mode="F"), "TIFF", compression="tiff_lzw")),
        "int32.tiff": bad(Status.UNSUPPORTED, encode(scene(mode="I"), "TIFF", compression="tiff_lzw")),
        "lab.tiff": bad(Status.UNSUPPORTED, lab_tiff()),
        "grey-16-bit.tiff": ok(encode(grey16, "TIFF", compression="tiff_lzw")),
        # Containers
        "jpeg-inside.tiff": ok(encode(scene(), "TIFF", compression="jpeg")),
        "pages.tiff": ok(animation("TIFF", compression="tiff_lzw")),
        "animated.gif": ok(animation("GIF")),
        "animated.webp": ok(animation("WEBP")),
        "animated.png": ok(animation("PNG")),
        "lossy.webp": ok(webp),
        "lossless.webp": ok(webp_lossless),
        "picture.avif": ok(avif),
        "picture.bmp": ok(bmp),
        "picture.gif": ok(gif),
        "camera.mpo.jpg": ok(multi_picture_jpeg()),
        "turned.jpg": ok(exif_rotated_jpeg()),
        "trailing-bytes.jpg": ok(good_jpeg + b"\x00" * 3000),
        # Names
        "png-inside.jpg": ok(good_png),
        "jpeg-inside.txt": ok(good_jpeg),
        "no-extension": ok(good_png),
        "UPPER.PNG": ok(good_png),
        "two  spaces .png": ok(good_png),
        "100%25 %2F.png": ok(good_png),
        "a+b=c&d.png": ok(good_png),
        "hash#mark.png": ok(good_png),
        "question?mark=*.png": ok(good_png),
        "quote'\".png": ok(good_png),
        unicodedata.normalize("NFC", "caf\u00e9-\u65e5\u672c-\U0001f600.png"): ok(good_png),
        unicodedata.normalize("NFD", "caf\u00e9-\u65e5\u672c-\U0001f600.png"): ok(good_png),
        "new\nline.png": ok(good_png),
        "-rf.png": ok(good_png),
        ".hidden.png": ok(good_png),
        "deep/er/and deeper/nested.png": ok(good_png),
        "deep.png": ok(good_png),
    }
    assert all(len(file.data) < 300_000 for file in files.values()), "awkward files are meant to be small"
    return files


def awkward_bytes() -> dict[str, bytes]:
    """Return the files as key and bytes, for upload to S3: no links, no pipe, no backslash, no name but UTF-8."""
    return {name: file.data for name, file in awkward_files().items()}


def expected_statuses(policy_id: str = "crop256") -> dict[str, Status]:
    """Return the status of each file of `awkward_bytes` under a policy, by its name."""
    return {name: file.status(policy_id) for name, file in awkward_files().items()}


def write_awkward_files(folder: Path, policy_id: str = "crop256") -> dict[str, Status]:
    """Write the files, and what only a file system can hold: links, a loop, a pipe, a name that is not UTF-8.

    Returns:
        The status of every input under the policy, by the URI that `LocalStore.list` gives it. The loop is no
        input and has none.
    """
    folder = Path(os.path.abspath(folder))
    good_png = awkward_files()["png-inside.jpg"].data
    for name, data in awkward_bytes().items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (folder / DANGLING_LINK).symlink_to("nowhere.png")
    (folder / GOOD_LINK).symlink_to("deep.png")
    (folder / FOLDER_LOOP).symlink_to(folder, target_is_directory=True)
    (folder / BACKSLASH).write_bytes(good_png)
    os.mkfifo(folder / PIPE)
    not_utf8 = os.path.join(os.fsencode(folder), NOT_UTF8)
    Path(os.fsdecode(not_utf8)).write_bytes(good_png)
    return {
        **{str(folder / name): status for name, status in expected_statuses(policy_id).items()},
        str(folder / DANGLING_LINK): Status.MISSING,
        str(folder / GOOD_LINK): Status.OK,
        str(folder / PIPE): Status.ERROR,
        str(folder / BACKSLASH): Status.OK,
        f"file://{folder}/caf%E9.png": Status.OK,
    }


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
