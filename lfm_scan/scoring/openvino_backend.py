"""LFM in OpenVINO: about twice as fast as torch on a CPU, and four times in bfloat16.

OpenVINO is the work of Intel and others, Apache-2.0; its CPU plugin makes its kernels when the graph is compiled, for
the instructions the processor has. Nothing is loaded from a file or the network: the graph is built from the
checkpoint's tensors, in a tenth of a second.

What OpenVINO is given to do is the convolutions. NPR comes before them, on integers, and pooling and the head after
them, in float32, so neither knows the precision of the convolutions.
"""

from __future__ import annotations

import queue
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np
import openvino as ov
import torch
from openvino import opset13 as ops
from torch import Tensor, nn

from lfm_scan.imaging.preprocess import SIDE_PX
from lfm_scan.model import LFM, Checkpoint
from lfm_scan.model.network import Block
from lfm_scan.options import Precision
from lfm_scan.scoring.torch_backend import fold_batch_norm

_HINTS: Final[dict[Precision, str]] = {"fp32": "f32", "bf16": "bf16"}

RECHECK_LOGITS: Final = 0.5
"""A bf16 logit this near the decision is computed again in fp32."""

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
        num_threads: Images computed at once, each by one thread. Default: as many threads as torch takes here.
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
        num_threads = num_threads or torch.get_num_threads()
        model = fold_batch_norm(checkpoint.model)
        self._head = _Head(model)
        self._decision = decision
        precisions: tuple[Precision, ...] = ("fp32",) if precision == "fp32" else ("bf16", "fp32")
        networks = [_compile(model, checkpoint.metadata.std, each, num_threads) for each in precisions]
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


def _compile(model: LFM, std: tuple[float, float, float], precision: Precision, num_threads: int) -> ov.CompiledModel:
    config = {
        "INFERENCE_PRECISION_HINT": _HINTS[precision],
        "INFERENCE_NUM_THREADS": num_threads,
        "NUM_STREAMS": num_threads,
        # Each process would pin its threads to the same first cores.
        "ENABLE_CPU_PINNING": False,
    }
    return ov.Core().compile_model(_build_graph(model, std, precision), "CPU", config)


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


def _build_graph(model: LFM, std: tuple[float, float, float], precision: Precision) -> ov.Model:
    """Return the graph from NPR in uint8 (1, H, W, 3) to the projected map (1, 64, H', W')."""
    blocks = [block for block in model.blocks if isinstance(block, Block)]
    weights = [conv.weight.double() for conv in (*(block.conv for block in blocks), model.projection)]
    biases = [block.conv.bias.double() for block in blocks if block.conv.bias is not None]
    weights[0] = weights[0] / (255 * torch.tensor(std, dtype=torch.float64)).view(1, 3, 1, 1)
    residual = ops.parameter([1, SIDE_PX, SIDE_PX, 3], np.uint8, name="npr")
    x = ops.transpose(ops.convert(residual, "f32"), ops.constant(np.array([0, 3, 1, 2])))
    if precision == "bf16":
        _spare_biases(weights, biases)
        weights[0] = _split(weights[0])
        x = ops.concat([x, x], axis=1)
    for block, weight, bias in zip(blocks, weights, biases, strict=False):  # the projection has neither
        x = ops.relu(ops.add(_convolution(x, weight), ops.constant(bias.float().view(1, -1, 1, 1).numpy())))
        if isinstance(block.pool, nn.MaxPool2d):
            x = ops.max_pool(x, [2, 2], [1, 1], [0, 0], [0, 0], [2, 2], index_element_type="i32").output(0)
    x = _convolution(x, weights[-1])
    return ov.Model([ops.convert(x, "f32")], [residual], "lfm")


def _convolution(x: ov.Output, weight: Tensor) -> ov.Output:
    return ops.convolution(x, ops.constant(weight.float().numpy()), [1, 1], [0, 0], [0, 0], [1, 1])


def _spare_biases(weights: list[Tensor], biases: list[Tensor]) -> None:
    """Rescale channels, in place, so that each bias is a bfloat16 number and loses nothing by rounding.

    ReLU and max-pool let a positive factor through: what multiplies a channel divides the weights that read it.
    """
    for index, bias in enumerate(biases):
        rounded = bias.bfloat16().double()
        factor = torch.where(rounded != 0, rounded / bias, 1)
        weights[index] = weights[index] * factor.view(-1, 1, 1, 1)
        weights[index + 1] = weights[index + 1] / factor.view(1, -1, 1, 1)
        biases[index] = rounded


def _split(weight: Tensor) -> Tensor:
    """Return the weights (O, 2I, 2, 2) of which the first half, in bfloat16, and the second add up to the ones given.

    Rounding the first convolution's weights would cause most of bfloat16's error. Two bfloat16 numbers hold 16 bits,
    and cost nothing: three input channels or six fill one step of the kernel.
    """
    rounded = weight.bfloat16().double()
    return torch.cat([rounded, weight - rounded], dim=1)


class _Head:
    """Pooling and the linear head, in float32 at every precision."""

    def __init__(self, model: LFM) -> None:
        self._model = model
        self._k = model.config.k if model.config.pooling == "tkp" else None
        if self._k is not None:
            # Sorting gives the values in ascending order; the head has a weight for each rank in descending order.
            self._weight = model.head.weight.view(-1, self._k).flip(1).numpy().astype(np.float64)
            self._bias = float(model.head.bias)

    def __call__(self, feature_map: np.ndarray) -> float:
        if self._k is None:
            with torch.inference_mode():
                map_bchw = torch.from_numpy(feature_map)
                return float(self._model.classify(self._model.pool(map_bchw)))
        # numpy's partition takes a seventh of the time of torch's topk on one core.
        values = feature_map.reshape(len(self._weight), -1)
        first = values.shape[1] - self._k
        largest = np.partition(values, first, axis=1)[:, first:]
        largest.sort(axis=1)
        return self._bias + float((largest * self._weight).sum())
