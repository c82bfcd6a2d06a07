"""Join trained networks in one of the same size: fewer channels of each, side by side, their logits added.

An experiment on the bundled checkpoint (docs/experiments.md). Networks that started from other weights make other
mistakes, so the sum of their logits is better than any of them, but a checkpoint is one network. LFM has channels to
spare (in the published one 15 of the first 64 hold 99 % of what the next layer reads), so each member is made narrow,
layer by layer: the channels that the next layer reads most are kept, and the weights are fitted anew, by least
squares, so that what is kept comes out of the kept channels alone as it did out of all. No labels and no gradient:
only crops, half of them saved as JPEG first, as most photographs once were. The narrow members lie in one network as
diagonal blocks.
"""

from __future__ import annotations

import argparse
import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from evaluate import LabelledFiles, normalise, table
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from lfm_scan.model import LFM, CheckpointMetadata, Domain, load_checkpoint, save_checkpoint
from lfm_scan.model.network import Block

MODEL_ID: Final = "lfm-joined"
CROP_PX: Final = 136
JPEG_QUALITIES: Final = (70, 98)
MAX_ROWS: Final = 16_000
"""Positions of a map that a fit is made on; it has at most 1024 unknowns a channel."""
RIDGE: Final = 1e-5
"""Share of the mean square of an input that is added to each square."""


@dataclass(frozen=True)
class Narrow:
    """A member made narrow.

    Attributes:
        blocks: Its blocks.
        projection: (P, C), from the last block's channels to the projected ones that are kept.
        head: (P, K), the head's weights of those.
        bias: Of the head, with what the dropped ones add on average.
        fidelity: Share of variance of each fitted layer that is kept, the projection last.
    """

    blocks: list[Block]
    projection: Tensor
    head: Tensor
    bias: float
    fidelity: tuple[float, ...]


def draw_crops(folder: Path, num_of_each: int, rng: np.random.Generator) -> Tensor:
    """Return (B, 3, CROP_PX, CROP_PX) uint8: crops of the reals, three times as many, and of each kind of copy."""
    crops = []
    for path in [folder / "real.npy", *sorted(folder.glob("fake_*.npy"))]:
        images = np.load(path, mmap_mode="r")
        for row in rng.integers(0, len(images), num_of_each * (3 if path.stem == "real" else 1)):
            top, left = rng.integers(0, images.shape[1] - CROP_PX + 1, 2)
            image = np.array(images[row])
            if rng.random() < 0.5:
                image = _save_as_jpeg(image, int(rng.integers(*JPEG_QUALITIES)))
            crops.append(image[top : top + CROP_PX, left : left + CROP_PX])
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)


def _save_as_jpeg(image: NDArray[np.uint8], quality: int) -> NDArray[np.uint8]:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    with Image.open(file) as opened:
        return np.asarray(opened.convert("RGB"))


def fit(inputs: Tensor, targets: Tensor, with_bias: bool, rng: np.random.Generator) -> tuple[Tensor, Tensor, float]:
    """Return the linear map (N, M), bias (N,) and share of variance explained for rows (R, M) to (R, N)."""
    rows = torch.from_numpy(rng.choice(len(inputs), min(MAX_ROWS, len(inputs)), replace=False))
    x, y = inputs[rows].double(), targets[rows].double()
    x_mean, y_mean = (x.mean(0), y.mean(0)) if with_bias else (torch.zeros_like(x[0]), torch.zeros_like(y[0]))
    gram = (x - x_mean).T @ (x - x_mean)
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram))
    weights = torch.linalg.solve(gram, (x - x_mean).T @ (y - y_mean)).T
    bias = y_mean - weights @ x_mean
    error = (x @ weights.T + bias - y).square().sum() / (y - y.mean(0)).square().sum()
    return weights.float(), bias.float(), float(1 - error)


def _patches(map_bchw: Tensor) -> Tensor:
    """Return what each position of a 2x2 convolution reads, (positions, 4 * C), ordered as its weights are."""
    return nn.functional.unfold(map_bchw, 2).transpose(1, 2).flatten(0, 1)


def _rows(map_bchw: Tensor) -> Tensor:
    return map_bchw.permute(0, 2, 3, 1).flatten(0, 2)


def _blocks(model: LFM) -> list[Block]:
    return [block for block in model.blocks if isinstance(block, Block)]


def _largest(values: Tensor, count: int) -> Tensor:
    return values.argsort(descending=True)[:count].sort().values


@torch.no_grad()
def narrow(model: LFM, widths: tuple[int, ...], images: Tensor, rng: np.random.Generator) -> Narrow:
    """Return a narrow copy of a network.

    Args:
        model: In evaluation mode.
        widths: Channels to keep of each block, and last of the projection.
        images: Normalised crops to fit on, (B, 3, H, W).
        rng: Chooses the positions that are fitted on.
    """
    maps = [model.npr(images)]
    whole = _blocks(model)
    for block in whole:
        maps.append(block(maps[-1]))
    projected = model.projection(maps[-1])
    head = model.head.weight.view(projected.shape[1], -1)
    terms = (model.pool(projected) * head).sum(2)
    kept_terms = _largest(terms.std(0), widths[-1])
    is_dropped = torch.ones(terms.shape[1], dtype=torch.bool).index_fill(0, kept_terms, False)
    projection = model.projection.weight[kept_terms, :, 0, 0] * head[kept_terms].norm(dim=1, keepdim=True)
    readers = [*(block.conv.weight.square().sum((0, 2, 3)) for block in whole[1:]), projection.square().sum(0)]

    blocks: list[Block] = []
    fidelity = []
    x = maps[0]
    for index, (block, reader, width) in enumerate(zip(whole, readers, widths[:-1], strict=True)):
        kept = _largest(maps[index + 1].std((0, 2, 3)) * reader.sqrt(), width)
        slim = Block(x.shape[1], width, pool=isinstance(block.pool, nn.MaxPool2d)).eval()
        if index == 0:  # nothing before it was dropped
            conv = block.conv.state_dict()
            weights, bias = conv["weight"][kept], conv["bias"][kept]
        else:
            target = _rows(block.conv(maps[index])[:, kept])
            weights, bias, share = fit(_patches(x), target, with_bias=True, rng=rng)
            fidelity.append(share)
        slim.conv.load_state_dict({"weight": weights.reshape(slim.conv.weight.shape), "bias": bias})
        norm = block.norm.state_dict()
        slim.norm.load_state_dict({key: value[kept] if value.dim() else value for key, value in norm.items()})
        x = slim(x)
        blocks.append(slim)
    fitted, _, share = fit(_rows(x), _rows(projected[:, kept_terms]), with_bias=False, rng=rng)
    bias_of_head = float(model.head.bias + terms[:, is_dropped].mean(0).sum())
    return Narrow(blocks, fitted, head[kept_terms].clone(), bias_of_head, (*fidelity, share))


@torch.no_grad()
def join(members: list[Narrow], shares: list[float], shift: float) -> LFM:
    """Return one network whose logit is the members', each times its share, added up, and `shift`."""
    model = LFM().eval()
    head = model.head.weight.view(model.projection.out_channels, -1)
    model.projection.weight.zero_()
    for index, whole in enumerate(_blocks(model)):
        whole.conv.weight.zero_()
        of_whole = {**whole.conv.state_dict(), **whole.norm.state_dict(prefix="norm.")}
        row = column = 0
        for member in members:
            part = member.blocks[index]
            rows = slice(row, row + part.conv.out_channels)
            columns = slice(column, column + part.conv.in_channels)
            of_part = {**part.conv.state_dict(), **part.norm.state_dict(prefix="norm.")}
            for key, value in of_whole.items():
                if value.dim() == 1:
                    value[rows] = of_part[key]
            of_whole["weight"][rows, columns] = of_part["weight"]
            row, column = rows.stop, columns.stop if index else 0  # all members' first blocks read the same residual
    row = column = 0
    for member, share in zip(members, shares, strict=True):
        rows = slice(row, row + len(member.projection))
        columns = slice(column, column + member.projection.shape[1])
        model.projection.weight[rows, columns, 0, 0] = member.projection
        head[rows] = share * member.head
        row, column = rows.stop, columns.stop
    model.head.bias.fill_(shift + sum(share * member.bias for member, share in zip(members, shares, strict=True)))
    return model


def _check_widths(all_widths: list[tuple[int, ...]]) -> None:
    whole = LFM()
    expected = (*(block.conv.out_channels for block in _blocks(whole)), whole.projection.out_channels)
    if tuple(map(sum, zip(*all_widths, strict=True))) != expected:
        raise SystemExit(f"--member: the widths must add up to {expected}")


def main() -> None:
    """Narrow the members, join them, evaluate, and write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of prepare_data.py and decoders.py")
    parser.add_argument(
        "--member",
        nargs=3,
        action="append",
        required=True,
        metavar=("CHECKPOINT", "WIDTHS", "SHARE"),
        help="a network, the channels it gets in each block and in the projection (16,44,96,168,20), its logit's share",
    )
    parser.add_argument("--shift", type=float, default=0.0, help="added to the logit, so that 0.5 is the threshold")
    parser.add_argument("--crops", type=int, default=10, help="of each kind of copy, and three times of the reals")
    parser.add_argument("--validation", type=Path, help="CSV file: path,set,label,format; its PNG files are scored")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    checkpoints = [load_checkpoint(Path(path).read_bytes(), path) for path, _, _ in args.member]
    all_widths = [tuple(map(int, widths.split(","))) for _, widths, _ in args.member]
    shares = [float(share) for _, _, share in args.member]
    _check_widths(all_widths)
    metadata = CheckpointMetadata(model_id=MODEL_ID, preprocess="crop256", domain=Domain(lossy=False, resampled=False))
    rng = np.random.default_rng(args.seed)
    images = normalise(draw_crops(args.data, args.crops, rng), metadata)
    members: list[Narrow] = []
    for checkpoint, widths in zip(checkpoints, all_widths, strict=True):
        members.append(narrow(checkpoint.model, widths, images, rng))
        print(f"{checkpoint.metadata.model_id}: fidelity {[round(x, 4) for x in members[-1].fidelity]}", flush=True)
    model = join(members, shares, args.shift)

    facts: dict[str, Any] = {
        "method": "structured pruning with least squares, members joined as diagonal blocks, logits added",
        "members": [
            {
                "model_id": checkpoint.metadata.model_id,
                "sha256": checkpoint.sha256,
                "widths": widths,
                "share": share,
                "fidelity": member.fidelity,
                "training": {
                    key: checkpoint.metadata.training[key]
                    for key in ("initialised", "teacher", "reals", "generated", "recipe", "num_steps")
                    if key in checkpoint.metadata.training
                },
            }
            for checkpoint, widths, share, member in zip(checkpoints, all_widths, shares, members, strict=True)
        ],
        "shift": args.shift,
        "seed": args.seed,
    }
    if args.validation:
        results = LabelledFiles(args.validation, frozenset({"PNG"})).evaluate(model, metadata)
        facts["validation_crop256_png"] = {name: asdict(row) for name, row in results.items()}
        print(table(results))
    described = CheckpointMetadata(
        model_id=MODEL_ID,
        preprocess=metadata.preprocess,
        domain=metadata.domain,
        training=json.loads(json.dumps(facts)),
    )
    args.out.write_bytes(save_checkpoint(model, described))


if __name__ == "__main__":
    main()
