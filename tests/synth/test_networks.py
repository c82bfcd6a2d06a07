from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lfm_scan.synth.kinds import KINDS, Kind
from lfm_scan.synth.networks import Autoencoder

_KIND = Kind(name="test", upsampling="nearest", factor=2, code=12, widths=(8, 8))


def _pictures(num: int = 2, side_px: int = 16) -> Tensor:
    return torch.rand(num, 3, side_px, side_px, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_draws_a_picture_of_the_size_it_was_given(name: str) -> None:
    model = Autoencoder(KINDS[name], _pictures(16, 64))

    assert model(_pictures()).shape == (2, 3, 16, 16)


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_has_a_name_widths_and_a_code_that_fit_its_factor(name: str) -> None:
    kind = KINDS[name]

    assert kind.name == name
    assert 2 ** (len(kind.widths) - 1) == kind.factor
    assert kind.code <= 3 * kind.factor**2


def test_there_is_a_deep_kind_as_latent_diffusion_has_it() -> None:
    kind = KINDS["vae-f8"]

    model = Autoencoder(kind, _pictures(16, 64))

    names = [type(module).__name__ for module in model.modules()]
    assert names.count("Upsample") == 3
    assert names.count("ResidualBlock") == 4
    assert names.count("GroupNorm") == 8


def test_the_code_has_unit_variance_and_no_correlation() -> None:
    pictures = _pictures(8, 64)
    model = Autoencoder(_KIND, pictures)

    blocks = torch.nn.functional.pixel_unshuffle(pictures, 2)
    codes = torch.nn.functional.conv2d(blocks, model.get_buffer("encoder")).permute(1, 0, 2, 3).flatten(1)

    np.testing.assert_allclose(torch.cov(codes).numpy(), np.eye(12), atol=1e-3)


def test_only_the_decoder_learns() -> None:
    model = Autoencoder(_KIND, _pictures(8, 64))

    assert all(name.startswith("decoder.") for name, _ in model.named_parameters())


def test_what_the_decoder_leaves_out_is_the_mean_of_each_block() -> None:
    model = Autoencoder(_KIND, _pictures(8, 64))
    torch.nn.init.zeros_(model.decoder[-1].weight)  # type: ignore[arg-type]
    torch.nn.init.zeros_(model.decoder[-1].bias)  # type: ignore[arg-type]
    pictures = _pictures()

    drawn = model(pictures)

    blocks = pictures.reshape(2, 3, 8, 2, 8, 2)
    expected = blocks.mean(dim=(3, 5), keepdim=True).expand_as(blocks).reshape(2, 3, 16, 16)
    torch.testing.assert_close(drawn, expected)
