"""LFM on a CUDA GPU: batches that fit, copies that overlap with the work on the batch before, the fastest network."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, Literal

import numpy as np
import torch
from torch import Tensor

from lfm_scan.errors import ConfigError
from lfm_scan.model import Checkpoint
from lfm_scan.scoring.cuda.folded import DTYPES, FoldedLFM, Precision, convolutions
from lfm_scan.scoring.cuda.graphs import GraphedNetwork

if TYPE_CHECKING:
    from lfm_scan.scoring.cuda.fused import FusedLFM

Kernels = Literal["auto", "triton", "torch"]

MAX_BATCH: Final = 256
"""More gains nothing: 256 images are thousands of programs for each kernel."""
_SHARE_OF_FREE: Final = 0.8
_COPIES: Final = 2  # the maps of a recorded pass stay allocated beside those of an ordinary one
_PROBE_IMAGES: Final = 4
_PROBE_SIDE_PX: Final = 256
_NUM_LANES: Final = 2
# Of the norm of the map. bf16 differs by a hundredth of it, from other places of rounding; a wrong kernel by all of it.
_MAX_DISAGREEMENT: Final = 0.05
_MAX_HEAD_DISAGREEMENT: Final = 1e-4  # of the sum of absolute terms: both sum in fp32

_logger: Final = logging.getLogger(__name__)


class CudaBackend:
    """Scores pixels on one GPU.

    uint8 crosses the bus and nothing else: NPR, normalisation and the network run on the device. While a batch is
    computed the next one is copied. Batches of the full size are launched as one CUDA graph. When memory runs out,
    because others use the GPU too, the batch is halved and scoring goes on.

    Not thread-safe.

    Args:
        checkpoint: Weights and their normalisation.
        precision: Of weights and maps: "fp16", "bf16", "tf32" (fp32, rounded factors) or "fp32". NPR is exact
            in each.
        batch_size: Images a forward pass. Default: what free memory allows, at most 256.
        kernels: "triton" for the fused kernels, "torch" for torch's own operations, "auto" for the former where they
            exist, run here and agree with the latter on probe images.
        device: A CUDA device.

    Attributes:
        batch_size: Images a forward pass now.
        kernels: "triton" or "torch": what is used.

    Raises:
        ConfigError: If kernels that were asked for cannot be had, or a weight is too large for the precision.
        torch.OutOfMemoryError: If not even a few images fit.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        precision: Precision = "fp16",
        batch_size: int | None = None,
        kernels: Kernels = "auto",
        device: str = "cuda",
    ) -> None:
        if precision not in DTYPES:
            raise ConfigError(f"precision must be one of {', '.join(DTYPES)}, got {precision!r}")
        if batch_size is not None and batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
        self.device = torch.device(device)
        self.precision = precision
        folded = FoldedLFM(checkpoint, precision).to(self.device)
        fused = None if kernels == "torch" else self._fused(checkpoint, folded, required=kernels == "triton")
        self._network: FoldedLFM | FusedLFM = fused or folded
        self.kernels: Literal["triton", "torch"] = "torch" if fused is None else "triton"
        self.batch_size = batch_size or self._fitting_batch_size()
        self._lanes: _Lanes | None = None
        self._graph: GraphedNetwork | None = None
        self._graphs_work = True

    @torch.inference_mode()
    def logits(self, pixels_bhwc: np.ndarray) -> np.ndarray:
        """Return one logit an image.

        Args:
            pixels_bhwc: (B, 256, 256, 3) uint8 RGB; B may be 0 or more than the batch size.

        Returns:
            (B,) float32.

        Raises:
            torch.OutOfMemoryError: If not even one image fits.
        """
        out = torch.empty(len(pixels_bhwc), dtype=torch.float32, device=self.device)
        start = 0
        while start < len(pixels_bhwc):
            part = pixels_bhwc[start : start + self.batch_size]
            try:
                out[start : start + len(part)] = self._score(part)
            except torch.OutOfMemoryError:
                if self.batch_size == 1:
                    raise
                self._halve()
                continue
            start += len(part)
        logits: np.ndarray = out.cpu().numpy()
        return logits

    @torch.inference_mode()
    def forward(self, pixels_bhwc: Tensor) -> Tensor:
        """Return logits (B,) fp32 on the device, from (B, H, W, 3) uint8 pixels there, as one batch of any size.

        Raises:
            torch.OutOfMemoryError: If it does not fit.
        """
        if len(pixels_bhwc) != self.batch_size or not self._graphs_work or self.device.type != "cuda":
            return self._eager(pixels_bhwc)
        if self._graph is None or self._graph.shape != pixels_bhwc.shape:
            self._graph = None
            self._graph = self._record(pixels_bhwc.shape)
        return self._graph(pixels_bhwc) if self._graph is not None else self._eager(pixels_bhwc)

    def _score(self, part_bhwc: np.ndarray) -> Tensor:
        if self.device.type != "cuda":
            return self.forward(torch.tensor(part_bhwc))  # a copy: arrays of Ray's store may not be written
        if self._lanes is None or not self._lanes.fit(part_bhwc.shape):
            self._drop_buffers()
            self._lanes = _Lanes((self.batch_size, *part_bhwc.shape[1:]), self.device)
        with self._lanes.upload(part_bhwc) as pixels_bhwc:
            return self.forward(pixels_bhwc)

    def _eager(self, pixels_bhwc: Tensor) -> Tensor:
        with convolutions(self.precision):
            logits: Tensor = self._network(pixels_bhwc)
        return logits

    def _record(self, shape: torch.Size) -> GraphedNetwork | None:
        try:
            return GraphedNetwork(self._eager, shape, self.device)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as exc:
            _logger.warning("CUDA graphs do not work here, each kernel is launched by itself: %s", exc)
            self._graphs_work = False
            return None

    def _halve(self) -> None:
        self.batch_size //= 2
        _logger.warning("GPU memory ran out: going on with %d images a batch", self.batch_size)
        self._drop_buffers()

    def _drop_buffers(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # copies from and to them may be under way
        self._lanes = self._graph = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _fused(self, checkpoint: Checkpoint, folded: FoldedLFM, required: bool) -> FusedLFM | None:
        """Return the network of kernels, if it can be had and gives what torch gives."""
        try:
            # Triton comes with CUDA builds of torch only.
            from lfm_scan.scoring.cuda.fused import FusedLFM, is_fusible  # noqa: PLC0415

            if not required and not is_fusible(checkpoint.model.config, self.precision):
                return None
            fused = FusedLFM(checkpoint, self.precision).to(self.device)
            _compare(fused, folded, self.precision, _probe(self.device))
        except (ConfigError, torch.OutOfMemoryError):
            raise
        except Exception as exc:  # Triton needs a compiler and a driver, and fails in as many ways as they do
            if required:
                raise ConfigError(f"kernels triton: they do not work here: {exc}; use auto or torch") from exc
            _logger.warning("the fused kernels do not work here, torch's operations are used: %s", exc)
            return None
        return fused

    @torch.inference_mode()
    def _fitting_batch_size(self) -> int:
        if self.device.type != "cuda":
            return 1
        pixels_bhwc = _probe(self.device)
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        self._eager(pixels_bhwc)
        bytes_per_image = (torch.cuda.max_memory_allocated(self.device) - before) // _PROBE_IMAGES
        torch.cuda.empty_cache()
        free_bytes, _ = torch.cuda.mem_get_info(self.device)
        return fitting_batch_size(free_bytes, bytes_per_image + pixels_bhwc[0].nbytes)


def fitting_batch_size(free_bytes: int, bytes_per_image: int) -> int:
    """Return the power of two, at most 256 and at least 1, whose maps fit free memory twice with a fifth to spare."""
    fitting = int(_SHARE_OF_FREE * free_bytes) // (_COPIES * max(1, bytes_per_image))
    return 1 << (max(1, min(fitting, MAX_BATCH)).bit_length() - 1)


class _Lanes:
    """Two buffers on each side of the bus, taken by turns: one is filled and copied while the other is computed."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self._device = device
        self._host = [torch.empty(shape, dtype=torch.uint8, pin_memory=True) for _ in range(_NUM_LANES)]
        self._pixels = [torch.empty(shape, dtype=torch.uint8, device=device) for _ in range(_NUM_LANES)]
        self._copied = [torch.cuda.Event() for _ in range(_NUM_LANES)]  # type: ignore[no-untyped-call]
        self._computed = [torch.cuda.Event() for _ in range(_NUM_LANES)]  # type: ignore[no-untyped-call]
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # Memory is handed out in the order of the current stream: what used it before may not have run yet.
        self._stream.wait_stream(torch.cuda.current_stream(device))
        self._next = 0

    def fit(self, shape: tuple[int, ...]) -> bool:
        """Tell whether a batch of this shape has room."""
        held = self._host[0].shape
        return shape[0] <= held[0] and shape[1:] == tuple(held[1:])

    @contextlib.contextmanager
    def upload(self, part_bhwc: np.ndarray) -> Iterator[Tensor]:
        """Begin to copy a batch, and give it to work that the current stream will do after that."""
        lane, self._next = self._next, (self._next + 1) % _NUM_LANES
        host = self._host[lane][: len(part_bhwc)]
        pixels_bhwc = self._pixels[lane][: len(part_bhwc)]
        self._copied[lane].synchronize()  # the host buffer's last copy; an event never recorded does not wait
        np.copyto(host.numpy(), part_bhwc)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._computed[lane])
            pixels_bhwc.copy_(host, non_blocking=True)
            self._copied[lane].record(self._stream)
        computing = torch.cuda.current_stream(self._device)
        computing.wait_event(self._copied[lane])
        try:
            yield pixels_bhwc
        finally:
            self._computed[lane].record(computing)


@torch.inference_mode()
def _compare(fused: FusedLFM, network: FoldedLFM, precision: Precision, pixels_bhwc: Tensor) -> None:
    """Compare the kernels' map with torch's, and their sum over it with torch's sum over the same map.

    Raises:
        RuntimeError: If they disagree. NaN disagrees.
    """
    map_bhwc = fused.feature_map(pixels_bhwc)
    with convolutions(precision):
        expected_bchw = network.feature_map(pixels_bhwc)
    found_bchw = map_bhwc.permute(0, 3, 1, 2)
    off = float((found_bchw - expected_bchw).norm() / expected_bchw.norm())
    if not off <= _MAX_DISAGREEMENT:
        raise RuntimeError(f"their map is off by {off:.3g} of its norm")
    terms = network.pool(found_bchw).flatten(1) * network.head.weight
    expected = terms.sum(dim=1) + network.head.bias
    off = float(((fused.topk_head(map_bhwc) - expected).abs() / terms.abs().sum(dim=1)).max())
    if not off <= _MAX_HEAD_DISAGREEMENT:
        raise RuntimeError(f"their logits are off by {off:.3g} of the sum of absolute terms")


def _probe(device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (_PROBE_IMAGES, _PROBE_SIDE_PX, _PROBE_SIDE_PX, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(device)
