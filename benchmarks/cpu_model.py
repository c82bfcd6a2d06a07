"""The model on a CPU: images a second of the published forward pass and of every backend, by turns.

    python -m benchmarks.cpu_model [--data FOLDER] [--weights FILE ...] [--smoke]

"naive" is how the published code runs the network: fp32, batch 32, BatchNorm and NPR's two convolutions as modules of
their own. Each side runs twice: in one process with as many threads as there are cores, and as a scan does, in one
process a core with one thread each. Each is given the same decoded pixels; a round takes every side once, and what
counts is the median over rounds of a side's time and of its ratio to naive's, in one process with all threads.
"start_s" is the time from reading the checkpoint to the first logit, in a process that has imported torch.

With --data, each side also scores all development images: the largest difference to naive's logits, and decisions at
0.5 that are other ones. "raw" is bf16 without its check in fp32.

ONNX Runtime takes part where the packages onnx and onnxruntime are installed. It is no dependency: it was measured, and
OpenVINO chosen.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import math
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import report
from lfm_scan.imaging import ImageLimits, decode_bytes, get_policy
from lfm_scan.model import Checkpoint
from lfm_scan.model.network import Block
from lfm_scan.scoring.backend import has_openvino, open_backend
from lfm_scan.scoring.torch_backend import fold_batch_norm
from lfm_scan.scoring.weights import BUNDLED, read_weights

_NAIVE_BATCH: Final = 32
_GFLOP_AN_IMAGE: Final = 3.15
_POLICY: Final = "resize256"

Logits = Callable[[np.ndarray], np.ndarray]


# --- The sides ---


class Naive:
    """The published forward pass: SNet in evaluation mode on normalised NCHW pixels, NPR as two convolutions."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._model = checkpoint.model.eval()
        self._mean = torch.tensor(checkpoint.metadata.mean).view(1, 3, 1, 1)
        self._std = torch.tensor(checkpoint.metadata.std).view(1, 3, 1, 1)
        self._down = torch.zeros(3, 1, 2, 2)
        self._down[:, :, 0, 0] = 1
        self._up = torch.ones(3, 1, 2, 2)

    @torch.no_grad()
    def __call__(self, pixels_bhwc: np.ndarray) -> np.ndarray:
        """Return logits."""
        batches = torch.split(torch.from_numpy(pixels_bhwc), _NAIVE_BATCH)
        return torch.cat([self._forward(batch) for batch in batches]).numpy()

    def _forward(self, batch_bhwc: Tensor) -> Tensor:
        x = (batch_bhwc.permute(0, 3, 1, 2).float().contiguous() / 255 - self._mean) / self._std
        low = F.conv2d(x, self._down, stride=2, groups=3)
        residual = (x - F.conv_transpose2d(low, self._up, stride=2, groups=3)).abs()
        model = self._model
        return model.classify(model.pool(model.projection(model.blocks(residual))))


def _onnxruntime(checkpoint: Checkpoint, num_threads: int) -> Logits:
    import onnxruntime  # noqa: PLC0415 - optional

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    session = onnxruntime.InferenceSession(_onnx_model(checkpoint), options, providers=["CPUExecutionProvider"])
    model, mean, std = fold_batch_norm(checkpoint.model), checkpoint.metadata.mean, checkpoint.metadata.std

    @torch.inference_mode()
    def logits(pixels_bhwc: np.ndarray) -> np.ndarray:
        x_bchw = (torch.from_numpy(pixels_bhwc).float() / 255 - torch.tensor(mean)).div(torch.tensor(std))
        residuals = model.npr(x_bchw.permute(0, 3, 1, 2)).contiguous().numpy()
        maps = [session.run(None, {"x": residual[None]})[0] for residual in residuals]
        return torch.cat([model.classify(model.pool(torch.from_numpy(each))) for each in maps]).numpy()

    return logits


def _onnx_model(checkpoint: Checkpoint) -> bytes:
    from onnx import TensorProto, helper, numpy_helper  # noqa: PLC0415 - optional

    model = fold_batch_norm(checkpoint.model)
    make_node: Any = helper.make_node  # its types know no attributes
    nodes: list[Any] = []
    tensors: list[Any] = []
    last = "x"

    def add(operation: str, *inputs: str, **attributes: list[int]) -> str:
        output = f"{operation}{len(nodes)}"
        nodes.append(make_node(operation, inputs, [output], **attributes))
        return output

    def constant(value: Tensor) -> str:
        tensors.append(numpy_helper.from_array(value.detach().numpy(), f"w{len(tensors)}"))
        return f"w{len(tensors) - 1}"

    for block in model.blocks:
        assert isinstance(block, Block)  # noqa: S101 - narrows the type
        assert block.conv.bias is not None  # noqa: S101
        last = add("Relu", add("Conv", last, constant(block.conv.weight), constant(block.conv.bias)))
        if isinstance(block.pool, nn.MaxPool2d):
            last = add("MaxPool", last, kernel_shape=[2, 2], strides=[2, 2])
    last = add("Conv", last, constant(model.projection.weight))
    taken = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 256, 256])
    given = helper.make_tensor_value_info(last, TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "lfm", [taken], [given], tensors)
    opset = [helper.make_opsetid("", 17)]
    data: bytes = helper.make_model(graph, opset_imports=opset, ir_version=9).SerializeToString()
    return data


def _open(name: str, checkpoint: Checkpoint, num_threads: int) -> Logits:
    torch.set_num_threads(num_threads)
    match name.split():
        case ["naive"]:
            return Naive(checkpoint)
        case ["onnxruntime", "fp32"]:
            return _onnxruntime(checkpoint, num_threads)
        case ["torch", "fp32"]:
            return open_backend(checkpoint, "cpu", backend="torch").logits
        case ["openvino", "bf16", "raw"]:
            from lfm_scan.scoring.openvino_backend import OpenVINOBackend  # noqa: PLC0415 - optional

            return OpenVINOBackend(checkpoint, precision="bf16", num_threads=num_threads, decision=math.inf).logits
        case ["openvino", "fp32" | "bf16" as precision]:
            return open_backend(
                checkpoint, "cpu", backend="openvino", precision=precision, num_threads=num_threads
            ).logits
    raise ValueError(name)


def _available() -> list[str]:
    names = ["naive", "torch fp32"]
    if importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnx"):
        names.append("onnxruntime fp32")
    if has_openvino():
        from lfm_scan.scoring.openvino_backend import supports_bf16  # noqa: PLC0415 - optional

        names += ["openvino fp32", "openvino bf16"] if supports_bf16() else ["openvino fp32"]
    return names


# --- Processes that run them ---


class Side:
    """One way to score, in processes of its own that wait between rounds.

    Args:
        name: Backend and precision.
        weights: Which checkpoint.
        num_processes: How many.
        num_threads: Threads each.
    """

    def __init__(self, name: str, weights: str, num_processes: int, num_threads: int) -> None:
        self.name, self.num_processes, self.num_threads = name, num_processes, num_threads
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for _ in range(num_processes):
            ours, theirs = context.Pipe()
            self._pipes.append(ours)
            self._processes.append(context.Process(target=_serve, args=(name, weights, num_threads, theirs)))
            self._processes[-1].start()
            theirs.close()  # so that the death of the process ends `recv`
        self.start_s = max(pipe.recv() for pipe in self._pipes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join()

    def run(self, pixels_file: Path) -> tuple[np.ndarray, float, float]:
        """Score a file of pixels; return logits in order, seconds, and MB of memory that one process has ever had."""
        start = time.perf_counter()
        for index, pipe in enumerate(self._pipes):
            pipe.send((str(pixels_file), index, self.num_processes))
        parts, peaks = zip(*(pipe.recv() for pipe in self._pipes), strict=True)
        wall_s = time.perf_counter() - start
        logits = np.empty(sum(map(len, parts)), np.float32)
        for index, part in enumerate(parts):
            logits[index :: self.num_processes] = part
        return logits, wall_s, max(peaks)


def _serve(name: str, weights: str, num_threads: int, pipe: Connection) -> None:
    start = time.perf_counter()
    _, checkpoint = read_weights(weights)
    logits = _open(name, checkpoint, num_threads)
    logits(np.zeros((1, 256, 256, 3), np.uint8))
    pipe.send(time.perf_counter() - start)
    while (message := pipe.recv()) is not None:
        path, first, step = message
        # A copy: torch wants arrays that it may write to, and all sides are to be given the same.
        pixels = np.array(np.load(path, mmap_mode="r")[first::step])
        found = logits(pixels)
        pipe.send((found, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


# --- Measuring ---


@dataclass(frozen=True)
class Plan:
    """How much to measure."""

    num_images: int
    rounds: int
    num_cores: int
    layouts: tuple[tuple[int, int], ...]
    """Pairs of processes and threads in each."""


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with dev.csv and dev/, to compare logits on")
    parser.add_argument("--weights", nargs="+", default=[BUNDLED], help="checkpoints; the first is used for speed")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, default=64, help="images a round")
    parser.add_argument("--output", type=Path, default=report.RESULTS / "cpu_model.json")
    parser.add_argument("--smoke", action="store_true", help="one round of few images: does it run at all?")
    options = parser.parse_args(arguments)
    num_cores = len(os.sched_getaffinity(0))
    layouts = tuple(dict.fromkeys(((1, num_cores), (num_cores, 1))))
    plan = Plan(options.images, options.rounds, num_cores, layouts)
    if options.smoke:
        plan = Plan(num_images=2, rounds=1, num_cores=1, layouts=((1, 1),))
    with tempfile.TemporaryDirectory() as folder:
        speed = _measure_speed(plan, options.weights[0], Path(folder))
        agreement = _measure_agreement(options.data, options.weights, plan, Path(folder)) if options.data else []
    _print(speed, agreement)
    report.write(
        options.output,
        {
            "machine": report.machine(),
            "versions": report.versions(["torch", "numpy", "openvino", "onnxruntime"]),
            "configuration": {
                "images_a_round": plan.num_images,
                "rounds": plan.rounds,
                "gflop_an_image": _GFLOP_AN_IMAGE,
                "naive_batch": _NAIVE_BATCH,
            },
            "speed": speed,
            "agreement": agreement,
        },
    )


def _measure_speed(plan: Plan, weights: str, folder: Path) -> list[dict[str, Any]]:
    pixels_file = folder / "noise.npy"
    # Time does not depend on what is seen, but for bf16, which is checked near 0.5.
    np.save(pixels_file, np.random.default_rng(0).integers(0, 256, (plan.num_images, 256, 256, 3), dtype=np.uint8))
    with ExitStack() as stack:
        sides = [stack.enter_context(Side(name, weights, *layout)) for name in _available() for layout in plan.layouts]
        for side in sides:
            side.run(pixels_file)
        rounds = [[side.run(pixels_file)[1:] for side in sides] for _ in range(plan.rounds)]
    results = []
    for index, side in enumerate(sides):
        wall_s = statistics.median(row[index][0] for row in rounds)
        results.append(
            {
                "side": side.name,
                "processes": side.num_processes,
                "threads_each": side.num_threads,
                "images_per_s": round(plan.num_images / wall_s, 1),
                "times_naive": round(statistics.median(row[0][0] / row[index][0] for row in rounds), 2),
                "gflop_per_s_a_core": round(_GFLOP_AN_IMAGE * plan.num_images / wall_s / plan.num_cores, 1),
                "start_s": round(side.start_s, 2),
                "peak_mb_a_process": round(max(row[index][1] for row in rounds)),
            }
        )
    return results


def _measure_agreement(data: Path, weights: list[str], plan: Plan, folder: Path) -> list[dict[str, Any]]:
    pixels_file = folder / "development.npy"
    np.save(pixels_file, np.stack(list(_development_pixels(data))))
    names = _available()
    if "openvino bf16" in names:
        names.append("openvino bf16 raw")
    results = []
    for each in weights:
        logits = {}
        for name in names:
            with Side(name, each, plan.num_cores, 1) as side:
                logits[name] = side.run(pixels_file)[0]
        _, checkpoint = read_weights(each)
        for name in names[1:]:
            apart = np.abs(logits[name] - logits["naive"])
            results.append(
                {
                    "model_id": checkpoint.metadata.model_id,
                    "side": name,
                    "images": len(apart),
                    "largest_logit_difference": float(apart.max()),
                    "median_logit_difference": float(np.median(apart)),
                    "flipped_decisions": int(((logits[name] > 0) != (logits["naive"] > 0)).sum()),
                }
            )
    return results


def _development_pixels(data: Path) -> Iterator[np.ndarray]:
    policy, limits = get_policy(_POLICY), ImageLimits(min_side_px=1)
    with (data / "dev.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            yield policy(decode_bytes((data / "dev" / row["path"]).read_bytes(), limits, traces=False))


# --- The report ---


def _print(speed: list[dict[str, Any]], agreement: list[dict[str, Any]]) -> None:
    print(f"{'':18s} {'processes':>9s} {'threads':>7s} {'images/s':>8s} {'x naive':>8s} {'start s':>8s} {'MB':>6s}")
    for row in speed:
        print(
            f"{row['side']:18s} {row['processes']:9d} {row['threads_each']:7d} {row['images_per_s']:8.1f} "
            f"{row['times_naive']:8.2f} {row['start_s']:8.2f} {row['peak_mb_a_process']:6d}"
        )
    for row in agreement:
        print(
            f"{row['model_id']}, {row['side']}: {row['images']} images, logits differ by at most "
            f"{row['largest_logit_difference']:.2g}, {row['flipped_decisions']} decisions flipped"
        )


if __name__ == "__main__":
    main()
