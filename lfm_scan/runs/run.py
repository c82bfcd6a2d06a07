"""Opening a run: what can be wrong is found here, in seconds, before anything is started or written."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any, Final

import pyarrow as pa

from lfm_scan.concurrency import OrderedMap, map_in_threads
from lfm_scan.config import ScanConfig, absolute
from lfm_scan.errors import ConfigError, FingerprintError, RunError
from lfm_scan.imaging import get_policy
from lfm_scan.model.checkpoint import Checkpoint
from lfm_scan.options import InputConfig
from lfm_scan.runs import rundir
from lfm_scan.runs.earlier import (
    EarlierRun,
    check_same_scores,
    failed_inputs,
    is_unchanged_since,
    schema_of,
    selection_in,
)
from lfm_scan.runs.plan import Plan, read_plan, write_plan
from lfm_scan.runs.rundir import RunDirectory
from lfm_scan.runs.shard import ShardJob
from lfm_scan.schema import SCHEMA_VERSION
from lfm_scan.scoring.weights import read_weights
from lfm_scan.sources.inputs import Input, input_schema
from lfm_scan.sources.listing import check_sources
from lfm_scan.sources.select import carried_types_of, list_inputs
from lfm_scan.version import __version__

_NOT_RETRIED: Final = frozenset({"since", "retry_failed", "reuse"})


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
        reuse: Earlier run whose scores are taken for identical bytes.
    """

    config: ScanConfig
    run_id: str
    directory: RunDirectory
    weights: bytes
    checkpoint: Checkpoint
    job: ShardJob
    fingerprint: dict[str, Any]
    success: dict[str, Any] | None
    reuse: EarlierRun | None


def open_run(config: ScanConfig) -> Run:
    """Start a run, or pick one up.

    Raises:
        CheckpointError: If the weights cannot be used.
        StorageError: If a source cannot be listed or the output cannot be written.
        FingerprintError: If the run directory belongs to another scan.
    """
    weights, checkpoint = read_weights(config.weights, config.storage)
    policy = get_policy(config.preprocess or checkpoint.metadata.preprocess)
    quick = RunDirectory.at(config.output, config.storage, patient=False)
    existing = quick.read_json(rundir.CONFIG)
    config = _as_retried(config, existing)
    fingerprint = _fingerprint(config, checkpoint, policy.id)
    reuse = _earlier(config.inputs.reuse, config, "--reuse")
    if reuse is not None:
        check_same_scores(reuse, fingerprint)
    if existing is None:
        check_sources(config.sources, config.storage)
        _earlier(config.inputs.since, config, "--since")
        existing = _start(quick, config, fingerprint)
    _check_fingerprint(existing, fingerprint, quick)
    directory = RunDirectory.at(config.output, config.storage)
    job = ShardJob(
        run_id=existing["run_id"],
        directory=directory,
        preprocess=policy.id,
        limits=config.limits,
        inputs=config.inputs,
        storage=config.storage,
        fetch_threads=config.compute.fetch_threads,
        threshold=config.threshold,
        flag_unassessable=config.flag_unassessable,
        model_id=checkpoint.metadata.model_id,
        weights_sha256=checkpoint.sha256,
        domain=checkpoint.metadata.domain,
        log_format=config.log_format,
    )
    success = quick.read_json(rundir.SUCCESS)
    return Run(config, existing["run_id"], directory, weights, checkpoint, job, fingerprint, success, reuse)


def ensure_plan(
    run: Run,
    num_workers: int,
    on_progress: Callable[[int], None] = lambda num_rows: None,
    index_all: OrderedMap = map_in_threads,
) -> Plan:
    """Return the run's plan, listing the sources if there is none yet.

    Args:
        run: As opened.
        num_workers: Cores, or GPUs, that will work on it.
        on_progress: Called with the number of inputs found so far.
        index_all: How to read many archives at once.

    Raises:
        RunError: If the sources hold no input, and are not compared with an earlier run.
        StorageError: If a source cannot be listed, or the plan cannot be written.
    """
    plan = read_plan(run.directory)
    if plan is not None:
        return plan
    inputs, schema = _inputs(run.config, run.directory, index_all)
    return write_plan(
        run.directory,
        inputs,
        schema,
        num_workers=num_workers,
        shard_size=run.config.compute.shard_size,
        on_progress=on_progress,
        may_be_empty=bool(run.config.inputs.since or run.config.inputs.retry_failed),
    )


def todo(run: Run, plan: Plan) -> list[int]:
    """Return the shards without a part: the plan minus one LIST.

    Raises:
        RunError: If there are parts that the plan does not know.
    """
    is_done = bytearray(plan.num_shards)
    for shard, part in run.directory.iter_parts():
        if shard >= plan.num_shards:
            raise RunError(
                f"{part.uri}: not in the plan of {plan.num_shards} shards: the directory holds files of another run; "
                "use a new --output"
            )
        is_done[shard] = 1
    return [shard for shard in range(plan.num_shards) if not is_done[shard]]


def _inputs(config: ScanConfig, directory: RunDirectory, index_all: OrderedMap) -> tuple[Iterator[Input], pa.Schema]:
    """Return what to plan, and the columns of the plan."""
    selection, storage = config.inputs, config.storage
    failed = _earlier(selection.retry_failed, config, "--retry-failed")
    if failed is not None:
        return failed_inputs(failed, selection, storage), schema_of(failed)
    inputs = list_inputs(config.sources, selection, storage, exclude=directory.uri, index_all=index_all)
    since = _earlier(selection.since, config, "--since")
    if since is not None:
        inputs = itertools.filterfalse(is_unchanged_since(since), inputs)
    return inputs, input_schema(carried_types_of(config.sources, selection, storage))


def _as_retried(config: ScanConfig, existing: dict[str, Any] | None) -> ScanConfig:
    """Return what to scan, where a run is to retry an earlier one: that one's inputs were planned by its own selection.

    A run that exists has taken it over: its own fingerprint tells, also when the earlier run is gone.

    Raises:
        ConfigError: If other columns are to be carried.
        RunError: If the earlier run cannot be used.
    """
    chosen = config.inputs
    if chosen.retry_failed is None:
        return config
    fingerprint = existing.get("fingerprint") if existing is not None else None
    if isinstance(fingerprint, dict):
        before = selection_in(fingerprint)
    else:
        before = EarlierRun.open(chosen.retry_failed, config.storage, "--retry-failed").selection
    if chosen.carry and chosen.carry != before.get("carry", ()):
        raise ConfigError("--carry: with --retry-failed, the columns are those that the earlier run carried")
    kept = {
        name: value
        for name, value in before.items()
        if name not in _NOT_RETRIED and getattr(chosen, name) == getattr(InputConfig(), name)
    }
    return replace(config, inputs=replace(chosen, **kept))


def _earlier(uri: str | None, config: ScanConfig, flag: str) -> EarlierRun | None:
    return None if uri is None else EarlierRun.open(uri, config.storage, flag)


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
        "precision": config.compute.precision,
        "threshold": config.threshold,
        "flag_unassessable": config.flag_unassessable,
        "max_image_bytes": config.limits.max_image_bytes,
        "max_image_pixels": config.limits.max_image_pixels,
        "min_side_px": config.limits.min_side_px,
        "score_truncated": config.limits.score_truncated,
        "inputs": _selection(config.inputs),
    }


def _selection(config: InputConfig) -> dict[str, Any]:
    """Return the settings that decide which inputs there are, as JSON values; defaults are left out."""
    chosen = {name: value for name, value in asdict(config).items() if value != getattr(InputConfig(), name)}
    chosen.pop("reuse", None)  # decides only where scores come from
    chosen |= {name: absolute(chosen[name]) for name in ("since", "retry_failed") if name in chosen}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in chosen.items()}


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
