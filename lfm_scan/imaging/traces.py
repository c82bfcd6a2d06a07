"""Was a picture a JPEG once? What its pixels tell, when its container is lossless.

JPEG rounds every coefficient of its 8x8 DCT to a multiple of a step. Rounding the decoded pixels to integers blurs
that by some 0.3, so a luminance coefficient that was quantised with a step of 2 or more still sits near multiples of
its step: a comb. No camera, resampling or generator makes one, even where it leaves a grid of 8 pixels.

1. Search. In the most active 16x16 cells of a bounded sample, 25 coefficients are taken at all 64 offsets that the grid
   can have in a cropped picture. For each coefficient and step q, z tests the mean of cos(2 pi c / q) over those with
   abs(c) > q/2. Zeros say nothing and are left out; for the rest the mean is zero or less where the density falls off
   convexly, as it does in pictures, and near one on a comb. The offsets are ranked by the sum of squares of z; the
   prominence is how much the first exceeds the fourth.
2. Proof. At the first offset, in all blocks of the sample, each different block once: how many of the 63 coefficients
   show a comb.

JPEG has a comb in many coefficients, at one offset, or two or three if it was saved repeatedly. Drawings, text, dither
and pixel art have few grey values, so their coefficients repeat too, but at many offsets alike: prominence tells.

The quality is that of the standard luminance table (scaled as libjpeg does) which makes the coefficients likeliest.

Not seen: pictures resized, rotated, filtered or reduced to a palette after the JPEG; quality 100, and some of 99; very
low qualities; many pictures of less than 96 pixels a side; JPEGs coded in RGB; WebP and AVIF, whose transforms differ.

Sources: Fan and de Queiroz, "Identification of bitmap compression history", IEEE TIP 2003, and Neelamani et al., "JPEG
compression history estimation for color images", IEEE TIP 2006, for the steps; Nikoukhah et al., "ZERO", IPOL 2021, for
the search over all offsets. The test on non-zero coefficients and the prominence are ours;
`benchmarks/jpeg_traces.py` measures them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from PIL import Image

from lfm_scan.imaging.lossy import TABLES

MIN_COMBS: Final = 8
"""Coefficients with a comb, of 63, that make a JPEG. Chosen with the next by benchmarks/jpeg_traces.py."""
MIN_PROMINENCE: Final = 2.0

_BLOCK: Final = 8
_NUM_OFFSETS: Final = _BLOCK**2
_WHOLE_PIXELS: Final = 512 * 512
"""Pictures up to this size are sampled whole, larger ones by tiles: the cost is bounded."""
_TILE_PX: Final = 64
_MAX_TILES: Final = 64
_CELL_PX: Final = 16
_SPAN_PX: Final = 15  # holds one block at each offset
_MAX_CELLS: Final = 96
_MAX_BLOCKS: Final = 4096

_FREQUENCIES: Final = (0, 1, 2, 3, 5)  # low ones have values at low quality, high ones have steps at high quality
_BINS_PER_UNIT: Final = 4
_SEARCHED_STEPS: Final = np.arange(2, 21)
_PROVEN_STEPS: Final = np.arange(2, 41)
_SEARCHED_BINS: Final = 122
_PROVEN_BINS: Final = 258
_SEARCH_Z: Final = 1.5  # the best of some steps is above it by chance
_COMB_Z: Final = 4.0
_NEXT: Final = 3

_SPREAD: Final = 0.3
"""Standard deviation of a coefficient around its multiple: rounding to integer pixels, sqrt(1/12), and some more."""
_STRAY: Final = 0.1
"""Share of coefficients off the comb: of clipped pixels, and of what was pasted."""
_MIN_FIT: Final = 0.9


@dataclass(frozen=True, slots=True)
class Traces:
    """Signs of JPEG compression in a picture.

    Attributes:
        offset: Of the 8x8 grid, (x, y), 0 to 7 each; (0, 0) unless the picture was cropped.
        prominence: The evidence for this offset over that of the fourth best, 1 or more.
        num_combs: Coefficients with a comb at this offset, 0 to 63; 0 also if prominence was too low to count them.
        quality: 1 to 100 on the IJG scale, or None if no standard table fits.
    """

    offset: tuple[int, int]
    prominence: float
    num_combs: int
    quality: int | None

    @property
    def are_jpeg(self) -> bool:
        """Whether they are enough to say that the picture was a JPEG."""
        return self.num_combs >= MIN_COMBS and self.prominence >= MIN_PROMINENCE


def find_jpeg_traces(image: Image.Image) -> Traces | None:
    """Return the traces of JPEG compression, or None if there are not enough to say so.

    Args:
        image: Mode RGB, at its stored size.
    """
    traces = measure_traces(image, MIN_PROMINENCE)
    return traces if traces is not None and traces.are_jpeg else None


def measure_traces(image: Image.Image, min_prominence: float = 0.0) -> Traces | None:
    """Return what traces there are, enough or not; None for an image that is too small to hold any.

    Args:
        image: Mode RGB, at its stored size.
        min_prominence: Below it, combs are not counted, which takes a quarter of the time.
    """
    tiles = _sample(image)
    cells = np.concatenate([_cut(tile, _CELL_PX) for tile in tiles])
    if not len(cells):
        return None
    evidence = _evidence(_most_active(cells))
    best = int(evidence.argmax())
    y, x = divmod(best, _BLOCK)
    prominence = float((evidence[best] + 1) / (np.partition(evidence, -1 - _NEXT)[-1 - _NEXT] + 1))
    if prominence < min_prominence:
        return Traces((x, y), prominence, 0, None)
    histograms = _histograms_at(tiles, y, x)
    combs = int((_comb_z(histograms, _PROVEN_WEIGHTS) > _COMB_Z).sum())
    return Traces((x, y), prominence, combs, _likeliest_quality(histograms))


# --- The sample ---


def _sample(image: Image.Image) -> list[np.ndarray]:
    """Return luminance of the whole picture, or of tiles spread evenly over it, at multiples of 8 pixels; uint8."""
    width, height = image.size
    if width * height <= _WHOLE_PIXELS:
        return [np.asarray(image.convert("L"))]
    tile_width, tile_height = min(_TILE_PX, width), min(_TILE_PX, height)
    across = min(max(1, math.isqrt(_MAX_TILES * width // height)), _MAX_TILES, width // tile_width)
    down = min(_MAX_TILES // across, height // tile_height)
    lefts = np.linspace(0, width - tile_width, across).astype(int) // _BLOCK * _BLOCK
    tops = np.linspace(0, height - tile_height, down).astype(int) // _BLOCK * _BLOCK
    # Pillow's rounded L restores the integers that the JPEG decoder had before it made RGB of them.
    return [
        np.asarray(image.crop((left, top, left + tile_width, top + tile_height)).convert("L"))
        for top in tops.tolist()
        for left in lefts.tolist()
    ]


def _cut(tile: np.ndarray, side: int) -> np.ndarray:
    """Cut (H, W) into squares without the rest, (N, side, side)."""
    rows, columns = tile.shape[0] // side, tile.shape[1] // side
    whole = tile[: rows * side, : columns * side]
    return whole.reshape(rows, side, columns, side).swapaxes(1, 2).reshape(-1, side, side)


def _most_active(cells: np.ndarray) -> np.ndarray:
    if len(cells) <= _MAX_CELLS:
        return cells
    signed = cells.astype(np.int16)
    activity = np.abs(np.diff(signed, axis=2)).sum(axis=(1, 2)) + np.abs(np.diff(signed, axis=1)).sum(axis=(1, 2))
    return cells[np.argpartition(activity, -_MAX_CELLS)[-_MAX_CELLS:]]


# --- Combs ---


def _dct_basis() -> np.ndarray:
    """Return the orthonormal DCT-II of 8 samples, (frequency, sample), float32."""
    frequency, sample = np.mgrid[0:_BLOCK, 0:_BLOCK]
    basis = np.cos(np.pi * (2 * sample + 1) * frequency / (2 * _BLOCK)) * np.sqrt(2 / _BLOCK)
    basis[0] /= np.sqrt(2)
    return np.asarray(basis, dtype=np.float32)


def _shifted_basis() -> np.ndarray:
    """Return the rows of `_FREQUENCIES` at each offset in 15 samples, (offset * frequency, sample)."""
    rows = np.zeros((_BLOCK, len(_FREQUENCIES), _SPAN_PX), dtype=np.float32)
    for offset in range(_BLOCK):
        rows[offset, :, offset : offset + _BLOCK] = _dct_basis()[list(_FREQUENCIES)]
    return rows.reshape(-1, _SPAN_PX)


def _comb_weights(num_bins: int, steps: np.ndarray) -> np.ndarray:
    """Return, for a histogram of abs(c), the cosine and 1 where abs(c) > q/2; (bins, 2 * steps), float32.

    The last bin holds whatever is larger and counts for nothing.
    """
    values = (np.arange(num_bins)[:, None] + 0.5) / _BINS_PER_UNIT
    counts = values > steps / 2
    counts[-1] = False
    return np.concatenate([np.where(counts, np.cos(2 * np.pi * values / steps), 0), counts], axis=1).astype(np.float32)


_BASIS: Final = _dct_basis()
_BLOCK_BASIS: Final = np.kron(_BASIS, _BASIS)[1:].T.copy()  # (pixel, coefficient without DC)
_SHIFTED: Final = _shifted_basis()
_SEARCH_WEIGHTS: Final = _comb_weights(_SEARCHED_BINS, _SEARCHED_STEPS)
_PROVEN_WEIGHTS: Final = _comb_weights(_PROVEN_BINS, _PROVEN_STEPS)
_MIXTURE: Final = np.sin(np.arange(1, _NUM_OFFSETS, dtype=np.float32) ** 2)  # tells blocks apart; no two weights alike


def _histograms(coefficients: np.ndarray, num_bins: int) -> np.ndarray:
    """Return histograms of abs(c) over the first axis, (product of the others, bins), float32."""
    bins = np.minimum(np.abs(coefficients) * _BINS_PER_UNIT, num_bins - 1).astype(np.int64)
    num_histograms = math.prod(bins.shape[1:])
    bins += (np.arange(num_histograms) * num_bins).reshape(bins.shape[1:])
    counts = np.bincount(bins.ravel(), minlength=num_histograms * num_bins)
    return counts.reshape(num_histograms, num_bins).astype(np.float32)


def _comb_z(histograms: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the highest z over all steps; under no comb the mean of n cosines has a variance of 1/(2n) at most."""
    cosines, counts = np.split(histograms @ weights, 2, axis=1)
    z: np.ndarray = (cosines / np.sqrt(np.maximum(counts, 1) / 2)).max(axis=1)
    return z


def _evidence(cells: np.ndarray) -> np.ndarray:
    """Return the evidence for each offset, (64,), row by row."""
    pixels = cells[:, :_SPAN_PX, :_SPAN_PX].astype(np.float32) - 128
    rows = (pixels.reshape(-1, _SPAN_PX) @ _SHIFTED.T).reshape(len(cells), _SPAN_PX, -1)
    z = _comb_z(_histograms(_SHIFTED @ rows, _SEARCHED_BINS), _SEARCH_WEIGHTS)
    num = len(_FREQUENCIES)
    by_offset = z.reshape(_BLOCK, num, _BLOCK, num).swapaxes(1, 2).reshape(_NUM_OFFSETS, num * num)
    evidence: np.ndarray = (np.maximum(by_offset[:, 1:] - _SEARCH_Z, 0) ** 2).sum(axis=1)  # without DC
    return evidence


def _histograms_at(tiles: list[np.ndarray], y: int, x: int) -> np.ndarray:
    """Return histograms of the 63 AC coefficients at an offset of the grid, (63, bins)."""
    blocks = np.concatenate([_cut(tile[y:, x:], _BLOCK) for tile in tiles]).reshape(-1, _NUM_OFFSETS)
    coefficients = blocks[:: -(-len(blocks) // _MAX_BLOCKS) or 1].astype(np.float32) @ _BLOCK_BASIS
    # A block that repeats is one witness, not many: also in another brightness, also inverted.
    _, first = np.unique(np.round(np.abs(coefficients @ _MIXTURE), 2), return_index=True)
    return _histograms(coefficients[first], _PROVEN_BINS)


# --- Quality ---


def _log_likelihoods() -> np.ndarray:
    """Return, for a histogram of abs(c) and steps 1 to 255, log p(c | step) - log p(c | no step); (bins, 255), float32.

    Zero where abs(c) <= q/2: how many zeros there should be depends on the picture.
    """
    values, steps = (np.arange(_PROVEN_BINS)[:, None] + 0.5) / _BINS_PER_UNIT, np.arange(1, 256)
    distance = values - np.round(values / steps) * steps
    density = steps / (_SPREAD * math.sqrt(2 * math.pi)) * np.exp(-0.5 * (distance / _SPREAD) ** 2)
    gain = np.where(values > steps / 2, np.log((1 - _STRAY) * density + _STRAY), 0)
    gain[:, 0] = 0  # a step of 1 is finer than the rounding of pixels
    gain[-1] = 0
    return gain.astype(np.float32)


_GAIN: Final = _log_likelihoods()
_COEFFICIENTS: Final = np.arange(_NUM_OFFSETS - 1)


def _likeliest_quality(histograms: np.ndarray) -> int | None:
    gain = histograms @ _GAIN
    by_quality = gain[_COEFFICIENTS, TABLES[:, 1:] - 1].sum(axis=1)
    best = int(by_quality.argmax())
    # Tables of cameras and other encoders: each coefficient alone would be explained far better.
    return best + 1 if by_quality[best] > _MIN_FIT * gain.max(axis=1).sum() else None
