"""The authors' published weights: fetched once, checked by their digest, kept in the user's cache."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path
from typing import Final

from lfm_scan.errors import CheckpointError, StorageError
from lfm_scan.model.checkpoint import MAX_CHECKPOINT_BYTES
from lfm_scan.model.published import PUBLISHED_SHA256
from lfm_scan.storage import StorageConfig, open_store

PUBLISHED: Final = "published"
"""The name of the checkpoint that the paper's authors published."""

PUBLISHED_URL: Final = "https://raw.githubusercontent.com/lmlpy/LFM/HEAD/weights/bs_model.pth"
"""In the repository that the paper names (arXiv 2508.17029), Apache-2.0."""


def read_published(storage: StorageConfig | None = None) -> bytes:
    """Return the authors' file, from the cache or else from their repository.

    It is kept as `lfm-scan/SHA256.pth` below `$XDG_CACHE_HOME`, or else below `~/.cache`. Nothing is used that does
    not have the digest: a damaged copy in the cache is fetched again.

    Args:
        storage: Timeouts of the download.

    Raises:
        CheckpointError: If the file cannot be fetched, or is another one by now.
    """
    kept = _cache_folder() / f"{PUBLISHED_SHA256}.pth"
    with contextlib.suppress(StorageError):
        data = open_store(str(kept)).get(str(kept), max_bytes=MAX_CHECKPOINT_BYTES).data
        if hashlib.sha256(data).hexdigest() == PUBLISHED_SHA256:
            return data
    data = _fetch(storage)
    with contextlib.suppress(StorageError):  # where nothing can be kept, each start fetches it: no reason to fail
        open_store(str(kept)).replace(str(kept), data)
    return data


def _fetch(storage: StorageConfig | None) -> bytes:
    remedy = f"get the file elsewhere (sha256 {PUBLISHED_SHA256}) and give its path as weights"
    try:
        data = open_store(PUBLISHED_URL, storage, patient=False).get(PUBLISHED_URL, max_bytes=MAX_CHECKPOINT_BYTES).data
    except StorageError as exc:
        raise CheckpointError(f"the published weights cannot be fetched: {exc}; {remedy}") from exc
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 != PUBLISHED_SHA256:
        raise CheckpointError(f"the published weights at {PUBLISHED_URL} are another file by now: {sha256}; {remedy}")
    return data


def _cache_folder() -> Path:
    given = os.environ.get("XDG_CACHE_HOME", "")
    # Relative paths in it are to be ignored, says the XDG Base Directory Specification.
    base = Path(given) if os.path.isabs(given) else Path("~/.cache").expanduser()
    return base / "lfm-scan"
