"""BatchNorm over the images of all workers, so that a distributed training is the one-process training.

torch's SyncBatchNorm does it on GPUs and refuses CPU tensors; `GlobalBatchNorm2d` does it on CPUs. Both keep the names
of BatchNorm2d in a state dict, so a checkpoint does not tell who trained it.

Shape legend: B batch, C channels, H W map height and width.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lfm_scan.model.network import LFM, Block


def num_workers() -> int:
    """Return how many processes train together, 1 outside torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def norms_of(model: LFM) -> list[nn.Module]:
    """Return the BatchNorm layers, in order."""
    return [cast(Block, block).norm for block in model.blocks]


def synchronise_norms(model: LFM, device: torch.device) -> None:
    """Make each BatchNorm take its statistics from the images of all workers, in place; alone, leave them as they are.

    Args:
        model: With plain BatchNorm2d layers.
        device: Where it will train.
    """
    if num_workers() == 1:
        return
    for module in model.blocks:
        block = cast(Block, module)
        if device.type == "cpu":
            block.norm = GlobalBatchNorm2d.like(cast(nn.BatchNorm2d, block.norm))
        else:
            block.norm = nn.SyncBatchNorm.convert_sync_batchnorm(block.norm)  # type: ignore[no-untyped-call]


def global_moments(x_bchw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean (C,), biased variance (C,) and count () of each channel over the images of all workers, float32.

    Every worker must call it at the same time; one of them may have no images.
    """
    num_channels = x_bchw.shape[1]
    count = x_bchw.numel() // num_channels
    local = torch.zeros(2 * num_channels + 1, device=x_bchw.device)
    if count:
        local[:num_channels], local[num_channels:-1] = reversed(
            torch.var_mean(x_bchw.detach().float(), dim=(0, 2, 3), correction=0)
        )
    local[-1] = count
    gathered = local
    if num_workers() > 1:
        gathered = local.new_empty(num_workers() * len(local))
        dist.all_gather_into_tensor(gathered, local)
    gathered = gathered.view(-1, len(local))
    means, variances, counts = gathered[:, :num_channels], gathered[:, num_channels:-1], gathered[:, -1:]
    # Chan et al.'s way to join variances: sums of squares would cancel where a mean is far from zero.
    shares = counts / counts.sum()
    mean = (shares * means).sum(dim=0)
    variance = (shares * (variances + (means - mean).square())).sum(dim=0)
    return mean, variance, counts.sum()


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d whose batch, in training mode, is that of all workers together; the same in evaluation mode.

    Every worker must take part in each forward and backward pass of training mode; one of them may have no images.
    """

    @classmethod
    def like(cls, norm: nn.BatchNorm2d) -> GlobalBatchNorm2d:
        """Return one with the settings, weights and statistics of another norm."""
        made = cls(norm.num_features, eps=norm.eps, momentum=norm.momentum)
        made.load_state_dict(norm.state_dict())
        return made

    def forward(self, input: Tensor) -> Tensor:
        """Return (B, C, H, W)."""
        if not self.training:
            return super().forward(input)
        mean, variance, count = global_moments(input)
        self._track(mean, variance, count)
        out: Tensor = _Normalise.apply(  # type: ignore[no-untyped-call]
            input, self.weight, self.bias, mean, variance, count, self.eps
        )
        return out

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """Update the running statistics as BatchNorm2d does: the variance unbiased."""
        assert self.running_mean is not None  # noqa: S101 - narrows the type; `like` always tracks
        assert self.running_var is not None  # noqa: S101
        assert self.num_batches_tracked is not None  # noqa: S101
        assert self.momentum is not None  # noqa: S101
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * count / (count - 1), self.momentum)


class _Normalise(torch.autograd.Function):
    """Normalise by statistics of all workers; the gradient knows that they depend on the input of each."""

    @staticmethod
    def forward(  # noqa: PLR0917 - apply() takes no keywords
        ctx: Any,  # noqa: ANN401 - torch's type lacks what save_for_backward leaves
        x_bchw: Tensor,
        weight_c: Tensor,
        bias_c: Tensor,
        mean_c: Tensor,
        variance_c: Tensor,
        count: Tensor,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(x_bchw, weight_c, mean_c, torch.rsqrt(variance_c + eps), count)
        return F.batch_norm(x_bchw, mean_c, variance_c, weight_c, bias_c, training=False, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_bchw: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        x_bchw, weight_c, mean_c, inverse_std_c, count = ctx.saved_tensors
        grad = grad_bchw.float()
        normal = (x_bchw.float() - _wide(mean_c)) * _wide(inverse_std_c)
        sums = torch.stack([grad.sum(dim=(0, 2, 3)), (grad * normal).sum(dim=(0, 2, 3))])
        # The weights' own gradients stay local: they are summed over workers with all others.
        grad_bias, grad_weight = sums.clone()
        dist.all_reduce(sums)
        mean_grad, mean_product = sums / count
        grad_x = _wide(weight_c * inverse_std_c) * (grad - _wide(mean_grad) - normal * _wide(mean_product))
        return grad_x.to(x_bchw.dtype), grad_weight, grad_bias, None, None, None, None


def _wide(value_c: Tensor) -> Tensor:
    return value_c.view(1, -1, 1, 1)
