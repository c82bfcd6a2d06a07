"""Where a checkpoint's score means something. Apart from the model, so that decoding workers need not load torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Domain:
    """Which images the checkpoint's score means something for. The scan marks all others not assessable.

    Attributes:
        lossy: Whether it was shown to work on files saved by a lossy codec.
        resampled: Whether its score survives the resize of its own preprocess policy.
    """

    lossy: bool = False
    resampled: bool = False
