"""A labelled image: what a training plans, checks, and reads."""

from __future__ import annotations

from enum import StrEnum
from typing import Final

import pyarrow as pa

from lfm_scan.sources.inputs import INPUT_SCHEMA

REAL: Final = 0
GENERATED: Final = 1


class Split(StrEnum):
    """What a sample is for."""

    TRAIN = "train"
    VALIDATION = "validation"


SAMPLE_SCHEMA: Final = pa.schema(
    [
        *INPUT_SCHEMA,  # how to get at its bytes; `status` and `error` say why it cannot be used, else "ok" and null
        pa.field("label", pa.int8(), nullable=False),  # REAL or GENERATED
        pa.field("set", pa.string(), nullable=False),  # NAME of NAME/[CLASS/]0_real|1_fake
        pa.field("class", pa.string()),
        pa.field("pair", pa.string()),  # samples with the same pair show the same content and are augmented alike
        pa.field("split", pa.string(), nullable=False),
        # What the check before training saw in the file.
        pa.field("format", pa.string()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("lossy", pa.bool_()),
        pa.field("jpeg_quality", pa.int32()),
        pa.field("quantization", pa.string()),  # hexadecimal digest of a JPEG's quantisation tables
        pa.field("num_bytes", pa.int64()),  # of the file as read
    ]
)
"""Columns of `samples.parquet` in a training's run directory, in the order that ids of samples count."""
