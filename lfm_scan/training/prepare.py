"""Opening a training: what can be wrong is found here, before anything is learned."""

from __future__ import annotations

import hashlib
import json
import subprocess
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from lfm_scan.concurrency import OrderedMap, map_in_threads
from lfm_scan.errors import CheckpointError, FingerprintError, TrainingError
from lfm_scan.model import Checkpoint, CheckpointMetadata
from lfm_scan.model.checkpoint import IMAGENET_MEAN, IMAGENET_STD
from lfm_scan.options import Device, StorageConfig
from lfm_scan.runs import rundir
from lfm_scan.runs.rundir import RunDirectory
from lfm_scan.scoring.backend import resolve_device
from lfm_scan.scoring.weights import read_weights
from lfm_scan.training.check import CheckReport, check_samples
from lfm_scan.training.config import TrainConfig
from lfm_scan.training.fit import FitSettings
from lfm_scan.training.gather import gather_samples, split_off
from lfm_scan.training.images import LoadJob
from lfm_scan.training.leaks import LeakReport, find_leaks, refuse_leaks
from lfm_scan.training.reading import SampleReader
from lfm_scan.training.recipe import Recipe
from lfm_scan.training.records import TrainingDirectory
from lfm_scan.training.samples import Split
from lfm_scan.training.step import StepSettings
from lfm_scan.version import __version__

CHECK: Final = "check.json"
_VERSION: Final = 1


@dataclass(frozen=True)
class Checked:
    """The samples of a training, and what is to be known of them.

    Attributes:
        samples: In `SAMPLE_SCHEMA`.
        report: How many there are, and what cannot be used.
        leaks: What format, size and quality tell of the label.
    """

    samples: pa.Table
    report: CheckReport
    leaks: LeakReport


@dataclass(frozen=True)
class Training:
    """An opened training: all that its workers need, but for the samples.

    Attributes:
        config: What the user asked for, this time.
        fingerprint: All that decides what is learned; a resume with another one is refused.
        recipe: The recipe, with all its values.
        start: Weights to begin with, or None for random ones.
        teacher: Network to learn from, or None.
        directory: Where everything goes.
        success: `_SUCCESS.json`, if the training is finished.
    """

    config: TrainConfig
    fingerprint: dict[str, Any]
    recipe: Recipe
    start: Checkpoint | None
    teacher: Checkpoint | None
    directory: TrainingDirectory
    success: dict[str, Any] | None

    @property
    def load_job(self) -> LoadJob:
        """How its samples become pixels."""
        config = self.config
        reader = SampleReader(limits=config.limits, storage=config.storage, inputs=config.inputs)
        return LoadJob(recipe=self.recipe, augment=config.augment, reader=reader, seed=config.seed)

    def step_settings(self, device: Device) -> StepSettings:
        """How its steps are computed on a device."""
        teacher, compute = self.config.teacher, self.config.compute
        return StepSettings(
            device="cuda" if resolve_device(device) == "cuda" else "cpu",
            precision=compute.precision,
            accumulate=compute.accumulate,
            seed=self.config.seed,
            freeze_norm=teacher.freeze_norm,
            label_weight=teacher.label_weight,
            logit_weight=teacher.logit_weight if self.teacher else 0.0,
            map_weight=teacher.map_weight if self.teacher else 0.0,
            real_weight=teacher.real_weight,
        )

    def with_data(self, checked: Checked) -> Training:
        """Return the training with checkpoints that say what data they come from."""
        metadata = self.directory.metadata
        facts = {**metadata.training, "data": checked.report.to_json()["counts"]}
        return replace(self, directory=replace(self.directory, metadata=replace(metadata, training=facts)))

    @property
    def fit_settings(self) -> FitSettings:
        """When it measures, saves and stops."""
        return FitSettings(
            epochs=self.recipe.epochs,
            metric=self.config.metric,
            patience=self.config.patience,
            checkpoint_every=self.config.checkpoint_every,
        )


def open_training(config: TrainConfig) -> Training:
    """Start a training, or pick one up.

    Raises:
        ConfigError: If the recipe is out of range.
        CheckpointError: If the weights to start from or to learn from cannot be used.
        FingerprintError: If the run directory belongs to another training.
        StorageError: If the output cannot be written.
    """
    recipe = config.recipe.recipe()
    start = _checkpoint("--start", config.teacher.start, config.storage)
    teacher = _checkpoint("--teacher", config.teacher.teacher, config.storage)
    if start is not None and start.metadata.architecture != recipe.architecture:
        raise TrainingError(
            f"--start {config.teacher.start} has {start.metadata.architecture}, the recipe {recipe.architecture}: give "
            "--depth, --pooling and --k that fit it"
        )
    fingerprint = _fingerprint(config, recipe, start, teacher)
    quick = RunDirectory.at(config.output, config.storage, patient=False)
    existing = quick.read_json(rundir.CONFIG)
    if existing is not None:
        _check_fingerprint(existing, fingerprint, quick)
    digest = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:8]
    metadata = CheckpointMetadata(
        model_id=config.model_id or f"lfm-{config.recipe.preset}-{digest}",
        architecture=recipe.architecture,
        preprocess=recipe.preprocess,
        training=_facts(config, recipe, start, teacher),
    )
    directory = TrainingDirectory(RunDirectory.at(config.output, config.storage), metadata)
    success = quick.read_json(rundir.SUCCESS)
    return Training(config, fingerprint, recipe, start, teacher, directory, success)


def ensure_samples(training: Training, map_all: OrderedMap = map_in_threads) -> Checked:
    """Return the training's samples: gathered and checked if they were not before.

    Args:
        training: As opened.
        map_all: How to check many at once.

    Raises:
        TrainingError: If a class is empty, or something but the content tells the label.
        StorageError: If a source cannot be listed.
    """
    config = training.config
    samples = training.directory.read_samples()
    is_new = samples is None
    if samples is None:
        samples = check_samples(_gather(config, map_all), training.recipe, training.load_job.reader, map_all)
    checked = Checked(samples, CheckReport.of(samples), find_leaks(samples))
    if is_new:
        described = {"samples": checked.report.to_json(), "leaks": checked.leaks.to_json()}
        training.directory.replace_json(CHECK, described)
    checked.report.refuse()
    refuse_leaks(checked.leaks, config.max_leak)
    if is_new:
        # Last, so that data that is refused leaves nothing behind that would refuse the data that replaces it.
        training.directory.create_samples(samples)
        settings = {"config": config.to_json(), "fingerprint": training.fingerprint}
        training.directory.directory.create_json(
            rundir.CONFIG, {"kind": "training", "version": __version__, **settings}
        )
    return checked


def _gather(config: TrainConfig, map_all: OrderedMap) -> pa.Table:
    found = gather_samples(config.sources, config.inputs, config.storage, config.labels, Split.TRAIN, index_all=map_all)
    if not config.validation:
        return split_off(found, config.validation_share, config.seed)
    measured = gather_samples(
        config.validation, config.inputs, config.storage, config.labels, Split.VALIDATION, index_all=map_all
    )
    return pa.concat_tables([found, measured])


def _checkpoint(flag: str, weights: str | None, storage: StorageConfig) -> Checkpoint | None:
    """Return the checkpoint that an option names.

    Raises:
        CheckpointError: If it cannot be used, or expects images that are normalised otherwise.
    """
    if weights is None:
        return None
    checkpoint = read_weights(weights, storage)[1]
    if (checkpoint.metadata.mean, checkpoint.metadata.std) != (IMAGENET_MEAN, IMAGENET_STD):
        raise CheckpointError(
            f"{flag} {weights}: it takes images normalised by {checkpoint.metadata.mean} and "
            f"{checkpoint.metadata.std}; a training has ImageNet's mean and standard deviation"
        )
    return checkpoint


def _fingerprint(
    config: TrainConfig, recipe: Recipe, start: Checkpoint | None, teacher: Checkpoint | None
) -> dict[str, Any]:
    """Return all that decides what is learned; a training may go on with other workers on other machines."""
    chosen = ("sources", "validation", "validation_share", "seed", "augment", "labels", "inputs", "limits")
    asked = config.to_json()
    return json.loads(  # type: ignore[no-any-return]  # as it will be read
        json.dumps(
            {
                "version": _VERSION,
                **{name: asked[name] for name in chosen},
                "recipe": asdict(recipe),
                "teacher": {**asked["teacher"], "start": start and start.sha256, "teacher": teacher and teacher.sha256},
            }
        )
    )


def _check_fingerprint(existing: dict[str, Any], fingerprint: dict[str, Any], directory: RunDirectory) -> None:
    if existing.get("kind") != "training":
        raise FingerprintError(f"{directory.uri} is the run directory of a scan: choose another --output")
    theirs = existing.get("fingerprint", {})
    differing = [name for name, value in fingerprint.items() if theirs.get(name) != value]
    if differing:
        raise FingerprintError(
            f"{directory.uri} belongs to a training with other settings ({', '.join(differing)}): choose another "
            "--output, or repeat its command"
        )


def _facts(config: TrainConfig, recipe: Recipe, start: Checkpoint | None, teacher: Checkpoint | None) -> dict[str, Any]:
    """Return what a checkpoint tells of its making; no path or URI of the user's."""
    asked = config.to_json()
    facts = {
        "program": f"lfm-scan {__version__}",
        "git_revision": _git_revision(),
        "preset": config.recipe.preset,
        "recipe": asdict(recipe),
        "augment": asked["augment"],
        "seed": config.seed,
        "precision": config.compute.precision,
    }
    for name, checkpoint in (("start", start), ("teacher", teacher)):
        if checkpoint is not None:
            facts[name] = {"model_id": checkpoint.metadata.model_id, "sha256": checkpoint.sha256}
    if start or teacher:
        weights = asdict(replace(config.teacher, start=None, teacher=None, freeze_norm=False))
        facts["weights"] = {key: value for key, value in weights.items() if key.endswith("_weight")}
        facts["freeze_norm"] = config.teacher.freeze_norm
    return json.loads(json.dumps(facts))  # type: ignore[no-any-return]


def _git_revision() -> str | None:
    """Return the revision of the program's own repository, or None where it was installed from a package."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
