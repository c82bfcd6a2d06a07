"""What became of an input, why a score may mean nothing, why an image counts as lossy: the results' closed lists."""

from __future__ import annotations

from enum import StrEnum


class Status(StrEnum):
    """What became of one input. The list is closed."""

    OK = "ok"
    EMPTY = "empty"
    """Zero bytes."""
    UNSUPPORTED = "unsupported"
    """Not an image, or an image in a format or colour mode the program does not read."""
    CORRUPT = "corrupt"
    """Starts like an image, cannot be decoded."""
    TRUNCATED = "truncated"
    """Cannot be decoded because its end is missing."""
    TOO_LARGE = "too_large"
    """More bytes or pixels than the limits allow, or more memory to decode it."""
    TOO_SMALL = "too_small"
    """Fewer pixels than the model or the preprocess policy needs."""
    MISSING = "missing"
    """Listed, but gone when it was fetched."""
    DENIED = "denied"
    """The store refused to hand it out."""
    TIMEOUT = "timeout"
    """The store, or the decoder, did not finish in time."""
    CRASHED = "crashed"
    """The decoder died on it."""
    ERROR = "error"
    """Anything else; `error` says what."""


class Unassessable(StrEnum):
    """Why a row has `assessable` false. The list is closed."""

    NOT_SCORED = "not_scored"
    """`status` is not ok: there is no score."""
    TRUNCATED = "truncated"
    """The end of the file is missing, and what is there was scored (--score-truncated)."""
    LOSSY = "lossy"
    """The file was saved by a lossy codec, and the checkpoint was only shown lossless files."""
    RESAMPLED = "resampled"
    """The preprocess policy had to resize, and resizing alone moves this checkpoint's score."""


class LossyEvidence(StrEnum):
    """Why a row has `lossy` true. The list is closed."""

    CODEC = "codec"
    """The file itself is coded so."""
    NOTE = "note"
    """Its metadata says that it was made from a JPEG."""
    TRACES = "traces"
    """Its pixels show that they were a JPEG."""
