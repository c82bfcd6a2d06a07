"""The step: against plain autograd and Adam, across passes and workers, across interruptions."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor
from torch.nn import functional as F

from lfm_scan.errors import CheckpointError, ConfigError, TrainingError
from lfm_scan.model import LFM, ArchitectureConfig, CheckpointMetadata, load_checkpoint, save_checkpoint
from lfm_scan.model.checkpoint import IMAGENET_MEAN, IMAGENET_STD
from lfm_scan.training.recipe import Recipe
from lfm_scan.training.step import Batch, StepResult, StepSettings, Trainer

SMALL: Final = ArchitectureConfig(depth=4, k=4)
RECIPE: Final = Recipe(crop_px=48, batch_size=8, architecture=SMALL)
PLAIN: Final = dataclasses.replace(RECIPE, rbld=None, rks=None)
SIDE: Final = 48
NUM_ROWS: Final = 8
DISTILL: Final = StepSettings(logit_weight=2.0, map_weight=1.0, label_weight=0.2, real_weight=3.0)


def images(seed: int, num_rows: int = NUM_ROWS) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (num_rows, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)


def batch(seed: int, first: int = 0, stop: int = NUM_ROWS) -> Batch:
    """Rows first to stop - 1 of the global batch with this seed; its labels alternate but for the last."""
    labels = torch.tensor([0, 1, 0, 1, 0, 1, 0, 0])
    return Batch(images(seed)[first:stop], labels[first:stop], first, NUM_ROWS)


def normalised(pixels: Tensor) -> Tensor:
    mean, std = torch.tensor(IMAGENET_MEAN).view(3, 1, 1), torch.tensor(IMAGENET_STD).view(3, 1, 1)
    return (pixels.float() / 255 - mean) / std


def network(seed: int) -> LFM:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LFM(SMALL)


def weights_of(trainer: Trainer) -> Mapping[str, Tensor]:
    return trainer.model().state_dict()


def assert_same_bits(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [key for key, value in one.items() if not torch.equal(value, other[key])]
    assert not different


def test_a_step_is_bce_and_adam() -> None:
    trainer = Trainer(PLAIN, StepSettings(), initial=network(1))
    expected = network(1)
    adam = torch.optim.Adam(expected.parameters(), lr=1e-4, betas=(0.9, 0.999))
    for seed in range(2):
        rows = batch(seed)
        scores = torch.sigmoid(expected(normalised(rows.images_bchw)).double())
        loss = -torch.where(rows.labels == 1, scores, 1 - scores).log().mean()
        adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        result = trainer.step(rows)
        assert result.loss == pytest.approx(loss.item(), rel=1e-5)
        assert result.parts == {"label": pytest.approx(loss.item(), rel=1e-5)}
        for name, value in expected.named_parameters():
            torch.testing.assert_close(trainer.gradients()[name], value.grad, rtol=1e-3, atol=1e-6)
        if seed == 0:
            norm = sum(value.grad.square().sum().item() for value in expected.parameters() if value.grad is not None)
            assert result.gradient_norm == pytest.approx(norm**0.5, rel=1e-4)
        adam.step()
    for key, value in expected.state_dict().items():
        # BatchNorm takes a convolution's bias off again: its gradient is noise, which Adam scales up.
        if not key.endswith(("conv.bias", "running_mean")):
            torch.testing.assert_close(weights_of(trainer)[key], value, rtol=1e-4, atol=2e-6)


def test_the_loss_is_l_a_plus_alpha_l_b() -> None:
    result = Trainer(RECIPE, StepSettings()).step(batch(0))
    assert result.parts.keys() == {"label", "auxiliary"}
    assert result.parts["label"] != result.parts["auxiliary"]
    assert result.loss == pytest.approx(result.parts["label"] + 0.1 * result.parts["auxiliary"], rel=1e-6)


def test_a_real_image_counts_as_often_as_asked() -> None:
    once = Trainer(PLAIN, StepSettings(), initial=network(1)).step(batch(0)).loss
    thrice = Trainer(PLAIN, StepSettings(real_weight=3.0), initial=network(1)).step(batch(0)).loss
    model = network(1).train()
    logits = model(normalised(images(0))).detach()
    of_reals = F.softplus(logits)[batch(0).labels == 0].sum().item() / NUM_ROWS
    assert thrice - once == pytest.approx(2 * of_reals, rel=1e-4)


@pytest.mark.parametrize("accumulate", [2, 3, 9])
def test_passes_change_nothing_but_batchnorms_statistics(accumulate: int) -> None:
    initial = network(1)
    whole = Trainer(RECIPE, StepSettings(freeze_norm=True), initial=initial)
    parts = Trainer(RECIPE, StepSettings(freeze_norm=True, accumulate=accumulate), initial=initial)
    assert parts.step(batch(0)).loss == pytest.approx(whole.step(batch(0)).loss, rel=1e-6)
    for name, gradient in whole.gradients().items():
        torch.testing.assert_close(parts.gradients()[name], gradient, rtol=1e-4, atol=1e-6)


def test_frozen_statistics_stay_while_the_weights_learn() -> None:
    trainer = Trainer(RECIPE, StepSettings(freeze_norm=True), initial=network(1))
    trainer.step(batch(0))
    before, after = network(1).state_dict(), weights_of(trainer)
    moved = {key for key, value in after.items() if not torch.equal(value, before[key])}
    assert not {key for key in moved if "running" in key or "num_batches" in key}
    assert {key for key in after if key.endswith("weight")} <= moved


def test_the_learning_rate_falls_by_a_tenth_every_ten_epochs() -> None:
    trainer = Trainer(dataclasses.replace(PLAIN, learning_rate=1.0), StepSettings())
    rates = []
    for _ in range(21):
        rates.append(trainer.learning_rate)
        trainer.end_epoch()
    assert rates == [1.0] * 10 + [0.9] * 10 + [pytest.approx(0.81)]
    assert trainer.step(batch(0)).learning_rate == pytest.approx(0.81)
    # Adam's first step moves each weight by the learning rate, whatever the gradient.
    moved = (trainer.model().head.weight - Trainer(PLAIN, StepSettings()).model().head.weight).abs()
    assert moved.median().item() == pytest.approx(0.81, rel=1e-3)


@pytest.mark.parametrize("settings", [StepSettings(accumulate=2), DISTILL], ids=["passes", "distillation"])
def test_an_interrupted_training_reaches_the_same_bits(settings: StepSettings) -> None:
    teacher = network(7) if settings.map_weight else None

    def start() -> Trainer:
        return Trainer(dataclasses.replace(RECIPE, decay_every=1), settings, initial=network(1), teacher=teacher)

    undisturbed = start()
    results = []
    for seed in range(6):
        results.append(undisturbed.step(batch(seed)))
        if seed % 2:
            undisturbed.end_epoch()

    first = start()
    for seed in range(3):
        first.step(batch(seed))
        if seed % 2:
            first.end_epoch()
    resumed = start()
    resumed.load_state(first.state())
    assert (resumed.num_steps, resumed.num_epochs) == (3, 1)
    for seed in range(3, 6):
        assert resumed.step(batch(seed)) == results[seed]
        if seed % 2:
            resumed.end_epoch()
    assert_same_bits(weights_of(resumed), weights_of(undisturbed))
    assert resumed.state() == undisturbed.state()


def test_a_seed_names_the_first_weights_and_the_draws_and_leaves_torchs_alone() -> None:
    before = torch.random.get_rng_state()
    one, same, other = (Trainer(RECIPE, StepSettings(seed=seed)) for seed in (3, 3, 4))
    losses = [trainer.step(batch(0)).loss for trainer in (one, same)]
    assert losses[0] == losses[1]
    assert_same_bits(weights_of(one), weights_of(same))
    assert not torch.equal(weights_of(other)["head.weight"], weights_of(one)["head.weight"])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_every_step_draws_anew() -> None:
    still = dataclasses.replace(RECIPE, learning_rate=1e-30)
    trainer = Trainer(still, StepSettings(freeze_norm=True), initial=network(1))
    assert trainer.step(batch(0)).loss != trainer.step(batch(0)).loss


def test_a_loss_that_is_no_number_stops_the_training_and_changes_nothing() -> None:
    initial = network(1)
    with torch.no_grad():
        initial.head.bias.fill_(float("nan"))
    trainer = Trainer(RECIPE, StepSettings(), initial=initial)
    with pytest.raises(
        TrainingError, match=r"step 1: loss nan \(label nan, auxiliary nan\), gradient norm nan"
    ) as caught:
        trainer.step(batch(0))
    assert "with a --learning-rate below 0.0001, or with --precision fp32" in str(caught.value)
    with torch.no_grad():
        initial.head.bias.zero_()
        trainer_weights = dict(weights_of(trainer))
        trainer_weights["head.bias"] = torch.zeros(1)
    assert_same_bits(trainer_weights, initial.state_dict())
    assert trainer.num_steps == 0


def test_an_infinite_loss_stops_the_training() -> None:
    initial = network(1)
    with torch.no_grad():
        initial.head.bias.fill_(3e38)  # a logit that float32 holds, and whose losses it cannot sum
    with pytest.raises(TrainingError, match="step 1: loss inf"):
        Trainer(PLAIN, StepSettings(), initial=initial).step(batch(0))


def test_bf16_is_close_to_fp32_and_takes_npr_exactly() -> None:
    seen: list[Tensor] = []
    initial = network(1)
    exact = Trainer(RECIPE, StepSettings(), initial=initial)
    rough = Trainer(RECIPE, StepSettings(precision="bf16"), initial=initial)
    rough._model.npr.register_forward_hook(lambda _module, _inputs, out: seen.append(out.detach()))
    assert rough.step(batch(0)).loss == pytest.approx(exact.step(batch(0)).loss, rel=0.02)
    assert seen[0].dtype == torch.float32
    torch.testing.assert_close(seen[0], network(1).npr(normalised(images(0))), rtol=0, atol=2e-6)
    assert {value.dtype for value in rough.gradients().values()} == {torch.float32}
    cosine = F.cosine_similarity(rough.gradients()["head.weight"], exact.gradients()["head.weight"])
    assert cosine.item() > 0.99


def test_evaluation_is_what_a_scan_does_with_the_checkpoint() -> None:
    trainer = Trainer(RECIPE, StepSettings(precision="bf16"))
    trainer.step(batch(0))
    saved = load_checkpoint(save_checkpoint(trainer.model(), CheckpointMetadata("test", SMALL))).model
    logits = trainer.evaluate(images(5))
    assert logits.dtype == torch.float32
    with torch.inference_mode():
        torch.testing.assert_close(logits, saved(normalised(images(5))), rtol=1e-4, atol=1e-4)


def test_evaluation_in_between_does_not_disturb_the_training() -> None:
    one, other = (Trainer(RECIPE, StepSettings()) for _ in range(2))
    other.evaluate(images(5))
    assert one.step(batch(0)) == other.step(batch(0))
    other.evaluate(images(5))
    assert one.step(batch(1)) == other.step(batch(1))


def changed(data: bytes, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> bytes:
    """Return a state file with its tensors and description changed."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    tensors, described = safetensors.torch.load(data), json.loads(header["__metadata__"]["lfm_scan"])
    change(tensors, described)
    return safetensors.torch.save(tensors, {"lfm_scan": json.dumps(described)})


@pytest.mark.parametrize(
    ("recipe", "settings", "message"),
    [
        (dataclasses.replace(RECIPE, alpha=0.2), StepSettings(), "alpha was 0.1 and now is 0.2"),
        (dataclasses.replace(RECIPE, rbld=None), StepSettings(), "rbld was 'paper' and now is None"),
        (RECIPE, StepSettings(seed=9), "seed was 0 and now is 9"),
        (RECIPE, StepSettings(freeze_norm=True), "freeze_norm was False and now is True"),
        (
            dataclasses.replace(RECIPE, architecture=ArchitectureConfig(depth=4, k=5)),
            StepSettings(),
            "architecture was {'depth': 4, 'k': 4, 'pooling': 'tkp'} and now is {'depth': 4, 'k': 5, ",
        ),
    ],
)
def test_the_state_of_another_training_is_refused(recipe: Recipe, settings: StepSettings, message: str) -> None:
    data = Trainer(RECIPE, StepSettings()).state()
    with pytest.raises(CheckpointError) as caught:
        Trainer(recipe, settings).load_state(data, "last")
    assert str(caught.value).startswith("last: of another training: ")
    assert message in str(caught.value)


def test_the_state_of_a_training_with_another_teacher_is_refused() -> None:
    data = Trainer(RECIPE, DISTILL, teacher=network(7)).state()
    Trainer(RECIPE, DISTILL, teacher=network(7)).load_state(data)
    with pytest.raises(
        CheckpointError, match=r"of another training: teacher was '[0-9a-f]{64}' and now is '[0-9a-f]{64}'"
    ):
        Trainer(RECIPE, DISTILL, teacher=network(8)).load_state(data)


def test_a_state_goes_on_with_another_number_of_passes_and_precision() -> None:
    data = Trainer(RECIPE, StepSettings()).state()
    Trainer(RECIPE, StepSettings(accumulate=4, precision="bf16")).load_state(data)


def fill(value: float) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    return lambda tensors, _: tensors.update({"model.head.bias": torch.full((1,), value)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, _: tensors.pop("adam.exp_avg.head.bias"), "adam.exp_avg.head.bias is missing"),
        (lambda tensors, _: tensors.update(more=torch.zeros(1)), "more is not part of the training"),
        (
            lambda tensors, _: tensors.update({"model.head.bias": torch.zeros(2)}),
            "model.head.bias is .2,. torch.float32",
        ),
        (fill(float("nan")), "model.head.bias holds values that are not finite"),
        (lambda _, described: described.update(format="x"), "format is not 'lfm-scan-training-state'"),
        (lambda _, described: described.update(format_version=2), "format version 2, this program reads 1"),
        (lambda _, described: described.update(num_steps=-1), "counts of steps and epochs"),
        (lambda _, described: described.update(num_steps="1"), "counts of steps and epochs"),
        (lambda _, described: described.pop("identity"), "not a training state of lfm-scan, or a damaged one"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(
    change: Callable[[dict[str, Tensor], dict[str, Any]], None], message: str
) -> None:
    trainer = Trainer(RECIPE, StepSettings())
    before = trainer.state()
    damaged = changed(before, change)
    with pytest.raises(CheckpointError, match=message):
        trainer.load_state(damaged)
    assert trainer.state() == before


@pytest.mark.parametrize("data", [b"", b"{}", b"\x80\x04N.", b"\xff" * 100])
def test_bytes_that_are_no_state_are_refused(data: bytes) -> None:
    with pytest.raises(CheckpointError, match="last: not a training state of lfm-scan, or a damaged one"):
        Trainer(RECIPE, StepSettings()).load_state(data, "last")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "tpu"}, "device must be cpu or cuda, got 'tpu'"),
        ({"precision": "fp8"}, "--precision must be fp32 or bf16, got 'fp8'"),
        ({"accumulate": 0}, "--accumulate must be at least 1, got 0"),
        ({"seed": -1}, "--seed must be 0 to"),
        ({"map_weight": float("nan")}, "--map-weight must be at least 0 and finite, got nan"),
        ({"real_weight": -1.0}, "--real-weight must be at least 0 and finite, got -1"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        StepSettings(**settings)


def test_weights_of_another_architecture_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"the first weights are of .*k=16.*, the recipe is .*k=4"):
        Trainer(RECIPE, StepSettings(), initial=LFM())


@pytest.mark.parametrize(
    ("pixels", "labels", "first", "message"),
    [
        (torch.zeros(2, 3, 48, 48), torch.zeros(2), 0, "images must be .B, 3, S, S. uint8"),
        (torch.zeros(2, 48, 48, 3, dtype=torch.uint8), torch.zeros(2), 0, "images must be .B, 3, S, S. uint8"),
        (torch.zeros(2, 3, 48, 48, dtype=torch.uint8), torch.zeros(3), 0, "labels must be .2,., one an image"),
        (torch.zeros(2, 3, 48, 48, dtype=torch.uint8), torch.zeros(2), 3, "rows 3 to 4 are not within a batch of 4"),
    ],
)
def test_a_batch_that_is_none_is_refused(pixels: Tensor, labels: Tensor, first: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Batch(pixels, labels, first, total=4)


# How the eight rows lie on two workers, how many passes, and whether a teacher is there.
CASES: Final = {
    "uneven": ((5, 3), StepSettings()),
    "passes": ((5, 3), StepSettings(accumulate=2)),
    "one_row": ((7, 1), StepSettings(accumulate=3)),
    "idle": ((8, 0), StepSettings()),
    "bf16": ((5, 3), StepSettings(precision="bf16", accumulate=2)),
    "distillation": ((5, 3), dataclasses.replace(DISTILL, accumulate=2)),
    "frozen": ((5, 3), StepSettings(freeze_norm=True)),
}
NUM_STEPS: Final = 2


def run_case(name: str, split: tuple[int, int] | None, rank: int, folder: Path) -> None:
    """Take two steps, alone (no split) or as a worker, and write results, first gradients and state into the folder."""
    settings = CASES[name][1]
    teacher = network(7) if settings.map_weight else None
    # The workers start from different weights: those of the first must count.
    trainer = Trainer(RECIPE, settings, initial=network(1 if rank == 0 else 99), teacher=teacher)
    first, stop = (0, NUM_ROWS) if split is None else ((0, split[0]) if rank == 0 else (split[0], NUM_ROWS))
    results: list[StepResult] = []
    for seed in range(NUM_STEPS):
        results.append(trainer.step(batch(seed, first, stop)))
        if seed == 0:
            gradients = {key: value.contiguous() for key, value in trainer.gradients().items()}
            (folder / "gradients").write_bytes(safetensors.torch.save(gradients))
            statistics = {key: value for key, value in weights_of(trainer).items() if "norm" in key}
            (folder / "statistics").write_bytes(safetensors.torch.save(statistics))
    (folder / "results").write_text(json.dumps([dataclasses.asdict(result) for result in results]))
    (folder / "state").write_bytes(trainer.state())


def run_worker(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        for name, (split, _) in CASES.items():
            made = folder / name / str(rank)
            made.mkdir(parents=True)
            run_case(name, split, rank, made)
        trainer = Trainer(PLAIN, StepSettings(), initial=network(1))
        rows = batch(0, *((0, 5) if rank == 0 else (5, NUM_ROWS)))
        if rank == 1:
            trainer._std.zero_()  # its images alone are not finite
        with pytest.raises(TrainingError, match="step 1: loss nan"):
            trainer.step(rows)
        (folder / f"refused_{rank}").touch()
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what two workers found in each case."""
    folder = tmp_path_factory.mktemp("workers")
    torch.multiprocessing.spawn(run_worker, (folder,), nprocs=2)  # type: ignore[no-untyped-call,attr-defined]
    return folder


def relative_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """Return the Euclidean distance of all values, as a share of their norm."""
    one, other = (torch.cat([value.double().flatten() for value in values]) for values in (found, expected))
    return float((one - other).norm() / other.norm().clamp_min(1e-9))


@pytest.mark.parametrize("name", CASES)
def test_two_workers_take_the_step_of_one(name: str, two_workers: Path, tmp_path: Path) -> None:
    run_case(name, None, 0, tmp_path)
    alone, together = (json.loads((path / "results").read_text()) for path in (tmp_path, two_workers / name / "0"))
    rough = 3e-2 if name == "bf16" else 1e-4
    for one, both in zip(alone, together, strict=True):
        assert both["parts"] == pytest.approx(one["parts"], rel=rough)
        assert both["loss"] == pytest.approx(one["loss"], rel=rough)
        assert both["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=rough)
    for kind in ("gradients", "statistics"):
        expected, found = (
            safetensors.torch.load((path / kind).read_bytes()) for path in (tmp_path, two_workers / name / "0")
        )
        assert expected.keys() == found.keys()
        # One worker's bf16 gradients are 0.2 away from fp32's: what is left of a sum depends on how it is rounded.
        tolerance = 0.15 if name == "bf16" else rough
        assert relative_error([found[key] for key in expected], list(expected.values())) < tolerance
        for key, value in expected.items():
            # A bias that BatchNorm takes off again has a gradient of nothing but noise, as has much in bf16.
            if name != "bf16" and not key.endswith("conv.bias"):
                assert relative_error([found[key]], [value]) < rough, key


@pytest.mark.parametrize("name", CASES)
def test_both_workers_hold_the_same_bits(name: str, two_workers: Path) -> None:
    for kind in ("state", "gradients", "results"):
        assert (two_workers / name / "0" / kind).read_bytes() == (two_workers / name / "1" / kind).read_bytes()


def test_a_loss_that_is_no_number_on_one_worker_stops_both(two_workers: Path) -> None:
    assert (two_workers / "refused_0").exists()
    assert (two_workers / "refused_1").exists()
