"""lfm_scan: find AI-generated images in object storage.

    import lfm_scan

    for result in lfm_scan.Scorer().score(["a.png", "b.jpg"]):
        print(result.status, result.score, result.assessable, result.flagged)

    frame = lfm_scan.read_results("s3://bucket/runs/2026-11")

`lfm_scan.scan` runs a whole scan; it is the only name here that loads Ray, when it is called. Everything is imported on
first use, so that `import lfm_scan` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lfm_scan.lazy import attach
from lfm_scan.version import __version__

if TYPE_CHECKING:
    from lfm_scan.config import ScanConfig
    from lfm_scan.distributed.scan import ScanOutcome, scan
    from lfm_scan.errors import LFMScanError
    from lfm_scan.options import ComputeConfig, ImageLimits, StorageConfig
    from lfm_scan.runs.results import read_results
    from lfm_scan.scoring.result import ImageResult
    from lfm_scan.scoring.scorer import Scorer
    from lfm_scan.status import Status, Unassessable

__all__ = [
    "ComputeConfig",
    "ImageLimits",
    "ImageResult",
    "LFMScanError",
    "ScanConfig",
    "ScanOutcome",
    "Scorer",
    "Status",
    "StorageConfig",
    "Unassessable",
    "__version__",
    "read_results",
    "scan",
]

_HOMES = {
    "ComputeConfig": "lfm_scan.options",
    "ImageLimits": "lfm_scan.options",
    "ImageResult": "lfm_scan.scoring.result",
    "LFMScanError": "lfm_scan.errors",
    "ScanConfig": "lfm_scan.config",
    "ScanOutcome": "lfm_scan.distributed.scan",
    "Scorer": "lfm_scan.scoring.scorer",
    "Status": "lfm_scan.status",
    "StorageConfig": "lfm_scan.options",
    "Unassessable": "lfm_scan.status",
    "read_results": "lfm_scan.runs.results",
    "scan": "lfm_scan.distributed.scan",
}

__getattr__, __dir__ = attach(__name__, __all__, _HOMES)
