"""Opening a run: what can be wrong is found here, in seconds, before anything is started or written."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from lfm_scan.config import ScanConfig, absolute
from lfm_scan.errors import FingerprintError, RunError
from lfm_scan.imaging import get_policy
from lfm_scan.model import Checkpoint
from lfm_scan.runs import rundir
from lfm_scan.runs.plan import Plan, read_plan, write_plan
from lfm_scan.runs.rundir import RunDirectory
from lfm_scan.runs.shard import ShardJob
from lfm_scan.schema import SCHEMA_VERSION
from lfm_scan.scoring.weights import read_weights
from lfm_scan.sources import check_sources, list_sources
from lfm_scan.version import __version__


@dataclass(frozen=True)
class Run:
    """An opened run.

    Attributes:
        config: What the user asked for, this time.
        run_id: Of the run, the same every time it goes on.
        directory: Where it lives.
        weights: The checkpoint's file.
        checkpoint: What it holds.
        job: What workers need to know.
        fingerprint: All that decides what the rows say; a resume with another one is refused.
        success: `_SUCCESS.json`, if the run is finished.
    """

    config: ScanConfig
    run_id: str
    directory: RunDirectory
    weights: bytes
    checkpoint: Checkpoint
    job: ShardJob
    fingerprint: dict[str, Any]
    success: dict[str, Any] | None


def open_run(config: ScanConfig) -> Run:
    """Start a run, or pick one up.

    Raises:
        CheckpointError: If the weights cannot be used.
        StorageError: If a source cannot be listed or the output cannot be written.
        FingerprintError: If the run directory belongs to another scan.
    """
    weights, checkpoint = read_weights(config.weights, config.storage)
    policy = get_policy(config.preprocess or checkpoint.metadata.preprocess)
    fingerprint = _fingerprint(config, checkpoint, policy.id)
    quick = RunDirectory.at(config.output, config.storage, patient=False)
    existing = quick.read_json(rundir.CONFIG)
    if existing is None:
        check_sources(config.sources, config.storage)
        existing = _start(quick, config, fingerprint)
    _check_fingerprint(existing, fingerprint, quick)
    directory = RunDirectory.at(config.output, config.storage)
    job = ShardJob(
        run_id=existing["run_id"],
        directory=directory,
        preprocess=policy.id,
        limits=config.limits,
        storage=config.storage,
        fetch_threads=config.compute.fetch_threads,
        threshold=config.threshold,
        flag_unassessable=config.flag_unassessable,
        model_id=checkpoint.metadata.model_id,
        weights_sha256=checkpoint.sha256,
        domain=checkpoint.metadata.domain,
    )
    success = quick.read_json(rundir.SUCCESS)
    return Run(config, existing["run_id"], directory, weights, checkpoint, job, fingerprint, success)


def ensure_plan(run: Run, num_workers: int, on_progress: Callable[[int], None]) -> Plan:
    """Return the run's plan, listing the sources if there is none yet.

    Args:
        run: As opened.
        num_workers: Cores, or GPUs, that will work on it.
        on_progress: Called with the number of objects listed so far.
    """
    plan = read_plan(run.directory)
    if plan is not None:
        return plan
    objects = list_sources(run.config.sources, run.config.storage, exclude=run.directory.uri)
    return write_plan(run.directory, objects, num_workers, run.config.compute.shard_size, on_progress)


def todo(run: Run, plan: Plan) -> list[int]:
    """Return the shards without a part: the plan minus one LIST.

    Raises:
        RunError: If there are parts that the plan does not know.
    """
    done = run.directory.list_parts().keys()
    unknown = sorted(shard for shard in done if shard >= plan.num_shards)
    if unknown:
        raise RunError(
            f"{run.directory.uri}: part {unknown[0]} is not in the plan of {plan.num_shards} shards: the directory "
            "holds files of another run; use a new --output"
        )
    return [shard for shard in range(plan.num_shards) if shard not in done]


def _start(directory: RunDirectory, config: ScanConfig, fingerprint: dict[str, Any]) -> dict[str, Any]:
    """Write config.json, or return the one of a driver that was first."""
    now = datetime.now(UTC)
    value = {
        "run_id": f"{now:%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:8]}",
        "created_at": now.isoformat(timespec="seconds"),
        "lfm_scan_version": __version__,
        "fingerprint": fingerprint,
        "config": config.to_json(),
    }
    if directory.create_json(rundir.CONFIG, value).created:
        return value
    existing = directory.read_json(rundir.CONFIG)
    if existing is None:
        raise RunError(f"{directory.path(rundir.CONFIG)}: taken, but cannot be read back")
    return existing


def _fingerprint(config: ScanConfig, checkpoint: Checkpoint, preprocess: str) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "sources": sorted(absolute(source) for source in config.sources),
        "model_id": checkpoint.metadata.model_id,
        "weights_sha256": checkpoint.sha256,
        "preprocess": preprocess,
        "threshold": config.threshold,
        "flag_unassessable": config.flag_unassessable,
        "max_image_bytes": config.limits.max_image_bytes,
        "max_image_pixels": config.limits.max_image_pixels,
        "min_side_px": config.limits.min_side_px,
    }


def _check_fingerprint(existing: dict[str, Any], fingerprint: dict[str, Any], directory: RunDirectory) -> None:
    theirs = existing.get("fingerprint")
    if not isinstance(theirs, dict) or "run_id" not in existing:
        raise RunError(f"{directory.path(rundir.CONFIG)}: not a run of this program; use a new --output")
    differing = [
        f"{name} was {theirs.get(name)!r}, now {value!r}"
        for name, value in fingerprint.items()
        if theirs.get(name) != value
    ]
    if differing:
        raise FingerprintError(
            f"{directory.uri} belongs to another scan: {'; '.join(differing)}. Use a new --output, or the settings "
            "of that run"
        )
