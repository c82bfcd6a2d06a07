"""The kernels against definitions in torch, on the GPU or else in Triton's interpreter."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lfm_scan.errors import ConfigError
from lfm_scan.model import ArchitectureConfig, Checkpoint
from lfm_scan.scoring.cuda.folded import FoldedLFM, Precision
from tests.scoring.cuda.networks import (
    DEVICE,
    ON_GPU,
    make_checkpoint,
    make_pixels,
    needs_gpu,
    needs_triton,
    published_logits,
)

if TYPE_CHECKING:
    from lfm_scan.scoring.cuda.fused import FusedLFM

pytestmark = needs_triton

# Triton's interpreter keeps bf16 as whole numbers and multiplies those.
_PRECISIONS = ["fp16", pytest.param("bf16", marks=needs_gpu)]
_TOLERANCE = {"fp16": 2e-3, "bf16": 1.6e-2}


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return make_checkpoint()


def fused(checkpoint: Checkpoint, precision: Precision = "fp16", *, quad: bool = False) -> FusedLFM:
    from lfm_scan.scoring.cuda.fused import FusedLFM, Launch, Launches

    # On a CPU a program is a loop's turn, and small products are quick; on a GPU the blocks are those that are used.
    pooled = Launch(64, block_n=64, quad=True, num_warps=4, num_stages=2) if quad else Launch(32)
    return FusedLFM(checkpoint, precision, Launches(layer2=pooled, layer3=pooled)).to(DEVICE)


def folded_conv(checkpoint: Checkpoint, layer: int) -> nn.Conv2d:
    conv = FoldedLFM(checkpoint).blocks.get_submodule(f"{layer - 1}.conv").double()
    assert isinstance(conv, nn.Conv2d)
    return conv


def to_device(pixels: object) -> Tensor:
    return torch.as_tensor(pixels).to(DEVICE)


def assert_close(found_bhwc: Tensor, expected_bchw: Tensor, tolerance: float) -> None:
    found, expected = found_bhwc.permute(0, 3, 1, 2).double().cpu(), expected_bchw.double().cpu()
    assert found.shape == expected.shape
    assert (found - expected).norm() <= tolerance * expected.norm()
    assert (found - expected).abs().max() <= 4 * tolerance * expected.abs().max()


@pytest.mark.parametrize("precision", _PRECISIONS)
@torch.inference_mode()
def test_layer1_is_npr_conv_pool_and_relu(checkpoint: Checkpoint, precision: Precision) -> None:
    pixels = make_pixels(3, 50, 64)
    found = fused(checkpoint, precision).npr_conv_pool(to_device(pixels))
    model = checkpoint.model.double()
    normalised = (torch.from_numpy(pixels) / 255.0).double().permute(0, 3, 1, 2) / torch.tensor(
        checkpoint.metadata.std
    ).view(3, 1, 1)
    expected = model.blocks[0](model.npr(normalised))
    checkpoint.model.float()
    assert_close(found, expected, _TOLERANCE[precision])


@pytest.mark.parametrize("precision", _PRECISIONS)
@pytest.mark.parametrize("quad", [False, True])
@pytest.mark.parametrize("layer", [2, 3])
@pytest.mark.parametrize("shape", [(3, 7, 9), (3, 8, 6)])
@torch.inference_mode()
def test_conv_pool_is_conv_pool_and_relu(
    checkpoint: Checkpoint, precision: Precision, quad: bool, layer: int, shape: tuple[int, ...]
) -> None:
    network = fused(checkpoint, precision, quad=quad)
    conv = folded_conv(checkpoint, layer)
    x_bhwc = torch.rand(*shape, conv.in_channels, generator=torch.Generator().manual_seed(layer))
    x_bhwc = x_bhwc.to(network.dtype)
    found = network.conv_pool(x_bhwc.to(DEVICE), layer)
    expected = F.max_pool2d(conv(x_bhwc.double().permute(0, 3, 1, 2)).relu(), 2)
    assert (expected > 0).any()
    assert_close(found, expected, _TOLERANCE[precision])


@pytest.mark.parametrize("precision", _PRECISIONS)
@torch.inference_mode()
def test_conv_project_is_conv_relu_and_projection(checkpoint: Checkpoint, precision: Precision) -> None:
    network, folded = fused(checkpoint, precision), FoldedLFM(checkpoint).double()
    conv = folded_conv(checkpoint, 4)
    x_bhwc = torch.rand(3, 8, 7, 256, generator=torch.Generator().manual_seed(0)).to(network.dtype)
    found = network.conv_project(x_bhwc.to(DEVICE))
    assert found.dtype == torch.float32
    expected = folded.projection(conv(x_bhwc.double().permute(0, 3, 1, 2)).relu())
    assert_close(found, expected, _TOLERANCE[precision])


@pytest.mark.parametrize("k", [1, 16])
@torch.inference_mode()
def test_topk_head_sums_the_largest_values_by_rank(k: int) -> None:
    checkpoint = make_checkpoint(ArchitectureConfig(k=k))
    network = fused(checkpoint)
    # Whole numbers: many are equal, and their order must not matter; some channels are negative throughout.
    map_bhwc = torch.randint(-9, 10, (3, 5, 6, 64), generator=torch.Generator().manual_seed(0)).float()
    map_bhwc[:, :, :, :8] -= 100
    values = map_bhwc.flatten(1, 2).transpose(1, 2).sort(dim=-1, descending=True).values[:, :, :k]
    head = checkpoint.model.head
    expected = (values.double() * head.weight.double().view(64, k)).sum(dim=(1, 2)) + head.bias.double()
    found = network.topk_head(map_bhwc.to(DEVICE)).cpu()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)


@torch.inference_mode()
def test_a_map_smaller_than_k_is_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(ValueError, match="a map of 15 positions cannot give its 16 largest"):
        fused(checkpoint).topk_head(torch.zeros(1, 3, 5, 64, device=DEVICE))


@pytest.mark.parametrize("precision", _PRECISIONS)
@pytest.mark.parametrize("quad", [False, True])
@torch.inference_mode()
def test_logits_are_those_of_the_network(checkpoint: Checkpoint, precision: Precision, quad: bool) -> None:
    pixels = make_pixels(3)
    expected = published_logits(checkpoint, pixels)
    found = fused(checkpoint, precision, quad=quad)(to_device(pixels)).double().cpu()
    assert found.shape == (3,)
    assert (found - expected).abs().max() < 50 * _TOLERANCE[precision] * expected.std()


@torch.inference_mode()
def test_a_logit_does_not_depend_on_the_batch(checkpoint: Checkpoint) -> None:
    network, pixels = fused(checkpoint), to_device(make_pixels(9 if ON_GPU else 2))
    together = network(pixels)
    alone = torch.cat([network(image[None]) for image in pixels])
    # The interpreter multiplies with numpy, whose sums depend on where a row is.
    tolerance = 0.0 if ON_GPU else 1e-3
    torch.testing.assert_close(alone, together, rtol=0, atol=tolerance)
    torch.testing.assert_close(network(pixels.flip(0)), together.flip(0), rtol=0, atol=tolerance)


@torch.inference_mode()
def test_a_view_of_a_larger_batch_gives_the_same(checkpoint: Checkpoint) -> None:
    network, pixels = fused(checkpoint), to_device(make_pixels(1, 48, 104))
    assert torch.equal(network(pixels[:, :, :52]), network(pixels[:, :, :52].contiguous()))


@torch.inference_mode()
def test_what_passes_the_largest_number_saturates(checkpoint: Checkpoint) -> None:
    network = fused(checkpoint)
    network.get_buffer("bias2").fill_(1e30)
    assert network(to_device(make_pixels(1, 48, 48))).isfinite().all()


@pytest.mark.parametrize(
    ("config", "precision"),
    [
        (ArchitectureConfig(depth=6), "fp16"),
        (ArchitectureConfig(pooling="gap"), "fp16"),
        (ArchitectureConfig(), "fp32"),
    ],
)
def test_what_has_no_kernels_is_refused(config: ArchitectureConfig, precision: Precision) -> None:
    with pytest.raises(ConfigError, match=f"no kernels for precision {precision}"):
        fused(make_checkpoint(config), precision)


@torch.inference_mode()
def test_tuning_takes_the_fastest_that_gives_the_right_map(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lfm_scan.scoring.cuda import fused as module

    wrong, slow, quick = module.Launch(128), module.Launch(32), module.Launch(64, block_n=64, quad=True, num_stages=2)
    monkeypatch.setattr(module, "CANDIDATES", {"layer3": (wrong, slow, quick)})
    network = fused(checkpoint)
    before = network.launches
    honest = network.conv_pool

    def conv_pool(x_bhwc: Tensor, layer: int) -> Tensor:
        return honest(x_bhwc, layer) * (0 if network.launches.layer3 == wrong else 1)

    monkeypatch.setattr(network, "conv_pool", conv_pool)
    monkeypatch.setattr(module, "_run_layer", lambda network, layer, x_bhwc: network.conv_pool(x_bhwc, int(layer[-1])))
    times = {wrong: 1.0, slow: 3.0, quick: 2.0}
    x_bhwc = torch.rand(1, 9, 9, 128, generator=torch.Generator().manual_seed(0)).to(DEVICE, network.dtype)
    trials = list(module.tune(network, x_bhwc, lambda run: times[network.launches.layer3]))
    assert [(trial.launch, trial.ms, trial.error) for trial in trials] == [
        (wrong, None, "gives another map"),
        (slow, 3.0, None),
        (quick, 2.0, None),
    ]
    assert network.launches.layer3 == quick
    assert network.launches.layer2 == before.layer2


@needs_gpu
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@torch.inference_mode()
def test_every_candidate_gives_the_map_of_the_default_at_full_size(
    checkpoint: Checkpoint, precision: Precision
) -> None:
    from lfm_scan.scoring.cuda.fused import CANDIDATES, tune

    trials = list(tune(fused(checkpoint, precision), to_device(make_pixels(3, 256, 256)), lambda run: 1.0))
    assert len(trials) == sum(map(len, CANDIDATES.values()))
    assert [trial for trial in trials if trial.error] == []
