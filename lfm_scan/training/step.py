"""One step of the optimizer, on a CPU or GPU, in one process or many: the same result however the batch is spread.

A batch is a global thing: each worker holds some of its rows, and works through them in `accumulate` passes. What a
step does depends on the batch alone: losses are sums over rows divided by its total, BatchNorm sees all rows of a pass
whoever holds them, and the draws of RBLD and RKS belong to a row, not to a worker.

Gradients are summed in one flat all-reduce after the last pass, not by DistributedDataParallel: the network has 2.9 MB
of them, too little to be worth hiding behind the backward pass, and DDP arranges its buckets anew after the first step
it sees, so that with three or more workers a resumed training would round otherwise than one that was never stopped.
The losses travel in the same all-reduce, so that all workers agree whether the step may be taken.

Source: LFM section 4 (arXiv 2508.17029): BCE with logits, L = L_A + alpha * L_B, Adam.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Final, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from lfm_scan.errors import ConfigError, TrainingError
from lfm_scan.model.architecture import ArchitectureConfig
from lfm_scan.model.checkpoint import IMAGENET_MEAN, IMAGENET_STD
from lfm_scan.model.network import LFM
from lfm_scan.model.regularizers import Draw, Purpose
from lfm_scan.options import Variant, flag_of
from lfm_scan.scoring.backend import resolve_device
from lfm_scan.training.distill import Teacher, logit_losses, map_losses
from lfm_scan.training.draws import uniform_rows
from lfm_scan.training.norm import norms_of, num_workers, synchronise_norms
from lfm_scan.training.recipe import Recipe
from lfm_scan.training.state import read_state, write_state

LossName = Literal["label", "auxiliary", "logit", "map"]

_LOSS_NAMES: Final[tuple[LossName, ...]] = ("label", "auxiliary", "logit", "map")
_BETAS: Final = (0.9, 0.999)
# Images evaluated at once: as many as a scan takes. One image's maps stay in a CPU's cache.
_CPU_ROWS: Final = 1
_CUDA_ROWS: Final = 128


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """How steps are computed, and what the loss is made of beside the recipe's.

    Attributes:
        device: Where the network trains: "cpu", or "cuda" for the current GPU.
        precision: Of the convolutions. NPR, pooling, head and losses are always fp32.
        accumulate: Passes in which a worker goes through its rows; more take less memory.
        seed: Of the first weights and of all that RBLD and RKS draw.
        freeze_norm: Keep the BatchNorm statistics of the first weights, and normalise by them while training.
        label_weight: Weight of the recipe's own loss.
        logit_weight: Weight of the distance to the teacher's logits.
        map_weight: Weight of the distance to the teacher's projected maps.
        real_weight: Weight of a real image in the label and logit losses, a generated one having 1.
    """

    device: Literal["cpu", "cuda"] = "cpu"
    precision: Literal["fp32", "bf16"] = "fp32"
    accumulate: int = 1
    seed: int = 0
    freeze_norm: bool = False
    label_weight: float = 1.0
    logit_weight: float = 0.0
    map_weight: float = 0.0
    real_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.device not in ("cpu", "cuda"):
            raise ConfigError(f"device must be cpu or cuda, got {self.device!r}")
        if self.precision not in ("fp32", "bf16"):
            raise ConfigError(f"--precision must be fp32 or bf16, got {self.precision!r}")
        if self.accumulate < 1:
            raise ConfigError(f"--accumulate must be at least 1, got {self.accumulate}")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"--seed must be 0 to 2**63 - 1, got {self.seed}")
        for name in ("label_weight", "logit_weight", "map_weight", "real_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{flag_of(name)} must be at least 0 and finite, got {getattr(self, name)}")


@dataclass(frozen=True)
class Batch:
    """A worker's rows of a global batch.

    Attributes:
        images_bchw: (B, 3, S, S) uint8 RGB, S even; B may be 0.
        labels: (B,) 0 is real and 1 is generated, any number type.
        first: Where the rows begin in the global batch; with B they are first to first + B - 1.
        total: Rows of the global batch, over all workers and passes.
    """

    images_bchw: Tensor
    labels: Tensor
    first: int
    total: int

    def __post_init__(self) -> None:
        shape, num_rows = tuple(self.images_bchw.shape), len(self.images_bchw)
        if self.images_bchw.dtype != torch.uint8 or len(shape) != 4 or shape[1] != 3:
            raise ValueError(f"images must be (B, 3, S, S) uint8, got {shape} {self.images_bchw.dtype}")
        if self.labels.shape != (num_rows,):
            raise ValueError(f"labels must be ({num_rows},), one an image, got {tuple(self.labels.shape)}")
        if self.total < 1 or self.first < 0 or self.first + num_rows > self.total:
            raise ValueError(f"rows {self.first} to {self.first + num_rows - 1} are not within a batch of {self.total}")


@dataclass(frozen=True)
class StepResult:
    """What a step was, the same on every worker.

    Attributes:
        step: Its number, from 1.
        loss: What was minimised, over the global batch.
        parts: Its summands before their weights: "label" (L_A), "auxiliary" (L_B), and the teacher's "logit" and "map";
            those that the recipe and settings have.
        gradient_norm: Euclidean norm of the gradient.
        learning_rate: That it was taken with.
    """

    step: int
    loss: float
    parts: dict[LossName, float]
    gradient_norm: float
    learning_rate: float


class Trainer:
    """A network in training: weights, optimizer, schedule.

    In a torch.distributed process group every worker makes one alike and calls `step` and `end_epoch` together; the
    weights of the first worker count.

    On the CPU, the same batches with the same seed and numbers of workers and threads give the same bits, whether or
    not the training was interrupted.

    Args:
        recipe: Architecture, regularizers, loss and schedule.
        settings: Device, precision, passes, seed, distillation.
        initial: Network to start from. Default: random weights.
        teacher: Network to learn from; takes images normalised with ImageNet's mean and standard deviation, as this
            one does.

    Raises:
        ConfigError: If a teacher is asked for and missing or the reverse, or architectures do not fit.
    """

    def __init__(
        self, recipe: Recipe, settings: StepSettings, *, initial: LFM | None = None, teacher: LFM | None = None
    ) -> None:
        _check_teacher(recipe, settings, teacher)
        self._recipe, self._settings = recipe, settings
        self._device = _open_device(settings.device)
        self._mean = torch.tensor(IMAGENET_MEAN, device=self._device).view(3, 1, 1)
        self._std = torch.tensor(IMAGENET_STD, device=self._device).view(3, 1, 1)
        model = _first_model(recipe, settings, initial)
        if not settings.freeze_norm:
            synchronise_norms(model, self._device)
        self._model = model.to(device=self._device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._teacher = None if teacher is None else Teacher(teacher, self._device)
        self._optimizer = _start_adam(self._model)
        self._num_steps = self._num_epochs = 0
        self._weight_of_loss: dict[LossName, float] = {
            "label": settings.label_weight,
            "auxiliary": settings.label_weight * recipe.alpha,
            "logit": settings.logit_weight,
            "map": settings.map_weight,
        }
        self._take_weights_of_first_worker()

    @property
    def num_steps(self) -> int:
        """Steps taken so far."""
        return self._num_steps

    @property
    def num_epochs(self) -> int:
        """Epochs ended so far."""
        return self._num_epochs

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        return self._recipe.learning_rate * self._recipe.decay ** (self._num_epochs // self._recipe.decay_every)

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradient of the last step, over the global batch, by parameter."""
        return {name: value.grad for name, value in self._model.named_parameters() if value.grad is not None}

    def model(self) -> LFM:
        """Return a copy of the network for `save_checkpoint`: on the CPU, in evaluation mode, with plain BatchNorm."""
        made = _new_model(self._recipe.architecture, None, self._settings.seed)
        made.load_state_dict(self._model.state_dict())
        return made.eval()

    def step(self, batch: Batch) -> StepResult:
        """Take one step.

        Args:
            batch: This worker's rows; those of all workers make up the global batch.

        Raises:
            TrainingError: On every worker, if the loss or the gradient of the global batch is not a finite number. The
                network is then as it was before.
        """
        self._set_mode()
        self._optimizer.zero_grad(set_to_none=True)
        statistics = [buffer.clone() for buffer in self._model.buffers()]
        sums = torch.zeros(len(_LOSS_NAMES), device=self._device)
        for index, rows in enumerate(_passes(batch, self._settings.accumulate)):
            losses = self._losses(batch, rows, measure_teacher=self._num_steps == index == 0)
            weights = [self._weight_of_loss[name] for name in _LOSS_NAMES]
            (losses @ losses.new_tensor(weights)).backward()  # type: ignore[no-untyped-call]
            sums += losses.detach()
        self._sum_over_workers(sums)
        result = self._result(sums)
        if not _is_finite(result):
            for buffer, before in zip(self._model.buffers(), statistics, strict=True):
                buffer.copy_(before)
            raise TrainingError(_not_finite(result))
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate
        self._optimizer.step()
        self._num_steps += 1
        return result

    def end_epoch(self) -> None:
        """Move the learning rate along its schedule."""
        self._num_epochs += 1

    @torch.inference_mode()
    def evaluate(self, images_bchw: Tensor) -> Tensor:
        """Return logits (B,) float32 on the CPU of images (B, 3, S, S) uint8, as a scan would: fp32, no regularizers.

        Workers need not call it together.
        """
        self._model.eval()
        num_rows = _CUDA_ROWS if self._device.type == "cuda" else _CPU_ROWS
        logits = [self._model(self._normalised(rows)) for rows in torch.split(images_bchw, num_rows)]
        return torch.cat(logits).cpu()

    def state(self) -> bytes:
        """Return all that `load_state` needs to go on as if nothing had happened, as a safetensors file."""
        return write_state(self._identity(), self._num_steps, self._num_epochs, self._tensors())

    def load_state(self, data: bytes, name: str = "training state") -> None:
        """Go on from a state; device, precision and number of passes and workers may have changed.

        Args:
            data: What `state` returned.
            name: How error messages call it, usually its path.

        Raises:
            CheckpointError: If it is damaged, or of a training with another recipe, seed, loss or teacher.
        """
        state = read_state(data, name, self._identity())
        state.copy_into(self._tensors())
        self._num_steps, self._num_epochs = state.num_steps, state.num_epochs

    def _identity(self) -> dict[str, object]:
        """Return what must be the same for a state to fit: what is computed, not how."""
        of_machine = {"device", "precision", "accumulate"}
        settings = {key: value for key, value in asdict(self._settings).items() if key not in of_machine}
        return {**asdict(self._recipe), **settings, "teacher": self._teacher.sha256 if self._teacher else None}

    def _tensors(self) -> dict[str, Tensor]:
        """Return all tensors that a state has, by name; not copies."""
        tensors = {f"model.{key}": value for key, value in self._model.state_dict().items()}
        for key, parameter in self._model.named_parameters():
            tensors |= {f"adam.{kind}.{key}": value for kind, value in self._optimizer.state[parameter].items()}
        return tensors | ({"teacher.spread_c": self._teacher.spread_c} if self._teacher else {})

    def _set_mode(self) -> None:
        self._model.train()
        if self._settings.freeze_norm:
            for norm in norms_of(self._model):
                norm.eval()

    def _normalised(self, images_bchw: Tensor) -> Tensor:
        x_bchw = images_bchw.to(self._device, non_blocking=True).contiguous(memory_format=torch.channels_last)
        return x_bchw.float().div_(255).sub_(self._mean).div_(self._std)

    def _feature_map(self, model: LFM, x_bchw: Tensor) -> Tensor:
        """Return the projected map, float32. Autocast leaves NPR alone: its difference is never taken in bf16."""
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._settings.precision == "bf16"):
            return model.feature_map(x_bchw).float()

    def _losses(self, batch: Batch, rows: Tensor, *, measure_teacher: bool) -> Tensor:
        """Return this worker's share of each loss, (len(_LOSS_NAMES),): sums over rows divided by the batch's total."""
        x_bchw = self._normalised(batch.images_bchw[rows])
        labels = batch.labels[rows].to(self._device, torch.float32)
        weights = torch.where(labels > 0.5, 1.0, self._settings.real_weight)
        feature_map = self._feature_map(self._model, x_bchw)
        logits, auxiliary = self._model.classify_train(feature_map, self._recipe.rks, self._draw_for(batch, rows))
        losses = {"label": weights * F.binary_cross_entropy_with_logits(logits, labels, reduction="none")}
        if auxiliary is not None:
            losses["auxiliary"] = weights * F.binary_cross_entropy_with_logits(auxiliary, labels, reduction="none")
        if self._teacher:
            with torch.no_grad():
                targets = self._teacher.targets(self._feature_map(self._teacher.model, x_bchw), labels)
            losses["logit"] = weights * logit_losses(logits, targets)
            if self._settings.map_weight:
                if measure_teacher:
                    self._teacher.measure_spread(targets.map_bchw)
                values = self._model.pool(feature_map)
                losses["map"] = map_losses(feature_map, values, targets, self._teacher.spread_c)
        absent = torch.zeros((), device=self._device)
        return torch.stack([losses[name].sum() if name in losses else absent for name in _LOSS_NAMES]) / batch.total

    def _draw_for(self, batch: Batch, rows: Tensor) -> Draw:
        global_rows = (rows + batch.first).tolist()

        def draw(purpose: Purpose, shape: torch.Size) -> Tensor:
            return uniform_rows(self._settings.seed, self._num_steps, purpose, global_rows, shape[1:])

        return draw

    def _sum_over_workers(self, losses: Tensor) -> None:
        """Sum the losses and the gradients of all workers, in place."""
        if num_workers() == 1:
            return
        summands = [*self.gradients().values(), losses]
        flat = torch.cat([summand.flatten() for summand in summands])
        dist.all_reduce(flat)
        totals = torch.split(flat, [summand.numel() for summand in summands])
        for summand, total in zip(summands, totals, strict=True):
            summand.copy_(total.view(summand.shape))

    def _result(self, losses: Tensor) -> StepResult:
        norm = torch.nn.utils.get_total_norm(self.gradients().values())
        *values, gradient_norm = torch.cat([losses, norm.view(1)]).tolist()
        present = {
            "label": True,
            "auxiliary": self._recipe.rks,
            "logit": self._teacher,
            "map": self._settings.map_weight,
        }
        value_of = dict(zip(_LOSS_NAMES, values, strict=True))
        return StepResult(
            step=self._num_steps + 1,
            loss=sum(self._weight_of_loss[name] * value for name, value in value_of.items()),
            parts={name: value for name, value in value_of.items() if present[name]},
            gradient_norm=gradient_norm,
            learning_rate=self.learning_rate,
        )

    def _take_weights_of_first_worker(self) -> None:
        if num_workers() == 1:
            return
        for value in self._model.state_dict().values():
            first = value.contiguous()  # collectives take no channels-last tensors
            dist.broadcast(first, src=0)
            value.copy_(first)


def _check_teacher(recipe: Recipe, settings: StepSettings, teacher: LFM | None) -> None:
    distills = settings.logit_weight > 0 or settings.map_weight > 0
    if distills and teacher is None:
        raise ConfigError("--logit-weight and --map-weight are distances to a teacher: give one, or set both to 0")
    if teacher is not None and not distills:
        raise ConfigError("a teacher without --logit-weight or --map-weight teaches nothing: set one above 0")
    if teacher is not None and settings.map_weight > 0 and teacher.config != recipe.architecture:
        raise ConfigError(
            f"--map-weight compares maps, and the teacher is {teacher.config}, the recipe {recipe.architecture}: use "
            "--map-weight 0, or the teacher's architecture"
        )


def _open_device(device: str) -> torch.device:
    resolved = torch.device(resolve_device(device))
    if resolved.type == "cuda":
        # cuDNN's fastest kernels add in whatever order; a training is to be repeatable.
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
    return resolved


def _first_model(recipe: Recipe, settings: StepSettings, initial: LFM | None) -> LFM:
    """Return the network before the first step, on the CPU, so that every device starts from the same weights."""
    model = _new_model(recipe.architecture, recipe.rbld, settings.seed)
    if initial is not None:
        if initial.config != recipe.architecture:
            raise ConfigError(
                f"the first weights are of {initial.config}, the recipe is {recipe.architecture}: give the same depth, "
                "pooling and k"
            )
        model.load_state_dict(initial.state_dict())
    return model


def _new_model(architecture: ArchitectureConfig, rbld: Variant | None, seed: int) -> LFM:
    """Return a network with random weights, without a trace in torch's global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LFM(architecture, rbld=rbld)


def _start_adam(model: LFM) -> torch.optim.Adam:
    """Return the optimizer with its state made at once, not at its first step: a saved state then is always whole."""
    adam = torch.optim.Adam(model.parameters(), betas=_BETAS)
    for parameter in model.parameters():
        adam.state[parameter] = {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros_like(parameter, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
        }
    return adam


def _passes(batch: Batch, num_passes: int) -> Iterator[Tensor]:
    """Yield which of a worker's rows each pass takes, some perhaps none; as many passes for every worker.

    A row's place in the global batch decides, so that a pass has the same rows however many workers there are. Two
    neighbours go together: they may be a pair, and a pass of one class would spoil BatchNorm's statistics.
    """
    pass_of_row = (batch.first + torch.arange(len(batch.images_bchw))) // 2 % num_passes
    for index in range(min(num_passes, (batch.total + 1) // 2)):
        yield (pass_of_row == index).nonzero().flatten()


def _is_finite(result: StepResult) -> bool:
    return math.isfinite(result.loss) and math.isfinite(result.gradient_norm)


def _not_finite(result: StepResult) -> str:
    parts = ", ".join(f"{name} {value:g}" for name, value in result.parts.items())
    return (
        f"step {result.step}: loss {result.loss:g} ({parts}), gradient norm {result.gradient_norm:g}: not finite "
        f"numbers, so the step was not taken. Resume from the last checkpoint with a --learning-rate below "
        f"{result.learning_rate:g}, or with --precision fp32"
    )
