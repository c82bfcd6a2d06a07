"""Measures this machine, and says what holds it back."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from lfm_scan.bench.config import BenchConfig
from lfm_scan.bench.cores import model_rate
from lfm_scan.bench.images import Group, given_group, make_groups, write_distinct
from lfm_scan.bench.pipeline import PipelineTimes, ScanTimes, pipeline_times
from lfm_scan.bench.stages import GroupTimes, Stage, measure_groups
from lfm_scan.config import ScanConfig
from lfm_scan.estimate.machine import processor, usable_cores
from lfm_scan.imaging import ImageLimits, get_policy
from lfm_scan.scoring.backend import resolve_device
from lfm_scan.scoring.weights import read_weights
from lfm_scan.version import __version__

_PIPELINE_SECONDS: Final = 10
"""How much longer the pipeline is measured than a stage."""

_SHARDS_PER_WORKER: Final = 8
_MAX_PIPELINE_IMAGES: Final = 4096
_MAX_PIPELINE_BYTES: Final = 2**30
_TASKS: Final = (Stage.FETCH, Stage.ISOLATED, Stage.COMMIT)
"""What cores do besides the model."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What was measured.

    Attributes:
        cores: That this process may use.
        processor: Their kind.
        device: Where the model ran.
        model_id: Of the checkpoint.
        preprocess: Policy id.
        groups: What images cost, by group.
        model_images_per_s: What all cores, or the GPU, score together.
        pipeline: How fast a scan is.
    """

    cores: int
    processor: str
    device: str
    model_id: str
    preprocess: str
    groups: tuple[GroupTimes, ...]
    model_images_per_s: float
    pipeline: PipelineTimes

    def to_json(self) -> dict[str, Any]:
        """Return the figures as JSON values, with what they hold for."""
        return {
            "lfm_scan_version": __version__,
            "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": {name: version(name) for name in ("torch", "ray", "pillow", "numpy", "pyarrow")},
            **asdict(self),
        }


def bench(
    config: BenchConfig, scan: Callable[[ScanConfig], ScanTimes], on_progress: Callable[[str], None] = lambda what: None
) -> Bench:
    """Measure each stage alone, then all of them as a scan.

    Args:
        config: With which images, and for how long.
        scan: Runs a scan to its end; handed in, because only `lfm_scan.distributed` knows Ray.
        on_progress: Told what is measured next.

    Raises:
        ConfigError: If the device cannot be had.
        CheckpointError: If the weights cannot be used.
        RunError: If none of the user's images can be scored.
        StorageError: If they cannot be listed.
    """
    weights, checkpoint = read_weights(config.weights, config.storage)
    policy = get_policy(config.preprocess or checkpoint.metadata.preprocess)
    device = resolve_device(config.compute.device)
    cores = usable_cores()
    with tempfile.TemporaryDirectory(prefix="lfm-scan-bench-") as name:
        folder = Path(name)
        on_progress("the images")
        groups = (
            make_groups(folder / "images") if config.images is None else [given_group(config, ImageLimits(), policy)]
        )
        times = measure_groups(
            groups, config, checkpoint, policy, device=device, folder=folder / "commits", on_progress=on_progress
        )
        middle = len(groups) // 2
        on_progress("the model on all cores" if device == "cpu" else "the model")
        all_cores = model_rate(config, weights, cores) if device == "cpu" else 1000 / times[middle].ms[Stage.MODEL]
        on_progress("the whole pipeline")
        pipeline = _pipeline(config, groups[middle], times[middle], folder, scan, device=device, cores=cores)
    return Bench(
        cores=cores,
        processor=processor(),
        device=device,
        model_id=checkpoint.metadata.model_id,
        preprocess=policy.id,
        groups=tuple(times),
        model_images_per_s=all_cores,
        pipeline=pipeline,
    )


def _pipeline(
    config: BenchConfig,
    group: Group,
    times: GroupTimes,
    folder: Path,
    scan: Callable[[ScanConfig], ScanTimes],
    *,
    device: str,
    cores: int,
) -> PipelineTimes:
    allowed = cores * 1000 / core_ms(times, device)
    wanted = math.ceil(allowed * config.seconds * _PIPELINE_SECONDS)
    most = min(_MAX_PIPELINE_IMAGES, int(_MAX_PIPELINE_BYTES / group.mean_bytes))
    count = max(cores * _SHARDS_PER_WORKER, min(wanted, most))
    images = folder / "pipeline"
    write_distinct(images, group.files, count)
    settings = ScanConfig(
        (str(images),),
        output=str(folder / "run"),
        weights=config.weights,
        preprocess=config.preprocess,
        compute=config.compute,
        storage=config.storage,
    )
    return pipeline_times(times.name, scan(settings), cores, allowed if device == "cpu" else None)


def core_ms(times: GroupTimes, device: str) -> float:
    """Return the milliseconds of a core that an image takes in a scan: without the model, if that is on a GPU."""
    return sum(times.ms[stage] for stage in _TASKS) + (times.ms[Stage.MODEL] if device == "cpu" else 0.0)


def shares(times: GroupTimes, device: str) -> dict[Stage, float]:
    """Return the share of each stage in what an image takes of a core; of a model on a GPU, none."""
    stages = (*_TASKS, Stage.MODEL) if device == "cpu" else _TASKS
    return {stage: times.ms[stage] / core_ms(times, device) for stage in stages}


def bottleneck(times: GroupTimes, device: str, cores: int) -> str:
    """Return what holds a scan of such images back on this machine: "store", "gpu", or the stage that takes most."""
    by_cores = cores * 1000 / core_ms(times, device)
    if cores * times.fetch_images_per_s < by_cores:
        return "store"
    if device == "cuda" and 1000 / times.ms[Stage.MODEL] < by_cores:
        return "gpu"
    of_cores = shares(times, device)
    return str(max(of_cores, key=lambda stage: of_cores[stage]))


def advice(times: GroupTimes, device: str, cores: int) -> str:
    """Return what to add to this machine for such images, in a sentence."""
    feed = 1000 / sum(times.ms[stage] for stage in _TASKS)  # images a second of a core that does not score
    if device == "cuda":
        rate = 1000 / times.ms[Stage.MODEL]
        needed = math.ceil(rate / feed)
        state = f"the GPU scores {rate:,.0f} images/s and takes {needed:,} cores to feed; there are {cores:,}"
        match bottleneck(times, device, cores):
            case "store":
                return f"{state}. The store is slower than both: {_NEARER}"
            case "gpu":
                return f"{state}: another GPU would help"
            case _:
                return f"{state}: add cores"
    if bottleneck(times, device, cores) == "store":
        return _NEARER
    most = core_ms(times, device) * feed / 1000
    return (
        f"more cores, in proportion; a GPU for the model makes these cores at most {most:,.1f} times as fast: each "
        f"feeds it {feed:,.0f} images/s, so a GPU that scores R images/s takes R / {feed:,.0f} cores"
    )


_NEARER: Final = "more requests in flight (--fetch-threads), or machines nearer to the store"
