"""The kinds of network that draw pictures again. Apart from the networks, so that `--help` loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

Upsampling = Literal["nearest", "bilinear", "transposed", "transposed3", "shuffle"]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of network.

    Attributes:
        name: Of the kind, and of the folder of its fakes.
        upsampling: How it makes four pixels of one; it does so log2(`factor`) times.
        factor: How much smaller than the picture its code is, on each side: 2, 4 or 8.
        code: Numbers the code holds for each block of factor x factor pixels, which are 3 x factor². Too few, and the
            network draws blur.
        widths: Channels at each size, from the code's to the picture's.
        residual: Whether there are residual blocks (GroupNorm, SiLU, conv) at each size, as in latent-diffusion
            decoders, instead of one convolution.
        effort: How many times more steps than others it is trained for.
    """

    name: str
    upsampling: Upsampling
    factor: int
    code: int
    widths: tuple[int, ...]
    residual: bool = False
    effort: int = 1


_PLAIN2: Final = (40, 40)
_PLAIN4: Final = (40, 40, 40)

KINDS: Final[dict[str, Kind]] = {
    kind.name: kind
    for kind in (
        Kind(name="nearest-f2", upsampling="nearest", factor=2, code=7, widths=_PLAIN2),
        Kind(name="bilinear-f2", upsampling="bilinear", factor=2, code=7, widths=_PLAIN2),
        Kind(name="transposed-f2", upsampling="transposed", factor=2, code=5, widths=_PLAIN2),
        Kind(name="transposed3-f2", upsampling="transposed3", factor=2, code=5, widths=_PLAIN2),
        Kind(name="shuffle-f2", upsampling="shuffle", factor=2, code=5, widths=_PLAIN2),
        Kind(name="nearest-f4", upsampling="nearest", factor=4, code=30, widths=_PLAIN4),
        Kind(name="transposed-f4", upsampling="transposed", factor=4, code=16, widths=_PLAIN4),
        Kind(name="shuffle-f4", upsampling="shuffle", factor=4, code=16, widths=_PLAIN4),
        Kind(name="vae-f4", upsampling="nearest", factor=4, code=28, widths=(64, 32, 24), residual=True),
        Kind(name="vae-f8", upsampling="nearest", factor=8, code=96, widths=(128, 72, 40, 24), residual=True, effort=2),
    )
}
"""The kinds by name. Their codes are so wide that each draws at 34 dB or better; docs/synth.md has the figures."""
