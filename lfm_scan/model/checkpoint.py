"""Reading and writing weights: our safetensors format, and the authors' published PyTorch file.

A checkpoint is untrusted input. Nothing in it is executed, every tensor is checked by name and shape against the
architecture it claims, and every refusal says what was expected.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from lfm_scan.domain import Domain
from lfm_scan.errors import CheckpointError
from lfm_scan.model import published
from lfm_scan.model.network import LFM, ArchitectureConfig

FORMAT_NAME: Final = "lfm-scan-checkpoint"
FORMAT_VERSION: Final = 1
MAX_CHECKPOINT_BYTES: Final = 256 * 2**20
"""The largest architecture is a hundredth of this; anything bigger is not a checkpoint of this model."""

IMAGENET_MEAN: Final = (0.485, 0.456, 0.406)
IMAGENET_STD: Final = (0.229, 0.224, 0.225)

_METADATA_KEY: Final = "lfm_scan"
_ZIP_MAGIC: Final = b"PK\x03\x04"


@dataclass(frozen=True)
class CheckpointMetadata:
    """What a checkpoint says about itself.

    Attributes:
        model_id: Stored with every score; names the training run.
        architecture: The network the tensors fit.
        preprocess: Id of the policy it was validated with, the default for its users.
        domain: Where its score means something.
        mean: Per-channel mean of the RGB input in [0, 1], subtracted first.
        std: Per-channel standard deviation it is then divided by.
        training: Facts about its training: data, recipe, metrics. JSON values only.
    """

    model_id: str
    architecture: ArchitectureConfig = field(default_factory=ArchitectureConfig)
    preprocess: str = "crop256"
    domain: Domain = field(default_factory=Domain)
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    training: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.model_id, str) or not isinstance(self.preprocess, str):
            raise TypeError("model_id and preprocess must be strings")
        if not self.model_id or len(self.model_id) > 200:
            raise ValueError("model_id must have 1 to 200 characters")
        numbers = (*self.mean, *self.std)
        if len(self.mean) != 3 or len(self.std) != 3 or not all(map(math.isfinite, numbers)) or min(self.std) <= 0:
            raise ValueError(f"mean and std must be three numbers, std positive: got {self.mean} and {self.std}")


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint.

    Attributes:
        model: The network in evaluation mode, on the CPU.
        metadata: What the file says about itself.
        sha256: Of the whole file, hexadecimal.
    """

    model: LFM
    metadata: CheckpointMetadata
    sha256: str


def load_checkpoint(data: bytes, name: str = "checkpoint") -> Checkpoint:
    """Read a checkpoint from the bytes of its file.

    Accepts this package's safetensors files and state dicts in the authors' published layout, told apart by
    content. The latter are unpickled by torch's restricted reader, which refuses anything but tensors.

    Args:
        data: The whole file.
        name: How error messages call it, usually its path.

    Raises:
        CheckpointError: If the file is damaged, hostile, of another model, or larger than any checkpoint.
    """
    if len(data) > MAX_CHECKPOINT_BYTES:
        raise CheckpointError(f"{name}: {len(data):,} bytes; a checkpoint has at most {MAX_CHECKPOINT_BYTES:,}")
    sha256 = hashlib.sha256(data).hexdigest()
    if data.startswith(_ZIP_MAGIC):
        model, metadata = _read_published(data, name, sha256)
    else:
        model, metadata = _read_safetensors(data, name)
    return Checkpoint(model.eval(), metadata, sha256)


def save_checkpoint(model: LFM, metadata: CheckpointMetadata) -> bytes:
    """Return the bytes of a safetensors file; the same model and metadata always give the same bytes.

    Raises:
        ValueError: If the metadata names another architecture than the model's.
    """
    if metadata.architecture != model.config:
        raise ValueError(f"metadata says {metadata.architecture}, the model is {model.config}")
    described = {"format": FORMAT_NAME, "format_version": FORMAT_VERSION, **asdict(metadata)}
    tensors = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    return safetensors.torch.save(tensors, {_METADATA_KEY: json.dumps(described, sort_keys=True)})


def _read_safetensors(data: bytes, name: str) -> tuple[LFM, CheckpointMetadata]:
    try:
        tensors = safetensors.torch.load(data)
    except (safetensors.SafetensorError, KeyError, ValueError) as exc:
        raise CheckpointError(
            f"{name}: neither a safetensors file nor a PyTorch checkpoint, or a damaged one ({exc}); expected a "
            "file written by lfm-scan or the authors' published weights"
        ) from exc
    header_bytes = int.from_bytes(data[:8], "little")
    described = json.loads(data[8 : 8 + header_bytes]).get("__metadata__", {}).get(_METADATA_KEY)
    if described is None:
        raise CheckpointError(f"{name}: a safetensors file, but without lfm-scan metadata: it is of another program")
    metadata = _parse_metadata(described, name)
    return _build(metadata.architecture, tensors, name), metadata


def _parse_metadata(described: str, name: str) -> CheckpointMetadata:
    try:
        values: dict[str, Any] = json.loads(described)
        if values.pop("format") != FORMAT_NAME:
            raise ValueError(f"format is not {FORMAT_NAME!r}")
        version = values.pop("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(f"format version {version}, this program reads {FORMAT_VERSION}")
        return CheckpointMetadata(
            **{
                **values,
                "architecture": ArchitectureConfig(**values["architecture"]),
                "domain": Domain(**values["domain"]),
                "mean": tuple(values["mean"]),
                "std": tuple(values["std"]),
            }
        )
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        raise CheckpointError(f"{name}: its lfm-scan metadata cannot be used: {exc}") from exc


def _read_published(data: bytes, name: str, sha256: str) -> tuple[LFM, CheckpointMetadata]:
    try:
        loaded = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as exc:
        raise CheckpointError(
            f"{name}: refused: it holds pickled objects other than tensors, which could run code when loaded; "
            "expected a plain state dict"
        ) from exc
    except (RuntimeError, zipfile.BadZipFile, EOFError, ValueError, KeyError, OSError) as exc:
        reason = str(exc).splitlines()[0] if str(exc) else type(exc).__name__
        raise CheckpointError(f"{name}: a damaged PyTorch file ({reason}); fetch it again") from exc
    if not isinstance(loaded, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in loaded.items()
    ):
        raise CheckpointError(f"{name}: expected a state dict of tensors, found {type(loaded).__name__}")
    architecture, tensors = published.translate(dict(loaded), name)
    metadata = CheckpointMetadata(
        model_id=published.model_id(sha256),
        architecture=architecture,
        preprocess="resize256",
        domain=Domain(lossy=False, resampled=False),
        training={"source": "state dict in the layout of the authors' repository (BMVC 2025)"},
    )
    return _build(architecture, tensors, name), metadata


def _build(architecture: ArchitectureConfig, tensors: Mapping[str, Tensor], name: str) -> LFM:
    model = LFM(architecture)
    expected = model.state_dict()
    problems = [f"{key} is missing" for key in expected if key not in tensors]
    problems += [f"{key} is not part of the model" for key in tensors if key not in expected]
    problems += [
        f"{key} has shape {tuple(tensors[key].shape)}, expected {tuple(value.shape)}"
        for key, value in expected.items()
        if key in tensors and tensors[key].shape != value.shape
    ]
    problems += [
        f"{key} holds values that are not finite numbers"
        for key, value in tensors.items()
        if key in expected and not _is_finite(value)
    ]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise CheckpointError(f"{name}: does not fit {architecture}: {'; '.join(problems[:3])}{more}")
    model.load_state_dict({key: tensors[key].to(value.dtype) for key, value in expected.items()})
    return model


def _is_finite(value: Tensor) -> bool:
    """Tell whether a tensor is dense, real and finite: a hostile file may hold sparse or complex ones."""
    plain = value.layout == torch.strided and not value.is_complex() and not value.is_quantized
    return plain and bool(value.isfinite().all())
