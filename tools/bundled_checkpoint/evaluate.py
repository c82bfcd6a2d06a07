"""Score labelled image files with a checkpoint: centre crop 256, figures per set.

Step 4 of the bundled checkpoint. The input is a CSV file NAME.csv with the columns path, set, label (1 is
generated) and format; paths are relative to the folder NAME beside it, or to its own. A set without photographs
is measured against those of all sets. Files that were JPEG once are shown by their traces, as the scanner does it.

The JPEG photographs are measured a second time, scaled down as for a page of the web: most photographs that are kept
without loss were, and a network that knows only whole ones calls many of them generated.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lfm_scan.imaging.traces import find_jpeg_traces
from lfm_scan.model import LFM, CheckpointMetadata, load_checkpoint

CROP_PX: Final = 256
BATCH: Final = 32
RESIZED_CROP_PX: Final = 150
RESIZES: Final = tuple(
    itertools.product(
        (0.5, 0.6, 0.7),
        (
            Image.Resampling.LANCZOS,
            Image.Resampling.BICUBIC,
            Image.Resampling.BILINEAR,
            Image.Resampling.BOX,
        ),
    )
)
"""Factors and kernels by which photographs are scaled down, by turns. The factors take off what JPEG left."""


@dataclass(frozen=True)
class SetFigures:
    """Figures of one set; None where the set lacks one of the classes. Rates are at a score of 0.5.

    `auc` is within the set, `auc_pooled` that of its generated images against the photographs of all sets.
    """

    num_real: int
    num_generated: int
    real_kept: float | None
    generated_found: float | None
    accuracy: float
    auc: float | None
    auc_pooled: float | None


def centre_crop(image: Image.Image, side_px: int = CROP_PX) -> Tensor | None:
    """Return the centre (3, side_px, side_px) of an RGB image as uint8, or None where it is smaller."""
    left, top = (image.width - side_px) // 2, (image.height - side_px) // 2
    if left < 0 or top < 0:
        return None
    crop = image.crop((left, top, left + side_px, top + side_px))
    return torch.from_numpy(np.array(crop)).permute(2, 0, 1)


def normalise(images_bchw: Tensor, metadata: CheckpointMetadata) -> Tensor:
    """Return uint8 images as the network takes them."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (metadata.mean, metadata.std))
    return ((images_bchw.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def logits_of(model: LFM, images: list[Tensor], metadata: CheckpointMetadata) -> list[float]:
    """Return one logit an image, in fp32."""
    batches = [normalise(torch.stack(images[i : i + BATCH]), metadata) for i in range(0, len(images), BATCH)]
    return [logit for batch in batches for logit in model(batch).tolist()]


def auc(real: list[float], generated: list[float]) -> float | None:
    """Return the probability that a generated image scores above a real one, ties counting half."""
    if not real or not generated:
        return None
    difference = np.subtract.outer(np.asarray(generated), np.asarray(real))
    return float(np.mean((difference > 0) + 0.5 * (difference == 0)))


def figures(logits: list[float], labels: list[int], photographs: list[float]) -> SetFigures:
    """Return the figures of one set; `photographs` are the logits of all sets' real images."""
    real = [logit for logit, label in zip(logits, labels, strict=True) if label == 0]
    generated = [logit for logit, label in zip(logits, labels, strict=True) if label == 1]
    kept, found = sum(logit <= 0 for logit in real), sum(logit > 0 for logit in generated)
    return SetFigures(
        num_real=len(real),
        num_generated=len(generated),
        real_kept=kept / len(real) if real else None,
        generated_found=found / len(generated) if generated else None,
        accuracy=(kept + found) / len(logits),
        auc=auc(real, generated),
        auc_pooled=auc(photographs, generated),
    )


class LabelledFiles:
    """The files of a CSV list, decoded once, grouped by set; smaller ones than the crop are left out."""

    def __init__(self, list_path: Path, formats: frozenset[str] | None = None) -> None:
        self.images: dict[str, list[Tensor]] = defaultdict(list)
        self.labels: dict[str, list[int]] = defaultdict(list)
        self.have_traces: dict[str, list[bool]] = defaultdict(list)
        self.resized: list[Tensor] = []
        folder = list_path.with_suffix("") if list_path.with_suffix("").is_dir() else list_path.parent
        resizes = itertools.cycle(RESIZES)
        with list_path.open(newline="") as file:
            for row in csv.DictReader(file):
                if formats is not None and row["format"] not in formats:
                    continue
                with Image.open(folder / row["path"]) as opened:
                    image = opened.convert("RGB")
                if (row["format"], row["label"]) == ("JPEG", "0"):
                    factor, kernel = next(resizes)
                    size = round(image.width * factor), round(image.height * factor)
                    resized = centre_crop(image.resize(size, kernel), RESIZED_CROP_PX)
                    self.resized += [] if resized is None else [resized]
                crop = centre_crop(image)
                if crop is not None:
                    name = f"{row['set']} ({row['format']})"
                    self.images[name].append(crop)
                    self.labels[name].append(int(row["label"]))
                    self.have_traces[name].append(find_jpeg_traces(image) is not None)

    def evaluate(self, model: LFM, metadata: CheckpointMetadata) -> dict[str, SetFigures]:
        """Return the figures of each set, of all of them pooled, and of the files without traces of JPEG."""
        model.eval()
        names = sorted(self.images)
        logits = {name: logits_of(model, self.images[name], metadata) for name in names}
        pooled = [
            (logit, label, has_traces)
            for name in names
            for logit, label, has_traces in zip(logits[name], self.labels[name], self.have_traces[name], strict=True)
        ]
        photographs = [logit for logit, label, _ in pooled if label == 0]
        result = {name: figures(logits[name], self.labels[name], photographs) for name in names}
        result["pooled"] = figures(*_columns(pooled), photographs)
        result["pooled, no traces of JPEG"] = figures(*_columns([row for row in pooled if not row[2]]), photographs)
        return result

    def resized_called_generated(self, model: LFM, metadata: CheckpointMetadata) -> float:
        """Return the share of the photographs that the model calls generated once they are scaled down."""
        logits = logits_of(model.eval(), self.resized, metadata)
        return sum(logit > 0 for logit in logits) / len(logits)


def _columns(rows: list[tuple[float, int, bool]]) -> tuple[list[float], list[int]]:
    return [row[0] for row in rows], [row[1] for row in rows]


def table(results: dict[str, SetFigures]) -> str:
    """Return the figures as a Markdown table."""
    lines = [
        "| set | real / generated | real kept | generated found | ACC | AUC | AUC, all photographs |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in results.items():
        percents = ["-" if v is None else f"{100 * v:.1f}" for v in (row.real_kept, row.generated_found, row.accuracy)]
        areas = ["-" if v is None else f"{v:.3f}" for v in (row.auc, row.auc_pooled)]
        lines.append(f"| {name} | {row.num_real} / {row.num_generated} | {' | '.join([*percents, *areas])} |")
    return "\n".join(lines)


def main() -> None:
    """Print a table for each checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, nargs="+")
    parser.add_argument("--list", type=Path, required=True, help="CSV file: path,set,label,format")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    files = LabelledFiles(args.list)
    everything: dict[str, dict[str, Any]] = {}
    for path in args.checkpoint:
        checkpoint = load_checkpoint(path.read_bytes(), str(path))
        results = files.evaluate(checkpoint.model, checkpoint.metadata)
        share = files.resized_called_generated(checkpoint.model, checkpoint.metadata)
        found = {name: asdict(row) for name, row in results.items()}
        everything[checkpoint.metadata.model_id] = {"sets": found, "resized_photographs_called_generated": share}
        print(f"{checkpoint.metadata.model_id}\n\n{table(results)}\n")
        print(f"Photographs scaled down, called generated: {100 * share:.1f} % of {len(files.resized)}\n")
    if args.json:
        args.json.write_text(json.dumps(everything, indent=2) + "\n")


if __name__ == "__main__":
    main()
