"""Labels, sets, classes and pairs: from folders, archives, manifests and a scan's results."""

from __future__ import annotations

import io
import logging
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lfm_scan.errors import ConfigError, NotFoundError, TrainingError
from lfm_scan.options import InputConfig, StorageConfig
from lfm_scan.training.columns import LabelColumns
from lfm_scan.training.gather import gather_samples, split_off
from lfm_scan.training.samples import SAMPLE_SCHEMA, Split

TREE = ("a/0_real/1.png", "a/1_fake/1.png", "a/1_fake/2.png", "b/dog/0_real/x.png", "b/dog/1_fake/x.jpg")


def _write(root: Path, names: tuple[str, ...] = TREE) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"not looked at")
    return root


def _gather(*sources: Path | str, inputs: InputConfig | None = None, columns: LabelColumns | None = None) -> pa.Table:
    names = [str(source) for source in sources]
    return gather_samples(names, inputs or InputConfig(), StorageConfig(), columns or LabelColumns(), Split.TRAIN)


def _rows(table: pa.Table, *names: str) -> dict[str, tuple[Any, ...]]:
    """Return columns of each row by the end of its URI."""
    return {row["uri"].rsplit("/", 1)[-1]: tuple(row[name] for name in names) for row in table.to_pylist()}


def _tar(path: Path, names: tuple[str, ...]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 3
            archive.addfile(member, io.BytesIO(b"abc"))
    return path


def test_a_tree_tells_labels_sets_classes_and_pairs(tmp_path: Path) -> None:
    table = _gather(_write(tmp_path))

    assert table.schema == SAMPLE_SCHEMA
    names = ("uri", "label", "set", "class", "pair", "split", "status", "error", "format", "num_bytes", "kind")
    assert [tuple(row[name] for name in names) for row in table.to_pylist()] == [
        (f"{tmp_path}/{name}", label, set_, class_, pair, "train", "ok", None, None, None, "object")
        for name, label, set_, class_, pair in (
            ("a/0_real/1.png", 0, "a", None, "a/1"),
            ("a/1_fake/1.png", 1, "a", None, "a/1"),
            ("a/1_fake/2.png", 1, "a", None, None),
            ("b/dog/0_real/x.png", 0, "b", "dog", "b/dog/x"),
            ("b/dog/1_fake/x.jpg", 1, "b", "dog", "b/dog/x"),
        )
    ]


@pytest.mark.parametrize(
    ("source", "set_", "class_"),
    [
        (".", "p/q", "r"),
        ("p", "q", "r"),
        ("p/q", "r", None),
        ("p/q/r", "r", None),
        ("p/q/r/", "r", None),
        ("p/q/r/0_real", "r", None),
        ("p/q/r/0_real/deep/1.png", "r", None),
        ("p/*/r/0_real/**/*.png", "q", "r"),
        ("p/q/r/*/deep/*.png", "r", None),
    ],
)
def test_set_and_class_are_counted_from_the_source(tmp_path: Path, source: str, set_: str, class_: str | None) -> None:
    _write(tmp_path, ("p/q/r/0_real/deep/1.png",))

    assert _rows(_gather(f"{tmp_path}/{source}"), "label", "set", "class") == {"1.png": (0, set_, class_)}


def test_the_last_folder_with_a_label_counts_and_the_name_of_a_file_is_none(tmp_path: Path) -> None:
    _write(tmp_path, ("0_real/n/1_fake/0_real",))

    assert _rows(_gather(tmp_path), "label", "set", "class") == {"0_real": (1, "0_real", "n")}


def test_members_of_archives_are_labelled_by_their_names_and_by_where_the_archive_lies(tmp_path: Path) -> None:
    whole = _tar(tmp_path / "whole.tar", ("n/0_real/1.png", "n/1_fake/1.png", "1_fake/2.png"))
    (tmp_path / "m" / "1_fake").mkdir(parents=True)
    part = _tar(tmp_path / "m" / "1_fake" / "part.tar", ("3.png",))

    rows = _gather(whole, part).to_pylist()

    assert [(row["uri"], row["label"], row["set"], row["pair"]) for row in rows] == [
        (f"{part}#3.png", 1, "m", None),
        (f"{whole}#n/0_real/1.png", 0, "n", "n/1"),
        (f"{whole}#n/1_fake/1.png", 1, "n", "n/1"),
        (f"{whole}#1_fake/2.png", 1, "whole", None),
    ]


def test_side_data_of_a_web_data_set_labels_its_images(tmp_path: Path) -> None:
    path = tmp_path / "shard.tar"
    with tarfile.open(path, "w") as archive:
        for name, data in (("1.png", b"x"), ("1.cls", b"0\n"), ("2.png", b"x"), ("2.cls", b"1")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))

    assert _rows(_gather(path, columns=LabelColumns(label_column="cls")), "label", "set") == {
        "shard.tar#1.png": (0, "shard"),
        "shard.tar#2.png": (1, "shard"),
    }


@pytest.mark.parametrize(
    ("text", "label"),
    [("0", 0), ("1", 1), ("False", 0), ("TRUE", 1), ("Real", 0), ("fake", 1), (" Generated ", 1), ("real", 0)],
)
def test_a_label_may_be_written_in_several_ways(tmp_path: Path, text: str, label: int) -> None:
    (tmp_path / "m.csv").write_text(f"uri,label\nx.png,{text}\n")

    assert _rows(_gather(tmp_path / "m.csv"), "label", "set", "class", "pair") == {"x.png": (label, "m", None, None)}


@pytest.mark.parametrize("text", ["2", "0.5", "-1", "cat", "yes", "nan"])
def test_another_label_is_refused_with_file_row_and_remedy(tmp_path: Path, text: str) -> None:
    manifest = tmp_path / "m.csv"
    manifest.write_text(f"uri,label\na.png,0\nb.png,{text}\n")

    with pytest.raises(TrainingError) as caught:
        _gather(manifest)

    assert str(caught.value) == (
        f"{manifest}: the row of {tmp_path}/b.png has {text!r} in column 'label'; a label is 0, false or real, or 1, "
        "true, fake or generated: correct it, or name the column with labels by --label-column"
    )


def test_every_format_of_a_manifest_carries_the_same_columns(tmp_path: Path) -> None:
    rows = [
        {"uri": "a/1.png", "is_ai": 0, "source": "s", "topic": "t", "group": "p1"},
        {"uri": "a/2.png", "is_ai": 1, "source": "s", "topic": "t", "group": "p1"},
    ]
    names = list(rows[0])
    lines = [",".join(names), *(",".join(str(row[name]) for name in names) for row in rows)]
    (tmp_path / "m.csv").write_text("\n".join(lines))
    (tmp_path / "m.jsonl").write_text("\n".join(str(row).replace("'", '"') for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "m.parquet")
    columns = LabelColumns(label_column="is_ai", set_column="source", class_column="topic", pair_column="group")
    expected = {"1.png": (0, "s", "t", "p1"), "2.png": (1, "s", "t", "p1")}

    for name in ("m.csv", "m.jsonl", "m.parquet"):
        assert _rows(_gather(tmp_path / name, columns=columns), "label", "set", "class", "pair") == expected


@pytest.mark.parametrize("values", [[0, 1, None], [False, True, None], [0.0, 1.0, None], ["real", "fake", ""]])
def test_a_column_of_any_type_labels_and_an_empty_value_leaves_it_to_the_folder(
    tmp_path: Path, values: list[object]
) -> None:
    uris = ["/x/1.png", "/x/2.png", "/x/n/1_fake/3.png"]
    pq.write_table(pa.table({"uri": uris, "label": values}), tmp_path / "m.parquet")

    assert _rows(_gather(tmp_path / "m.parquet"), "label", "set") == {
        "1.png": (0, "m"),
        "2.png": (1, "m"),
        "3.png": (1, "n"),
    }


def test_a_column_whose_name_the_results_of_a_scan_have_can_hold_the_set(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("uri,label,format\n/x/1.png,1,mine\n")

    assert _rows(_gather(tmp_path / "m.csv", columns=LabelColumns(set_column="format")), "set") == {"1.png": ("mine",)}


def test_results_of_a_scan_with_a_carried_label_are_a_manifest(tmp_path: Path) -> None:
    results = pa.table({"uri": ["/x/1.png"], "status": ["ok"], "score": [0.9], "label": ["generated"]})
    pq.write_table(results, tmp_path / "part-0.parquet")

    assert _rows(_gather(f"{tmp_path}/*.parquet"), "label", "status") == {"1.png": (1, "ok")}


def test_a_list_of_uris_is_labelled_by_their_folders(tmp_path: Path) -> None:
    (tmp_path / "m.txt").write_text("s3://b/n/0_real/1.png\nn/c/1_fake/2.png\n")

    assert _rows(_gather(tmp_path / "m.txt"), "label", "set", "class") == {
        "1.png": (0, "n", None),
        "2.png": (1, "n", "c"),  # below the manifest's folder NAME and CLASS can be told apart
    }


def test_the_pair_of_a_manifest_wins(tmp_path: Path) -> None:
    _write(tmp_path)
    (tmp_path / "m.csv").write_text("uri,label,pair\na/0_real/1.png,0,mine\na/1_fake/1.png,1,\na/1_fake/2.png,1,mine\n")

    table = _gather(tmp_path / "m.csv")

    assert table.column("pair").to_pylist() == ["mine", None, "mine"]


def test_a_manifest_labels_the_images_of_a_folder_that_is_named_too_and_each_is_one_sample(tmp_path: Path) -> None:
    _write(tmp_path / "photos", ("1.png", "2.png"))
    (tmp_path / "m.csv").write_text("uri,label\nphotos/1.png,0\nphotos/2.png,1\nphotos/2.png,1\n")

    table = _gather(tmp_path / "photos" / "1.png", tmp_path / "photos" / "2.png", tmp_path / "m.csv")

    assert _rows(table, "label") == {"1.png": (0,), "2.png": (1,)}
    assert table.num_rows == 2


def test_contradictions_are_refused(tmp_path: Path) -> None:
    _write(tmp_path)
    swapped, twice = tmp_path / "swapped.csv", tmp_path / "twice.csv"
    swapped.write_text("uri,label\na/0_real/1.png,1\n")
    twice.write_text("uri,label\n/x/1.png,1\n/x/1.png,0\n")

    with pytest.raises(
        TrainingError, match=r"says generated \('1' in column 'label'\), the folder it lies in says real"
    ):
        _gather(swapped)
    with pytest.raises(TrainingError, match=r"/x/1.png: is named twice, once as real and once as generated"):
        _gather(twice)


def test_an_image_without_a_label_is_refused(tmp_path: Path) -> None:
    _write(tmp_path, (*TREE, "stray.png"))
    (tmp_path / "m.csv").write_text("uri\n/x/1.png\n")

    with pytest.raises(
        TrainingError, match=r"stray.png: has no label: no folder of its path is named 0_real or 1_fake"
    ):
        _gather(tmp_path)
    with pytest.raises(TrainingError, match=r"/x/1.png: has no label: .*m.csv has no value for it in a column 'label'"):
        _gather(tmp_path / "m.csv")
    assert _gather(tmp_path, inputs=InputConfig(exclude=("stray.png", "m.csv"))).num_rows == len(TREE)


def test_a_line_that_cannot_be_read_is_refused_and_so_is_an_archive(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("uri,label\na.png,0\nb.png\n")
    (tmp_path / "x.tar").write_bytes(b"no tar" * 200)

    with pytest.raises(TrainingError, match=r"m.csv#line=3: error: 1 cells, the header names 2"):
        _gather(tmp_path / "m.csv")
    with pytest.raises(TrainingError, match=r"x.tar: unsupported: .*would be missing from the training"):
        _gather(tmp_path / "x.tar")


def test_what_lies_beside_the_images_is_left_out_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _write(tmp_path, (*TREE, "README.md", "a/synth.json"))

    with caplog.at_level(logging.WARNING):
        assert _gather(tmp_path).num_rows == len(TREE)

    (record,) = caplog.records
    assert record.getMessage().startswith("2 files without a label that are not named like images are left out")


def test_a_source_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        _gather(tmp_path / "none")


def test_one_column_cannot_be_two_things() -> None:
    with pytest.raises(ConfigError, match="one column cannot be two of label, set, class and pair"):
        LabelColumns(label_column="x", set_column="x")


def _numbered(count: int) -> pa.Table:
    rows = [
        {
            "uri": f"/{set_}/{number}/{label}",
            "kind": "object",
            "label": label,
            "set": set_,
            "pair": f"{set_}/{number}",
            "split": "train",
        }
        for set_ in ("a", "b")
        for number in range(count)
        for label in (0, 1)
    ]
    return pa.Table.from_pylist([row | {"status": "ok"} for row in rows], schema=SAMPLE_SCHEMA)


def test_a_share_of_the_pairs_of_each_set_moves_to_validation_as_wholes() -> None:
    rows = split_off(_numbered(1000), 0.2, seed=3).to_pylist()

    for set_ in ("a", "b"):
        moved = [row for row in rows if row["set"] == set_ and row["split"] == "validation"]
        assert 2 * 160 < len(moved) < 2 * 240  # 200 pairs and three standard deviations
        pairs = [row["pair"] for row in moved]
        assert all(pairs.count(pair) == 2 for pair in set(pairs))


def test_data_added_later_moves_nothing_and_another_seed_moves_others() -> None:
    few, many = split_off(_numbered(50), 0.3, seed=1), split_off(_numbered(80), 0.3, seed=1)
    split_of = dict(zip(many["uri"].to_pylist(), many["split"].to_pylist(), strict=True))

    assert few["split"].to_pylist() == [split_of[uri] for uri in few["uri"].to_pylist()]
    assert few["split"].to_pylist() != split_off(_numbered(50), 0.3, seed=2)["split"].to_pylist()
    assert split_off(few, 0.0, seed=1).equals(few)  # what was in validation stays there


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match="at least 0 and below 1"):
        split_off(_numbered(1), share, seed=0)
