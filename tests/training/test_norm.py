"""BatchNorm over workers, here with one of them: two are in `test_step`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lfm_scan.model import LFM
from lfm_scan.training.norm import GlobalBatchNorm2d, global_moments, norms_of, synchronise_norms


@pytest.fixture
def _one_worker(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def maps(seed: int, mean: float = 3.0) -> Tensor:
    return mean + torch.randn(6, 5, 4, 3, generator=torch.Generator().manual_seed(seed))


def plain_norm() -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(5, eps=1e-3, momentum=0.3)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2.0)
        norm.bias.normal_()
    return norm


@pytest.mark.usefixtures("_one_worker")
def test_it_is_batchnorm2d_forwards_and_backwards() -> None:
    expected = plain_norm()
    ours = GlobalBatchNorm2d.like(expected)
    for seed in range(3):
        theirs_in, ours_in = maps(seed).requires_grad_(), maps(seed).requires_grad_()
        theirs_out, ours_out = expected(theirs_in), ours(ours_in)
        torch.testing.assert_close(ours_out, theirs_out, rtol=1e-5, atol=1e-5)
        for module, out in ((expected, theirs_out), (ours, ours_out)):
            module.zero_grad()
            (out * maps(seed + 10)).sum().backward()
        torch.testing.assert_close(ours_in.grad, theirs_in.grad, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.weight.grad, expected.weight.grad, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.bias.grad, expected.bias.grad, rtol=1e-4, atol=1e-4)
    theirs_state, our_state = expected.state_dict(), ours.state_dict()
    assert list(our_state) == list(theirs_state)
    for key, value in theirs_state.items():
        torch.testing.assert_close(our_state[key], value, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.eval()(maps(9)), expected.eval()(maps(9)), rtol=1e-5, atol=1e-5)


def test_moments_are_right_where_sums_of_squares_would_cancel() -> None:
    mean, variance, count = global_moments(maps(0, mean=3000.0))
    exact = maps(0, mean=3000.0).double()
    torch.testing.assert_close(mean.double(), exact.mean(dim=(0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(variance.double(), exact.var(dim=(0, 2, 3), correction=0), rtol=1e-4, atol=0)
    assert count.item() == 6 * 4 * 3


def test_alone_the_norms_stay_batchnorm2d() -> None:
    model = LFM()
    before = norms_of(model)
    synchronise_norms(model, torch.device("cpu"))
    assert all(one is other for one, other in zip(norms_of(model), before, strict=True))
    assert {type(norm) for norm in before} == {nn.BatchNorm2d}
