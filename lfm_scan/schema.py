"""Result schema, version 2: one row an image. `docs/results.md` explains every column to its reader.

The schema is additive: a later version may append columns, never rename, retype or drop one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import pyarrow as pa

SCHEMA_VERSION: Final = 2

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
        pa.field("lossy_evidence", pa.string()),
    ],
    metadata={"lfm_scan.schema_version": str(SCHEMA_VERSION)},
)


def result_schema(carried: Iterable[pa.Field]) -> pa.Schema:
    """Return the columns of a run's results: `RESULT_SCHEMA`, then what it carries from its sources."""
    return pa.schema([*RESULT_SCHEMA, *carried], metadata=RESULT_SCHEMA.metadata)
