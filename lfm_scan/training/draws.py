"""Chance that does not depend on how many workers share a batch.

Philox is a counter-based generator (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011): a key and
a counter name a stream of their own. One stream for each seed, step, purpose and row of the global batch, so that a
worker draws for its own rows alone and gets the numbers that any other worker would get for them, on every device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor

from lfm_scan.model.regularizers import Purpose

_STREAMS: Final[dict[Purpose, int]] = {"rbld": 0, "rks": 1}


def uniform_rows(seed: int, step: int, purpose: Purpose, rows: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Return uniform numbers in [0, 1), (len(rows), *shape) float32 on the CPU.

    Args:
        seed: Of the training, 0 to 2**64 - 1.
        step: Steps of the optimizer done so far.
        purpose: Who takes the numbers.
        rows: Of the global batch.
        shape: For each row.
    """
    numbers = np.empty((len(rows), *shape), dtype=np.float32)
    key = np.array([seed, step], dtype=np.uint64)
    for index, row in enumerate(rows):
        # The low half of the counter runs through a stream, the high half names it.
        counter = np.array([0, 0, _STREAMS[purpose], row], dtype=np.uint64)
        np.random.Generator(np.random.Philox(key=key, counter=counter)).random(out=numbers[index], dtype=np.float32)
    return torch.from_numpy(numbers)
