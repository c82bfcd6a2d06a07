"""The authors' checkpoint layout: one table from their names to ours.

`covn1_1` is their spelling. The two fixed NPR kernels are stored with the weights; they must be what NPR is by
definition, or the file is of another model.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from lfm_scan.errors import CheckpointError
from lfm_scan.model.architecture import ArchitectureConfig

PUBLISHED_SHA256: Final = "903036979adb186c6baf48b6214092540161d7b0194d1b7bea5592a072b49317"
PUBLISHED_MODEL_ID: Final = "lfm-bmvc2025"

_NPR_KERNELS: Final = ("downsample_conv.weight", "upsample_conv.weight")
_CONV_ENTRIES: Final = ("weight", "bias")
_NORM_ENTRIES: Final = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
_PROJECTION: Final = "covn1_1.weight"
_HEAD: Final = "fc1.weight"


def key_table(num_blocks: int) -> dict[str, str]:
    """Return the authors' key for each of ours, for a network of `num_blocks` conv blocks."""
    table = {"projection.weight": _PROJECTION, "head.weight": _HEAD, "head.bias": "fc1.bias"}
    for index in range(num_blocks):
        theirs = f"cnn.layer{index + 1}"
        table |= {f"blocks.{index}.conv.{entry}": f"{theirs}.0.{entry}" for entry in _CONV_ENTRIES}
        table |= {f"blocks.{index}.norm.{entry}": f"{theirs}.1.{entry}" for entry in _NORM_ENTRIES}
    return table


def model_id(sha256: str) -> str:
    """Name the authors' own file as such, and any other file of the same layout by its hash."""
    return PUBLISHED_MODEL_ID if sha256 == PUBLISHED_SHA256 else f"lfm-{sha256[:12]}"


def translate(tensors: dict[str, np.ndarray], name: str) -> tuple[ArchitectureConfig, dict[str, np.ndarray]]:
    """Return the architecture and the tensors under our names.

    Keys that the table does not know are kept, so that the caller's check names them.

    Raises:
        CheckpointError: If the file does not have the authors' layout.
    """
    num_blocks = sum(key.startswith("cnn.layer") and key.endswith(".0.weight") for key in tensors)
    head = tensors.get(_HEAD)
    if num_blocks == 0 or head is None or _PROJECTION not in tensors:
        raise CheckpointError(
            f"{name}: a PyTorch state dict, but not LFM's: expected keys such as cnn.layer1.0.weight, {_PROJECTION} "
            f"and {_HEAD}, found {', '.join(sorted(tensors)[:3]) or 'none'}"
        )
    for key in _NPR_KERNELS:
        _check_npr_kernel(tensors.pop(key, None), key, name)
    try:
        k = head.shape[-1] // tensors[_PROJECTION].shape[0]
        architecture = ArchitectureConfig(depth=num_blocks + 1, pooling="tkp", k=k)
    except (ValueError, ZeroDivisionError, IndexError) as exc:
        raise CheckpointError(f"{name}: not an architecture of LFM: {exc}") from exc
    ours_of = {theirs: ours for ours, theirs in key_table(num_blocks).items()}
    return architecture, {ours_of.get(key, key): value for key, value in tensors.items()}


def _check_npr_kernel(kernel: np.ndarray | None, key: str, name: str) -> None:
    expected = np.zeros((3, 3, 2, 2))
    for channel in range(3):
        if key.startswith("downsample"):
            expected[channel, channel, 0, 0] = 1
        else:
            expected[channel, channel] = 1
    if kernel is None or not np.array_equal(kernel, expected):
        raise CheckpointError(f"{name}: {key} is not the fixed NPR kernel: the file is of another model")
