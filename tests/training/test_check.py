"""Every sample is read once; nothing is lost, and nothing that cannot be learned from is learned from."""

from __future__ import annotations

import functools
import io
import pickle
from pathlib import Path

import pytest
from PIL import Image

from lfm_scan.errors import TrainingError
from lfm_scan.training import check
from lfm_scan.training.check import CheckReport, check_chunk, check_samples, quantization_digest
from lfm_scan.training.reading import SampleReader
from lfm_scan.training.recipe import Recipe
from lfm_scan.training.samples import SAMPLE_SCHEMA, Split
from tests.images import encoded
from tests.training.labelled import gathered, made_up, write_tree

RESIZE, CROP = Recipe(), Recipe(preprocess="crop256", crop_px=224)
READER = SampleReader()


def _write(root: Path, **files: bytes) -> Path:
    for name, data in files.items():
        path = root / "s" / ("1_fake" if name.startswith("fake") else "0_real") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def test_the_facts_of_each_file_are_written_down_in_order(tmp_path: Path) -> None:
    jpeg = encoded("JPEG", seed=1, size=(300, 200), quality=80)
    png = encoded("PNG", seed=2, size=(64, 80))
    samples = gathered(_write(tmp_path, real_a=jpeg, real_b=png, fake_a=encoded("WEBP", quality=50)))

    checked = check_samples(samples, RESIZE, READER)

    names = ("format", "width", "height", "lossy", "jpeg_quality", "num_bytes", "status", "error")
    assert checked.schema == SAMPLE_SCHEMA
    assert checked["uri"].to_pylist() == samples["uri"].to_pylist()
    assert [tuple(row[name] for name in names) for row in checked.to_pylist()] == [
        ("JPEG", 300, 200, True, 80, len(jpeg), "ok", None),
        ("PNG", 64, 80, False, None, len(png), "ok", None),
        ("WEBP", 260, 258, True, None, len(encoded("WEBP", quality=50)), "ok", None),
    ]
    assert checked["quantization"].to_pylist() == [quantization_digest(jpeg), None, None]


def test_a_bad_image_is_a_row_with_its_status(tmp_path: Path) -> None:
    whole = encoded("PNG")
    root = _write(
        tmp_path, real_a=b"", real_b=whole[:5000], real_c=b"text", real_d=encoded(size=(40, 300)), real_e=whole
    )
    samples = gathered(root)
    (root / "s" / "0_real" / "real_e").unlink()

    checked = check_samples(samples, RESIZE, READER)

    assert checked["status"].to_pylist() == ["empty", "truncated", "unsupported", "too_small", "missing"]
    assert None not in checked["error"].to_pylist()


def test_an_image_must_be_large_enough_for_the_crop_and_for_validation_for_the_policy(tmp_path: Path) -> None:
    root = _write(
        tmp_path, real_a=encoded(size=(223, 400)), real_b=encoded(size=(400, 224)), real_c=encoded(size=(256, 256))
    )

    training = check_samples(gathered(root), CROP, READER)
    validation = check_samples(gathered(root, split=Split.VALIDATION), CROP, READER)
    resized = check_samples(gathered(root), RESIZE, READER)

    assert training["status"].to_pylist() == ["too_small", "ok", "ok"]
    assert training["error"][0].as_py() == "223x400: the recipe crops 224 pixels (--crop-px)"
    assert training["width"][0].as_py() == 223
    assert validation["status"].to_pylist() == ["too_small", "too_small", "ok"]
    assert validation["error"][1].as_py() == "400x224: policy crop256 needs 256 pixels a side"
    assert resized["status"].to_pylist() == ["ok", "ok", "ok"]


def test_chunks_can_be_checked_elsewhere_and_come_back_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = gathered(write_tree(tmp_path, 4, size=(64, 64)))
    whole = check_samples(samples, RESIZE, READER)
    monkeypatch.setattr(check, "CHUNK_ROWS", 3)
    sizes = []

    def through_pickle(function, items):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
        for item in items:
            sizes.append(item.num_rows)
            yield pickle.loads(pickle.dumps(function))(pickle.loads(pickle.dumps(item)))

    assert check_samples(samples, RESIZE, READER, through_pickle).equals(whole)
    assert sizes == [3, 3, 2]


def test_what_was_known_to_be_bad_before_stays_so(tmp_path: Path) -> None:
    samples = made_up([{"uri": f"{tmp_path}/x.tar#1", "label": 0, "status": "unsupported", "error": "a sparse member"}])

    (row,) = check_chunk(RESIZE, READER, samples).to_pylist()

    assert (row["status"], row["error"]) == ("unsupported", "a sparse member")


def test_no_samples_are_no_rows() -> None:
    assert check_samples(made_up([]), RESIZE, READER).num_rows == 0


def test_the_digest_tells_quantisation_tables_and_nothing_else() -> None:
    same = [encoded("JPEG", seed=seed, quality=80, size=(64 + seed, 64), optimize=bool(seed)) for seed in (0, 1)]
    other = [encoded("JPEG", quality=quality) for quality in (79, 81, 95)]
    one_segment = _with_tables_in_one_segment(same[0])

    assert len({quantization_digest(file) for file in [*same, one_segment]}) == 1
    assert len({quantization_digest(file) for file in [same[0], *other]}) == 4
    sampled = [encoded("JPEG", quality=80, subsampling=chroma) for chroma in ("4:4:4", "4:2:2", "4:2:0")]
    assert len({quantization_digest(file) for file in sampled}) == 3
    assert quantization_digest(sampled[2]) == quantization_digest(same[0])
    assert one_segment != same[0]
    assert quantization_digest(encoded("PNG")) is None


@pytest.mark.parametrize("cut", range(2, 700, 7))
def test_the_digest_of_a_damaged_file_is_no_error(cut: int) -> None:
    file = encoded("JPEG", size=(64, 64))

    quantization_digest(file[:cut])
    quantization_digest(file[:cut] + b"\xff\xdb\xff\xff" + file[cut:])


def _with_tables_in_one_segment(file: bytes) -> bytes:
    first = file.index(b"\xff\xdb\x00\x43")
    second = file.index(b"\xff\xdb\x00\x43", first + 1)
    tables = file[first + 4 : first + 69] + file[second + 4 : second + 69]
    return file[:first] + b"\xff\xdb" + (2 + len(tables)).to_bytes(2, "big") + tables + file[second + 69 :]


def test_the_tables_are_those_that_pillow_reads() -> None:
    digests: dict[str, set[str | None]] = {}
    for quality in range(1, 101):
        file = encoded("JPEG", size=(16, 16), quality=quality)
        with Image.open(io.BytesIO(file)) as image:
            digests.setdefault(str(image.quantization), set()).add(quantization_digest(file))  # type: ignore[attr-defined]
    assert all(len(found) == 1 for found in digests.values())
    assert len(digests) == len(set.union(*digests.values()))


def test_the_report_counts_by_split_set_class_and_status() -> None:
    rows: list[dict[str, object]] = [
        {"label": 0},
        {"label": 1},
        {"label": 1, "status": "corrupt", "error": "bad", "uri": "/bad.png"},
        {"label": 0, "set": "t", "split": "validation"},
    ]
    report = CheckReport.of(made_up(rows))

    assert report.counts == {
        ("train", "s", 0, "ok"): 1,
        ("train", "s", 1, "ok"): 1,
        ("train", "s", 1, "corrupt"): 1,
        ("validation", "t", 0, "ok"): 1,
    }
    assert (report.num_samples, report.num_unusable, report.num_usable(Split.TRAIN, 1)) == (4, 1, 1)
    assert report.examples == {"corrupt": ["/bad.png: bad"]}
    assert report.lines() == [
        "train       s  real               1 usable",
        "train       s  generated          1 usable, not 1 corrupt",
        "validation  t  real               1 usable",
        "corrupt: /bad.png: bad",
    ]
    assert {"split": "train", "set": "s", "label": 1, "status": "corrupt", "count": 1} in report.to_json()["counts"]
    report.refuse()


def test_a_class_without_a_usable_image_is_refused() -> None:
    none = CheckReport.of(made_up([{"label": 0}]))
    bad = CheckReport.of(made_up([{"label": 0}, {"label": 1, "status": "empty", "error": "no bytes", "uri": "/x.png"}]))
    unmeasurable: list[dict[str, object]] = [
        {"label": 0},
        {"label": 1},
        {"label": 0, "split": "validation", "status": "empty", "error": "no bytes"},
    ]

    with pytest.raises(TrainingError) as caught:
        none.refuse()
    assert str(caught.value) == (
        "no generated image could be used for train: the sources have none. Images need folders named 1_fake, or a "
        "manifest with a label"
    )
    with pytest.raises(TrainingError, match=r"no generated image .* of 1 none is ok; .* is /x.png: no bytes"):
        bad.refuse()
    with pytest.raises(TrainingError, match="no real image could be used for validation"):
        CheckReport.of(made_up(unmeasurable)).refuse()


def test_an_image_of_the_training_may_not_be_measured_with() -> None:
    rows: list[dict[str, object]] = [
        {"label": 0},
        {"label": 1, "uri": "/x.png"},
        {"label": 1, "uri": "/x.png", "split": "validation"},
    ]

    with pytest.raises(TrainingError, match=r"1 images are in training and in validation, such as /x.png"):
        CheckReport.of(made_up(rows)).refuse()


def test_the_function_of_a_chunk_can_be_pickled() -> None:
    function = functools.partial(check_chunk, RESIZE, READER)
    assert pickle.loads(pickle.dumps(function)).args == (RESIZE, READER)
