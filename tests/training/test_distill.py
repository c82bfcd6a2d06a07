"""Distillation losses against their definitions, written out again in the plainest way."""

from __future__ import annotations

import dataclasses
import math
from typing import Final

import pytest
import torch
from torch import Tensor

from lfm_scan.errors import ConfigError
from lfm_scan.model import LFM, ArchitectureConfig
from lfm_scan.training.distill import Targets, Teacher, logit_losses, map_losses
from lfm_scan.training.recipe import Recipe
from lfm_scan.training.step import Batch, StepSettings, Trainer

SMALL: Final = ArchitectureConfig(depth=4, k=4)
RECIPE: Final = Recipe(crop_px=48, rbld=None, rks=None, architecture=SMALL)
CPU: Final = torch.device("cpu")


def network(seed: int) -> LFM:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LFM(SMALL)


def random_maps(seed: int, num_images: int = 4) -> Tensor:
    return torch.randn(num_images, 64, 5, 5, generator=torch.Generator().manual_seed(seed))


def test_where_the_teacher_is_wrong_the_label_takes_its_place() -> None:
    model = network(1)
    maps = random_maps(0)
    said = model.classify(model.pool(maps)).detach()
    labels = (said > 0).float()
    labels[:2] = 1 - labels[:2]
    targets = Teacher(model, CPU).targets(maps, labels)
    assert targets.is_right.tolist() == [False, False, True, True]
    torch.testing.assert_close(targets.logits[2:], said[2:])
    assert targets.logits[:2].tolist() == [15.0 if label else -15.0 for label in labels[:2]]


def test_logits_are_compared_after_tanh_of_a_fifteenth() -> None:
    targets = Targets(torch.empty(0), torch.empty(0), torch.tensor([60.0, -15.0]), torch.tensor([True, True]))
    expected = [(math.tanh(30 / 15) - math.tanh(60 / 15)) ** 2, (math.tanh(1 / 15) - math.tanh(-1)) ** 2]
    assert logit_losses(torch.tensor([30.0, 1.0]), targets).tolist() == pytest.approx(expected, rel=1e-5)


def test_maps_and_values_are_compared_in_spreads_where_the_teacher_is_right() -> None:
    model = network(1)
    ours, theirs = random_maps(0), random_maps(1)
    spread = torch.rand(64, generator=torch.Generator().manual_seed(2)) + 0.5
    our_values, their_values = model.pool(ours), model.pool(theirs)
    is_right = torch.tensor([True, False, True, True])
    losses = map_losses(ours, our_values, Targets(theirs, their_values, torch.zeros(4), is_right), spread)
    for image in range(4):
        total = 0.0
        for channel in range(64):
            of_map = ((ours - theirs)[image, channel] / spread[channel]).square().sum().item() / (64 * 25)
            of_values = ((our_values - their_values)[image, channel] / spread[channel]).square().sum().item() / (64 * 4)
            total += of_map + of_values
        assert losses[image].item() == pytest.approx(total if is_right[image] else 0.0, rel=1e-4)


def test_the_spread_is_each_channels_standard_deviation() -> None:
    teacher = Teacher(network(1), CPU)
    maps = random_maps(3) * torch.arange(64).view(1, 64, 1, 1)
    teacher.measure_spread(maps)
    expected = maps.transpose(0, 1).flatten(1).std(dim=1, correction=0)
    expected[0] = 1e-3  # a channel that never moves must not be divided by 0
    torch.testing.assert_close(teacher.spread_c, expected)


def test_a_teacher_is_a_frozen_copy() -> None:
    model = network(1).train()
    teacher = Teacher(model, CPU)
    with torch.no_grad():
        model.head.bias.fill_(9.0)
    assert not teacher.model.training
    assert teacher.model.head.bias.item() != 9.0
    assert not any(value.requires_grad for value in teacher.model.parameters())
    assert all(value.requires_grad for value in model.parameters())


def test_a_teacher_is_named_by_its_weights() -> None:
    assert Teacher(network(1), CPU).sha256 == Teacher(network(1), CPU).sha256
    assert Teacher(network(1), CPU).sha256 != Teacher(network(2), CPU).sha256


def pairs(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (8, 3, 48, 48), generator=generator, dtype=torch.uint8)
    return Batch(pixels, torch.arange(8) % 2, 0, 8)


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_its_map() -> None:
    settings = StepSettings(map_weight=1.0, freeze_norm=True)
    trainer = Trainer(RECIPE, settings, initial=network(1), teacher=network(1))
    assert trainer.step(pairs(0)).parts["map"] == 0


def test_a_student_comes_closer_to_its_teacher() -> None:
    settings = StepSettings(label_weight=0.0, logit_weight=1.0, map_weight=1.0)
    recipe = dataclasses.replace(RECIPE, learning_rate=1e-3)
    trainer = Trainer(recipe, settings, initial=network(1), teacher=network(2))
    results = [trainer.step(pairs(0)) for _ in range(6)]
    assert results[-1].loss < 0.8 * results[0].loss
    for result in results:
        assert result.loss == pytest.approx(result.parts["logit"] + result.parts["map"], rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "teacher", "message"),
    [
        (StepSettings(logit_weight=1.0), None, "--logit-weight and --map-weight are distances to a teacher"),
        (StepSettings(), network(1), "a teacher without --logit-weight or --map-weight teaches nothing"),
        (StepSettings(map_weight=1.0), LFM(), "--map-weight compares maps, and the teacher is"),
    ],
)
def test_a_teacher_and_its_weights_come_together(settings: StepSettings, teacher: LFM | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Trainer(RECIPE, settings, teacher=teacher)


def test_a_teacher_of_another_architecture_can_teach_its_logits() -> None:
    trainer = Trainer(RECIPE, StepSettings(logit_weight=1.0), teacher=LFM(ArchitectureConfig(depth=4, pooling="gap")))
    assert trainer.step(pairs(0)).parts.keys() == {"label", "logit"}
