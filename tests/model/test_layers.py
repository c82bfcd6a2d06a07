"""The fixed and pooling layers against their definitions, written out again in the plainest way."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from lfm_scan.model import NPR, TopKPool
from lfm_scan.model.layers import GlobalAvgPool, GlobalMaxPool, SpatialAttentionPool


def random_map(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_npr_is_the_distance_to_the_top_left_pixel_of_the_block() -> None:
    images = random_map(2, 3, 6, 10)
    residual = NPR()(images)
    for row in range(6):
        for column in range(10):
            corner = images[:, :, row // 2 * 2, column // 2 * 2]
            torch.testing.assert_close(
                residual[:, :, row, column], (images[:, :, row, column] - corner).abs(), rtol=0, atol=0
            )


def test_npr_equals_the_published_pair_of_convolutions() -> None:
    images = random_map(1, 3, 8, 8)
    down, up = torch.zeros(3, 3, 2, 2), torch.zeros(3, 3, 2, 2)
    for channel in range(3):
        down[channel, channel, 0, 0] = 1
        up[channel, channel] = 1
    rebuilt = nn.functional.conv_transpose2d(nn.functional.conv2d(images, down, stride=2), up, stride=2)
    torch.testing.assert_close(NPR()(images), (images - rebuilt).abs(), rtol=0, atol=0)


def test_npr_of_an_image_doubled_by_nearest_neighbour_is_zero() -> None:
    doubled = random_map(1, 3, 4, 5).repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2)
    assert not NPR()(doubled).any()


@pytest.mark.parametrize("size", [(7, 8), (8, 7), (7, 7)])
def test_npr_refuses_odd_sizes(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"even height and width, got {size[0]}x{size[1]}"):
        NPR()(torch.zeros(1, 3, *size))


def test_npr_has_nothing_to_learn_or_save() -> None:
    assert not list(NPR().parameters())
    assert not NPR().state_dict()


@pytest.mark.parametrize("k", [1, 4, 16, 30])
def test_top_k_pooling_gives_the_largest_values_in_descending_order(k: int) -> None:
    feature_map = random_map(2, 4, 5, 6)
    pooled = TopKPool(k)(feature_map)
    expected = -np.sort(-feature_map.numpy().reshape(2, 4, 30), axis=-1)[..., :k]
    np.testing.assert_array_equal(pooled.numpy(), expected)


def test_top_k_pooling_keeps_ties() -> None:
    assert TopKPool(3)(torch.tensor([[[[2.0, 5.0], [5.0, 1.0]]]])).tolist() == [[[5, 5, 2]]]


def test_top_k_pooling_refuses_a_map_with_too_few_positions() -> None:
    with pytest.raises(ValueError, match="a map of 9 positions cannot give its 16 largest: use a larger image"):
        TopKPool(16)(torch.zeros(1, 2, 3, 3))


def test_top_k_pooling_refuses_k_below_one() -> None:
    with pytest.raises(ValueError, match="k >= 1"):
        TopKPool(0)


def test_average_pooling_is_the_mean_of_each_channel() -> None:
    feature_map = random_map(2, 3, 4, 5)
    expected = feature_map.numpy().astype(np.float64).mean(axis=(2, 3))[..., None]
    np.testing.assert_allclose(GlobalAvgPool()(feature_map).numpy(), expected, rtol=0, atol=1e-6)


def test_max_pooling_is_the_maximum_of_each_channel() -> None:
    feature_map = random_map(2, 3, 4, 5)
    np.testing.assert_array_equal(GlobalMaxPool()(feature_map).numpy(), feature_map.numpy().max(axis=(2, 3))[..., None])


def test_max_pooling_equals_top_one() -> None:
    feature_map = random_map(2, 3, 4, 5)
    assert torch.equal(GlobalMaxPool()(feature_map), TopKPool(1)(feature_map))


def test_spatial_attention_weighs_each_position_by_cbams_formula() -> None:
    layer, feature_map = SpatialAttentionPool(), random_map(1, 3, 5, 6)
    kernel = random_map(1, 2, 7, 7, seed=1) * 0.1
    with torch.no_grad():
        layer.conv.weight.copy_(kernel)
        pooled = layer(feature_map).numpy()
    values = feature_map.numpy().astype(np.float64)[0]
    summary = np.pad(np.stack([values.mean(axis=0), values.max(axis=0)]), ((0, 0), (3, 3), (3, 3)))
    weights = kernel.numpy().astype(np.float64)[0]
    attention = np.array([[(summary[:, y : y + 7, x : x + 7] * weights).sum() for x in range(6)] for y in range(5)])
    expected = (values / (1 + np.exp(-attention))).mean(axis=(1, 2))
    np.testing.assert_allclose(pooled[0, :, 0], expected, rtol=0, atol=1e-6)
