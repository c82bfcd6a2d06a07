"""Small trainings for tests: pictures a network learns to tell in a few steps, and what a run leaves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from PIL import Image

from lfm_scan.training.config import RecipeConfig, TrainCompute, TrainConfig
from tests.images import picture

SIDE_PX = 64


def write_doubled(root: Path, num_pairs: int, name: str = "doubled") -> Path:
    """Write pairs of PNG files: a picture, and the same one halved and doubled again, as upsampling networks do."""
    for number in range(num_pairs):
        real = picture(SIDE_PX, SIDE_PX, seed=number)
        half = real.resize((SIDE_PX // 2, SIDE_PX // 2), Image.Resampling.BOX)
        fake = Image.fromarray(np.asarray(half).repeat(2, axis=0).repeat(2, axis=1))
        for folder, image in (("0_real", real), ("1_fake", fake)):
            path = root / name / folder / f"{number:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    return root


def small_config(source: Path | str, output: Path | str, **changes: object) -> TrainConfig:
    """Return a training of seconds: crops of 48 pixels from 64, resized to 256 only where it is measured."""
    values: dict[str, object] = {
        "output": str(output),
        "validation_share": 0.25,
        "recipe": RecipeConfig(crop_px=48, epochs=2, train_batch_size=8, learning_rate=0.002),
        "compute": TrainCompute(workers=0, precision="fp32"),
        **changes,
    }
    return TrainConfig((str(source),), **values)  # type: ignore[arg-type]


def weights_in(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a checkpoint."""
    return dict(safetensors.torch.load_file(checkpoint))


def assert_same_weights(one: Path, other: Path) -> None:
    """Compare two checkpoints bit by bit."""
    mine, theirs = weights_in(one), weights_in(other)
    assert mine.keys() == theirs.keys()
    differing = [name for name in mine if not torch.equal(mine[name], theirs[name])]
    assert not differing
