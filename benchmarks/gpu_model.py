"""The model on one GPU: images a second of every way to run it, against the published forward pass and the floor.

    python benchmarks/gpu_model.py [--weights FILE] [--pixels dev.npz] [--out FILE]

needs torch, numpy and safetensors, and Triton for the fused kernels; it runs from a checkout that is not installed.
Where Pillow is, `--make-pixels FOLDER --pixels dev.npz` writes what `--pixels` reads: development images as uint8.

"published" is the forward pass as the paper's code does it: fp32, NCHW, NPR by two convolutions, BatchNorm and ReLU by
themselves, torch's defaults, which let convolutions round factors to TF32. Every side takes uint8 batches that are on
the device already and leaves logits there; sides take turns, CUDA events time them, medians count. "host" rows begin
with pixels in ordinary or pinned memory. The floor is the model's arithmetic at the rate of a large product of 16-bit
matrices in the same run, or one reading of the pixels at the bandwidth of a copy, whichever takes longer. Agreement is
with the published forward pass in strict fp32.

A side that cannot run is a row that says why. Results are written after every stage.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import functools
import importlib.metadata
import json
import os
import platform
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

_ROOT: Final = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(_ROOT))

from lfm_scan.model import LFM, Checkpoint, CheckpointMetadata, load_checkpoint  # noqa: E402
from lfm_scan.model.checkpoint import tensors_of  # noqa: E402
from lfm_scan.scoring.cuda.backend import CudaBackend  # noqa: E402
from lfm_scan.scoring.cuda.folded import FoldedLFM, Precision, convolutions  # noqa: E402
from lfm_scan.scoring.cuda.graphs import GraphedNetwork  # noqa: E402

_RESULTS: Final = _ROOT / "benchmarks" / "results" / "gpu_model.json"
_BUNDLED: Final = _ROOT / "lfm_scan" / "data" / "lfm-bundled-v1.safetensors"
_SIDE_PX: Final = 256
_BATCHES: Final = (32, 128, 256, 512, 1024)
_ROUNDS: Final = 7
_MIN_ROUND_MS: Final = 30.0
_NUM_INPUTS: Final = 3
"""Batches taken by turns: one might stay in the cache."""
_COMPILE_LIMIT_S: Final = 120
_TUNE_LIMIT_S: Final = 100
_AGREEMENT_BATCH: Final = 32
_COPY_BYTES: Final = 4 * 2**30
_PRODUCT_SIDE: Final = 8192
_SEED: Final = 0
_TARGET_IMAGES_PER_S: Final = 60_000

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Side:
    """One way to run the model.

    Attributes:
        name: In the table.
        precision: Of weights and maps.
        forward: From (B, H, W, 3) uint8 on the device to (B,).
        graphed: Whether it is launched as a CUDA graph, recorded for each size of batch.
        only_batch: The one size of batch that it takes, or None for any.
    """

    name: str
    precision: Precision
    forward: Forward
    graphed: bool = False
    only_batch: int | None = None


@dataclass(frozen=True)
class Scale:
    """How large the run is."""

    device: torch.device
    side_px: int
    batches: tuple[int, ...]
    rounds: int
    min_round_ms: float
    product_side: int
    copy_bytes: int
    deadline_s: float

    @property
    def on_gpu(self) -> bool:
        """Whether there is a GPU to measure."""
        return self.device.type == "cuda"

    def out_of_time(self, reserve_s: float = 0) -> bool:
        """Tell whether less than this is left."""
        return time.monotonic() > self.deadline_s - reserve_s


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write the results."""
    options = _parse(arguments)
    if options.make_pixels is not None:
        make_pixels(options.make_pixels, options.pixels, options.every, options.first)
        return
    scale = _scale(options)
    torch.manual_seed(_SEED)
    checkpoint = _checkpoint(options.weights)
    cudnn: Any = torch.backends.cudnn  # its attributes are made at run time
    report: dict[str, Any] = {
        "machine": _machine(scale),
        "versions": _versions(),
        "configuration": {
            "weights": checkpoint.metadata.model_id,
            "side_px": scale.side_px,
            "batches": list(scale.batches),
            "rounds": scale.rounds,
            "smoke": options.smoke,
            "torch_defaults": {
                "cudnn.conv.fp32_precision": cudnn.conv.fp32_precision,
                "cuda.matmul.fp32_precision": torch.backends.cuda.matmul.fp32_precision,
            },
        },
        "gflop_per_image": round(flop_per_image(scale.side_px) / 1e9, 4),
        "target_images_per_s": _TARGET_IMAGES_PER_S,
        "errors": [],
    }
    with torch.inference_mode():
        for stage in _AGREEMENT_STAGES if options.agreement_only else _STAGES:
            started = time.monotonic()
            try:
                stage(report, scale, checkpoint, options)
            except Exception as exc:  # noqa: BLE001 - one stage is not the end of a run on a machine that is lent
                report["errors"].append({"stage": stage.__name__.strip("_"), "error": _reason(exc)})
            report.setdefault("stage_seconds", {})[stage.__name__.strip("_")] = round(time.monotonic() - started, 1)
            _write(options.out, report)
    _print(report)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--weights", default=str(_BUNDLED), help="a checkpoint's file, or random (default: bundled)")
    parser.add_argument("--pixels", type=Path, help="development images to agree on, an .npz of --make-pixels")
    parser.add_argument(
        "--make-pixels", type=Path, metavar="FOLDER", help="write --pixels from FOLDER/dev.csv, and end"
    )
    parser.add_argument("--every", type=int, default=1, help="with --make-pixels: take each Nth image")
    parser.add_argument("--first", type=int, default=0, help="with --make-pixels: skip so many before the first")
    parser.add_argument(
        "--agreement-only", action="store_true", help="measure no times; without a GPU, torch's sides on a CPU"
    )
    parser.add_argument("--batches", type=int, nargs="+", default=list(_BATCHES))
    parser.add_argument("--seconds", type=float, default=420, help="start no measurement after this long")
    parser.add_argument("--out", type=Path, default=_RESULTS)
    parser.add_argument("--smoke", action="store_true", help="everything that runs on a CPU, tiny, in seconds")
    options = parser.parse_args(arguments)
    if options.make_pixels is not None and options.pixels is None:
        parser.error("--make-pixels needs --pixels FILE.npz to write to")
    needs_gpu = not options.smoke and not options.agreement_only and options.make_pixels is None
    if needs_gpu and not torch.cuda.is_available():
        parser.error("torch finds no GPU here; --smoke and --agreement-only run on a CPU")
    return options


def _scale(options: argparse.Namespace) -> Scale:
    deadline_s = time.monotonic() + options.seconds
    if options.smoke:
        return Scale(torch.device("cpu"), 64, (1, 2), 2, 0, 64, 2**20, deadline_s)
    return Scale(
        torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        _SIDE_PX,
        tuple(options.batches),
        _ROUNDS,
        _MIN_ROUND_MS,
        _PRODUCT_SIDE,
        _COPY_BYTES,
        deadline_s,
    )


def make_pixels(folder: Path, out: Path, every: int = 1, first: int = 0) -> int:
    """Write what `--pixels` reads: pixels (N, 256, 256, 3) uint8 and paths (N,), of images of FOLDER/dev.csv.

    Returns:
        How many images were written.
    """
    # Pillow is here, but perhaps not where the model is measured.
    from lfm_scan.imaging import ImageLimits, get_policy  # noqa: PLC0415
    from lfm_scan.scoring.prepare import prepare_bytes  # noqa: PLC0415

    policy, limits = get_policy("resize256"), ImageLimits(min_side_px=1)
    with (folder / "dev.csv").open() as file:
        paths = [row["path"] for row in csv.DictReader(file)][first::every]
    prepared = [prepare_bytes((folder / "dev" / path).read_bytes(), policy, limits).pixels for path in paths]
    kept = [(path, pixels) for path, pixels in zip(paths, prepared, strict=True) if pixels is not None]
    np.savez_compressed(
        out, pixels=np.stack([pixels for _, pixels in kept]), paths=np.array([path for path, _ in kept])
    )
    print(f"{len(kept)} images in {out}, {out.stat().st_size / 2**20:.0f} MiB")
    return len(kept)


# --- The sides ---


class PublishedForward(nn.Module):
    """The forward pass of the paper's code, from uint8: nothing folded, nothing fused, NCHW, fp32."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()
        self.model = checkpoint.model
        metadata = checkpoint.metadata
        self.register_buffer("mean", torch.tensor(metadata.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(metadata.std).view(3, 1, 1))
        down = torch.zeros(3, 3, 2, 2)
        up = torch.zeros(3, 3, 2, 2)
        for channel in range(3):
            down[channel, channel, 0, 0] = 1
            up[channel, channel] = 1
        self.register_buffer("down", down)
        self.register_buffer("up", up)

    def forward(self, pixels_bhwc: Tensor) -> Tensor:
        """Return logits (B,)."""
        pixels_bchw = pixels_bhwc.permute(0, 3, 1, 2).contiguous()
        x_bchw = (pixels_bchw.float() / 255 - self.get_buffer("mean")) / self.get_buffer("std")
        small = F.conv2d(x_bchw, self.get_buffer("down"), stride=2)
        npr = (x_bchw - F.conv_transpose2d(small, self.get_buffer("up"), stride=2)).abs()
        map_bchw = self.model.projection(self.model.blocks(npr))
        logits: Tensor = self.model.classify(self.model.pool(map_bchw))
        return logits


def _strict(forward: Forward, precision: Precision) -> Forward:
    """Return the pass with TF32 only where it is meant; nothing is searched, as in the backend."""

    def run(pixels_bhwc: Tensor) -> Tensor:
        with convolutions(precision):
            return forward(pixels_bhwc)

    return run


def _searched(forward: Forward, precision: Precision) -> Forward:
    """Return the pass with cuDNN's search for its fastest algorithm."""

    def run(pixels_bhwc: Tensor) -> Tensor:
        with convolutions(precision, search=True):
            return forward(pixels_bhwc)

    return run


def _builders(
    report: dict[str, Any], scale: Scale, checkpoint: Checkpoint
) -> Iterator[tuple[str, Callable[[], list[Side]]]]:
    """Yield, by name, what makes sides; making one may fail."""
    device = scale.device

    def published() -> list[Side]:
        network = PublishedForward(checkpoint).eval().to(device)
        return [
            Side("published", "tf32", network),  # torch's defaults, untouched
            Side("published, TF32 off", "fp32", _strict(network, "fp32")),
        ]

    def folded(precision: Precision) -> list[Side]:
        network = FoldedLFM(checkpoint, precision).eval().to(device)
        sides = [Side(f"folded {precision}", precision, _strict(network, precision))]
        if scale.on_gpu:
            sides.append(Side(f"folded {precision}, cuDNN search", precision, _searched(network, precision)))
        if scale.on_gpu and precision == "fp16":
            sides.append(Side(f"folded {precision}, graph", precision, _strict(network, precision), graphed=True))
        return sides

    def compiled(precision: Precision) -> list[Side]:
        network = FoldedLFM(checkpoint, precision).eval().to(device)
        compiled_network = torch.compile(network, mode="max-autotune", dynamic=False)
        batch = min(256, scale.batches[-1])
        with _time_limit(_COMPILE_LIMIT_S):
            compiled_network(_random_pixels(batch, scale))
        # Another size would be compiled again.
        return [Side(f"folded {precision}, torch.compile", precision, compiled_network, only_batch=batch)]

    def fused(precision: Precision) -> list[Side]:
        from lfm_scan.scoring.cuda.fused import FusedLFM  # noqa: PLC0415 - needs Triton

        default = FusedLFM(checkpoint, precision).eval().to(device)
        default(_random_pixels(1, scale))
        sides = [Side(f"fused {precision}", precision, default)]
        launches = _tuned_launches(report)
        if launches is not None:
            tuned = FusedLFM(checkpoint, precision, launches).eval().to(device)
            tuned(_random_pixels(1, scale))
            sides.append(Side(f"fused {precision}, tuned", precision, tuned))
            sides.append(Side(f"fused {precision}, tuned, graph", precision, tuned, graphed=True))
        return sides

    yield "published", published
    precisions: tuple[Precision, ...] = ("fp32", "tf32", "bf16", "fp16") if scale.on_gpu else ("fp32", "bf16", "fp16")
    for precision in precisions:
        yield f"folded {precision}", functools.partial(folded, precision)
    if scale.on_gpu:
        yield "fused fp16", lambda: fused("fp16")
        yield "fused bf16", lambda: fused("bf16")
        yield "folded fp16, torch.compile", lambda: compiled("fp16")


def _sides(report: dict[str, Any], scale: Scale, checkpoint: Checkpoint, options: argparse.Namespace) -> None:
    """Build every side; keep those that run once."""
    built: list[Side] = []
    for name, build in _builders(report, scale, checkpoint):
        try:
            built += build()
        except Exception as exc:  # noqa: BLE001
            report["errors"].append({"side": name, "error": _reason(exc)})
    options.built = built


def _tuning(report: dict[str, Any], scale: Scale, checkpoint: Checkpoint, options: argparse.Namespace) -> None:
    """Choose the block sizes of the fused kernels on real pixels, at batch 256."""
    if not scale.on_gpu:
        return
    from lfm_scan.scoring.cuda.fused import FusedLFM, tune  # noqa: PLC0415 - needs Triton

    network = FusedLFM(checkpoint, "fp16").eval().to(scale.device)
    started = time.monotonic()
    pixels_bhwc = _pixels(options, 256, scale)
    trials = tune(
        network,
        pixels_bhwc,
        lambda run: statistics.median(_times_ms([run], scale, rounds=5)[0]),
        lambda: time.monotonic() - started > _TUNE_LIMIT_S,
    )
    report["tuning"] = {
        "batch": len(pixels_bhwc),
        "trials": [dataclasses.asdict(trial) for trial in trials],
        "launches": dataclasses.asdict(network.launches),
    }


def _tuned_launches(report: dict[str, Any]) -> Any:  # noqa: ANN401 - its type needs Triton
    from lfm_scan.scoring.cuda.fused import Launch, Launches  # noqa: PLC0415

    chosen = report.get("tuning", {}).get("launches")
    return chosen and Launches(**{layer: Launch(**launch) for layer, launch in chosen.items()})


@contextlib.contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    def give_up(number: int, frame: object) -> None:
        raise TimeoutError(f"took longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# --- The stages ---


def flop_per_image(side_px: int) -> int:
    """Return the floating-point operations of the convolutions for one square image, two for a multiply-add."""
    model = LFM()
    total, extent, inputs = 0, side_px, 3
    for block in model.blocks:
        conv = block.get_submodule("conv")
        assert isinstance(conv, nn.Conv2d)  # noqa: S101
        extent -= 1
        total += 2 * extent * extent * conv.out_channels * inputs * 4
        inputs = conv.out_channels
        extent = extent // 2 if isinstance(block.get_submodule("pool"), nn.MaxPool2d) else extent
    return total + 2 * extent * extent * inputs * model.projection.out_channels


def _ceilings(report: dict[str, Any], scale: Scale, checkpoint: Checkpoint, options: argparse.Namespace) -> None:
    """Measure what the device can do, and the floor that follows for one image."""
    del checkpoint, options
    side = scale.product_side
    report["ceilings"] = ceilings = {}
    rates = []
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        a, b = (torch.randn(side, side, device=scale.device).to(dtype) for _ in range(2))
        ms = statistics.median(_times_ms([functools.partial(torch.matmul, a, b)], scale)[0])
        ceilings[f"{name}_tflop_per_s"] = round(2 * side**3 / ms / 1e9, 3)
        rates.append(2 * side**3 / ms * 1e3)
    source = torch.randint(0, 256, (scale.copy_bytes,), dtype=torch.uint8, device=scale.device)
    target = torch.empty_like(source)
    ms = statistics.median(_times_ms([lambda: target.copy_(source)], scale)[0])
    bytes_per_s = 2 * scale.copy_bytes / ms * 1e3
    ceilings["copy_gb_per_s"] = round(bytes_per_s / 1e9, 1)
    pixel_bytes = scale.side_px**2 * 3
    arithmetic, reading = max(rates) / flop_per_image(scale.side_px), bytes_per_s / pixel_bytes
    report["floor"] = {
        "arithmetic_images_per_s": round(arithmetic),
        "reading_images_per_s": round(reading),
        "images_per_s": round(min(arithmetic, reading)),
    }


def _layers(report: dict[str, Any], scale: Scale, checkpoint: Checkpoint, options: argparse.Namespace) -> None:
    """Time each kernel of the fused network by itself, at batch 256."""
    launches = _tuned_launches(report) if scale.on_gpu else None
    if launches is None:
        return
    from lfm_scan.scoring.cuda.fused import FusedLFM  # noqa: PLC0415

    network = FusedLFM(checkpoint, "fp16", launches).eval().to(scale.device)
    pixels = _pixels(options, 256, scale)
    map1 = network.npr_conv_pool(pixels)
    map2 = network.conv_pool(map1, 2)
    map3 = network.conv_pool(map2, 3)
    map4 = network.conv_project(map3)
    runs: dict[str, Callable[[], Tensor]] = {
        "npr, layer1": lambda: network.npr_conv_pool(pixels),
        "layer2": lambda: network.conv_pool(map1, 2),
        "layer3": lambda: network.conv_pool(map2, 3),
        "layer4, projection": lambda: network.conv_project(map3),
        "top-k, head": lambda: network.topk_head(map4),
        "top-k by torch.topk": lambda: map4.flatten(1, 2).topk(16, dim=1).values,
    }
    times = _times_ms(list(runs.values()), scale)
    report["kernels"] = [
        {"kernel": name, "us_per_image": round(statistics.median(ms) * 1e3 / len(pixels), 4)}
        for name, ms in zip(runs, times, strict=True)
    ]


def _agreement(report: dict[str, Any], scale: Scale, checkpoint: Checkpoint, options: argparse.Namespace) -> None:
    """Compare each side's logits with strict fp32, on the given pixels or else on random ones."""
    del checkpoint
    sides: list[Side] = options.built
    pixels = _host_pixels(options, scale)
    reference_side = next(side for side in sides if side.name == "published, TF32 off")
    expected = _all_logits(reference_side, pixels, scale)
    report["agreement"] = {
        "images": len(pixels),
        "pixels": "random" if options.pixels is None else options.pixels.name,
        "least_margin": float(np.abs(expected).min()),
        "sides": [],
    }
    for side in sides:
        row: dict[str, Any] = {"side": side.name}
        try:
            found = _all_logits(side, pixels, scale)
            row |= {
                "largest_difference": float(np.abs(found - expected).max()),
                "median_difference": float(np.median(np.abs(found - expected))),
                "flipped_decisions": int(((found > 0) != (expected > 0)).sum()),
                "largest_score_difference": float(np.abs(_score(found) - _score(expected)).max()),
            }
        except Exception as exc:  # noqa: BLE001
            row["error"] = _reason(exc)
        report["agreement"]["sides"].append(row)


def _throughput(report: dict[str, Any], scale: Scale, checkpoint: Checkpoint, options: argparse.Namespace) -> None:
    """Time all sides by turns, batch by batch: the sizes that matter most first."""
    del checkpoint
    report["throughput"] = rows = []
    order = sorted(scale.batches, key=lambda batch: abs(batch - 256))
    for batch in order:
        if scale.out_of_time(reserve_s=30):
            report["errors"].append({"stage": f"throughput, batch {batch}", "error": "no time was left"})
            continue
        rows += _throughput_of_batch(batch, scale, options)
        _free(scale)
    rows.sort(key=lambda row: row["batch"])
    floor = report.get("floor", {}).get("images_per_s")
    base = {row["batch"]: row.get("images_per_s") for row in rows if row["side"] == "published"}
    for row in rows:
        if "images_per_s" in row:
            row["share_of_floor"] = floor and round(row["images_per_s"] / floor, 4)
            if base.get(row["batch"]):
                row["times_published"] = round(row["images_per_s"] / base[row["batch"]], 2)


def _throughput_of_batch(batch: int, scale: Scale, options: argparse.Namespace) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    runs: list[Callable[[], Tensor]] = []
    inputs = [_pixels(options, batch, scale, start=index * batch) for index in range(_NUM_INPUTS)]
    measured = []
    for side in options.built:
        if side.only_batch not in (None, batch):
            continue
        row: dict[str, Any] = {"side": side.name, "precision": side.precision, "batch": batch}
        rows.append(row)
        try:
            forward = side.forward
            # A graph keeps what one pass takes.
            row["peak_memory_mb"] = _peak_memory_mb(functools.partial(forward, inputs[0]), scale)
            if side.graphed:
                forward = GraphedNetwork(side.forward, inputs[0].shape, scale.device)
        except Exception as exc:  # noqa: BLE001
            row["error"] = _reason(exc)
            _free(scale)
            continue
        runs.append(_by_turns(forward, inputs))
        measured.append(row)
    for row, times in zip(measured, _times_ms(runs, scale), strict=True):
        row |= {
            "ms": round(statistics.median(times), 4),
            "ms_spread": [round(min(times), 4), round(max(times), 4)],
            "images_per_s": round(batch / statistics.median(times) * 1e3, 1),
        }
    return rows


def _from_host(report: dict[str, Any], scale: Scale, checkpoint: Checkpoint, options: argparse.Namespace) -> None:
    """Time the backend on pixels in the host's memory, and what bounds it: the bus, and copies inside the host."""
    count = 4096 if scale.on_gpu else 5
    pixels = np.resize(_host_pixels(options, scale)[:count], (count, scale.side_px, scale.side_px, 3))
    rows: list[dict[str, Any]] = []
    host: dict[str, Any] = {"images": count, "rows": rows}
    report["host"] = host
    if scale.on_gpu:
        pinned = torch.empty(256, *pixels.shape[1:], dtype=torch.uint8, pin_memory=True)
        target = torch.empty_like(pinned, device=scale.device)
        ms = statistics.median(_times_ms([lambda: target.copy_(pinned, non_blocking=True)], scale)[0])
        host["pinned_to_device_gb_per_s"] = round(pinned.nbytes / ms / 1e6, 1)
        started = time.perf_counter()
        for _ in range(5):
            np.copyto(pinned.numpy(), pixels[:256])
        host["into_pinned_gb_per_s"] = round(5 * pinned.nbytes / (time.perf_counter() - started) / 1e9, 1)
    precisions: tuple[Precision, ...] = ("fp16", "bf16", "fp32") if scale.on_gpu else ("fp32",)
    backends = []
    for precision in precisions:
        for batch_size in (128, 256) if scale.on_gpu else (2,):
            row: dict[str, Any] = {"side": f"CudaBackend.logits {precision}", "batch": batch_size}
            rows.append(row)
            try:
                started = time.perf_counter()
                backend = CudaBackend(
                    checkpoint,
                    precision=precision,
                    batch_size=batch_size,
                    kernels="auto" if scale.on_gpu else "torch",
                    device=scale.device.type,
                )
                backend.logits(pixels[:batch_size])
                row |= {"kernels": backend.kernels, "seconds_to_first_logit": round(time.perf_counter() - started, 2)}
                backends.append((row, backend))
            except Exception as exc:  # noqa: BLE001
                row["error"] = _reason(exc)
    seconds: list[list[float]] = [[] for _ in backends]
    for _ in range(scale.rounds):
        for (_, backend), times in zip(backends, seconds, strict=True):
            started = time.perf_counter()
            backend.logits(pixels)
            times.append(time.perf_counter() - started)
    for (row, _), times in zip(backends, seconds, strict=True):
        row["images_per_s"] = round(count / statistics.median(times), 1)
    if scale.on_gpu:
        rows += _pinned_rows(report, scale, checkpoint, pixels)


def _pinned_rows(
    report: dict[str, Any], scale: Scale, checkpoint: Checkpoint, pixels: np.ndarray
) -> list[dict[str, Any]]:
    """Return rows for pixels that lie in pinned memory already: copied and then computed, and both at once."""
    from lfm_scan.scoring.cuda.fused import FusedLFM  # noqa: PLC0415

    network = FusedLFM(checkpoint, "fp16", _tuned_launches(report)).eval().to(scale.device)
    batch = 256
    host = [torch.from_numpy(pixels[start : start + batch].copy()).pin_memory() for start in range(0, 2048, batch)]
    device = [torch.empty_like(host[0], device=scale.device) for _ in range(2)]
    copying = torch.cuda.Stream(scale.device)  # type: ignore[no-untyped-call]

    def serial() -> Tensor:
        for part in host:
            device[0].copy_(part, non_blocking=True)
            logits: Tensor = network(device[0])
        return logits

    def overlapped() -> Tensor:
        computing = torch.cuda.current_stream(scale.device)
        copying.wait_stream(computing)
        computed: list[torch.cuda.Event] = []
        for index, part in enumerate(host):
            with torch.cuda.stream(copying):
                if index >= len(device):
                    copying.wait_event(computed[index - len(device)])
                device[index % len(device)].copy_(part, non_blocking=True)
                copied = copying.record_event()
            computing.wait_event(copied)
            logits: Tensor = network(device[index % len(device)])
            computed.append(computing.record_event())
        return logits

    serial_ms, overlapped_ms = (statistics.median(times) for times in _times_ms([serial, overlapped], scale))
    count = batch * len(host)
    return [
        {"side": "fused fp16, pinned", "batch": batch, "images_per_s": round(count / serial_ms * 1e3, 1)},
        {
            "side": "fused fp16, pinned, overlapped",
            "batch": batch,
            "images_per_s": round(count / overlapped_ms * 1e3, 1),
        },
    ]


_Stage = Callable[[dict[str, Any], Scale, Checkpoint, argparse.Namespace], None]
_STAGES: Final[tuple[_Stage, ...]] = (_ceilings, _tuning, _sides, _layers, _agreement, _throughput, _from_host)
_AGREEMENT_STAGES: Final[tuple[_Stage, ...]] = (_sides, _agreement)


# --- Helpers ---


def _times_ms(runs: list[Callable[[], Tensor]], scale: Scale, rounds: int | None = None) -> list[list[float]]:
    """Return, for each run, the milliseconds of one call in each round; runs take turns inside a round."""
    repeats = []
    for run in runs:
        run()
        once = _time_ms(run, 1, scale)
        repeats.append(max(1, min(1000, round(scale.min_round_ms / max(once, 1e-3)))))
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds or scale.rounds):
        for run, count, found in zip(runs, repeats, times, strict=True):
            found.append(_time_ms(run, count, scale) / count)
    return times


def _time_ms(run: Callable[[], Tensor], count: int, scale: Scale) -> float:
    if not scale.on_gpu:
        started = time.perf_counter()
        for _ in range(count):
            run()
        return (time.perf_counter() - started) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    begin.record()
    for _ in range(count):
        run()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end))


def _by_turns(forward: Forward, inputs: list[Tensor]) -> Callable[[], Tensor]:
    calls = 0

    def run() -> Tensor:
        nonlocal calls
        calls += 1
        return forward(inputs[calls % len(inputs)])

    return run


def _peak_memory_mb(run: Callable[[], Tensor], scale: Scale) -> float | None:
    if not scale.on_gpu:
        run()
        return None
    _free(scale)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


def _free(scale: Scale) -> None:
    if scale.on_gpu:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _all_logits(side: Side, pixels: np.ndarray, scale: Scale) -> np.ndarray:
    size = side.only_batch or min(_AGREEMENT_BATCH, len(pixels))
    parts = []
    for start in range(0, len(pixels), size):
        # Each batch is full: the last one begins again with the first images.
        batch = torch.from_numpy(pixels[np.arange(start, start + size) % len(pixels)]).to(scale.device)
        parts.append(side.forward(batch).float().cpu())
    return torch.cat(parts)[: len(pixels)].double().numpy()


def _score(logits: np.ndarray) -> np.ndarray:
    scores: np.ndarray = 1 / (1 + np.exp(-np.clip(logits, -500, 500)))
    return scores


def _host_pixels(options: argparse.Namespace, scale: Scale) -> np.ndarray:
    if options.pixels is None:
        count = 256 if scale.on_gpu else 5
        shape = (count, scale.side_px, scale.side_px, 3)
        return np.random.default_rng(_SEED).integers(0, 256, shape, dtype=np.uint8)
    if not hasattr(options, "loaded"):
        with np.load(options.pixels, allow_pickle=False) as stored:
            options.loaded = stored["pixels"]
    side = scale.side_px
    return np.ascontiguousarray(options.loaded[:, :side, :side])


def _pixels(options: argparse.Namespace, batch: int, scale: Scale, start: int = 0) -> Tensor:
    pixels = _host_pixels(options, scale)
    return torch.from_numpy(pixels[np.arange(start, start + batch) % len(pixels)]).to(scale.device)


def _random_pixels(batch: int, scale: Scale) -> Tensor:
    return torch.randint(0, 256, (batch, scale.side_px, scale.side_px, 3), dtype=torch.uint8, device=scale.device)


def _checkpoint(weights: str) -> Checkpoint:
    if weights == "random":
        return Checkpoint(tensors_of(LFM()), CheckpointMetadata("random"), "0" * 64)
    return load_checkpoint(Path(weights).read_bytes(), name=weights)


def _machine(scale: Scale) -> dict[str, Any]:
    machine: dict[str, Any] = {"cores": os.cpu_count(), "arch": platform.machine()}
    if scale.on_gpu:
        properties = torch.cuda.get_device_properties(scale.device)
        machine |= {
            "gpu": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
        }
    return machine


def _versions() -> dict[str, str | None]:
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    cudnn = torch.backends.cudnn.version() if torch.cuda.is_available() else None  # type: ignore[no-untyped-call]
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": None if cudnn is None else str(cudnn),
        "triton": triton,
        "numpy": np.__version__,
    }


def _reason(exc: BaseException) -> str:
    lines = str(exc).splitlines()
    return f"{type(exc).__name__}: {lines[0][:300] if lines else ''}"


def _write(path: Path, report: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")


def _print(report: dict[str, Any]) -> None:
    print(json.dumps({key: report.get(key) for key in ("machine", "versions", "ceilings", "floor", "kernels", "host")}))
    print(json.dumps(report.get("tuning", {}).get("launches")))
    for row in report.get("agreement", {}).get("sides", []):
        print(json.dumps(row))
    print(f"{'side':34}{'batch':>6}{'img/s':>12}{'x published':>13}{'of floor':>10}{'MiB':>9}")
    for row in report.get("throughput", []):
        print(
            f"{row['side']:34}{row['batch']:>6}"
            f"{row.get('images_per_s', float('nan')):>12,.0f}{row.get('times_published', float('nan')):>13.2f}"
            f"{row.get('share_of_floor') or float('nan'):>10.1%}{row.get('peak_memory_mb') or float('nan'):>9,.0f}"
            f"{'  ' + row['error'] if 'error' in row else ''}"
        )
    for error in report["errors"]:
        print(json.dumps(error))


if __name__ == "__main__":
    main()
