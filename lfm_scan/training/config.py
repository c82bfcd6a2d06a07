"""The one configuration object of a training, for the command line, `jobs/train.py` and the library alike.

It imports nothing heavy: `--help` is made from it.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from cyclopts import Parameter

from lfm_scan.errors import ConfigError
from lfm_scan.options import Device, ImageLimits, InputConfig, Pooling, Preset, StorageConfig, Variant, flag_of
from lfm_scan.training.augment import AugmentConfig
from lfm_scan.training.columns import LabelColumns

if TYPE_CHECKING:
    from lfm_scan.training.recipe import Recipe

Metric = Literal["mean_auc", "mean_ap", "mean_acc", "pooled_auc", "loss"]


@dataclass(frozen=True, kw_only=True)
class RecipeConfig:
    """The recipe: a named one, and what to change in it.

    Attributes:
        preset: paper: resize to 256, crop 224, RBLD and RKS, as the paper has it. published: the same as the authors'
            code runs it. crop: the paper's, on the pixels as they are.
        train_preprocess: How an image becomes 256x256 before the crop: resize256 or crop256 (no resize).
        crop_px: Side of the random crop the network sees, in pixels; even, 48 to 256.
        epochs: Passes over the training images.
        train_batch_size: Images a step, over all workers.
        learning_rate: Of Adam, at the start.
        decay: What the learning rate is multiplied by...
        decay_every: ...after so many epochs.
        alpha: Weight of the auxiliary loss of random-k sampling.
        rbld: Variant of rank-based linear dropout.
        rks: Variant of random-k sampling.
        depth: Convolutions in SNet, 4 to 8.
        pooling: How the map becomes features.
        k: Values a channel that top-k pooling keeps, 1 to 256.
    """

    preset: Preset = "paper"
    train_preprocess: Literal["resize256", "crop256"] | None = None
    crop_px: int | None = None
    epochs: int | None = None
    train_batch_size: int | None = None
    learning_rate: float | None = None
    decay: float | None = None
    decay_every: int | None = None
    alpha: float | None = None
    rbld: Variant | Literal["none"] | None = None
    rks: Variant | Literal["none"] | None = None
    depth: int | None = None
    pooling: Pooling | None = None
    k: int | None = None

    def recipe(self) -> Recipe:
        """Return the whole recipe.

        Raises:
            ConfigError: If a value is out of range.
        """
        from lfm_scan.training.recipe import recipe_of  # noqa: PLC0415 - loads torch

        given = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "preset"}
        renamed = {_RECIPE_FIELDS.get(name, name): value for name, value in given.items() if value is not None}
        architecture: dict[str, Any] = {name: renamed.pop(name) for name in _ARCHITECTURE if name in renamed}
        if architecture.get("pooling", "tkp") != "tkp":
            renamed = {"rbld": "none", "rks": "none", **renamed}
        return recipe_of(
            self.preset,
            architecture,
            {name: None if value == "none" else value for name, value in renamed.items()},
        )


_RECIPE_FIELDS: Final = {"train_preprocess": "preprocess", "train_batch_size": "batch_size"}
_ARCHITECTURE: Final = ("depth", "pooling", "k")


@dataclass(frozen=True, kw_only=True)
class TrainCompute:
    """What the training may use of the machine or cluster.

    Attributes:
        workers: Processes that train together; 0 trains in this one, without Ray.
        max_workers: Grow to so many while the cluster has room, and shrink to --workers when it has not.
        device: Where the model trains; auto takes GPUs if the cluster has any, one a worker.
        precision: bf16 computes convolutions in bfloat16; residuals, pooling, head and loss stay fp32.
        accumulate: Forward and backward passes a step, to fit a large batch into memory.
        cpus_per_worker: CPUs a worker claims. Default: three quarters of the cores shared out on CPUs, 1 beside a GPU.
        load_ahead: Batches loaded ahead of each worker.
        max_failures: Lost workers to recover from before giving up.
        ray_address: Of a running Ray cluster. Default: the one this job runs in, else a new one on this machine.
    """

    workers: int = 1
    max_workers: int | None = None
    device: Device = "auto"
    precision: Literal["fp32", "bf16"] = "bf16"
    accumulate: int = 1
    cpus_per_worker: float | None = None
    load_ahead: int = 4
    max_failures: int = 3
    ray_address: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("workers", 0), ("accumulate", 1), ("load_ahead", 1), ("max_failures", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{flag_of(name)} must be at least {least}, got {getattr(self, name)}")
        if self.max_workers is not None and not 1 <= self.workers <= self.max_workers:
            raise ConfigError(f"--max-workers {self.max_workers} needs --workers from 1 to as many, got {self.workers}")
        if self.cpus_per_worker is not None and self.cpus_per_worker <= 0:
            raise ConfigError(f"--cpus-per-worker must be above 0, got {self.cpus_per_worker}")


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """Learning from another checkpoint.

    Attributes:
        start: Weights to begin with: a path, a URI, bundled or published. Default: random ones.
        freeze_norm: Keep the statistics of the batch normalisation that --start brings.
        teacher: Checkpoint whose logits the model learns to give, where they are right about the image.
        label_weight: Weight of the loss on the labels.
        logit_weight: Weight of the squared error against the teacher's logits, squashed by tanh(logit / 15).
        map_weight: Weight of the squared error against the teacher's projected map.
        real_weight: Weight of a real image in the losses; a generated one counts 1.
    """

    start: str | None = None
    freeze_norm: bool = False
    teacher: str | None = None
    label_weight: float = 1.0
    logit_weight: float = 1.0
    map_weight: float = 0.0
    real_weight: float = 1.0

    def __post_init__(self) -> None:
        for name in ("label_weight", "logit_weight", "map_weight"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{flag_of(name)} must be at least 0, got {getattr(self, name)}")
        if self.real_weight <= 0:
            raise ConfigError(f"--real-weight must be above 0, got {self.real_weight}")
        if self.freeze_norm and self.start is None:
            raise ConfigError("--freeze-norm keeps the statistics of --start: give a checkpoint to start from")


@dataclass(frozen=True)
class TrainConfig:
    """What to train on, how, and where the checkpoints go.

    Attributes:
        sources: Folders or prefixes with NAME/[CLASS/]0_real and 1_fake, labelled manifests, or labelled scan results.
        output: Run directory, local or s3://. A training that was interrupted there goes on.
        validation: Sources to measure on after each epoch. Default: a share of the training images.
        validation_share: Without --validation, the share of each set, whole pairs, that is measured on.
        model_id: Name of the model, stored with every score it gives. Default: lfm-PRESET and a digest of the run.
        seed: Of the weights, the order, the crops, the augmentations and the dropouts.
        metric: What the best checkpoint is chosen by: mean_auc, mean_ap and mean_acc are means over the sets.
        patience: Stop after so many epochs in which the metric did not rise.
        checkpoint_every: Save the state for a resume after so many steps, besides after each epoch.
        max_leak: Refuse data whose format, size or quality tells more than this share of the label, 0 to 1.
        recipe: The recipe.
        augment: What is done to images, both classes alike.
        teacher: Learning from another checkpoint.
        labels: Where labels are.
        inputs: Which of the sources' objects are inputs.
        limits: What one image may cost.
        compute: What the training may use.
        storage: How to reach S3.
    """

    sources: tuple[str, ...] = ()
    _: KW_ONLY
    output: Annotated[str, Parameter(alias="-o")]
    validation: tuple[str, ...] = ()
    validation_share: float = 0.1
    model_id: str | None = None
    seed: int = 0
    metric: Metric = "mean_auc"
    patience: int | None = None
    checkpoint_every: int = 500
    max_leak: float = 0.1
    recipe: Annotated[RecipeConfig, Parameter(name="*", group="Recipe")] = field(default_factory=RecipeConfig)
    augment: Annotated[AugmentConfig, Parameter(name="*", group="Augmentations")] = field(default_factory=AugmentConfig)
    teacher: Annotated[TeacherConfig, Parameter(name="*", group="Start and teacher")] = field(
        default_factory=TeacherConfig
    )
    labels: Annotated[LabelColumns, Parameter(name="*", group="Labels")] = field(default_factory=LabelColumns)
    inputs: Annotated[InputConfig, Parameter(name="*", group="Inputs")] = field(default_factory=InputConfig)
    limits: Annotated[ImageLimits, Parameter(name="*", group="Limits on one image")] = field(
        default_factory=ImageLimits
    )
    compute: Annotated[TrainCompute, Parameter(name="*", group="Compute")] = field(default_factory=TrainCompute)
    storage: Annotated[StorageConfig, Parameter(name="*", group="Object store")] = field(default_factory=StorageConfig)

    def __post_init__(self) -> None:
        if not self.sources:
            raise ConfigError("nothing to train on: give folders with 0_real and 1_fake, or labelled manifests")
        if not self.output:
            raise ConfigError("--output names no run directory")
        if not self.validation and not 0 < self.validation_share < 1:
            raise ConfigError(f"--validation-share must be between 0 and 1, got {self.validation_share}")
        for name in ("patience", "checkpoint_every"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{flag_of(name)} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.max_leak <= 1:
            raise ConfigError(f"--max-leak must be 0 to 1, got {self.max_leak}")
        for name in ("since", "retry_failed", "reuse"):
            if getattr(self.inputs, name) is not None:
                raise ConfigError(f"{flag_of(name)} is for scans: a training reads all its images")

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)
