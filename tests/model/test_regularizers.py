"""RBLD and RKS: probabilities, expectations, order and gradients."""

from __future__ import annotations

import pytest
import torch

from lfm_scan.model import LFM, ArchitectureConfig, RankLinearDropout, random_k_sample
from lfm_scan.model.regularizers import Purpose
from lfm_scan.options import Variant

_NUM_DRAWS = 200_000
# Five standard errors of a share of 200,000 draws: about 0.005.
_TOLERANCE = 5 * (0.25 / _NUM_DRAWS) ** 0.5


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("k", [2, 16])
def test_paper_rbld_drops_from_03_at_the_largest_to_01_at_the_kth(k: int) -> None:
    dropped = RankLinearDropout(k)(torch.ones(_NUM_DRAWS, 1, k)) == 0
    expected = torch.tensor([0.3 - 0.2 * rank / (k - 1) for rank in range(k)])
    torch.testing.assert_close(dropped.float().mean(dim=(0, 1)), expected, rtol=0, atol=_TOLERANCE)


def test_published_rbld_drops_a_tenth_at_every_rank() -> None:
    dropped = RankLinearDropout(16, "published")(torch.ones(_NUM_DRAWS, 1, 16)) == 0
    torch.testing.assert_close(dropped.float().mean(dim=(0, 1)), torch.full((16,), 0.1), rtol=0, atol=_TOLERANCE)


@pytest.mark.parametrize("variant", ["paper", "published"])
def test_rbld_keeps_the_expectation_of_every_rank(variant: Variant) -> None:
    values = torch.arange(16, 0, -1).float()
    mean = RankLinearDropout(16, variant)(values.expand(_NUM_DRAWS, 1, 16)).mean(dim=(0, 1))
    torch.testing.assert_close(mean, values, rtol=0.01, atol=0)


def test_rbld_survivors_are_divided_by_their_own_keep_probability() -> None:
    out = RankLinearDropout(3)(torch.ones(1000, 2, 3))
    for rank, drop in enumerate((0.3, 0.2, 0.1)):
        survivors = out[..., rank][out[..., rank] != 0]
        torch.testing.assert_close(survivors, torch.full_like(survivors, 1 / (1 - drop)))


def test_rbld_draws_for_every_image_and_channel_alone() -> None:
    patterns = (RankLinearDropout(16)(torch.ones(8, 8, 16)) == 0).flatten(0, 1)
    assert len(patterns.unique(dim=0)) > 50


def test_rbld_is_the_identity_in_evaluation_mode() -> None:
    values = torch.randn(2, 4, 16)
    assert torch.equal(RankLinearDropout(16).eval()(values), values)


def test_rbld_saves_nothing_in_a_checkpoint() -> None:
    assert not RankLinearDropout(16).state_dict()


@pytest.mark.parametrize(("p_min", "p_max"), [(-0.1, 0.3), (0.3, 0.1), (0.1, 1.0)])
def test_rbld_refuses_probabilities_that_are_none(p_min: float, p_max: float) -> None:
    with pytest.raises(ValueError, match="RBLD needs 0 <= p_min <= p_max < 1"):
        RankLinearDropout(16, p_min=p_min, p_max=p_max)


def distinct_map(batch: int = 3, channels: int = 4, height: int = 5, width: int = 6) -> torch.Tensor:
    """Return a map in which a value names its position, channel and image."""
    return torch.randperm(batch * channels * height * width).float().view(batch, channels, height, width)


@pytest.mark.parametrize("variant", ["paper", "published"])
def test_rks_draws_without_replacement_from_its_own_channel(variant: Variant) -> None:
    feature_map = distinct_map()
    drawn = random_k_sample(feature_map, 16, variant)
    assert drawn.shape == (3, 4, 16)
    for image in range(3):
        for channel in range(4):
            values = set(drawn[image, channel].tolist())
            assert len(values) == 16
            assert values <= set(feature_map[image, channel].flatten().tolist())


def test_paper_rks_descends_as_top_k_does() -> None:
    assert (random_k_sample(distinct_map(), 16).diff(dim=-1) < 0).all()


def test_published_rks_ascends() -> None:
    assert (random_k_sample(distinct_map(), 16, "published").diff(dim=-1) > 0).all()


def test_rks_of_the_whole_map_is_the_sorted_map() -> None:
    feature_map = distinct_map()
    assert torch.equal(random_k_sample(feature_map, 30), feature_map.flatten(2).sort(descending=True).values)


def test_rks_draws_every_position_equally_often() -> None:
    feature_map = torch.arange(30).float().view(1, 1, 5, 6).expand(1, 20_000, 5, 6)
    share = random_k_sample(feature_map, 6).flatten().long().bincount(minlength=30) / 20_000
    torch.testing.assert_close(share, torch.full((30,), 6 / 30), rtol=0, atol=0.015)


def test_rks_sends_the_gradient_to_the_drawn_positions_alone() -> None:
    feature_map = distinct_map().requires_grad_()
    drawn = random_k_sample(feature_map, 16)
    drawn.sum().backward()  # type: ignore[no-untyped-call]
    assert feature_map.grad is not None
    hit = feature_map.detach()[feature_map.grad == 1]
    assert sorted(hit.tolist()) == sorted(drawn.detach().flatten().tolist())
    assert feature_map.grad.sum() == drawn.numel()


def test_rks_refuses_a_map_with_too_few_positions() -> None:
    with pytest.raises(ValueError, match="cannot draw 16 positions without replacement from a map of 9"):
        random_k_sample(torch.zeros(1, 2, 3, 3), 16)


def test_rbld_keeps_the_values_whose_number_is_below_their_keep_probability() -> None:
    numbers = torch.tensor([[0.69, 0.79, 0.89], [0.71, 0.81, 0.91], [0.69, 0.81, 0.89]]).view(1, 3, 3)
    kept = RankLinearDropout(3)(torch.ones(1, 3, 3), lambda _purpose, _shape: numbers) != 0
    assert kept.tolist() == [[[True, True, True], [False, False, False], [True, False, True]]]


@pytest.mark.parametrize("variant", ["paper", "published"])
def test_rbld_drops_as_often_with_numbers_of_the_callers(variant: Variant) -> None:
    values = torch.arange(16, 0, -1).float().expand(_NUM_DRAWS, 1, 16)
    dropout = RankLinearDropout(16, variant)
    out = dropout(values, lambda _purpose, shape: torch.rand(shape))
    expected = torch.linspace(0.3, 0.1, 16) if variant == "paper" else torch.full((16,), 0.1)
    torch.testing.assert_close((out == 0).float().mean(dim=(0, 1)), expected, rtol=0, atol=_TOLERANCE)
    torch.testing.assert_close(out.mean(dim=(0, 1)), values[0, 0], rtol=0.01, atol=0)


def test_rbld_sends_each_survivor_its_scaled_gradient_and_the_dropped_none() -> None:
    values = torch.ones(1, 2, 3, requires_grad=True)
    numbers = torch.tensor([[0.0, 0.99, 0.0], [0.99, 0.0, 0.99]]).view(1, 2, 3)
    RankLinearDropout(3)(values, lambda _purpose, _shape: numbers).sum().backward()
    assert values.grad is not None
    torch.testing.assert_close(values.grad, torch.tensor([[[1 / 0.7, 0, 1 / 0.9], [0, 1 / 0.8, 0]]]))


def test_rks_takes_the_positions_with_the_largest_numbers_of_the_callers() -> None:
    feature_map = distinct_map().requires_grad_()
    numbers = torch.rand(3, 4, 30)
    drawn = random_k_sample(feature_map, 7, "paper", lambda _purpose, _shape: numbers)
    drawn.sum().backward()  # type: ignore[no-untyped-call]
    assert feature_map.grad is not None
    for image in range(3):
        for channel in range(4):
            order = sorted(range(30), key=lambda position: -float(numbers[image, channel, position]))[:7]
            flat = feature_map.detach()[image, channel].flatten()
            assert drawn[image, channel].tolist() == sorted((float(flat[position]) for position in order), reverse=True)
            hit = feature_map.grad[image, channel].flatten().nonzero().flatten().tolist()
            assert hit == sorted(order)


def test_regularizers_ask_for_numbers_of_their_own_shape_once() -> None:
    asked = []

    def draw(purpose: Purpose, shape: torch.Size) -> torch.Tensor:
        asked.append((purpose, tuple(shape)))
        return torch.zeros(shape)

    model = LFM(ArchitectureConfig(depth=4, k=4), rbld="paper")
    model.forward_train(torch.randn(2, 3, 48, 48), "paper", draw)
    assert asked == [("rbld", (2, 64, 4)), ("rks", (2, 64, 25))]
    asked.clear()
    model.eval().forward_train(torch.randn(2, 3, 48, 48), None, draw)
    assert asked == []
