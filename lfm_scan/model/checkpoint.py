"""Reading and writing weights: our safetensors format, and the authors' published PyTorch file.

Torch is loaded for the latter only, and to make the network: other runtimes take the tensors as they are.

A checkpoint is untrusted input. Nothing in it is executed, every tensor is checked by name and shape against the
architecture it claims, and every refusal says what was expected.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import math
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lfm_scan.domain import Domain
from lfm_scan.errors import CheckpointError
from lfm_scan.model import published
from lfm_scan.model.architecture import ArchitectureConfig

if TYPE_CHECKING:
    from torch import Tensor

    from lfm_scan.model.network import LFM

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
        tensors: The network's state dict, of the shapes its architecture asks for.
        metadata: What the file says about itself.
        sha256: Of the whole file, hexadecimal.
    """

    tensors: Mapping[str, np.ndarray]
    metadata: CheckpointMetadata
    sha256: str

    @functools.cached_property
    def model(self) -> LFM:
        """The network in evaluation mode, on the CPU; made once."""
        # Late: it loads torch.
        import torch  # noqa: PLC0415

        from lfm_scan.model.network import LFM  # noqa: PLC0415

        model = LFM(self.metadata.architecture)
        model.load_state_dict({key: torch.from_numpy(value.copy()) for key, value in self.tensors.items()})
        return model.eval()


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
        tensors, metadata = _read_published(data, name, sha256)
    else:
        tensors, metadata = _read_safetensors(data, name)
    return Checkpoint(_checked(tensors, metadata.architecture, name), metadata, sha256)


def save_checkpoint(model: LFM, metadata: CheckpointMetadata) -> bytes:
    """Return the bytes of a safetensors file; the same model and metadata always give the same bytes.

    Raises:
        ValueError: If the metadata names another architecture than the model's.
    """
    if metadata.architecture != model.config:
        raise ValueError(f"metadata says {metadata.architecture}, the model is {model.config}")
    described = {"format": FORMAT_NAME, "format_version": FORMAT_VERSION, **asdict(metadata)}
    import safetensors.numpy  # noqa: PLC0415 - a network can be run where only torch is installed

    return safetensors.numpy.save(tensors_of(model), {_METADATA_KEY: json.dumps(described, sort_keys=True)})


def tensors_of(model: LFM) -> dict[str, np.ndarray]:
    """Return a network's state dict as arrays."""
    return {key: value.detach().cpu().contiguous().numpy() for key, value in model.state_dict().items()}


def _read_safetensors(data: bytes, name: str) -> tuple[dict[str, np.ndarray], CheckpointMetadata]:
    import safetensors.numpy  # noqa: PLC0415

    try:
        tensors = safetensors.numpy.load(data)
    except (safetensors.SafetensorError, KeyError, ValueError) as exc:
        raise CheckpointError(
            f"{name}: neither a safetensors file nor a PyTorch checkpoint, or a damaged one ({exc}); expected a "
            "file written by lfm-scan or the authors' published weights"
        ) from exc
    header_bytes = int.from_bytes(data[:8], "little")
    described = json.loads(data[8 : 8 + header_bytes]).get("__metadata__", {}).get(_METADATA_KEY)
    if described is None:
        raise CheckpointError(f"{name}: a safetensors file, but without lfm-scan metadata: it is of another program")
    return tensors, _parse_metadata(described, name)


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


def _read_published(data: bytes, name: str, sha256: str) -> tuple[dict[str, np.ndarray], CheckpointMetadata]:
    import torch  # noqa: PLC0415 - late, as most checkpoints do without

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
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in loaded.items()
    ):
        raise CheckpointError(f"{name}: expected a state dict of tensors, found {type(loaded).__name__}")
    architecture, tensors = published.translate({key: _array(value) for key, value in loaded.items()}, name)
    metadata = CheckpointMetadata(
        model_id=published.model_id(sha256),
        architecture=architecture,
        preprocess="resize256",
        domain=Domain(lossy=False, resampled=False),
        training={"source": "state dict in the layout of the authors' repository (BMVC 2025)"},
    )
    return tensors, metadata


def _checked(tensors: Mapping[str, np.ndarray], architecture: ArchitectureConfig, name: str) -> dict[str, np.ndarray]:
    """Return the tensors as the network has them, if they fit its architecture."""
    shapes = architecture.shapes()
    problems = [f"{key} is missing" for key in shapes if key not in tensors]
    problems += [f"{key} is not part of the model" for key in tensors if key not in shapes]
    problems += [
        f"{key} has shape {tensors[key].shape}, expected {shape}"
        for key, shape in shapes.items()
        if key in tensors and tensors[key].shape != shape
    ]
    problems += [
        f"{key} holds values that are not finite numbers"
        for key, shape in shapes.items()
        if key in tensors and tensors[key].shape == shape and not _is_finite(tensors[key])
    ]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise CheckpointError(f"{name}: does not fit {architecture}: {'; '.join(problems[:3])}{more}")
    # A count is the one whole number among them.
    return {key: tensors[key].astype(np.float32 if shape else np.int64) for key, shape in shapes.items()}


def _is_finite(value: np.ndarray) -> bool:
    """Tell whether all values are real and finite: a hostile file may hold complex ones."""
    return value.dtype.kind in "fiu" and bool(np.isfinite(value).all())


def _array(tensor: Tensor) -> np.ndarray:
    """Return a tensor as an array; one that no weights can be, by kind or size, as NaNs, which take no memory."""
    import torch  # noqa: PLC0415

    is_plain = tensor.layout == torch.strided and not tensor.is_complex() and not tensor.is_quantized
    if not is_plain or tensor.numel() > MAX_CHECKPOINT_BYTES:  # strides can make a few bytes a large tensor
        return np.broadcast_to(np.float32("nan"), tuple(tensor.shape))
    plain = tensor.detach()
    array: np.ndarray = (plain.float() if plain.is_floating_point() else plain).numpy()
    return array
