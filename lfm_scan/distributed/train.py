"""Training on Ray Train: workers that step together, Ray Data that decodes for them, and a driver that listens."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias, cast

import numpy as np
import pyarrow as pa
import ray
import ray.data
import ray.train
import ray.train.torch
from numpy.typing import NDArray

from lfm_scan.concurrency import Background
from lfm_scan.distributed.failures import translate
from lfm_scan.distributed.pipeline import map_on_cluster
from lfm_scan.distributed.session import ray_session
from lfm_scan.distributed.versions import check_versions, versions_here
from lfm_scan.errors import ConfigError, RunError, TrainingError
from lfm_scan.options import Device
from lfm_scan.runs import rundir
from lfm_scan.training.config import TrainCompute, TrainConfig
from lfm_scan.training.curves import draw_curves
from lfm_scan.training.fit import Fit, Report, rank_and_world
from lfm_scan.training.images import LoadAll, LoadJob, Part, WorkerImages, load_in_threads
from lfm_scan.training.loading import usable
from lfm_scan.training.prepare import Checked, Training, ensure_samples, open_training
from lfm_scan.training.records import Position
from lfm_scan.training.samples import Split
from lfm_scan.training.scores import Validation
from lfm_scan.training.step import Trainer

_PARTS_PER_WAVE: Final = 1000
"""Batches one Ray Data execution loads: bounds the time to the first and the driver's memory."""

_CPU_SHARE_OF_WORKERS: Final = 0.75
"""Of the cores of a machine without GPUs; the rest is for decoding, and the system shares out what neither uses."""

_CPUS_PER_LOAD: Final = 0.25
_LOOK_EVERY_S: Final = 0.5
_EPOCH: Final = b"epoch"

Event: TypeAlias = Mapping[str, Any]
"""What a training reports: its "kind" is "step" or "epoch"."""


class TrainListener:
    """Hears of a training's progress, in the driver. Does nothing unless overridden."""

    def opened(self, training: Training) -> None:
        """Take note of a training that starts or goes on."""

    def checked(self, checked: Checked) -> None:
        """Take note of what the check found in the data."""

    def progressed(self, event: Event) -> None:
        """Take note of a step or an epoch."""


@dataclass(frozen=True)
class TrainOutcome:
    """What came of a training.

    Attributes:
        run_dir: Where it is.
        model_id: What its checkpoints are called.
        position: Where it ended.
        already_finished: Whether it was finished before.
    """

    run_dir: str
    model_id: str
    position: Position
    already_finished: bool

    @property
    def best_checkpoint(self) -> str:
        """Where the best checkpoint lies."""
        return f"{self.run_dir}/checkpoints/best.safetensors"


def train(config: TrainConfig, listener: TrainListener | None = None, *, debug: bool = False) -> TrainOutcome:
    """Train a model, or go on with a training that was interrupted.

    Args:
        config: Data, recipe, output.
        listener: Hears of progress.
        debug: Let Ray and its workers talk.

    Raises:
        ConfigError: If the workers do not fit the cluster.
        TrainingError: If the data, the losses or the state are not what they should be.
        LFMScanError: If something else stops the training; what is saved stays saved.
    """
    listener = listener or TrainListener()
    training = open_training(config)
    listener.opened(training)
    if training.success is not None:
        return _outcome(training, Position.from_json(training.success["position"]), already_finished=True)
    if config.compute.workers == 0:
        checked = ensure_samples(training)
        listener.checked(checked)
        position = _fit_here(training, checked, listener.progressed)
    else:
        with ray_session(config.compute.ray_address, debug=debug):
            try:
                checked = ensure_samples(training, map_on_cluster)
                listener.checked(checked)
                position = _fit_on_ray(training, checked, listener)
            except (ray.exceptions.RayError, ray.train.TrainingFailedError) as exc:
                raise translate(exc) from exc
    curves = draw_curves(position.history)
    if curves is not None:
        training.directory.write_curves(curves)
    success = {"model_id": training.directory.metadata.model_id, "position": position.to_json()}
    training.directory.directory.create_json(rundir.SUCCESS, success)
    return _outcome(training, position, already_finished=False)


def _outcome(training: Training, position: Position, *, already_finished: bool) -> TrainOutcome:
    run_dir, model_id = training.directory.directory.uri, training.directory.metadata.model_id
    return TrainOutcome(run_dir, model_id, position, already_finished)


def _fit_here(training: Training, checked: Checked, report: Report) -> Position:
    """Train in this process, without Ray."""
    return _fit(training.with_data(checked), checked.samples, training.config.compute.device, report)


def _fit_on_ray(training: Training, checked: Checked, listener: TrainListener) -> Position:
    """Train in workers of the cluster; return where they ended."""
    scaling = _scaling(training.config.compute)
    mailbox = _Mailbox.remote()  # type: ignore[attr-defined]  # Ray's decorator hides it
    with tempfile.TemporaryDirectory(prefix="lfm-scan-train-") as scratch:
        trainer = ray.train.torch.TorchTrainer(
            _train_worker,
            train_loop_config={
                "training": training.with_data(checked),
                "mailbox": mailbox,
                "versions": versions_here(),
            },
            scaling_config=scaling,
            # States go to the run directory, by this program's own door to stores; Ray's needs a place and gets one.
            run_config=ray.train.RunConfig(
                storage_path=scratch,
                failure_config=ray.train.FailureConfig(max_failures=training.config.compute.max_failures),
            ),
        )
        # In a thread, so that this one can listen, and because in the main thread Ray would take Ctrl-C for itself.
        with Background(_fitted(trainer)) as fitting:
            _listen(fitting, mailbox, listener)
    found = training.directory.read_state()
    if found is None:
        raise RunError(f"{training.directory.directory.uri}: the training ended without a state")
    return found[0]


def _fitted(trainer: ray.train.torch.TorchTrainer) -> Iterator[ray.train.Result]:
    """Yield the result of a training: once, for whoever asks for more would train again."""
    yield trainer.fit()


def _listen(fitting: Background[Any], mailbox: Any, listener: TrainListener) -> None:  # noqa: ANN401 - a Ray actor
    """Pass events on until the training ends.

    Raises:
        ray.train.TrainingFailedError: If it failed.
    """
    is_over = False
    while not is_over:
        with contextlib.suppress(TimeoutError):
            fitting.get(timeout_s=_LOOK_EVERY_S)
            is_over = True
        for event in ray.get(mailbox.take.remote()):
            listener.progressed(event)


def _scaling(compute: TrainCompute) -> ray.train.ScalingConfig:
    """Return how many workers there are and what each claims.

    Raises:
        ConfigError: If they do not fit the cluster.
    """
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    num_cpus, num_gpus = resources.get("CPU", 1), resources.get("GPU", 0)
    use_gpu = compute.device == "cuda" or (compute.device == "auto" and num_gpus > 0)
    if use_gpu and compute.workers > num_gpus:
        raise ConfigError(
            f"--workers {compute.workers} need a GPU each, the cluster has {num_gpus:g}: lower --workers, or use "
            "--device cpu"
        )
    cpus = compute.cpus_per_worker or (1.0 if use_gpu else _CPU_SHARE_OF_WORKERS * num_cpus / compute.workers)
    if cpus * compute.workers + _CPUS_PER_LOAD > num_cpus:
        raise ConfigError(
            f"--workers {compute.workers} of {cpus:g} CPUs leave nothing of the cluster's {num_cpus:g} to load images "
            "with: lower --workers or --cpus-per-worker"
        )
    return ray.train.ScalingConfig(
        num_workers=(compute.workers, compute.max_workers) if compute.max_workers else compute.workers,  # type: ignore[arg-type]
        use_gpu=use_gpu,
        resources_per_worker={"CPU": cpus, **({"GPU": 1} if use_gpu else {})},
    )


@ray.remote(num_cpus=0)
class _Mailbox:
    """Where the first worker leaves what happened, for the driver to take."""

    def __init__(self) -> None:
        self._events: list[Event] = []

    def put(self, event: Event) -> None:
        self._events.append(event)

    def take(self) -> list[Event]:
        events, self._events = self._events, []
        return events


def _train_worker(settings: dict[str, Any]) -> None:
    """One worker's part; Ray Train calls it, again after a failure, and then it goes on from the last state."""
    check_versions(settings["versions"])
    training: Training = settings["training"]
    mailbox = settings["mailbox"]
    samples = training.directory.read_samples()
    if samples is None:
        raise TrainingError(f"{training.directory.directory.uri}: its samples are gone")
    context = ray.data.DataContext.get_current()
    context.target_max_block_size = None  # a block is one part, never split
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    device: Device = "cuda" if ray.train.torch.get_device().type == "cuda" else "cpu"
    load_all = functools.partial(load_on_cluster, training.config.compute.load_ahead)
    _fit(training, samples, device, lambda event: mailbox.put.remote(dict(event)), load_all)


def _fit(
    training: Training, samples: pa.Table, device: Device, report: Report, load_all: LoadAll = load_in_threads
) -> Position:
    """Train as a worker of the process group this process is in, or alone."""
    rank, world_size = rank_and_world()
    trainer = Trainer(
        training.recipe,
        training.step_settings(device),
        initial=training.start.model if training.start else None,
        teacher=training.teacher.model if training.teacher else None,
    )
    images = WorkerImages(samples, training.load_job, rank, world_size, load_all)
    measured = samples.take(pa.array(usable(samples, Split.VALIDATION)))
    validation = Validation.of(measured, training.recipe.preprocess)
    with tempfile.TemporaryDirectory(prefix="lfm-scan-board-") as folder:
        fit = Fit(trainer, images, validation, training.directory, training.fit_settings, report, Path(folder))
        return fit.run()


def load_on_cluster(num_ahead: int, job: LoadJob, parts: Iterable[Part]) -> Iterator[NDArray[np.uint8]]:
    """Load parts in Ray Data tasks, wherever the cluster has a CPU: the `LoadAll` of a training on Ray.

    Args:
        num_ahead: Parts held ready before they are asked for.
        job: How samples become pixels.
        parts: What to load.
    """
    remaining = iter(parts)
    while wave := list(itertools.islice(remaining, _PARTS_PER_WAVE)):
        # Not `from_arrow`: it starts tasks that each claim a CPU, and the workers may leave less than one.
        loaded = ray.data.from_items([_packed(part) for part in wave], override_num_blocks=len(wave)).map_batches(
            _load,  # type: ignore[arg-type]  # Ray's types know no further arguments
            fn_args=(job,),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=_CPUS_PER_LOAD,
        )
        for batch in loaded.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=num_ahead):
            yield _pixels_in(cast("pa.Table", batch))


def _packed(part: Part) -> bytes:
    sink = pa.BufferOutputStream()
    table = part.rows.replace_schema_metadata({_EPOCH: json.dumps(part.epoch)})
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    packed: bytes = sink.getvalue().to_pybytes()
    return packed


def _load(parts: pa.Table, job: LoadJob) -> pa.Table:
    (packed,) = parts["item"]
    rows = pa.ipc.open_stream(packed.as_buffer()).read_all()
    images = job.load(Part(rows.replace_schema_metadata(None), json.loads(rows.schema.metadata[_EPOCH])))
    return pa.table({"shape": [list(images.shape)], "pixels": pa.array([images.tobytes()], pa.large_binary())})


def _pixels_in(block: pa.Table) -> NDArray[np.uint8]:
    pixels = np.frombuffer(block["pixels"][0].as_buffer(), np.uint8)
    return pixels.reshape(block["shape"][0].as_py()).copy()  # torch asks for memory it may write to
