"""Where weights come from: the bundled file, the authors' published one, or any path or URI."""

from __future__ import annotations

from importlib import resources
from typing import Final

from lfm_scan.errors import CheckpointError, NotFoundError, OversizeError
from lfm_scan.model.checkpoint import MAX_CHECKPOINT_BYTES, Checkpoint, load_checkpoint
from lfm_scan.scoring.published import PUBLISHED, read_published
from lfm_scan.storage import StorageConfig, open_store

BUNDLED: Final = "bundled"
"""The name of the checkpoint that ships inside the package."""

_BUNDLED_FILE: Final = "lfm-bundled-v1.safetensors"


def read_weights(weights: str, storage: StorageConfig | None = None) -> tuple[bytes, Checkpoint]:
    """Return a checkpoint's file and what it holds.

    Args:
        weights: "bundled", "published", a local path, or an s3:// URI.
        storage: How to reach S3.

    Raises:
        CheckpointError: If it is missing or cannot be used.
        StorageError: If the store does not hand it out.
    """
    if weights == BUNDLED:
        data = resources.files("lfm_scan").joinpath("data", _BUNDLED_FILE).read_bytes()
        return data, load_checkpoint(data, name=f"the bundled {_BUNDLED_FILE}")
    if weights == PUBLISHED:
        data = read_published(storage)
        return data, load_checkpoint(data, name="the published weights")
    try:
        data = open_store(weights, storage, patient=False).get(weights, max_bytes=MAX_CHECKPOINT_BYTES).data
    except NotFoundError as exc:
        raise CheckpointError(
            f"no weights at {weights}; give a path, an s3:// URI, {BUNDLED!r} or {PUBLISHED!r}"
        ) from exc
    except OversizeError as exc:
        raise CheckpointError(f"{weights}: not a checkpoint of this model: {exc}") from exc
    return data, load_checkpoint(data, name=weights)
