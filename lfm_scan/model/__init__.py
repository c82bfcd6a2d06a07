"""LFM, the Local Focus Mechanism network, in pure torch: importable without the rest of the package."""

from lfm_scan.domain import Domain
from lfm_scan.model.checkpoint import Checkpoint, CheckpointMetadata, load_checkpoint, save_checkpoint
from lfm_scan.model.layers import NPR, TopKPool
from lfm_scan.model.network import LFM, ArchitectureConfig
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
