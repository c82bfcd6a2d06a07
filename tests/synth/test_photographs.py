from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lfm_scan.options import InputConfig, StorageConfig
from lfm_scan.sources.select import list_inputs
from lfm_scan.status import Status
from lfm_scan.synth.config import SynthConfig
from lfm_scan.synth.photographs import (
    KERNELS,
    Photograph,
    _second_factor,
    cut_crops,
    read_photographs,
    without_duplicates,
)
from lfm_scan.training.samples import Split
from tests.images import encoded, picture


def _config(**changes: object) -> SynthConfig:
    settings: dict[str, Any] = {"crop_px": 64, "rescale_share": 0.0, **changes}
    return SynthConfig(("photographs",), output="out", **settings)


def _photograph(image: Image.Image | None = None, sha256: str = "ab") -> Photograph:
    return Photograph(uri="x.jpg", sha256=sha256, image=image or picture(400, 300))


def _read(folder: Path, config: SynthConfig) -> list[Photograph]:
    inputs = list(list_inputs([str(folder)], InputConfig(), StorageConfig()))
    return list(without_duplicates(read_photographs(inputs, config)))


def test_each_file_is_a_photograph_or_says_why_not(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(encoded("JPEG", size=(300, 200)))
    (tmp_path / "b.png").write_bytes(encoded("PNG", size=(300, 127)))
    (tmp_path / "c.png").write_bytes(encoded("PNG", size=(300, 200))[:5000])
    (tmp_path / "d.txt").write_bytes(b"no image")
    (tmp_path / "e.jpg").write_bytes(b"")

    found = _read(tmp_path, _config())

    assert [one.status for one in found] == [
        Status.OK,
        Status.TOO_SMALL,
        Status.TRUNCATED,
        Status.UNSUPPORTED,
        Status.EMPTY,
    ]
    assert [one.image is not None for one in found] == [True, False, False, False, False]
    assert "300x127" in (found[1].error or "")
    assert "128 pixels" in (found[1].error or "")


def test_of_the_same_bytes_only_the_first_is_used(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(encoded("JPEG", size=(300, 200)))

    first, second = _read(tmp_path, _config())

    assert first.image is not None
    assert second.image is None
    assert first.uri in (second.error or "")


def test_crops_have_the_size_asked_for_and_differ() -> None:
    crops = cut_crops(_photograph(), _config(), 8)

    assert crops.shape == (8, 64, 64, 3)
    assert crops.dtype == np.uint8
    assert len({crop.tobytes() for crop in crops}) == 8


def test_fewer_crops_are_the_first_of_more() -> None:
    assert np.array_equal(cut_crops(_photograph(), _config(), 3), cut_crops(_photograph(), _config(), 8)[:3])


def test_crops_depend_on_seed_and_bytes_and_not_on_the_place() -> None:
    crops = cut_crops(_photograph(), _config(), 2)
    moved = Photograph(uri="elsewhere.jpg", sha256="ab", image=picture(400, 300))

    assert np.array_equal(crops, cut_crops(moved, _config(), 2))
    assert not np.array_equal(crops, cut_crops(_photograph(sha256="cd"), _config(), 2))
    assert not np.array_equal(crops, cut_crops(_photograph(), _config(seed=1), 2))


def test_a_photograph_as_small_as_allowed_gives_its_whole_square() -> None:
    image = picture(128, 128)

    (crop,) = cut_crops(_photograph(image), _config(), 1)

    assert any(np.array_equal(crop, np.asarray(image.resize((64, 64), kernel))) for kernel in KERNELS)


def test_scaling_down_is_by_the_factors_asked_for() -> None:
    columns = np.broadcast_to(np.arange(1000, dtype=np.float32) / 1000 * 255, (1000, 1000))
    ramp = Image.fromarray(columns.astype(np.uint8)).convert("RGB")

    crops = cut_crops(_photograph(ramp), _config(min_shrink=3.0, max_shrink=5.0), 50)

    slopes = (crops[:, 32, -8, 0].astype(float) - crops[:, 32, 8, 0]) / 48 / 255 * 1000
    assert slopes.min() > 2.8
    assert slopes.max() < 5.2
    assert slopes.max() - slopes.min() > 1


def _finest_detail(crops: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return, for each crop, the mean squared difference of pixels side by side, over that of pixels two apart."""
    values = crops.astype(float)
    near, far = values[:, :, 1:] - values[:, :, :-1], values[:, :, 2:] - values[:, :, :-2]
    ratios: NDArray[np.float64] = (near**2).mean(axis=(1, 2, 3)) / (far**2).mean(axis=(1, 2, 3))
    return ratios


def test_a_share_of_the_crops_is_scaled_once_more_and_shows_it() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (1200, 1200, 3), np.uint8))
    once, half, twice = (
        _finest_detail(cut_crops(_photograph(noise), _config(rescale_share=share), 60)) for share in (0.0, 0.5, 1.0)
    )

    # Enlarging leaves less detail between neighbours than anything that only scaled noise down.
    assert (once > 0.7).all()
    assert 0.25 < (twice < 0.7).mean() < 0.85
    assert 0.05 < (half < 0.7).mean() < (twice < 0.7).mean()


def test_a_photograph_with_no_pixels_to_spare_is_not_asked_for_more() -> None:
    crops = cut_crops(_photograph(picture(128, 128)), _config(rescale_share=1.0), 20)

    assert crops.shape == (20, 64, 64, 3)
    assert len({crop.tobytes() for crop in crops}) == 20
    config, rng = _config(rescale_share=1.0), np.random.default_rng(0)
    assert min(_second_factor(128, config, rng) for _ in range(200)) >= 1
    assert min(_second_factor(1280, config, rng) for _ in range(200)) < 0.7


def test_varied_crops_have_other_tones_and_keep_the_content() -> None:
    image = picture(128, 128)  # its whole square is the only crop, but for the kernel
    plain = [np.asarray(image.resize((64, 64), kernel)) for kernel in KERNELS]

    varied = cut_crops(_photograph(image), _config(vary_share=1.0), 20)

    assert not any(np.array_equal(crop, each) for crop in varied for each in plain)
    alike = [np.corrcoef(crop.mean(axis=2).ravel(), plain[0].mean(axis=2).ravel())[0, 1] for crop in varied]
    assert min(alike) > 0.8
    assert np.ptp(varied.mean(axis=(1, 2, 3))) > 10


def test_crops_without_contrast_are_passed_over() -> None:
    grey = Image.new("RGB", (400, 400), (90, 90, 90))
    assert cut_crops(_photograph(grey), _config(), 4).shape == (0, 64, 64, 3)

    half = grey.copy()
    half.paste(picture(400, 200), (0, 200))
    crops = cut_crops(_photograph(half), _config(), 20)
    assert len(crops) == 20
    assert all(crop.std() > 4 for crop in crops)


def test_a_share_of_the_photographs_is_for_validation_each_as_a_whole() -> None:
    photographs = [Photograph(uri="x", sha256=f"{number:064x}") for number in range(400)]

    splits = [one.split(_config(validation_share=0.25)) for one in photographs]

    assert 70 <= splits.count(Split.VALIDATION) <= 130  # three standard deviations of 100
    assert splits == [one.split(_config(validation_share=0.25, crops=3)) for one in photographs]
    assert {one.split(_config(validation_share=0.0)) for one in photographs} == {Split.TRAIN}
