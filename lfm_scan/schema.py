"""Result schema, version 1: one row an image. `docs/results.md` explains every column to its reader.

The schema is additive: a later version may append columns, never rename, retype or drop one.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

import pyarrow as pa

SCHEMA_VERSION: Final = 1


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
    """More bytes or pixels than the limits allow."""
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
    LOSSY = "lossy"
    """The file was saved by a lossy codec, and the checkpoint was only shown lossless files."""
    RESAMPLED = "resampled"
    """The preprocess policy had to resize, and resizing alone moves this checkpoint's score."""


RESULT_SCHEMA: Final = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),
        pa.field("size_bytes", pa.int64()),
        pa.field("etag", pa.string()),
        pa.field("last_modified", pa.timestamp("us", tz="UTC")),
        pa.field("sha256", pa.string()),
        pa.field("format", pa.string()),
        pa.field("mode", pa.string()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("lossy", pa.bool_()),
        pa.field("jpeg_quality", pa.int16()),
        pa.field("exif_orientation", pa.int16()),
        pa.field("num_frames", pa.int32()),
        pa.field("status", pa.string(), nullable=False),
        pa.field("error", pa.string()),
        pa.field("logit", pa.float64()),
        pa.field("score", pa.float64()),
        pa.field("assessable", pa.bool_(), nullable=False),
        pa.field("unassessable_reason", pa.string()),
        pa.field("flagged", pa.bool_(), nullable=False),
        pa.field("preprocess", pa.string(), nullable=False),
        pa.field("model_id", pa.string(), nullable=False),
        pa.field("weights_sha256", pa.string(), nullable=False),
        pa.field("run_id", pa.string(), nullable=False),
        pa.field("shard", pa.int64(), nullable=False),
        pa.field("scored_at", pa.timestamp("us", tz="UTC"), nullable=False),
    ],
    metadata={"lfm_scan.schema_version": str(SCHEMA_VERSION)},
)
