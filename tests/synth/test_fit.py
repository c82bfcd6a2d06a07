from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lfm_scan.synth.fit import Fitted, detail_ratio, deterministic, draw, fit, psnr_db
from lfm_scan.synth.kinds import KINDS
from tests.images import picture

_STEPS = 20


@pytest.fixture(scope="module")
def crops() -> NDArray[np.uint8]:
    """Eighteen smooth pictures of 64 pixels."""
    return np.stack([np.asarray(picture(256, 256, seed).resize((64, 64))) for seed in range(18)])


@pytest.fixture(scope="module")
def fitted(crops: NDArray[np.uint8]) -> Fitted:
    return fit(KINDS["shuffle-f2"], crops, _STEPS, seed=0)


def test_psnr_of_an_error_of_one_level_everywhere_is_48_db() -> None:
    black = np.zeros((1, 8, 8, 3), np.uint8)

    assert psnr_db(black, black + 1) == pytest.approx(48.1308, abs=1e-4)


def test_psnr_does_not_wrap_around() -> None:
    black = np.zeros((1, 8, 8, 3), np.uint8)

    assert psnr_db(black, black + 255) == pytest.approx(0.0)
    assert psnr_db(black + 255, black) == pytest.approx(0.0)


def test_psnr_is_of_each_picture_and_infinite_where_nothing_differs() -> None:
    originals = np.zeros((2, 8, 8, 3), np.uint8)
    copies = originals.copy()
    copies[0, :, :, 0] = 10

    assert psnr_db(originals, copies).tolist() == pytest.approx([20 * np.log10(255 / 10) + 10 * np.log10(3), np.inf])


def test_training_makes_a_network_sharper(crops: NDArray[np.uint8], fitted: Fitted) -> None:
    barely = fit(KINDS["shuffle-f2"], crops, 1, seed=0)

    assert fitted.psnr_db > barely.psnr_db + 2


def test_the_psnr_of_a_network_is_of_the_crops_it_did_not_learn_from(crops: NDArray[np.uint8], fitted: Fitted) -> None:
    held_out = crops[1::8]

    assert fitted.psnr_db == pytest.approx(float(np.mean(psnr_db(held_out, draw(fitted.model, held_out)))))


def test_the_same_seed_gives_the_same_pixels_and_another_seed_others(crops: NDArray[np.uint8], fitted: Fitted) -> None:
    first = draw(fitted.model, crops)

    torch.rand(3)  # what others draw does not matter
    again = draw(fit(KINDS["shuffle-f2"], crops, _STEPS, seed=0).model, crops)
    other = draw(fit(KINDS["shuffle-f2"], crops, _STEPS, seed=1).model, crops)

    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_fitting_leaves_the_callers_random_numbers_and_torch_as_they_were(crops: NDArray[np.uint8]) -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)

    fit(KINDS["nearest-f2"], crops, 1, seed=0)

    assert torch.equal(torch.rand(1), expected)
    assert not torch.are_deterministic_algorithms_enabled()


def test_deterministic_algorithms_are_left_on_where_they_were_on() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        with deterministic(0):
            pass
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_picture_without_colour_is_drawn_without(crops: NDArray[np.uint8], fitted: Fitted) -> None:
    grey = np.repeat(crops[:1, ..., :1], 3, axis=-1)

    drawn = draw(fitted.model, np.concatenate([grey, crops[1:2]]))

    assert (drawn[0] == drawn[0, ..., :1]).all()
    assert not np.array_equal(drawn[0], grey[0])
    assert not (drawn[1] == drawn[1, ..., :1]).all()


def test_blur_shows_as_a_detail_below_one() -> None:
    checks = np.kron(np.indices((32, 32)).sum(axis=0) % 2, np.ones((2, 2)))[None, ..., None] * np.full(3, 255.0)
    softer = 64 + checks / 2

    assert detail_ratio(checks.astype(np.uint8), checks.astype(np.uint8)) == pytest.approx(1.0)
    assert detail_ratio(checks.astype(np.uint8), softer.astype(np.uint8)) == pytest.approx(0.5, abs=0.01)
