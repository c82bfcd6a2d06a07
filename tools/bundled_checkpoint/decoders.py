"""Train small sharp autoencoders on the crops and add what they draw to the fakes.

Step 2 of the bundled checkpoint. Each kind ends in another way of making pixels (nearest + conv, bilinear +
conv, transposed conv, pixel shuffle), because that is what LFM learns to see. They must be sharp: at 23 to 28
dB a detector learns blur instead and fails on everything else; these reach about 35 to 43 dB.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Upsampling = Literal["nearest", "bilinear", "transposed", "transposed3", "shuffle"]
BATCH: Final = 16
PATCH_PX: Final = 64
WIDTH: Final = 40
LEARNING_RATE: Final = 3e-3


@dataclass(frozen=True)
class Kind:
    """One autoencoder: how it upsamples, by which factor, and how many numbers its code has a position."""

    upsampling: Upsampling
    factor: int
    code: int

    @property
    def name(self) -> str:
        """Name of its files."""
        return f"decoder-{self.upsampling}-s{self.factor}"


KINDS: Final = (
    Kind("nearest", 2, 7),
    Kind("bilinear", 2, 7),
    Kind("transposed", 2, 5),
    Kind("transposed3", 2, 5),
    Kind("shuffle", 2, 5),
    Kind("nearest", 4, 30),
    Kind("bilinear", 4, 32),
    Kind("transposed", 4, 16),
    Kind("shuffle", 4, 16),
)


def _upsampler(kind: Upsampling, width: int) -> nn.Module:
    match kind:
        case "transposed":
            return nn.ConvTranspose2d(width, width, 4, stride=2, padding=1)
        case "transposed3":
            return nn.ConvTranspose2d(width, width, 3, stride=2, padding=1, output_padding=1)
        case "shuffle":
            return nn.Sequential(nn.Conv2d(width, 4 * width, 3, padding=1), nn.PixelShuffle(2))
        case "nearest" | "bilinear":
            return nn.Sequential(nn.Upsample(scale_factor=2, mode=kind), nn.Conv2d(width, width, 3, padding=1))


class Autoencoder(nn.Module):
    """Fixed linear encoder (principal components of factor x factor pixel blocks) and a learned decoder.

    The decoder adds detail to the block means, drawn large by its own kind of upsampling. Maps images
    (B, 3, H, W) in [0, 1] to images of the same shape; H and W divisible by the factor.
    """

    def __init__(self, kind: Kind, reals: NDArray[np.uint8], rng: np.random.Generator) -> None:
        super().__init__()
        self.factor = kind.factor
        blocks = nn.functional.pixel_unshuffle(_to_tensor(reals[rng.choice(len(reals), 32)]), kind.factor)
        values = blocks.permute(0, 2, 3, 1).flatten(0, 2)
        covariance = torch.cov(values.T)
        components = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, : kind.code].T
        scale = (components @ covariance @ components.T).diagonal().clamp_min(1e-8).rsqrt()
        self.encoder = nn.Parameter((components * scale[:, None])[..., None, None], requires_grad=False)
        self.base_mode = "bilinear" if kind.upsampling == "bilinear" else "nearest"
        layers: list[nn.Module] = [nn.Conv2d(kind.code, WIDTH, 3, padding=1), nn.SiLU()]
        for _ in range(kind.factor.bit_length() - 1):
            layers += [_upsampler(kind.upsampling, WIDTH), nn.SiLU()]
        self.decoder = nn.Sequential(*layers, nn.Conv2d(WIDTH, 3, 3, padding=1))

    def forward(self, x_bchw: Tensor) -> Tensor:
        """Return the copy."""
        code = nn.functional.conv2d(nn.functional.pixel_unshuffle(x_bchw - 0.5, self.factor), self.encoder)
        means = nn.functional.avg_pool2d(x_bchw, self.factor)
        base = nn.functional.interpolate(means, scale_factor=self.factor, mode=self.base_mode)
        copy: Tensor = base + self.decoder(code)
        return copy


def train(model: nn.Module, reals: NDArray[np.uint8], num_steps: int, rng: np.random.Generator) -> None:
    """Fit the decoder to random patches of the crops."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, step / 30) * (1 - 0.97 * step / num_steps)
        row, column = rng.integers(0, reals.shape[1] - PATCH_PX, 2)
        rows = rng.choice(len(reals), BATCH, replace=False)
        target = _to_tensor(reals[rows, row : row + PATCH_PX, column : column + PATCH_PX])
        with torch.autocast("cpu", torch.bfloat16):
            output = model(target)
        loss = nn.functional.mse_loss(output.float(), target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def _to_tensor(images_bhwc: NDArray[np.uint8]) -> Tensor:
    """Return (B, 3, H, W) in [0, 1], channels last in memory."""
    return torch.from_numpy(images_bhwc).permute(0, 3, 1, 2).float().div(255)


@torch.inference_mode()
def draw(model: nn.Module, reals: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the autoencoder's copies of the crops, same shape."""
    batches = [model(_to_tensor(reals[i : i + BATCH])) for i in range(0, len(reals), BATCH)]
    copies: NDArray[np.uint8] = torch.cat(batches).clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).numpy()
    return copies


def main() -> None:
    """Write fake_NAME.npy and index_NAME.npy for each kind beside the crops."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that prepare_data.py wrote")
    parser.add_argument("--steps", type=int, default=300, help="training steps of each kind")
    parser.add_argument("--every", type=int, default=4, help="draw every so many crops")
    parser.add_argument("--without", nargs="*", default=[], help="kinds of upsampling to leave out")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    reals = np.load(args.data / "real.npy")
    rng = np.random.default_rng(args.seed)
    kinds = [kind for kind in KINDS if kind.upsampling not in args.without]
    for number, kind in enumerate(kinds):
        torch.manual_seed(args.seed + number)
        model = Autoencoder(kind, reals, rng)
        start = time.monotonic()
        train(model, reals, args.steps, rng)
        train_s = time.monotonic() - start
        index = np.arange(number % args.every, len(reals), args.every)
        fakes = draw(model.eval(), reals[index])
        np.save(args.data / f"fake_{kind.name}.npy", fakes)
        np.save(args.data / f"index_{kind.name}.npy", index)
        error = np.mean((fakes.astype(np.float32) - reals[index]) ** 2, axis=(1, 2, 3))
        quality_db = np.mean(10 * np.log10(255**2 / np.maximum(error, 1e-3)))
        print(f"{kind.name}: {train_s:.0f} s, {len(fakes)} images, {quality_db:.1f} dB", flush=True)


if __name__ == "__main__":
    main()
