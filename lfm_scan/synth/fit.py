"""Training the autoencoders, drawing with them, and measuring how near to the original they draw."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from lfm_scan.synth.kinds import Kind
from lfm_scan.synth.networks import Autoencoder

_BATCH: Final = 16
_PATCH_PX: Final = 64
_LEARNING_RATE: Final = 3e-3
_LAST_LEARNING_RATE: Final = 0.03
"""Share of the learning rate that is left at the end."""
_WARM_UP_STEPS: Final = 30
_MAX_GRADIENT_NORM: Final = 1.0
_DETAIL_WEIGHT: Final = 1.0
_ENERGY_WEIGHT: Final = 1.0
_ENERGY_PX: Final = 8
_DRAW_BATCH: Final = 8
_HOLD_OUT_EVERY: Final = 8
_COMPONENT_CROPS: Final = 64
_MAX_VALUE: Final = 255.0


@dataclass(frozen=True)
class Fitted:
    """A trained network.

    Attributes:
        kind: What it is.
        model: Ready to draw.
        psnr_db: Mean over crops it did not learn from.
        detail: Strength of the finest detail in what it draws, as a share of the originals': below 1 is blur.
    """

    kind: Kind
    model: Autoencoder
    psnr_db: float
    detail: float


@contextlib.contextmanager
def deterministic(seed: int) -> Iterator[None]:
    """Give the block the random numbers of a seed and repeatable algorithms, and leave torch as it was."""
    before = torch.are_deterministic_algorithms_enabled()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)


def fit(kind: Kind, crops_bhwc: NDArray[np.uint8], num_steps: int, seed: int) -> Fitted:
    """Train a network of a kind on random patches of crops; every 8th crop is kept for measuring.

    Args:
        kind: What to train.
        crops_bhwc: (N, S, S, 3) uint8, N at least 2, S at least 64 and divisible by 8.
        num_steps: Of 16 patches each, times what the kind needs.
        seed: Of everything random.
    """
    held_out = np.arange(len(crops_bhwc)) % _HOLD_OUT_EVERY == 1
    learned = crops_bhwc[~held_out]
    rng = np.random.default_rng([seed, *kind.name.encode()])
    with deterministic(int(rng.integers(2**31))):
        sample = learned[rng.permutation(len(learned))[:_COMPONENT_CROPS]]
        model = Autoencoder(kind, _to_tensor(sample)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        _train(model, learned, num_steps * kind.effort, rng)
    model.eval().requires_grad_(False)
    originals = crops_bhwc[held_out]
    drawn = draw(model, originals)
    return Fitted(kind, model, float(psnr_db(originals, drawn).mean()), detail_ratio(originals, drawn))


@torch.inference_mode()
def draw(model: Autoencoder, crops_bhwc: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return crops drawn again, (N, H, W, 3) uint8; those without colour are drawn without.

    A network does not keep three channels exactly alike, which would tell that a picture without colour is real.
    """
    drawn = np.empty_like(crops_bhwc)
    with deterministic(0):
        for start in range(0, len(crops_bhwc), _DRAW_BATCH):
            batch = crops_bhwc[start : start + _DRAW_BATCH]
            copies = model(_to_tensor(batch))
            grey = torch.from_numpy((batch == batch[..., :1]).all(axis=(1, 2, 3)))
            copies = torch.where(grey[:, None, None, None], copies.mean(dim=1, keepdim=True), copies)
            values = copies.clamp(0, 1).mul(_MAX_VALUE).round().byte()
            drawn[start : start + _DRAW_BATCH] = values.permute(0, 2, 3, 1).numpy()
    return drawn


def psnr_db(originals_bhwc: NDArray[np.uint8], copies_bhwc: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return the peak signal-to-noise ratio of each copy (N,), in dB; infinite where nothing differs."""
    errors = originals_bhwc.astype(np.float64) - copies_bhwc
    mean_squares = np.square(errors).mean(axis=(1, 2, 3))
    with np.errstate(divide="ignore"):
        decibels: NDArray[np.float64] = 10 * np.log10(_MAX_VALUE**2 / mean_squares)
    return decibels


def detail_ratio(originals_bhwc: NDArray[np.uint8], copies_bhwc: NDArray[np.uint8]) -> float:
    """Return the mean strength of the finest detail in copies, as a share of the originals'."""
    strengths = [_detail(_to_tensor(each)).abs().mean().item() for each in (copies_bhwc, originals_bhwc)]
    return strengths[0] / strengths[1]


def _train(model: nn.Module, crops_bhwc: NDArray[np.uint8], num_steps: int, rng: np.random.Generator) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=_LEARNING_RATE)
    for step in range(num_steps):
        for group in optimizer.param_groups:
            warm_up = min(1.0, (step + 1) / _WARM_UP_STEPS)
            group["lr"] = _LEARNING_RATE * warm_up * (1 - (1 - _LAST_LEARNING_RATE) * step / num_steps)
        target = _draw_patches(crops_bhwc, rng)
        with torch.autocast("cpu", torch.bfloat16):
            output = model(target)
        loss = _loss(output.float(), target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), _MAX_GRADIENT_NORM)
        optimizer.step()


def _draw_patches(crops_bhwc: NDArray[np.uint8], rng: np.random.Generator) -> Tensor:
    """Return (16, 3, 64, 64), all cut at one place of as many crops."""
    rows = rng.integers(len(crops_bhwc), size=_BATCH)
    top, left = rng.integers(crops_bhwc.shape[1] - _PATCH_PX + 1, size=2)
    return _to_tensor(crops_bhwc[rows, top : top + _PATCH_PX, left : left + _PATCH_PX])


def _loss(drawn_bchw: Tensor, target_bchw: Tensor) -> Tensor:
    """Compare pixels, the finest detail, and how much detail there is anywhere.

    The last is what pixels alone cannot ask for: where a network is unsure, their best answer is blur.
    """
    drawn_detail, target_detail = _detail(drawn_bchw), _detail(target_bchw)
    pixels = F.l1_loss(drawn_bchw, target_bchw)
    detail = F.l1_loss(drawn_detail, target_detail)
    energy = F.l1_loss(F.avg_pool2d(drawn_detail.abs(), _ENERGY_PX), F.avg_pool2d(target_detail.abs(), _ENERGY_PX))
    return pixels + _DETAIL_WEIGHT * detail + _ENERGY_WEIGHT * energy


def _detail(x_bchw: Tensor) -> Tensor:
    """Return what a 3x3 mean takes away, (B, C, H, W)."""
    return x_bchw - F.avg_pool2d(F.pad(x_bchw, (1, 1, 1, 1), mode="replicate"), 3, stride=1)


def _to_tensor(images_bhwc: NDArray[np.uint8]) -> Tensor:
    """Return (B, 3, H, W) in [0, 1], channels last in memory."""
    return torch.from_numpy(np.ascontiguousarray(images_bhwc)).permute(0, 3, 1, 2).float().div(_MAX_VALUE)
