"""Bytes in, results out, without Ray."""

from lfm_scan.scoring.backend import TorchBackend, resolve_device
from lfm_scan.scoring.prepare import Prepared, prepare_bytes, prepare_image
from lfm_scan.scoring.result import ImageResult, Verdict, judge, sigmoid
from lfm_scan.scoring.scorer import Scorer
from lfm_scan.scoring.weights import BUNDLED, read_weights

__all__ = [
    "BUNDLED",
    "ImageResult",
    "Prepared",
    "Scorer",
    "TorchBackend",
    "Verdict",
    "judge",
    "prepare_bytes",
    "prepare_image",
    "read_weights",
    "resolve_device",
    "sigmoid",
]
