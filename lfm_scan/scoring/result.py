"""From a logit to a verdict: the score, whether it means anything, and whether to flag the image."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lfm_scan.domain import Domain
from lfm_scan.imaging import ImageInfo, PreprocessPolicy
from lfm_scan.status import Status, Unassessable


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a logit amounts to.

    Attributes:
        score: Sigmoid of the logit in [0, 1]; above 0.5 the model says generated. None if not scored.
        assessable: Whether the image lies in the checkpoint's domain, and is all there.
        unassessable_reason: Why not, else None.
        flagged: Whether to call it generated: its score passes the threshold, and means something.
    """

    score: float | None
    assessable: bool
    unassessable_reason: Unassessable | None
    flagged: bool


@dataclass(frozen=True, slots=True)
class ImageResult:
    """The result for one image; attributes are the columns of the results of a scan.

    Attributes:
        sha256: Of the file's bytes; None for a Pillow image, which has no file.
        size_bytes: Of the file.
        format: Content's format, see `ImageInfo` for this and the next seven, and lossy_evidence.
        mode: Stored colour mode.
        width: Stored width in pixels.
        height: Stored height in pixels.
        lossy: Ever saved by a lossy codec, as far as file and pixels tell.
        jpeg_quality: Estimated quality 1 to 100.
        exif_orientation: 1 to 8.
        num_frames: Frames or pages.
        status: What became of it.
        error: What is wrong, if status is not ok; of an ok one, that its end is missing.
        logit: The model's raw output, positive means generated.
        score: Its sigmoid.
        assessable: Whether the score means something for this image.
        unassessable_reason: Why not.
        flagged: Whether it is called generated.
        preprocess: Id of the policy.
        model_id: Of the checkpoint.
        weights_sha256: Of the checkpoint's file.
        lossy_evidence: Why it is lossy: codec, note or traces.
    """

    sha256: str | None
    size_bytes: int | None
    format: str | None
    mode: str | None
    width: int | None
    height: int | None
    lossy: bool | None
    jpeg_quality: int | None
    exif_orientation: int | None
    num_frames: int | None
    status: Status
    error: str | None
    logit: float | None
    score: float | None
    assessable: bool
    unassessable_reason: Unassessable | None
    flagged: bool
    preprocess: str
    model_id: str
    weights_sha256: str
    lossy_evidence: str | None


def sigmoid(logit: float) -> float:
    """Return the score in [0, 1] of a logit, exact at both ends of the range."""
    if logit >= 0:
        return 1 / (1 + math.exp(-logit))
    power = math.exp(logit)
    return power / (1 + power)


def judge(
    logit: float | None,
    info: ImageInfo,
    *,
    policy: PreprocessPolicy,
    domain: Domain,
    threshold: float,
    flag_unassessable: bool,
    truncated: bool = False,
) -> Verdict:
    """Return what a logit amounts to.

    Args:
        logit: The model's raw output, or None for an image without a score.
        info: Facts of the file.
        policy: How it was preprocessed.
        domain: Where the checkpoint's score means something.
        threshold: Scores above it are flagged.
        flag_unassessable: Flag by score alone, even outside the domain.
        truncated: Whether only a part of the image was there to score.
    """
    if logit is None:
        return Verdict(None, False, Unassessable.NOT_SCORED, False)
    score = sigmoid(logit)
    reason = Unassessable.TRUNCATED if truncated else _outside(info, policy, domain)
    flagged = score > threshold and (reason is None or flag_unassessable)
    return Verdict(score, reason is None, reason, flagged)


def _outside(info: ImageInfo, policy: PreprocessPolicy, domain: Domain) -> Unassessable | None:
    if info.lossy and not domain.lossy:
        return Unassessable.LOSSY
    resampled = info.width is not None and info.height is not None and policy.resamples(info.width, info.height)
    if resampled and not domain.resampled:
        return Unassessable.RESAMPLED
    return None
