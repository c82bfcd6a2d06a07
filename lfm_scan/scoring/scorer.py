"""The scorer: score images in a notebook or a service, without Ray."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import asdict
from typing import BinaryIO

import numpy as np
from PIL import Image

from lfm_scan.errors import ConfigError, StorageError
from lfm_scan.imaging import ImageLimits, get_policy
from lfm_scan.scoring.backend import open_backend, resolve_device
from lfm_scan.scoring.prepare import Prepared, image_error, prepare_bytes, prepare_image
from lfm_scan.scoring.result import ImageResult, judge
from lfm_scan.scoring.weights import BUNDLED, read_weights
from lfm_scan.storage import StorageConfig, open_store

Source = bytes | str | os.PathLike[str] | BinaryIO | Image.Image


class Scorer:
    """Scores images one list at a time.

        scorer = lfm_scan.Scorer()
        for result in scorer.score(["a.png", open("b.jpg", "rb"), image]):
            print(result.status, result.score, result.assessable, result.flagged)

    Args:
        weights: "bundled", "published" (the authors' file, fetched once), or the path or s3:// URI of a checkpoint.
        preprocess: Policy id. Default: the one the checkpoint names.
        device: "auto", "cpu" or "cuda".
        threshold: Scores above it are flagged, in [0, 1].
        flag_unassessable: Flag by score alone, even where the score means nothing.
        limits: What one image may cost.
        batch_size: Images a forward pass; the default suits the device.
        storage: How to reach S3, for s3:// sources and weights.

    Raises:
        CheckpointError: If the weights cannot be used.
        ConfigError: If another argument is wrong.
    """

    def __init__(
        self,
        weights: str | os.PathLike[str] = BUNDLED,
        preprocess: str | None = None,
        *,
        device: str = "auto",
        threshold: float = 0.5,
        flag_unassessable: bool = False,
        limits: ImageLimits | None = None,
        batch_size: int | None = None,
        storage: StorageConfig | None = None,
    ) -> None:
        if not 0 <= threshold <= 1:
            raise ConfigError(f"threshold must be 0 to 1, got {threshold}")
        _, self.checkpoint = read_weights(os.fspath(weights), storage)
        self.policy = get_policy(preprocess or self.checkpoint.metadata.preprocess)
        self.limits = limits or ImageLimits()
        self._threshold = threshold
        self._flag_unassessable = flag_unassessable
        self._storage = storage
        self._backend = open_backend(
            self.checkpoint, resolve_device(device), batch_size=batch_size, threshold=threshold
        )

    def score(self, images: Iterable[Source]) -> list[ImageResult]:
        """Score images.

        A bad image is a result with another status, never an exception.

        Args:
            images: File contents as bytes, paths or s3:// URIs, binary file objects, or Pillow images.

        Returns:
            One result each, in order.

        Raises:
            TypeError: If something in the list is none of these.
        """
        chunk: list[Prepared] = []
        results: list[ImageResult] = []
        for image in images:
            chunk.append(self._prepare(image))
            if len(chunk) >= max(64, self._backend.batch_size):  # bounds memory whatever the list's length
                results += self._finish(chunk)
                chunk = []
        return results + self._finish(chunk)

    def _prepare(self, image: Source) -> Prepared:
        if isinstance(image, Image.Image):
            return prepare_image(image, self.policy, self.limits)
        if isinstance(image, (bytes, bytearray, memoryview)):
            return prepare_bytes(bytes(image), self.policy, self.limits)
        if isinstance(image, (str, os.PathLike)):
            return self._prepare_stored(os.fspath(image))
        if hasattr(image, "read"):
            # One byte past the limit tells too_large without reading the rest.
            return prepare_bytes(image.read(self.limits.max_image_bytes + 1), self.policy, self.limits)
        raise TypeError(f"cannot score a {type(image).__name__}: give bytes, a path, a binary file or a Pillow image")

    def _prepare_stored(self, uri: str) -> Prepared:
        try:
            data = open_store(uri, self._storage).get(uri, self.limits.max_image_bytes).data
        except StorageError as exc:
            return Prepared.failed(image_error(exc))
        return prepare_bytes(data, self.policy, self.limits)

    def _finish(self, prepared: list[Prepared]) -> list[ImageResult]:
        pixels = [item.pixels for item in prepared if item.pixels is not None]
        logits = iter(self._backend.logits(np.stack(pixels)) if pixels else ())
        return [self._result(item, None if item.pixels is None else float(next(logits))) for item in prepared]

    def _result(self, item: Prepared, logit: float | None) -> ImageResult:
        metadata = self.checkpoint.metadata
        verdict = judge(
            logit,
            item.info,
            policy=self.policy,
            domain=metadata.domain,
            threshold=self._threshold,
            flag_unassessable=self._flag_unassessable,
            truncated=item.truncated,
        )
        return ImageResult(
            **asdict(item.info),
            **asdict(verdict),
            sha256=item.sha256,
            size_bytes=item.size_bytes,
            status=item.status,
            error=item.error,
            logit=logit,
            preprocess=self.policy.id,
            model_id=metadata.model_id,
            weights_sha256=self.checkpoint.sha256,
        )
