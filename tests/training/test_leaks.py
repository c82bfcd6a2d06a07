"""What files tell of labels is measured right, and refused past a bound."""

from __future__ import annotations

import json
import math

import numpy as np
import pyarrow as pa
import pytest

from lfm_scan.errors import TrainingError
from lfm_scan.training.leaks import ATTRIBUTES, Leak, find_leaks, mutual_information, refuse_leaks
from tests.training.labelled import made_up


def _samples(num_pairs: int = 100, **of_label: tuple[object, object]) -> pa.Table:
    """Return pairs that are alike but for the attributes given as (real, generated)."""
    labels = [number % 2 for number in range(2 * num_pairs)]
    return made_up([{"label": label} | {name: pair[label] for name, pair in of_label.items()} for label in labels])


def _shares(table: pa.Table, scope: str | None = None) -> dict[str, float]:
    return {leak.attribute: leak.share for leak in find_leaks(table).leaks if leak.set == scope}


def test_mutual_information_is_the_sum_over_the_joint_distribution() -> None:
    rng = np.random.default_rng(0)
    values, labels = rng.integers(0, 5, 400), rng.integers(0, 2, 400)
    expected = 0.0
    for value in range(5):
        for label in range(2):
            joint = np.mean((values == value) & (labels == label))
            expected += joint * math.log2(joint / (np.mean(values == value) * np.mean(labels == label)))

    assert mutual_information(values, labels) == pytest.approx(expected, abs=1e-12)
    assert mutual_information(labels, labels) == pytest.approx(
        -sum(p * math.log2(p) for p in (labels.mean(), 1 - labels.mean()))
    )


def test_files_that_are_alike_tell_nothing() -> None:
    assert _shares(_samples()) == dict.fromkeys(ATTRIBUTES, 0.0)
    assert _shares(_samples(), "s") == dict.fromkeys(ATTRIBUTES, 0.0)


@pytest.mark.parametrize(
    ("attribute", "pairs"),
    [
        ("format", {"format": ("JPEG", "PNG")}),
        ("quantization", {"quantization": ("aa", "bb")}),
        ("jpeg_quality", {"jpeg_quality": (75, None)}),
        ("lossy", {"lossy": (True, False)}),
        ("size", {"width": (256, 512), "height": (512, 256)}),
        ("bytes_per_pixel", {"num_bytes": (50_000, 150_000), "lossy": (True, True), "format": ("WEBP", "WEBP")}),
    ],
)
def test_an_attribute_that_differs_by_class_tells_the_label_and_no_other_does(
    attribute: str, pairs: dict[str, tuple[object, object]]
) -> None:
    shares = _shares(_samples(100, **pairs))

    assert shares.pop(attribute) == pytest.approx(1, abs=0.02)  # but for chance
    assert set(shares.values()) == {0.0}


@pytest.mark.parametrize("saved", [{"format": ("PNG", "PNG")}, {"format": ("JPEG", "JPEG"), "lossy": (True, True)}])
def test_bytes_per_pixel_are_no_leak_where_the_pixels_or_the_tables_decide_them(
    saved: dict[str, tuple[object, object]],
) -> None:
    assert _shares(_samples(100, num_bytes=(50_000, 150_000), **saved)) == dict.fromkeys(ATTRIBUTES, 0.0)


def test_bytes_per_pixel_are_binned_in_equal_counts() -> None:
    rows: list[dict[str, object]] = [
        {"label": number % 2, "format": "AVIF", "lossy": True, "num_bytes": 1000 * number} for number in range(80)
    ]
    values = find_leaks(made_up(rows)).values["bytes_per_pixel"]

    assert [share for _, share in values["real"]] == [0.125] * 3


def test_what_many_values_tell_by_chance_counts_as_nothing() -> None:
    rng = np.random.default_rng(1)
    sizes = rng.integers(100, 2000, (400, 2))
    rows = [{"label": number % 2, "width": int(w), "height": int(h)} for number, (w, h) in enumerate(sizes)]
    raw = mutual_information(np.arange(400), np.arange(400) % 2)

    assert raw == pytest.approx(1)  # each size is of one image, so it "tells" the label
    assert _shares(made_up(rows))["size"] == 0


def test_the_correction_is_the_mean_over_shuffled_labels() -> None:
    rng = np.random.default_rng(2)
    labels = np.arange(400) % 2
    widths = np.where(rng.random(400) < 0.8, 300 + labels, rng.integers(200, 240, 400))
    rows = [{"label": int(label), "width": int(width)} for label, width in zip(labels, widths, strict=True)]
    _, values = np.unique(widths, return_inverse=True)
    by_chance = np.mean([mutual_information(values, rng.permutation(labels)) for _ in range(300)])

    (leak,) = [leak for leak in find_leaks(made_up(rows)).leaks if (leak.attribute, leak.set) == ("size", None)]

    assert leak.bits == pytest.approx(mutual_information(values, labels) - by_chance, abs=0.01)
    assert leak.share == pytest.approx(leak.bits)  # the label has one bit


def test_a_set_with_one_class_counts_over_all_sets_only() -> None:
    rows = [{"label": 0, "set": "a", "format": "JPEG"}] * 50 + [{"label": 1, "set": "b", "format": "PNG"}] * 50
    rows = [row | {"uri": f"/{number}"} for number, row in enumerate(rows)]

    report = find_leaks(made_up(rows))

    assert {leak.set for leak in report.leaks} == {None}
    assert report.worst is not None
    assert report.worst.attribute == "format"


def test_within_a_set_more_can_be_told_than_over_all() -> None:
    rows = [
        {"label": label, "set": name, "format": "JPEG" if label == swapped else "PNG"}
        for swapped, name in enumerate("ab")
        for label in (0, 1)
        for _ in range(40)
    ]
    table = made_up(rows)

    assert _shares(table)["format"] == 0
    assert _shares(table, "a")["format"] == pytest.approx(1, abs=0.03)


def test_only_usable_training_images_count() -> None:
    alike = _samples(20).to_pylist()
    others = [
        row | {"format": "JPEG" if row["label"] else "PNG", **unused}
        for row in alike
        for unused in ({"split": "validation"}, {"status": "corrupt"})
    ]

    assert _shares(made_up([*alike, *others]))["format"] == 0


def test_a_leak_past_the_bound_is_refused_with_what_tells_what_and_the_remedy() -> None:
    report = find_leaks(_samples(format=("JPEG", "PNG")))

    with pytest.raises(TrainingError) as caught:
        refuse_leaks(report, 0.1)

    assert str(caught.value).startswith(
        "format tells 100% of the label over all sets, the limit is 10% (--max-leak): 100 of 100 images with format "
        "jpeg are real, 50% of all are."
    )
    assert "Save both classes alike" in str(caught.value)
    refuse_leaks(report, 1.0)
    refuse_leaks(find_leaks(_samples()), 0.0)


def test_the_worst_is_the_one_with_the_largest_share() -> None:
    worst = find_leaks(_samples(60, lossy=(True, False), set=("s", "s"))).worst

    assert isinstance(worst, Leak)
    assert worst.attribute == "lossy"


@pytest.mark.parametrize("rows", [[], [{"label": 0}], [{"label": 1}] * 3])
def test_one_class_has_nothing_to_tell(rows: list[dict[str, object]]) -> None:
    report = find_leaks(made_up(rows))

    assert report.leaks == ()
    assert report.worst is None
    refuse_leaks(report, 0.0)
    assert len(report.lines()) == 1 + len(ATTRIBUTES)


def test_the_table_shows_the_commonest_values_of_each_class() -> None:
    report = find_leaks(_samples(10, format=("JPEG", "PNG")))

    assert report.values["format"] == {"real": [("jpeg", 1.0)], "generated": [("png", 1.0)]}
    header, line = report.lines()[:2]
    assert header.split() == ["attribute", "tells", "most", "in", "a", "set", "real", "generated"]
    assert line.split() == ["format", "97%", "97%", "s", "jpeg", "100%", "png", "100%"]
    assert json.loads(json.dumps(report.to_json()))["values"]["lossy"]["real"] == [["false", 1.0]]


def test_the_figures_are_the_same_every_time() -> None:
    table = _samples(format=("JPEG", "PNG"))
    assert find_leaks(table) == find_leaks(table)
