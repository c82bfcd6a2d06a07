"""The torch backend against the network as it is trained."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from lfm_scan.errors import ConfigError
from lfm_scan.model import LFM, Checkpoint, CheckpointMetadata
from lfm_scan.model.checkpoint import tensors_of
from lfm_scan.scoring.backend import resolve_device
from lfm_scan.scoring.torch_backend import TorchBackend, fold_batch_norm


@pytest.fixture(scope="module")
def model() -> LFM:
    """A network whose BatchNorms are far from the identity."""
    torch.manual_seed(3)
    model = LFM().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.3, 2)
    return model


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 256, 256, 3), dtype=np.uint8)


def backend(model: LFM, batch_size: int | None = None) -> TorchBackend:
    metadata = CheckpointMetadata("lfm-test", mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3))
    return TorchBackend(Checkpoint(tensors_of(model), metadata, "0" * 64), batch_size=batch_size)


@torch.inference_mode()
def test_folding_batch_norm_keeps_the_logits(model: LFM) -> None:
    images = torch.randn(2, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    folded = fold_batch_norm(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert (folded(images) - model(images)).abs().max() < 1e-4


@torch.inference_mode()
def test_logits_are_those_of_the_network_on_normalised_pixels(model: LFM, pixels: np.ndarray) -> None:
    normalised = (pixels / 255 - (0.5, 0.4, 0.3)) / (0.1, 0.2, 0.3)
    expected = model(torch.from_numpy(normalised.transpose(0, 3, 1, 2)).float()).numpy()
    found = backend(model).logits(pixels)
    assert found.shape == (5,)
    assert found.dtype == np.dtype(np.float32)
    # Fresh weights score everything nearly alike: the differences between images are what must agree.
    spread = np.ptp(expected)
    assert spread > 0
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.005 * spread)


def test_on_a_cpu_no_bit_of_a_logit_depends_on_the_batch(model: LFM, pixels: np.ndarray) -> None:
    together = backend(model).logits(pixels)
    alone = [backend(model).logits(pixels[index : index + 1])[0] for index in range(len(pixels))]
    np.testing.assert_array_equal(together, alone)
    np.testing.assert_array_equal(backend(model, 64).logits(pixels), together)
    np.testing.assert_array_equal(backend(model).logits(pixels[::-1].copy()), together[::-1])


def test_no_images_give_no_logits(model: LFM) -> None:
    assert backend(model).logits(np.empty((0, 256, 256, 3), np.uint8)).shape == (0,)


def test_the_pixels_given_are_not_changed(model: LFM, pixels: np.ndarray) -> None:
    before = pixels.copy()
    backend(model).logits(pixels)
    np.testing.assert_array_equal(pixels, before)


def test_auto_takes_what_there_is() -> None:
    assert resolve_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolve_device("cpu") == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPU")
def test_cuda_without_a_gpu_is_refused_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match="torch finds no usable GPU here; use --device cpu"):
        resolve_device("cuda")


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ConfigError, match="device must be auto, cpu or cuda, got 'tpu'"):
        resolve_device("tpu")
