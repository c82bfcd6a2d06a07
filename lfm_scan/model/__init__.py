"""LFM, the Local Focus Mechanism network, in pure torch: importable without the rest of the package.

Names are imported on first use: a checkpoint can be read and run by other runtimes without loading torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lfm_scan.lazy import attach

if TYPE_CHECKING:
    from lfm_scan.domain import Domain
    from lfm_scan.model.architecture import ArchitectureConfig
    from lfm_scan.model.checkpoint import Checkpoint, CheckpointMetadata, load_checkpoint, save_checkpoint
    from lfm_scan.model.layers import NPR, TopKPool
    from lfm_scan.model.network import LFM
    from lfm_scan.model.regularizers import RankLinearDropout, random_k_sample

__all__ = [
    "LFM",
    "NPR",
    "ArchitectureConfig",
    "Checkpoint",
    "CheckpointMetadata",
    "Domain",
    "RankLinearDropout",
    "TopKPool",
    "load_checkpoint",
    "random_k_sample",
    "save_checkpoint",
]

_HOMES = {
    "LFM": "lfm_scan.model.network",
    "NPR": "lfm_scan.model.layers",
    "ArchitectureConfig": "lfm_scan.model.architecture",
    "Checkpoint": "lfm_scan.model.checkpoint",
    "CheckpointMetadata": "lfm_scan.model.checkpoint",
    "Domain": "lfm_scan.domain",
    "RankLinearDropout": "lfm_scan.model.regularizers",
    "TopKPool": "lfm_scan.model.layers",
    "load_checkpoint": "lfm_scan.model.checkpoint",
    "random_k_sample": "lfm_scan.model.regularizers",
    "save_checkpoint": "lfm_scan.model.checkpoint",
}

__getattr__, __dir__ = attach(__name__, __all__, _HOMES)
