"""Orders, batches and parts are permutations of what is usable; pixels are functions of seed, epoch and sample."""

from __future__ import annotations

import io
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lfm_scan.concurrency import map_in_threads
from lfm_scan.errors import TrainingError
from lfm_scan.imaging import decode_bytes, get_policy
from lfm_scan.training.augment import AugmentConfig, draw_augmentation
from lfm_scan.training.loading import (
    batches_of,
    epoch_order,
    load_examples,
    load_for_evaluation,
    rows_of,
    usable,
)
from lfm_scan.training.reading import SampleReader
from lfm_scan.training.recipe import Recipe
from lfm_scan.training.samples import Split
from tests.images import encoded
from tests.training.labelled import gathered, made_up, write_tree

RECIPE = Recipe(preprocess="crop256", crop_px=128)
AUGMENT = AugmentConfig(augment_jpeg=0.5, augment_blur=0.5, augment_noise=0.5, augment_rescale=0.5)
READER = SampleReader()


def _samples() -> pa.Table:
    """20 pairs, their members far apart, 10 images without one, and some that are not for an epoch."""
    rows: list[dict[str, object]] = [{"label": label, "pair": f"p{number}"} for label in (0, 1) for number in range(20)]
    rows += [{"label": 0} for _ in range(10)]
    rows += [{"label": 1, "status": "corrupt", "pair": "p3"}, {"label": 1, "split": "validation"}]
    return made_up(rows)


def _load(samples: pa.Table, epoch: int = 0, augment: AugmentConfig = AUGMENT) -> np.ndarray:
    return load_examples(samples, recipe=RECIPE, augment=augment, reader=READER, seed=7, epoch=epoch)


def test_an_epoch_sees_every_usable_training_image_once() -> None:
    order = epoch_order(_samples(), seed=0, epoch=0)

    assert order.dtype == np.int64
    assert sorted(order) == list(range(50))
    assert usable(_samples(), Split.VALIDATION).tolist() == [51]


def test_members_of_a_pair_are_side_by_side() -> None:
    samples = _samples()
    pairs = [samples["pair"][int(row)].as_py() for row in epoch_order(samples, 0, 0)]
    places = {pair: [at for at, other in enumerate(pairs) if other == pair] for pair in set(pairs) - {None}}

    assert len(places) == 20
    assert all(last - first == 1 for first, last in places.values())


def test_the_order_is_the_same_for_a_seed_and_epoch_and_another_for_others() -> None:
    samples = _samples()
    first = epoch_order(samples, 0, 0)

    np.testing.assert_array_equal(epoch_order(samples, 0, 0), first)
    assert not np.array_equal(epoch_order(samples, 0, 1), first)
    assert not np.array_equal(epoch_order(samples, 1, 0), first)
    assert not np.array_equal(epoch_order(samples, -1, 0), first)


def test_every_place_in_the_order_is_as_likely_for_every_image() -> None:
    samples = made_up([{"label": number % 2} for number in range(5)])
    firsts = Counter(int(epoch_order(samples, seed, 0)[0]) for seed in range(2000))

    assert all(count == pytest.approx(400, abs=75) for count in firsts.values())
    assert len(firsts) == 5


def test_an_image_that_is_called_as_a_pair_is_no_member_of_it() -> None:
    samples = made_up([{"label": 0, "pair": "x"}, {"label": 0, "uri": "x"}, {"label": 1, "pair": "x"}])
    for seed in range(20):
        order = epoch_order(samples, seed, 0).tolist()
        assert abs(order.index(0) - order.index(2)) == 1


@pytest.mark.parametrize(("num_rows", "num_batches"), [(4, 1), (7, 1), (8, 2), (11, 2)])
def test_only_whole_batches_are_trained_on(num_rows: int, num_batches: int) -> None:
    order = np.arange(num_rows)[::-1].copy()
    batches = batches_of(order, 4)

    assert [batch.tolist() for batch in batches] == [order[4 * at : 4 * at + 4].tolist() for at in range(num_batches)]


def test_too_few_images_for_one_batch_are_refused() -> None:
    with pytest.raises(TrainingError, match=r"^3 usable training images do not fill one batch of 4: lower"):
        batches_of(np.arange(3), 4)


@pytest.mark.parametrize("world_size", range(1, 12))
def test_the_parts_of_a_batch_are_contiguous_even_and_all_of_it(world_size: int) -> None:
    batch = np.arange(100, 108)
    parts = [rows_of(batch, rank, world_size) for rank in range(world_size)]

    np.testing.assert_array_equal(np.concatenate([rows for _, rows in parts]), batch)
    assert all(batch[first : first + len(rows)].tolist() == rows.tolist() for first, rows in parts)
    sizes = [len(rows) for _, rows in parts]
    assert max(sizes) - min(sizes) <= 1


def test_an_example_is_what_its_plan_makes_of_its_file(tmp_path: Path) -> None:
    samples = gathered(write_tree(tmp_path, 2))

    crops = _load(samples, epoch=3)

    for row, crop in zip(samples.to_pylist(), crops, strict=True):
        plan = draw_augmentation(AUGMENT, RECIPE, 7, 3, row["pair"])
        with Image.open(row["uri"]) as image:
            np.testing.assert_array_equal(crop, plan.apply(image.convert("RGB"), RECIPE))


def test_pixels_depend_on_the_sample_and_not_on_its_company(tmp_path: Path) -> None:
    samples = gathered(write_tree(tmp_path, 4))
    whole = _load(samples)
    order = np.array([5, 0, 3, 6])

    np.testing.assert_array_equal(_load(samples.take(pa.array(order))), whole[order])
    assert not np.array_equal(_load(samples, epoch=1), whole)


def test_images_of_a_pair_are_cut_at_the_same_place_whatever_their_label(tmp_path: Path) -> None:
    samples = gathered(write_tree(tmp_path, 6))
    real = samples["uri"].to_pylist()[0]
    for uri in samples["uri"].to_pylist():
        Path(uri).write_bytes(Path(real).read_bytes())  # the same content in both classes

    crops = _load(samples)

    pairs = samples["pair"].to_pylist()
    for pair in set(pairs):
        first, second = (crops[row] for row, other in enumerate(pairs) if other == pair)
        np.testing.assert_array_equal(first, second)
    assert len({crop.tobytes() for crop in crops}) == 6


def test_evaluation_sees_what_the_scanner_sees(tmp_path: Path) -> None:
    samples = gathered(write_tree(tmp_path, 2, size=(300, 270)))
    for recipe in (RECIPE, Recipe()):
        images = load_for_evaluation(samples, recipe=recipe, reader=READER)
        assert images.shape == (4, 256, 256, 3)
        for uri, pixels in zip(samples["uri"].to_pylist(), images, strict=True):
            expected = get_policy(recipe.preprocess)(decode_bytes(Path(uri).read_bytes()))
            np.testing.assert_array_equal(pixels, expected)


def test_members_of_archives_and_rows_of_tables_are_read_in_any_order(tmp_path: Path) -> None:
    files = [encoded(seed=seed, size=(140, 130)) for seed in range(6)]
    for suffix in ("tar", "tar.gz"):
        with tarfile.open(tmp_path / f"x.{suffix}", "w:gz" if suffix == "tar.gz" else "w") as archive:
            for number, data in enumerate(files):
                member = tarfile.TarInfo(f"{number % 2}_{'real' if number % 2 == 0 else 'fake'}/{number}.png")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    pq.write_table(
        pa.table({"image": files, "label": [number % 2 for number in range(6)]}),
        tmp_path / "x.parquet",
        row_group_size=2,
    )
    order = pa.array([4, 1, 5, 0, 3, 2])
    config = AugmentConfig()

    for name in ("x.tar", "x.tar.gz", "x.parquet"):
        samples = gathered(tmp_path / name)
        shuffled = samples.take(order)
        expected = []
        for row in shuffled["uri"].to_pylist():
            plan = draw_augmentation(config, RECIPE, 7, 0, row)
            at = samples["uri"].to_pylist().index(row)
            with Image.open(io.BytesIO(files[at])) as image:
                expected.append(plan.apply(image, RECIPE))
        np.testing.assert_array_equal(_load(shuffled, augment=config), np.stack(expected))


def test_a_sample_that_was_lost_since_the_check_is_named(tmp_path: Path) -> None:
    samples = gathered(write_tree(tmp_path, 2))
    gone, cut, small, _ = (Path(uri) for uri in samples["uri"].to_pylist())
    gone.unlink()
    with pytest.raises(TrainingError, match=rf"^{gone}: could be used when it was checked .*missing.* last checkpoint"):
        _load(samples)
    cut.write_bytes(cut.read_bytes()[:2000])
    with pytest.raises(TrainingError, match=rf"^{cut}: .*truncated"):
        _load(samples.slice(1))
    small.write_bytes(encoded(size=(100, 200)))
    with pytest.raises(TrainingError, match=rf"^{small}: .*100x200: smaller than the crop of 128 pixels"):
        _load(samples.slice(2))
    with pytest.raises(TrainingError, match=rf"^{small}: .*needs 256 pixels a side"):
        load_for_evaluation(samples.slice(2), recipe=RECIPE, reader=READER)


def test_a_worker_without_rows_loads_none(tmp_path: Path) -> None:
    nothing = gathered(write_tree(tmp_path, 1)).slice(0, 0)

    assert _load(nothing).shape == (0, 128, 128, 3)
    assert load_for_evaluation(nothing, recipe=RECIPE, reader=READER).shape == (0, 256, 256, 3)


def test_threads_load_what_one_would(tmp_path: Path) -> None:
    samples = gathered(write_tree(tmp_path, 4))
    parts = [samples.slice(start, 2) for start in range(0, 8, 2)] * 3

    loaded = list(map_in_threads(_load, parts, num_threads=4))

    np.testing.assert_array_equal(np.concatenate(loaded), np.concatenate([_load(samples)] * 3))
