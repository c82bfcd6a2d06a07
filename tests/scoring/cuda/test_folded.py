"""The network in torch's operations against the network as it is trained."""

from __future__ import annotations

import copy
from typing import Any, cast

import numpy as np
import pytest
import torch

from lfm_scan.errors import ConfigError
from lfm_scan.model import ArchitectureConfig
from lfm_scan.scoring.cuda.folded import DTYPES, RESIDUAL_SCALE, FoldedLFM, Precision, convolutions, residual
from tests.scoring.cuda.networks import DEVICE, make_checkpoint, make_pixels, needs_gpu, published_logits


def test_the_residual_is_how_far_each_pixel_is_from_the_top_left_of_its_block() -> None:
    pixels = make_pixels(2, 6, 8)
    found = residual(torch.from_numpy(pixels)).numpy()
    for batch, y, x, channel in np.ndindex(*pixels.shape):
        corner = int(pixels[batch, y // 2 * 2, x // 2 * 2, channel])
        assert found[batch, y, x, channel] == abs(int(pixels[batch, y, x, channel]) - corner)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_residual_is_exact_in_sixteen_bits(dtype: torch.dtype) -> None:
    values = torch.arange(256)
    scaled = values.to(dtype) * RESIDUAL_SCALE
    assert torch.equal(scaled.double() * 256, values.double())


@pytest.mark.parametrize(("height", "width"), [(63, 64), (64, 63)])
def test_an_odd_side_is_refused(height: int, width: int) -> None:
    with pytest.raises(ValueError, match=f"NPR needs even height and width, got {height}x{width}"):
        residual(torch.zeros(1, height, width, 3, dtype=torch.uint8))


@pytest.mark.parametrize(
    "config",
    [
        ArchitectureConfig(),
        ArchitectureConfig(depth=4, k=4),
        ArchitectureConfig(depth=7, pooling="gap"),
        ArchitectureConfig(pooling="cbam"),
        ArchitectureConfig(pooling="gmp"),
    ],
    ids=str,
)
@torch.inference_mode()
def test_logits_are_those_of_the_network_on_normalised_pixels(config: ArchitectureConfig) -> None:
    checkpoint, pixels = make_checkpoint(config), make_pixels(3)
    expected = published_logits(checkpoint, pixels)
    assert expected.std() > 1e-3
    found = FoldedLFM(checkpoint, "fp32")(torch.from_numpy(pixels))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4 * float(expected.std()) + 1e-5)


@pytest.mark.parametrize(
    ("precision", "bits"),
    [("fp32", 17), pytest.param("tf32", 9, marks=needs_gpu), ("fp16", 9), ("bf16", 6)],
)
@torch.inference_mode()
def test_a_map_is_as_exact_as_its_precision(precision: Precision, bits: int) -> None:
    checkpoint, pixels = make_checkpoint(), torch.from_numpy(make_pixels(2)).to(DEVICE)
    expected = FoldedLFM(checkpoint, "fp32").double()
    expected.dtype = torch.float64
    wanted = expected.feature_map(pixels.cpu())
    with convolutions(precision):
        found = FoldedLFM(checkpoint, precision).to(DEVICE).feature_map(pixels).cpu()
    assert (found - wanted).norm() < 2**-bits * wanted.norm()


@torch.inference_mode()
def test_what_passes_the_largest_number_saturates() -> None:
    checkpoint = copy.deepcopy(make_checkpoint())
    for index in (1, 2, 3):
        checkpoint.model.get_parameter(f"blocks.{index}.norm.weight").fill_(1000)
    pixels = torch.from_numpy(make_pixels(2))
    assert FoldedLFM(checkpoint, "fp32").feature_map(pixels).abs().max() > 10 * torch.finfo(torch.float16).max
    assert FoldedLFM(checkpoint, "fp16")(pixels).isfinite().all()


def test_weights_too_large_for_the_precision_are_refused_with_the_remedy() -> None:
    checkpoint = make_checkpoint()
    checkpoint.model.projection.weight.data[0] = 1e5
    with pytest.raises(ConfigError, match=r"projection\.weight is too large for precision fp16: use bf16 or fp32"):
        FoldedLFM(checkpoint, "fp16")
    FoldedLFM(checkpoint, "bf16")


def test_the_checkpoint_is_not_changed() -> None:
    checkpoint = make_checkpoint()
    before = copy.deepcopy(checkpoint.model.state_dict())
    FoldedLFM(checkpoint, "fp16")
    for name, value in checkpoint.model.state_dict().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name])


def test_only_fp32_forbids_tf32_and_all_is_put_back() -> None:
    cudnn: Any = torch.backends.cudnn
    before = cudnn.conv.fp32_precision, cudnn.benchmark
    found = {}
    for precision in DTYPES:
        with convolutions(cast(Precision, precision), search=True):
            found[precision] = cudnn.conv.fp32_precision
            assert cudnn.benchmark
        assert (cudnn.conv.fp32_precision, cudnn.benchmark) == before
    assert found == {"fp32": "ieee", "tf32": "tf32", "bf16": "tf32", "fp16": "tf32"}
