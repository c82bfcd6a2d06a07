"""Train LFM on the aligned crops, from the published checkpoint (or random weights) and with it as teacher.

Step 3 of the bundled checkpoint, once for each member. Each batch holds pairs: a crop and its generated copy, cut at
one random offset (even and odd, so that NPR meets both phases of the pixel grid) and flipped alike. No noise, no
JPEG: both were measured to hurt. The student learns three things at once: the teacher's projected map, where the
evidence lies; its logit; and the true label. Where the teacher is wrong, only the label counts.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from evaluate import LabelledFiles, logits_of, normalise, table
from numpy.typing import NDArray
from torch import Tensor, nn

from lfm_scan.model import (
    LFM,
    ArchitectureConfig,
    CheckpointMetadata,
    Domain,
    load_checkpoint,
    save_checkpoint,
)

LOGIT_SCALE: Final = 15.0
"""Teacher logits reach 70; they are compared after tanh(logit / LOGIT_SCALE)."""
HOLD_OUT_EVERY: Final = 7
LAST_STAGE_SHARE: Final = 0.4
HARD_LOGIT: Final = -5.0
"""Real crops above it are hard. Few photographs that were not resized come so high."""


Start = Literal["random", "teacher"]


@dataclass(frozen=True)
class Stage:
    """A part of the training: crop size in pixels, pairs a batch, share of the wall time."""

    crop_px: int
    pairs: int
    share: float


@dataclass(frozen=True)
class Recipe:
    """What the training run does.

    Attributes:
        minutes: Wall time.
        start: Random weights, or the teacher's with its BatchNorm statistics frozen.
        average: Share of the trained weights in the result, the rest being the teacher's; 1 is no averaging.
            From random weights only 1 makes sense.
        learning_rate: Peak of the cosine schedule.
        map_weight: Weight of the map loss, in units of each channel's standard deviation.
        logit_weight: Weight of the squared error of tanh-scaled logits.
        label_weight: Weight of the binary cross-entropy on true labels.
        real_weight: Weight of a real image in the logit and label losses; a generated one counts 1.
        hard: Share of the pairs drawn from those whose real crop the first weights call generated, or nearly.
        seed: Of everything random.
        stages: Crop sizes in order. From random weights small crops come first, for speed.
    """

    minutes: float
    start: Start = "teacher"
    average: float = 0.5
    learning_rate: float = 2e-4
    map_weight: float = 1.0
    logit_weight: float = 2.0
    label_weight: float = 0.2
    real_weight: float = 3.0
    hard: float = 0.0
    seed: int = 0
    stages: tuple[Stage, ...] = (Stage(176, 8, 1.0),)

    def stage_at(self, spent: float) -> Stage:
        """Return the stage after this share of the wall time."""
        for stage in self.stages:
            spent -= stage.share
            if spent < 0:
                return stage
        return self.stages[-1]


class Pairs:
    """The crops and their generated copies, by kind.

    Every HOLD_OUT_EVERY-th photograph, with all that was made of it, is kept for measuring.
    """

    def __init__(self, folders: list[Path], rng: np.random.Generator) -> None:
        self.reals: NDArray[np.uint8] = np.concatenate([np.load(folder / "real.npy") for folder in folders])
        photograph = np.concatenate([np.load(folder / "photograph.npy") for folder in folders])
        held_out = photograph % HOLD_OUT_EVERY == 0
        self.held_out = {"real": self.reals[held_out]}
        self.fakes: dict[str, NDArray[np.uint8]] = {}
        self.indices: dict[str, NDArray[np.int64]] = {}
        for name in sorted({path.stem.removeprefix("fake_") for each in folders for path in each.glob("fake_*.npy")}):
            fakes, index = _load_fakes(folders, name)
            self.held_out[name] = fakes[held_out[index]]
            self.fakes[name], self.indices[name] = fakes[~held_out[index]], index[~held_out[index]]
        self.num_reals = int((~held_out).sum())
        self._held_out = held_out
        self._hard_rows: dict[str, NDArray[np.int64]] = {}
        self._rng = rng

    def find_hard(self, model: LFM, metadata: CheckpointMetadata) -> int:
        """Find the crops that are hard for this model, so that `draw` can prefer them; return how many they are."""
        rows = np.flatnonzero(~self._held_out)
        logits = np.array(logits_of(model, list(torch.from_numpy(self.reals[rows]).permute(0, 3, 1, 2)), metadata))
        hard = rows[logits > HARD_LOGIT]
        self._hard_rows = {name: np.flatnonzero(np.isin(index, hard)) for name, index in self.indices.items()}
        return len(hard)

    def draw(self, num_pairs: int, crop_px: int, hard: float = 0.0) -> Tensor:
        """Return (2 * num_pairs, 3, crop_px, crop_px) uint8: reals, then their copies in the same order."""
        pairs = [self._draw_pair(crop_px, self._rng.random() < hard) for _ in range(num_pairs)]
        images = np.stack([pair[side] for side in (0, 1) for pair in pairs])
        return torch.from_numpy(images).permute(0, 3, 1, 2)

    def _draw_pair(self, crop_px: int, is_hard: bool) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        name = self._rng.choice(list(self.fakes))
        row = self._rng.choice(self._hard_rows[name]) if is_hard else self._rng.integers(len(self.indices[name]))
        top, left = self._rng.integers(0, self.reals.shape[1] - crop_px + 1, 2)
        window = (slice(top, top + crop_px), slice(left, left + crop_px))
        real, fake = self.reals[self.indices[name][row]][window], self.fakes[name][row][window]
        for axis in (0, 1):
            if self._rng.random() < 0.5:
                real, fake = np.flip(real, axis), np.flip(fake, axis)
        return real, fake


def _load_fakes(folders: list[Path], name: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return what one network drew in all folders, and which real of all folders each is of."""
    fakes, indices, num_before = [], [], 0
    for folder in folders:
        if (folder / f"fake_{name}.npy").exists():
            fakes.append(np.load(folder / f"fake_{name}.npy"))
            indices.append(np.load(folder / f"index_{name}.npy") + num_before)
        num_before += len(np.load(folder / "photograph.npy"))
    return np.concatenate(fakes), np.concatenate(indices)


def measure_held_out(model: LFM, pairs: Pairs, metadata: CheckpointMetadata) -> dict[str, float]:
    """Return the share of the held-out crops of each kind that the model calls generated."""
    called = {}
    for name, images in pairs.held_out.items():
        logits = logits_of(model, list(torch.from_numpy(images).permute(0, 3, 1, 2)), metadata)
        called[name] = round(sum(logit > 0 for logit in logits) / len(logits), 3)
    return called


@dataclass(frozen=True)
class Teacher:
    """The published network, and the standard deviation (64, 1, 1) of each channel of its map."""

    model: LFM
    spread: Tensor


def measure_teacher(model: LFM, pairs: Pairs, metadata: CheckpointMetadata) -> Teacher:
    """Return the teacher with the spread of its map on a few pairs."""
    with torch.no_grad():
        sample = model.feature_map(normalise(pairs.draw(32, 160), metadata))
    return Teacher(model, sample.std(dim=(0, 2, 3), keepdim=True)[0].clamp_min(1e-3))


def loss_of(student: LFM, teacher: Teacher, images: Tensor, labels: Tensor, recipe: Recipe) -> Tensor:
    """Return the loss of one batch."""
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            target_map = teacher.model.feature_map(images)
        student_map = student.feature_map(images)
    target_map, student_map = target_map.float(), student_map.float()
    with torch.no_grad():
        target_values = teacher.model.pool(target_map)
        target_logits = teacher.model.classify(target_values)
        is_right = (target_logits > 0) == (labels > 0.5)
        target_logits = torch.where(is_right, target_logits, LOGIT_SCALE * (2 * labels - 1))
    values = student.pool(student_map)
    logits = student.classify(values)
    map_losses = ((student_map - target_map) / teacher.spread).square().mean(dim=(1, 2, 3))
    value_losses = ((values - target_values) / teacher.spread[:, 0]).square().mean(dim=(1, 2))
    map_loss = ((map_losses + value_losses) * is_right).mean()
    weights = torch.where(labels > 0.5, 1.0, recipe.real_weight)
    logit_losses = (torch.tanh(logits / LOGIT_SCALE) - torch.tanh(target_logits / LOGIT_SCALE)).square()
    logit_loss = (weights * logit_losses).mean()
    label_loss = nn.functional.binary_cross_entropy_with_logits(logits, labels, weights)
    loss: Tensor = recipe.map_weight * map_loss + recipe.logit_weight * logit_loss + recipe.label_weight * label_loss
    return loss


def train(student: LFM, teacher: Teacher, pairs: Pairs, metadata: CheckpointMetadata, recipe: Recipe) -> int:
    """Train in place for the recipe's wall time; return the number of steps."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=recipe.learning_rate, weight_decay=1e-4)
    start, num_steps = time.monotonic(), 0
    student.train(recipe.start == "random")
    while (spent := (time.monotonic() - start) / (60 * recipe.minutes)) < 1:
        cosine = 0.01 + 0.99 * (1 + np.cos(np.pi * spent)) / 2
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * min(1.0, num_steps / 100) * cosine
        stage = recipe.stage_at(spent)
        images = normalise(pairs.draw(stage.pairs, stage.crop_px, recipe.hard), metadata)
        labels = torch.arange(2).repeat_interleave(stage.pairs).float()
        loss = loss_of(student, teacher, images, labels, recipe)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(student.parameters(), 5.0)
        optimizer.step()
        num_steps += 1
        if num_steps % 100 == 0:
            print(f"step {num_steps}, {100 * spent:.0f} %, loss {loss.item():.3f}", flush=True)
    return num_steps


def average_weights(student: LFM, teacher: LFM, share: float) -> None:
    """Move the student's weights towards the teacher's; `share` of the student remains."""
    theirs = teacher.state_dict()
    for key, value in student.state_dict().items():
        if value.is_floating_point():
            value.copy_(theirs[key] + (value - theirs[key]) * share)


def main() -> None:
    """Train, evaluate, and write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, nargs="+", help="folders of prepare_data.py, decoders.py")
    parser.add_argument("--teacher", type=Path, required=True, help="the published checkpoint, lfm_official.pth")
    parser.add_argument("--validation", type=Path, help="CSV file: path,set,label,format; its PNG files are scored")
    parser.add_argument("--start", choices=["random", "teacher"], default="teacher")
    parser.add_argument("--begin", type=Path, help="begin with these weights, not the teacher's")
    parser.add_argument("--shift", type=float, default=0.0, help="what is added to each logit in the end")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--label-weight", type=float, default=Recipe.label_weight)
    parser.add_argument("--real-weight", type=float, default=Recipe.real_weight)
    parser.add_argument("--average", type=float, default=Recipe.average, help="share of the trained weights, 0 to 1")
    parser.add_argument("--hard", type=float, default=Recipe.hard, help="share of the pairs of hard real crops")
    parser.add_argument("--last-stage", help="crop:pairs[:share], 240:6 of a random start")
    parser.add_argument("--model-id", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    recipe = Recipe(
        minutes=args.minutes,
        average=args.average,
        label_weight=args.label_weight,
        real_weight=args.real_weight,
        hard=args.hard,
        seed=args.seed,
    )
    if args.start == "random":
        recipe = replace(recipe, start="random", average=1.0, learning_rate=2e-3, stages=(Stage(112, 16, 1.0),))
    if last_stage := args.last_stage or ("240:6" if args.start == "random" else ""):
        crop_px, num_pairs, share = (*last_stage.split(":"), LAST_STAGE_SHARE)[:3]
        last = Stage(int(crop_px), int(num_pairs), float(share))
        recipe = replace(recipe, stages=(replace(recipe.stages[0], share=1 - last.share), last))
    torch.manual_seed(recipe.seed)
    pairs = Pairs(args.data, np.random.default_rng(recipe.seed))
    published = load_checkpoint(args.teacher.read_bytes(), str(args.teacher))
    teacher = published.model.requires_grad_(False)
    metadata = CheckpointMetadata(
        model_id=args.model_id, preprocess="crop256", domain=Domain(lossy=False, resampled=False)
    )
    teacher_held_out = measure_held_out(teacher, pairs, metadata)
    student = LFM(ArchitectureConfig())
    if recipe.start == "teacher":
        begin = load_checkpoint(args.begin.read_bytes(), str(args.begin)).model if args.begin else teacher
        student.load_state_dict(begin.state_dict())
    if recipe.hard:
        print(f"{pairs.find_hard(student.eval(), metadata)} hard crops of {pairs.num_reals}", flush=True)
    num_steps = train(student, measure_teacher(teacher, pairs, metadata), pairs, metadata, recipe)
    average_weights(student, teacher, recipe.average)
    student.eval()
    with torch.no_grad():
        student.head.bias += args.shift

    facts: dict[str, Any] = {
        "initialised": recipe.start,
        "teacher": {
            "model_id": published.metadata.model_id,
            "sha256": published.sha256,
            "licence": "Apache-2.0",
        },
        "begin": args.begin and args.begin.name,
        "shift": args.shift,
        "reals": f"{pairs.num_reals} crops of free wallpaper photographs",
        "generated": {name: len(images) for name, images in pairs.fakes.items()},
        "recipe": asdict(recipe),
        "num_steps": num_steps,
        "held_out_called_generated": {
            "this": measure_held_out(student, pairs, metadata),
            "teacher": teacher_held_out,
        },
    }
    print(json.dumps(facts["held_out_called_generated"], indent=1))
    if args.validation:
        results = LabelledFiles(args.validation, frozenset({"PNG"})).evaluate(student, metadata)
        facts["validation_crop256_png"] = {name: asdict(row) for name, row in results.items()}
        print(table(results))
    described = CheckpointMetadata(
        model_id=args.model_id,
        preprocess=metadata.preprocess,
        domain=metadata.domain,
        training=json.loads(json.dumps(facts)),
    )
    args.out.write_bytes(save_checkpoint(student, described))


if __name__ == "__main__":
    main()
