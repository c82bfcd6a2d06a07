"""Draws: uniform, and the same for a row whoever asks for it."""

from __future__ import annotations

from typing import get_args

import torch

from lfm_scan.model.regularizers import Purpose
from lfm_scan.training.draws import uniform_rows


def test_a_row_has_its_numbers_whoever_holds_it() -> None:
    whole = uniform_rows(3, 5, "rks", range(8), (4, 25))
    assert whole.shape == (8, 4, 25)
    assert whole.dtype == torch.float32
    assert torch.equal(uniform_rows(3, 5, "rks", [6, 2], (4, 25)), whole[[6, 2]])
    assert uniform_rows(3, 5, "rks", [], (4, 25)).shape == (0, 4, 25)


def test_seeds_steps_purposes_and_rows_have_numbers_of_their_own() -> None:
    drawn = [
        uniform_rows(seed, step, purpose, range(3), (64,))
        for seed in (0, 1, 2**63 - 1)
        for step in (0, 1)
        for purpose in get_args(Purpose)
    ]
    rows = torch.cat(drawn)
    assert len(set(rows.flatten().tolist())) > 0.999 * rows.numel()


def test_the_numbers_are_uniform_from_0_to_below_1() -> None:
    numbers = uniform_rows(0, 0, "rbld", range(100), (2000,)).flatten()
    assert numbers.min() >= 0
    assert numbers.max() < 1
    share = torch.histc(numbers, bins=20, min=0, max=1) / len(numbers)
    # Five standard errors of a share of 1/20 in 200,000 draws.
    torch.testing.assert_close(share, torch.full((20,), 0.05), rtol=0, atol=5 * (0.05 * 0.95 / 200_000) ** 0.5)
