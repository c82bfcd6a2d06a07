"""LFM in OpenVINO: about twice as fast as torch on a CPU, and four times in bfloat16.

OpenVINO is the work of Intel and others, Apache-2.0; its CPU plugin makes its kernels when the graph is compiled, for
the instructions the processor has. Nothing is loaded from a file or the network: the graph is built from the
checkpoint's tensors, in a tenth of a second, and torch, which takes more than a second to load, is not needed.

What OpenVINO is given to do is the convolutions. NPR comes before them, on integers, and pooling and the head after
them, in float32, so neither knows the precision of the convolutions.
"""

from __future__ import annotations

import os
import queue
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np
import openvino as ov
from openvino import opset13 as ops

from lfm_scan.imaging.preprocess import SIDE_PX
from lfm_scan.model.architecture import NORM_EPS, NUM_POOLED_BLOCKS
from lfm_scan.model.checkpoint import Checkpoint
from lfm_scan.options import Precision

_HINTS: Final[dict[Precision, str]] = {"fp32": "f32", "bf16": "bf16"}

RECHECK_LOGITS: Final = 0.5
"""A bf16 logit this near the decision is computed again in fp32."""

_NORM: Final = ("weight", "bias", "running_mean", "running_var")
_BLOCKS: Final = SIDE_PX // 2
_ROW: Final = 3 * SIDE_PX
# For each byte of a row, the byte of the same colour in the left pixel of its block.
_LEFT: Final = np.arange(_ROW).reshape(_BLOCKS, 2, 3)[:, :1].repeat(2, axis=1).ravel()


class OpenVINOBackend:
    """LFM on the CPU with OpenVINO's convolutions, one image a thread.

    A logit has the same bits whatever the batch, its neighbours in it and the number of threads.

    In bf16, weights and maps of the convolutions are rounded to bfloat16 and products are added in float32. Images
    whose logit is then within `RECHECK_LOGITS` of the decision are computed again in fp32, so that no decision
    hangs on the rounding.

    Args:
        checkpoint: Weights and their normalisation; any depth and pooling.
        precision: Of the convolutions. bf16 needs a processor for which `supports_bf16` is true.
        num_threads: Images computed at once, each by one thread. Default: as many as this process may use cores.
        decision: The logit above which an image is flagged; infinite if there is no such decision.
    """

    batch_size: Final = 1

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        precision: Precision = "fp32",
        num_threads: int | None = None,
        decision: float = 0.0,
    ) -> None:
        num_threads = num_threads or len(os.sched_getaffinity(0))
        self._head = _Head(checkpoint)
        self._decision = decision
        precisions: tuple[Precision, ...] = ("fp32",) if precision == "fp32" else ("bf16", "fp32")
        networks = [_compile(checkpoint, each, num_threads) for each in precisions]
        self._lanes: queue.SimpleQueue[list[_Lane]] = queue.SimpleQueue()
        for _ in range(num_threads):
            self._lanes.put([_Lane(network) for network in networks])
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="openvino") if num_threads > 1 else None

    def logits(self, pixels_bhwc: np.ndarray) -> np.ndarray:
        """Return one logit an image. May be called by several threads at once; they share this backend's.

        Args:
            pixels_bhwc: (B, 256, 256, 3) uint8 RGB; B may be 0.

        Returns:
            (B,) float32.
        """
        apply = map if self._threads is None or len(pixels_bhwc) < 2 else self._threads.map
        return np.fromiter(apply(self._logit, pixels_bhwc), np.float32, len(pixels_bhwc))

    def _logit(self, pixels_hwc: np.ndarray) -> float:
        lanes = self._lanes.get()
        try:
            logit = self._head(lanes[0].feature_map(pixels_hwc))
            if len(lanes) > 1 and abs(logit - self._decision) <= RECHECK_LOGITS:
                logit = self._head(lanes[1].feature_map(pixels_hwc))
            return logit
        finally:
            self._lanes.put(lanes)


def supports_bf16() -> bool:
    """Return whether this processor computes in bfloat16 (AVX-512 BF16, AMX), so that bf16 is worth having."""
    return "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _compile(checkpoint: Checkpoint, precision: Precision, num_threads: int) -> ov.CompiledModel:
    config = {
        "INFERENCE_PRECISION_HINT": _HINTS[precision],
        "INFERENCE_NUM_THREADS": num_threads,
        "NUM_STREAMS": num_threads,
        # Each process would pin its threads to the same first cores.
        "ENABLE_CPU_PINNING": False,
    }
    return ov.Core().compile_model(_build_graph(checkpoint, precision), "CPU", config)


class _Lane:
    """NPR and the convolutions for one image at a time: a request and the arrays it works on."""

    def __init__(self, network: ov.CompiledModel) -> None:
        self._residual = np.empty((1, SIDE_PX, SIDE_PX, 3), np.uint8)
        self._scratch = np.empty_like(self._residual)
        self._request = network.create_infer_request()
        self._request.set_input_tensor(ov.Tensor(self._residual, shared_memory=True))

    def feature_map(self, pixels_hwc: np.ndarray) -> np.ndarray:
        """Return the projected map (1, 64, H', W') float32, valid until the next call."""
        npr_uint8(pixels_hwc, self._residual, self._scratch)
        self._request.infer()
        feature_map: np.ndarray = self._request.get_output_tensor().data
        return feature_map


def npr_uint8(pixels_hwc: np.ndarray, out: np.ndarray, scratch: np.ndarray) -> None:
    """Write the neighbouring-pixel residual of raw pixels: exact, and still uint8.

    The mean cancels in a difference, so NPR of normalised pixels is this divided by 255 times the standard
    deviation. bfloat16 holds every integer up to 256, so this is exact there too.

    Args:
        pixels_hwc: (256, 256, 3) uint8.
        out: As many uint8 elements, contiguous.
        scratch: Likewise.
    """
    rows = pixels_hwc.reshape(_BLOCKS, 2, _ROW)  # the two rows of each block
    corner = rows[:, 0].take(_LEFT, axis=1)[:, np.newaxis]
    largest, smallest = out.reshape(rows.shape), scratch.reshape(rows.shape)
    np.maximum(rows, corner, out=largest)
    np.minimum(rows, corner, out=smallest)
    np.subtract(largest, smallest, out=largest)


def _build_graph(checkpoint: Checkpoint, precision: Precision) -> ov.Model:
    """Return the graph from NPR in uint8 (1, H, W, 3) to the projected map (1, 64, H', W')."""
    weights, biases = _fold_batch_norm(checkpoint)
    weights[0] = weights[0] / (255 * np.array(checkpoint.metadata.std)).reshape(1, 3, 1, 1)
    residual = ops.parameter([1, SIDE_PX, SIDE_PX, 3], np.uint8, name="npr")
    x = ops.transpose(ops.convert(residual, "f32"), ops.constant(np.array([0, 3, 1, 2])))
    if precision == "bf16":
        _spare_biases(weights, biases)
        weights[0] = _split(weights[0])
        x = ops.concat([x, x], axis=1)
    for index, (weight, bias) in enumerate(zip(weights, biases, strict=False)):  # the projection has no bias
        x = ops.relu(ops.add(_convolution(x, weight), ops.constant(bias.astype(np.float32).reshape(1, -1, 1, 1))))
        if index < NUM_POOLED_BLOCKS:
            x = ops.max_pool(x, [2, 2], [1, 1], [0, 0], [0, 0], [2, 2], index_element_type="i32").output(0)
    x = _convolution(x, weights[-1])
    return ov.Model([ops.convert(x, "f32")], [residual], "lfm")


def _fold_batch_norm(checkpoint: Checkpoint) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return the weights of all convolutions, the projection last, and the biases of those in blocks, in float64.

    Each block's BatchNorm is part of them.
    """
    weights: list[np.ndarray] = []
    biases: list[np.ndarray] = []
    for index in range(len(checkpoint.metadata.architecture.channels) - 1):
        weight, bias, gamma, beta, mean, variance = (
            checkpoint.tensors[f"blocks.{index}.{name}"].astype(np.float64)
            for name in ("conv.weight", "conv.bias", *(f"norm.{each}" for each in _NORM))
        )
        scale = gamma / np.sqrt(variance + NORM_EPS)
        weights.append(weight * scale.reshape(-1, 1, 1, 1))
        biases.append((bias - mean) * scale + beta)
    return [*weights, checkpoint.tensors["projection.weight"].astype(np.float64)], biases


def _convolution(x: ov.Output, weight: np.ndarray) -> ov.Output:
    return ops.convolution(x, ops.constant(weight.astype(np.float32)), [1, 1], [0, 0], [0, 0], [1, 1])


def _spare_biases(weights: list[np.ndarray], biases: list[np.ndarray]) -> None:
    """Rescale channels, in place, so that each bias is a bfloat16 number and loses nothing by rounding.

    ReLU and max-pool let a positive factor through: what multiplies a channel divides the weights that read it.
    """
    for index, bias in enumerate(biases):
        rounded = _bfloat16(bias)
        factor = np.divide(rounded, bias, out=np.ones_like(bias), where=rounded != 0)
        weights[index] = weights[index] * factor.reshape(-1, 1, 1, 1)
        weights[index + 1] = weights[index + 1] / factor.reshape(1, -1, 1, 1)
        biases[index] = rounded


def _split(weight: np.ndarray) -> np.ndarray:
    """Return the weights (O, 2I, 2, 2) of which the first half, in bfloat16, and the second add up to the ones given.

    Rounding the first convolution's weights would cause most of bfloat16's error. Two bfloat16 numbers hold 16 bits,
    and cost nothing: three input channels or six fill one step of the kernel.
    """
    rounded = _bfloat16(weight)
    return np.concatenate([rounded, weight - rounded], axis=1)


def _bfloat16(values: np.ndarray) -> np.ndarray:
    """Return the nearest bfloat16 numbers, the even one of two, in float64: numpy has no such type."""
    bits = values.astype(np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return rounded.astype(np.uint32).view(np.float32).astype(np.float64)


class _Head:
    """Pooling and the linear head, in float32 at every precision."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        config = checkpoint.metadata.architecture
        self._k = config.k if config.pooling == "tkp" else None
        self._checkpoint = checkpoint
        if self._k is not None:
            # Sorting gives the values in ascending order; the head has a weight for each rank in descending order.
            self._weight = checkpoint.tensors["head.weight"].reshape(-1, self._k)[:, ::-1].astype(np.float64)
            self._bias = float(checkpoint.tensors["head.bias"][0])

    def __call__(self, feature_map: np.ndarray) -> float:
        if self._k is None:
            return self._by_torch(feature_map)
        # numpy's partition takes a seventh of the time of torch's topk on one core.
        values = feature_map.reshape(len(self._weight), -1)
        first = values.shape[1] - self._k
        largest = np.partition(values, first, axis=1)[:, first:]
        largest.sort(axis=1)
        return self._bias + float((largest * self._weight).sum())

    def _by_torch(self, feature_map: np.ndarray) -> float:
        """Pool as the paper's other networks do: they are for comparisons, so torch's own layers will do."""
        import torch  # noqa: PLC0415 - the usual network does without

        model = self._checkpoint.model
        with torch.inference_mode():
            return float(model.classify(model.pool(torch.from_numpy(feature_map))))
