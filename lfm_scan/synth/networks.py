"""Small autoencoders that draw a picture again, each by another way of making pixels out of few.

What LFM learns to see is how a decoder makes four pixels of one, so a kind is a way of upsampling and a factor. Fakes
made by one kind show the traces of it and nothing else that could give them away: content, size and format are the
photograph's.

Sources: the ways of upsampling, Odena et al. 2016 (Deconvolution and Checkerboard Artifacts) and Shi et al. 2016 (pixel
shuffle); the residual decoder, Rombach et al. 2022 (latent diffusion, its first stage).
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lfm_scan.synth.kinds import Kind, Upsampling

_NUM_GROUPS: Final = 8
_MIN_VARIANCE: Final = 1e-8
_RESIDUAL_SCALE: Final = 0.1


class Autoencoder(nn.Module):
    """A fixed linear encoder and a learned decoder.

    The encoder keeps the principal components of blocks of factor x factor pixels, scaled to unit variance. The decoder
    adds detail to the block means, drawn large by interpolation.

    Args:
        kind: What to build.
        sample_bchw: Pictures (B, 3, H, W) in [0, 1] to take the components from; H and W divisible by the factor.
    """

    def __init__(self, kind: Kind, sample_bchw: Tensor) -> None:
        super().__init__()
        self.factor = kind.factor
        self.base_mode = "bilinear" if kind.upsampling == "bilinear" else "nearest"
        self.register_buffer("encoder", _principal_components(sample_bchw, kind.factor, kind.code))
        layers: list[nn.Module] = [nn.Conv2d(kind.code, kind.widths[0], 3, padding=1)]
        layers += _block(kind, kind.widths[0])
        for before, after in zip(kind.widths, kind.widths[1:], strict=False):
            layers += [_upsampler(kind.upsampling, before, after), *_block(kind, after)]
        self.decoder = nn.Sequential(*layers, nn.Conv2d(kind.widths[-1], 3, 3, padding=1))

    def forward(self, x_bchw: Tensor) -> Tensor:
        """Return the picture drawn again.

        Args:
            x_bchw: Pictures (B, 3, H, W) in [0, 1]; H and W divisible by the factor.

        Returns:
            (B, 3, H, W), in [0, 1] but for overshoot.
        """
        code = F.conv2d(F.pixel_unshuffle(x_bchw - 0.5, self.factor), self.get_buffer("encoder"))
        means = F.avg_pool2d(x_bchw, self.factor)
        base = F.interpolate(means, scale_factor=float(self.factor), mode=self.base_mode)
        drawn: Tensor = base + self.decoder(code)
        return drawn


class ResidualBlock(nn.Module):
    """Twice GroupNorm, SiLU and a 3x3 convolution, added to the input (B, C, H, W); C divisible by 8."""

    def __init__(self, width: int) -> None:
        super().__init__()
        last = nn.Conv2d(width, width, 3, padding=1)
        with torch.no_grad():  # begins near the identity, so that deep decoders learn from the first step
            last.weight.mul_(_RESIDUAL_SCALE)
        first = nn.Conv2d(width, width, 3, padding=1)
        norms = (nn.GroupNorm(_NUM_GROUPS, width), nn.GroupNorm(_NUM_GROUPS, width))
        self.layers = nn.Sequential(norms[0], nn.SiLU(), first, norms[1], nn.SiLU(), last)

    def forward(self, x_bchw: Tensor) -> Tensor:
        """Return (B, C, H, W)."""
        added: Tensor = x_bchw + self.layers(x_bchw)
        return added


def _block(kind: Kind, width: int) -> list[nn.Module]:
    return [ResidualBlock(width)] if kind.residual else [nn.SiLU()]


def _upsampler(upsampling: Upsampling, before: int, after: int) -> nn.Module:
    match upsampling:
        case "transposed":
            return nn.ConvTranspose2d(before, after, 4, stride=2, padding=1)
        case "transposed3":
            return nn.ConvTranspose2d(before, after, 3, stride=2, padding=1, output_padding=1)
        case "shuffle":
            return nn.Sequential(nn.Conv2d(before, 4 * after, 3, padding=1), nn.PixelShuffle(2))
        case "nearest" | "bilinear":
            return nn.Sequential(nn.Upsample(scale_factor=2, mode=upsampling), nn.Conv2d(before, after, 3, padding=1))


def _principal_components(sample_bchw: Tensor, factor: int, num_components: int) -> Tensor:
    """Return (num_components, 3 x factor², 1, 1): a 1x1 convolution on pixel-unshuffled pictures."""
    blocks = F.pixel_unshuffle(sample_bchw, factor).permute(0, 2, 3, 1).flatten(0, 2)
    covariance = torch.cov(blocks.T)
    components = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, :num_components].T
    variances = (components @ covariance @ components.T).diagonal().clamp_min(_MIN_VARIANCE)
    scaled: Tensor = (components * variances.rsqrt()[:, None])[..., None, None]
    return scaled
