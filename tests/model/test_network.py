"""SNet and LFM: the shapes of the paper, and the exact sum behind a logit."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from lfm_scan.model import LFM, ArchitectureConfig, RankLinearDropout
from lfm_scan.options import Pooling


def images(batch: int, side: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model() -> LFM:
    torch.manual_seed(0)
    return LFM().eval()


@torch.inference_mode()
def test_maps_at_256_have_the_shapes_of_the_paper(model: LFM) -> None:
    out = model.npr(images(1, 256))
    shapes = [tuple(out.shape[1:])]
    for block in model.blocks:
        out = block(out)
        shapes.append(tuple(out.shape[1:]))
    shapes.append(tuple(model.projection(out).shape[1:]))
    assert shapes == [
        (3, 256, 256),
        (64, 127, 127),
        (128, 63, 63),
        (256, 31, 31),
        (512, 30, 30),
        (64, 30, 30),
    ]


@torch.inference_mode()
def test_the_map_of_a_224_crop_is_26x26(model: LFM) -> None:
    assert model.feature_map(images(1, 224)).shape == (1, 64, 26, 26)


def test_the_default_model_has_the_papers_072_million_parameters() -> None:
    assert sum(parameter.numel() for parameter in LFM().parameters()) == 725_569


@pytest.mark.parametrize("pooling", get_args(Pooling))
@pytest.mark.parametrize("depth", [4, 5, 6, 7, 8])
def test_every_depth_and_pooling_trains(depth: int, pooling: Pooling) -> None:
    torch.manual_seed(0)
    config = ArchitectureConfig(depth=depth, pooling=pooling)
    model = LFM(config, rbld="paper" if pooling == "tkp" else None)
    logits, auxiliary = model.forward_train(images(2, 80), rks="paper" if pooling == "tkp" else None)
    assert logits.shape == (2,)
    assert (auxiliary is not None) == (pooling == "tkp")
    (logits.sum() if auxiliary is None else logits.sum() + auxiliary.sum()).backward()  # type: ignore[no-untyped-call]
    without_gradient = [name for name, value in model.named_parameters() if value.grad is None]
    assert not without_gradient
    # One convolution more for each step of depth, counting the projection.
    assert len(model.blocks) + 1 == depth


@pytest.mark.parametrize("k", [1, 4, 16, 64, 256])
def test_every_k_of_the_papers_ablation_runs_at_256(k: int) -> None:
    model = LFM(ArchitectureConfig(k=k)).eval()
    with torch.inference_mode():
        assert model(images(1, 256)).isfinite().all()
    assert model.head.in_features == 64 * k


@torch.inference_mode()
def test_a_logit_is_the_exact_sum_of_head_weights_times_top_k_values(model: LFM) -> None:
    batch = images(2, 96)
    feature_map = model.feature_map(batch)
    weights_ck = model.head.weight.double().view(64, 16)
    for image in range(2):
        total = float(model.head.bias)
        for channel in range(64):
            values = sorted(feature_map[image, channel].double().flatten().tolist(), reverse=True)[:16]
            total += sum(float(weight) * value for weight, value in zip(weights_ck[channel], values, strict=True))
        assert float(model(batch)[image]) == pytest.approx(total, abs=1e-5)


@torch.inference_mode()
def test_a_map_position_sees_23x23_residuals_at_stride_8(model: LFM) -> None:
    residuals = images(1, 96).abs()
    before = model.blocks(residuals)
    row, column = 4, 5

    def seen(y: int, x: int) -> bool:
        changed = residuals.clone()
        changed[:, :, y, x] += 1000
        return bool((model.blocks(changed) != before)[0, :, row, column].any())

    top, left = 8 * row, 8 * column
    assert [seen(top + offset, left + 11) for offset in (-1, 0, 22, 23)] == [False, True, True, False]
    assert [seen(top + 11, left + offset) for offset in (-1, 0, 22, 23)] == [False, True, True, False]


@torch.inference_mode()
def test_48_pixels_are_enough_and_46_are_not(model: LFM) -> None:
    assert model(images(1, 48)).shape == (1,)
    with pytest.raises(ValueError, match="use a larger image"):
        model(images(1, 46))


@torch.inference_mode()
def test_neither_regularizer_runs_at_inference() -> None:
    torch.manual_seed(0)
    model = LFM(rbld="paper").eval()
    batch = images(2, 96)
    assert isinstance(model.rbld, RankLinearDropout)
    assert torch.equal(model(batch), model(batch))
    plain = LFM().eval()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(batch), plain(batch))


def test_training_without_rks_has_no_auxiliary_logits() -> None:
    logits, auxiliary = LFM().forward_train(images(2, 64), rks=None)
    assert logits.shape == (2,)
    assert auxiliary is None


def test_rbld_and_rks_refuse_poolings_without_ranks() -> None:
    with pytest.raises(ValueError, match="RBLD drops by rank and needs tkp pooling, not gap"):
        LFM(ArchitectureConfig(pooling="gap"), rbld="paper")
    with pytest.raises(ValueError, match="RKS shares the head of tkp pooling and cannot be used with gmp"):
        LFM(ArchitectureConfig(pooling="gmp")).forward_train(images(2, 64))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depth": 3}, "SNet depth must be 4 to 8, got 3"),
        ({"depth": 9}, "SNet depth must be 4 to 8, got 9"),
        ({"pooling": "median"}, "pooling must be one of gap, gmp, cbam, tkp, got 'median'"),
        ({"k": 0}, "k must be 1 to 256, got 0"),
        ({"k": 257}, "k must be 1 to 256, got 257"),
    ],
)
def test_an_architecture_outside_the_papers_is_refused(settings: dict[str, int | str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ArchitectureConfig(**settings)  # type: ignore[arg-type]
