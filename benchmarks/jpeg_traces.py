"""How well traces of JPEG are found in pixels, on which images they are wrong, and what the search costs.

    OMP_NUM_THREADS=1 python -m benchmarks.jpeg_traces [--data FOLDER]

Needs the development images. Each is in the half "tune" or "report" by its sha256; thresholds were chosen on the first,
and every share is of the second. "found" is the share called a JPEG; of those, "quality" is the share with the true
quality and "wrong_quality" with another number, the rest has none. A lossless file that is not found is kept.

A development PNG that is found may have been a JPEG at its origin. "resave" tells: a JPEG saved again at its own
quality hardly changes, any other picture changes by what that quality costs.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import PIL
from PIL import Image

from lfm_scan import Scorer
from lfm_scan.imaging import decode_bytes
from lfm_scan.imaging.lossy import estimate_jpeg_quality
from lfm_scan.imaging.traces import MIN_COMBS, MIN_PROMINENCE, Traces, find_jpeg_traces, measure_traces
from tests.imaging import test_traces as drawings

_ROOT: Final = Path(__file__).resolve().parents[1]
_DATA: Final = _ROOT.parent / "shared" / "data"
_RESULTS: Final = _ROOT / "benchmarks" / "results" / "jpeg_traces.json"
_QUALITIES: Final = (99, 98, 95, 90, 85, 75, 60, 30)
_CROP_QUALITIES: Final = (95, 75)
_SIDES: Final = (192, 128, 96, 64, 48)
_SCALES: Final = (0.5, 0.75, 0.9, 1.5, 2.0)
_COMBS: Final = (4, 6, 8, 10, 12)
_PROMINENCES: Final = (1.25, 1.5, 1.75, 2.0, 2.5, 3.0)
_SEED: Final = 0


@dataclass(frozen=True)
class Picture:
    """One development image: what it belongs to, whether it is of the half to report, the quality it has if a JPEG."""

    group: str
    path: Path
    reported: bool
    quality: int | None

    @property
    def image(self) -> Image.Image:
        """Its pixels, RGB."""
        return Image.open(self.path).convert("RGB")


def main() -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=_DATA)
    pictures = list(_pictures(parser.parse_args().data))
    lossless = [picture for picture in pictures if picture.path.suffix == ".png"]
    # What is made from a PNG that was a JPEG would be found for the wrong reason.
    clean = [picture for picture in lossless if find_jpeg_traces(picture.image) is None]
    jpegs = [picture for picture in pictures if picture.quality is not None]
    report = {
        "versions": {"python": platform.python_version(), "pillow": PIL.__version__, "numpy": np.__version__},
        "thresholds": {"min_combs": MIN_COMBS, "min_prominence": MIN_PROMINENCE},
        "tuning": _tuning(clean),
        "lossless_files": _by_group(lossless, lambda picture: [(picture.image, None)]),
        "resave": _resave(lossless),
        "jpeg_files": _by_group(jpegs, lambda picture: [(picture.image, picture.quality)]),
        "once_jpeg": {
            f"quality {quality}, {subsampling}": _by_group(clean, _once_jpeg(quality, subsampling))
            for quality in _QUALITIES
            for subsampling in ("4:2:0", "4:4:4")
        },
        "crops": {
            f"quality {quality}, {side} px": _share(clean, _crop(quality, side))
            for quality in _CROP_QUALITIES
            for side in _SIDES
        },
        "twice_jpeg": {
            f"{first}, crop, {second}": _share(clean, _twice(first, second)) for first, second in ((75, 95), (95, 75))
        },
        "scaled_jpeg_files": {str(scale): _share(jpegs, _scaled(scale)) for scale in _SCALES},
        "other_codecs": {fmt: _share(clean, _other_codec(fmt)) for fmt in ("WEBP", "AVIF")},
        "drawings": _drawings(),
        "cost": _cost([picture for picture in clean if picture.group != "examples"]),
    }
    print(json.dumps(report, indent=2))
    _RESULTS.write_text(json.dumps(report, indent=2) + "\n")


def _pictures(data: Path) -> Iterator[Picture]:
    with (data / "dev.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        if min(int(row["width"]), int(row["height"])) < 48:
            continue
        path = data / "dev" / row["path"]
        yield _picture(f"{row['set']}, {'generated' if row['label'] == '1' else 'real'}", path)
    for path in sorted((_ROOT / "examples" / "images").rglob("*.png")):
        yield _picture("examples", path)


def _picture(group: str, path: Path) -> Picture:
    data = path.read_bytes()
    tables = getattr(Image.open(io.BytesIO(data)), "quantization", None)
    quality = estimate_jpeg_quality(tables[0]) if tables else None
    return Picture(group, path, hashlib.sha256(data).digest()[0] % 2 == 1, quality)


# --- Shares ---

_Variants = Callable[[Picture], Iterable[tuple[Image.Image, int | None]]]


def _share(pictures: Iterable[Picture], variants: _Variants) -> dict[str, Any]:
    outcomes = [
        (find_jpeg_traces(image), quality)
        for picture in pictures
        if picture.reported
        for image, quality in variants(picture)
    ]
    found = [(traces.quality, quality) for traces, quality in outcomes if traces is not None]
    known = [(estimate, quality) for estimate, quality in found if quality is not None]
    right = sum(estimate == quality for estimate, quality in known)
    missing = sum(estimate is None for estimate, _ in known)
    return {
        "images": len(outcomes),
        "found": round(len(found) / len(outcomes), 4) if outcomes else None,
        "quality": round(right / len(known), 4) if known else None,
        "wrong_quality": round((len(known) - right - missing) / len(known), 4) if known else None,
    }


def _by_group(pictures: list[Picture], variants: _Variants) -> dict[str, Any]:
    groups = sorted({picture.group for picture in pictures})
    shares = {group: _share([picture for picture in pictures if picture.group == group], variants) for group in groups}
    return {"all": _share(pictures, variants), **shares}


def _once_jpeg(quality: int, subsampling: str) -> _Variants:
    return lambda picture: [(_saved(picture.image, "JPEG", quality=quality, subsampling=subsampling), quality)]


def _crop(quality: int, side: int) -> _Variants:
    def variants(picture: Picture) -> list[tuple[Image.Image, int | None]]:
        image = _saved(picture.image, "JPEG", quality=quality)
        rng = np.random.default_rng([_SEED, *hashlib.sha256(picture.path.read_bytes()).digest()])
        left, top = (int(rng.integers(0, extent - side + 1)) for extent in image.size)
        return [(image.crop((left, top, left + side, top + side)), quality)]

    return variants


def _twice(first: int, second: int) -> _Variants:
    def variants(picture: Picture) -> list[tuple[Image.Image, int | None]]:
        once = _saved(picture.image, "JPEG", quality=first)
        return [(_saved(once.crop((3, 5, *once.size)), "JPEG", quality=second), None)]

    return variants


def _scaled(scale: float) -> _Variants:
    def variants(picture: Picture) -> list[tuple[Image.Image, int | None]]:
        image = picture.image
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        return [(image.resize(size, Image.Resampling.LANCZOS), None)]

    return variants


def _other_codec(fmt: str) -> _Variants:
    return lambda picture: [(_saved(picture.image, fmt, quality=80), None)]


def _saved(image: Image.Image, fmt: str, **options: object) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return Image.open(buffer).convert("RGB")


# --- The rest ---


def _tuning(clean: list[Picture]) -> list[dict[str, Any]]:
    """Return, for pairs of thresholds on the half "tune", lossless files and drawings found, and the share of JPEGs."""
    tuned = [picture for picture in clean if not picture.reported]
    kept = [measure_traces(picture.image) for picture in tuned]
    drawn = [measure_traces(image) for image in _drawn().values()]
    found = [
        measure_traces(_saved(picture.image, "JPEG", quality=quality, subsampling=subsampling))
        for picture in tuned
        for quality in (98, 95, 85, 75)
        for subsampling in ("4:2:0", "4:4:4")
    ]
    return [
        {
            "min_combs": combs,
            "min_prominence": prominence,
            "lossless_found": sum(_passes(traces, combs, prominence) for traces in kept),
            "drawings_found": sum(_passes(traces, combs, prominence) for traces in drawn),
            "jpeg_found": round(statistics.mean(_passes(traces, combs, prominence) for traces in found), 4),
        }
        for combs in _COMBS
        for prominence in _PROMINENCES
    ]


def _passes(traces: Traces | None, combs: int, prominence: float) -> bool:
    return traces is not None and traces.num_combs >= combs and traces.prominence >= prominence


def _resave(lossless: list[Picture]) -> dict[str, Any]:
    """Return, for each PNG in which traces are found, how saving it again at that quality changes its luminance.

    "others" is what the same quality does to PNGs in which none are found: mean absolute change in grey levels, the
    median of images.
    """
    rows = []
    others = [picture.image.convert("L") for picture in lossless if find_jpeg_traces(picture.image) is None][::8]
    for picture in lossless:
        traces = find_jpeg_traces(picture.image)
        if traces is None or traces.quality is None:
            continue
        rows.append(
            {
                "group": picture.group,
                "quality": traces.quality,
                "offset": list(traces.offset),
                "num_combs": traces.num_combs,
                "change": round(_change(picture.image.convert("L"), traces.quality), 3),
                "others": round(statistics.median(_change(other, traces.quality) for other in others), 3),
            }
        )
    return {"images": rows}


def _change(grey: Image.Image, quality: int) -> float:
    buffer = io.BytesIO()
    grey.save(buffer, "JPEG", quality=quality)
    difference = np.asarray(grey, dtype=np.int16) - np.asarray(Image.open(buffer), dtype=np.int16)
    return float(np.abs(difference).mean())


def _drawn() -> dict[str, Image.Image]:
    photograph = drawings.photograph()
    return {
        "flat colours": drawings.drawing(),
        "text": drawings.text("L"),
        "text of two colours": drawings.text("1"),
        **{
            f"pixel art by {scale}, {colours} colours": drawings.pixel_art(scale, colours)
            for scale in (1, 2, 4, 7, 8, 16)
            for colours in (8, 64, 4000)
        },
        "gradient": drawings.gradient(),
        "dithered by 8x8": drawings.dithered(),
        "bilevel": photograph.convert("1").convert("RGB"),
        **{f"palette of {colours}": photograph.quantize(colours).convert("RGB") for colours in (2, 16, 256)},
        **{f"{count} tiles of 8x8": drawings.tiled(count) for count in (1, 12, 96, 1000)},
        "a network's grid of 8": drawings.on_a_grid(),
        "waves of 8": drawings.sine(),
    }


def _drawings() -> dict[str, Any]:
    measured = {name: measure_traces(image) for name, image in _drawn().items()}
    return {
        name: {
            "found": traces.are_jpeg,
            "num_combs": traces.num_combs,
            "prominence": round(traces.prominence, 2),
        }
        for name, traces in measured.items()
        if traces is not None
    }


def _cost(pictures: list[Picture]) -> dict[str, Any]:
    """Return the time of the search as a share of decoding and scoring on one thread, median over images by size."""
    scorer = Scorer(device="cpu", preprocess="crop256")
    costs: dict[str, Any] = {}
    for side in (256, 512):
        files = [picture.path.read_bytes() for picture in pictures if picture.image.size == (side, side)][:30]
        images = [decode_bytes(data).image for data in files]
        search_s = statistics.median(_seconds(find_jpeg_traces, image) for image in images)
        decode_s = statistics.median(_seconds(decode_bytes, data) for data in files)
        whole_s = statistics.median(_seconds(scorer.score, [data]) for data in files)
        costs[f"{side}x{side} PNG"] = {
            "search_ms": round(search_s * 1e3, 3),
            "of_decoding": round(search_s / decode_s, 3),
            "of_decoding_and_scoring": round(search_s / whole_s, 4),
        }
    large = images[0].resize((4000, 3000))
    costs["4000x3000"] = {"search_ms": round(_seconds(find_jpeg_traces, large) * 1e3, 3)}
    return costs


def _seconds(work: Callable[[Any], object], argument: object) -> float:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        work(argument)
        times.append(time.perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    os.chdir(_ROOT)
    main()
