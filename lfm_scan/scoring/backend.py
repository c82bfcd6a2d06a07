"""Runs the network on preprocessed pixels. One class a runtime, behind one method, `logits`; `open_backend` chooses.

A runtime is loaded when it is chosen.
"""

from __future__ import annotations

import importlib
import logging
import math
from typing import Final, Protocol, get_args

import numpy as np

from lfm_scan.errors import ConfigError
from lfm_scan.model.checkpoint import Checkpoint
from lfm_scan.options import BackendName, Precision, check_precision

_BACKENDS: Final = get_args(BackendName)
_PRECISIONS: Final = get_args(Precision)

_logger: Final = logging.getLogger(__name__)


class Backend(Protocol):
    """The network on one device, ready to score."""

    @property
    def batch_size(self) -> int:
        """Images a forward pass."""
        ...

    def logits(self, pixels_bhwc: np.ndarray) -> np.ndarray:
        """Return one logit an image.

        Args:
            pixels_bhwc: (B, 256, 256, 3) uint8 RGB; B may be 0 or more than the batch size.

        Returns:
            (B,) float32.
        """
        ...


def open_backend(
    checkpoint: Checkpoint,
    device: str,
    *,
    backend: BackendName = "auto",
    precision: Precision = "fp32",
    batch_size: int | None = None,
    num_threads: int | None = None,
    threshold: float = 0.5,
) -> Backend:
    """Return the fastest way to run a checkpoint here.

    Args:
        checkpoint: Weights and their normalisation.
        device: "cpu" or "cuda", as `resolve_device` returns it.
        backend: "auto" is OpenVINO on a CPU where it is installed, else torch; on a GPU, `CudaBackend`.
        precision: Of the convolutions: bf16 or fp32 on a CPU, fp16 or fp32 on a GPU. Where bf16 is not to be had, the
            logits are fp32's, which is only slower: a cluster may have processors of both kinds. A line in the log
            says so.
        batch_size: Images a forward pass on a GPU. A CPU takes one at a time.
        num_threads: Threads on a CPU. Default: one a core. For torch it is set for the whole process.
        threshold: Score above which images are flagged: near it, bf16 is checked in fp32.

    Raises:
        ConfigError: If an argument is out of range, or OpenVINO is asked for where it cannot be.
    """
    _check(device, backend, precision, num_threads, threshold)
    if device == "cpu" and (backend == "openvino" or (backend == "auto" and has_openvino())):
        from lfm_scan.scoring import openvino_backend  # noqa: PLC0415 - it may not be installed

        if precision == "bf16" and not openvino_backend.supports_bf16():
            _logger.warning("precision bf16: this processor does not compute in bfloat16; scoring in fp32")
            precision = "fp32"
        return openvino_backend.OpenVINOBackend(
            checkpoint, precision=precision, num_threads=num_threads, decision=_logit(threshold)
        )
    if device == "cpu" and backend == "auto":
        _logger.warning("OpenVINO is not installed: the torch backend takes twice the time; pip install openvino")
    if device == "cuda" and backend == "auto":
        from lfm_scan.scoring.cuda.backend import CudaBackend  # noqa: PLC0415 - a CPU has no use for it

        return CudaBackend(checkpoint, precision=precision, batch_size=batch_size)
    if precision == "bf16":
        _logger.warning("precision bf16: the torch backend on %s computes in fp32 only", device)
    import torch  # noqa: PLC0415

    from lfm_scan.scoring.torch_backend import TorchBackend  # noqa: PLC0415

    if device == "cpu" and num_threads is not None:
        torch.set_num_threads(num_threads)
    return TorchBackend(checkpoint, device, batch_size)


def has_openvino() -> bool:
    """Return whether OpenVINO is installed and can be loaded."""
    try:
        importlib.import_module("openvino")
    except ImportError:  # also where its libraries do not fit the system's
        return False
    return True


def resolve_device(device: str) -> str:
    """Return "cpu" or "cuda" for "auto", "cpu" or "cuda", by what this process sees.

    Raises:
        ConfigError: If "cuda" is asked for and there is no usable GPU, or the name is unknown.
    """
    if device == "cpu":
        return device
    if device not in ("auto", "cuda"):
        raise ConfigError(f"device must be auto, cpu or cuda, got {device!r}")
    import torch  # noqa: PLC0415

    if torch.cuda.is_available():
        return "cuda"
    if device == "cuda":
        raise ConfigError("device cuda: torch finds no usable GPU here; use --device cpu, or a CUDA build of torch")
    return "cpu"


def _check(device: str, backend: str, precision: Precision, num_threads: int | None, threshold: float) -> None:
    if backend not in _BACKENDS:
        raise ConfigError(f"backend must be one of {', '.join(_BACKENDS)}, got {backend!r}")
    if precision not in _PRECISIONS:
        raise ConfigError(f"precision must be one of {', '.join(_PRECISIONS)}, got {precision!r}")
    check_precision(device, precision)
    if num_threads is not None and num_threads < 1:
        raise ConfigError(f"num_threads must be at least 1, got {num_threads}")
    if not 0 <= threshold <= 1:
        raise ConfigError(f"threshold must be 0 to 1, got {threshold}")
    if backend == "openvino" and device != "cpu":
        raise ConfigError(f"backend openvino runs on a CPU only, not on {device}: use backend auto, or device cpu")
    if backend == "openvino" and not has_openvino():
        raise ConfigError("backend openvino: it is not installed here; pip install openvino, or use backend torch")


def _logit(score: float) -> float:
    if score in (0, 1):
        return math.copysign(math.inf, score - 0.5)
    return math.log(score / (1 - score))
