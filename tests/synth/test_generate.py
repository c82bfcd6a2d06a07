from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lfm_scan.errors import FingerprintError, NotFoundError, TrainingError
from lfm_scan.imaging import decode_bytes
from lfm_scan.options import InputConfig, StorageConfig
from lfm_scan.sources.select import list_inputs
from lfm_scan.synth.config import SynthConfig
from lfm_scan.synth.generate import (
    PAIR_SCHEMA,
    PHOTOGRAPH_SCHEMA,
    Listener,
    NetworkReport,
    SynthOutcome,
    encode_png,
    synthesise,
)
from lfm_scan.training.samples import Split
from tests.images import encoded, picture
from tests.servers import S3Server

_NETWORKS = ("shuffle-f2", "nearest-f2")
_CROPS = 5


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four photographs and a file that is none."""
    folder = tmp_path_factory.mktemp("photographs")
    for number in range(4):
        fmt, suffix = ("JPEG", "jpg") if number % 2 else ("PNG", "png")
        (folder / f"{number}.{suffix}").write_bytes(encoded(fmt, number, (300, 200 + number)))
    (folder / "notes.txt").write_text("no image")
    return folder


def _config(photographs: Path, output: Path | str, **changes: object) -> SynthConfig:
    settings: dict[str, Any] = {
        "networks": _NETWORKS,
        "crops": _CROPS,
        "crop_px": 64,
        "steps": 2,
        "min_psnr": 0.0,
        "validation_share": 0.5,
    }
    return SynthConfig((str(photographs),), output=str(output), **{**settings, **changes})


class _Recorder(Listener):
    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def listed(self, num_photographs: int) -> None:
        self.calls.append(("listed", num_photographs))

    def fitted(self, report: NetworkReport) -> None:
        self.calls.append(("fitted", report.name))

    def photograph_done(self, num_done: int, num_pairs: int) -> None:
        self.calls.append(("done", num_done, num_pairs))


@pytest.fixture(scope="module")
def made(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SynthOutcome, _Recorder]:
    output, recorder = tmp_path_factory.mktemp("pairs"), _Recorder()
    return output, synthesise(_config(photographs, output), recorder), recorder


@pytest.fixture(scope="module")
def output(made: tuple[Path, SynthOutcome, _Recorder]) -> Path:
    return made[0]


def _rows(output: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(output / "manifest.parquet").to_pylist()
    return rows


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _chunks(png: bytes) -> list[tuple[bytes, int]]:
    position, found = 8, []
    while position < len(png):
        length = int.from_bytes(png[position : position + 4])
        found.append((png[position + 4 : position + 8], length))
        position += length + 12
    return found


def test_each_crop_is_a_pair_of_each_network(made: tuple[Path, SynthOutcome, _Recorder]) -> None:
    output, outcome, _ = made

    assert outcome.num_pairs == 4 * _CROPS * 2
    for network in _NETWORKS:
        reals = {path.name for path in (output / network / "0_real").iterdir()}
        fakes = {path.name for path in (output / network / "1_fake").iterdir()}
        assert reals == fakes
        assert len(reals) == 4 * _CROPS


def test_the_outcome_and_the_listener_tell_what_was_done(made: tuple[Path, SynthOutcome, _Recorder]) -> None:
    output, outcome, recorder = made

    assert outcome.output == str(output)
    assert outcome.num_photographs == {"ok": 4, "unsupported": 1}
    assert (outcome.num_used, outcome.num_crops) == (4, 4 * _CROPS)
    assert [(report.name, report.used, report.num_pairs) for report in outcome.networks] == [
        (name, True, 4 * _CROPS) for name in _NETWORKS
    ]
    assert recorder.calls[:3] == [("listed", 5), ("fitted", "shuffle-f2"), ("fitted", "nearest-f2")]
    assert recorder.calls[3:] == [("done", number, min(number, 4) * _CROPS * 2) for number in range(1, 6)]


def test_nothing_about_the_files_tells_the_classes_apart(output: Path) -> None:
    files = [path.read_bytes() for path in output.glob("*/*/*.png")]
    facts = {
        (
            len(data),
            tuple(_chunks(data)),
            data[:41],
            Image.open(io.BytesIO(data)).mode,
            Image.open(io.BytesIO(data)).size,
        )
        for data in files
    }

    assert len(facts) == 1
    assert {name for name, _ in _chunks(files[0])} == {b"IHDR", b"IDAT", b"IEND"}


def test_fakes_differ_from_their_originals_and_have_the_psnr_they_are_said_to_have(output: Path) -> None:
    for row in _rows(output):
        if row["label"] == 0:
            assert (row["network"], row["psnr"]) == (None, None)
            continue
        fake = np.asarray(Image.open(output / row["uri"])).astype(float)
        real = np.asarray(Image.open(output / row["uri"].replace("1_fake", "0_real"))).astype(float)
        assert not np.array_equal(fake, real)
        assert row["psnr"] == pytest.approx(10 * np.log10(255**2 / np.mean((fake - real) ** 2)))


def test_real_ones_of_all_networks_are_the_same_crops(output: Path) -> None:
    first, second = (_files(output / network / "0_real") for network in _NETWORKS)

    assert first == second


def test_the_manifest_names_every_file_once_and_both_of_each_pair(output: Path) -> None:
    rows = _rows(output)

    assert {row["uri"] for row in rows} == {str(path.relative_to(output)) for path in output.glob("*/*/*.png")}
    assert len({row["uri"] for row in rows}) == len(rows)
    labels: dict[str, list[int]] = {}
    for row in rows:
        labels.setdefault(row["pair"], []).append(row["label"])
        assert row["uri"].split("/")[0] == row["set"] == row["pair"].split("/")[0]
    assert all(sorted(both) == [0, 1] for both in labels.values())
    assert pq.read_table(output / "manifest.parquet").schema == PAIR_SCHEMA


def test_the_manifest_is_also_text_and_a_source_of_the_pairs(output: Path) -> None:
    with (output / "manifest.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))

    assert [(line["uri"], line["label"]) for line in lines] == [
        (row["uri"], str(row["label"])) for row in _rows(output)
    ]
    for name in ("manifest.csv", "manifest.parquet"):
        named = list_inputs([str(output / name)], InputConfig(carry=("label",)), StorageConfig())
        assert {each.uri for each in named} == {str(path) for path in output.glob("*/*/*.png")}


def test_all_pairs_of_a_photograph_are_for_the_same(output: Path) -> None:
    table = pq.read_table(output / "photographs.parquet")
    splits = {row["uri"]: row["split"] for row in table.to_pylist()}

    assert table.schema == PHOTOGRAPH_SCHEMA
    assert all(splits[row["photograph"]] == row["split"] for row in _rows(output))
    assert {split for split in splits.values() if split} <= set(Split)


def test_a_file_that_is_no_photograph_has_its_row(photographs: Path, output: Path) -> None:
    rows = {row["uri"]: row for row in pq.read_table(output / "photographs.parquet").to_pylist()}

    assert len(rows) == 5
    bad = rows[str(photographs / "notes.txt")]
    assert (bad["status"], bad["num_crops"], bad["split"]) == ("unsupported", 0, None)
    assert "not an image" in bad["error"]


def test_synth_json_says_how_the_pairs_were_made(output: Path) -> None:
    facts = json.loads((output / "synth.json").read_text())

    assert facts["settings"]["config"]["seed"] == 0
    assert facts["settings"]["networks"]["nearest-f2"]["upsampling"] == "nearest"
    assert [network["name"] for network in facts["networks"]] == list(_NETWORKS)
    rows = [row["psnr"] for row in _rows(output) if row["network"] == "nearest-f2"]
    assert facts["networks"][1]["pairs_psnr"] == pytest.approx(np.mean(rows))
    assert "terms of its photograph" in facts["licences"]


def test_the_same_settings_make_the_same_bytes(photographs: Path, output: Path, tmp_path: Path) -> None:
    synthesise(_config(photographs, tmp_path / "again"))

    assert _files(tmp_path / "again") == _files(output)


def test_an_interrupted_run_goes_on_when_it_is_repeated(photographs: Path, output: Path, tmp_path: Path) -> None:
    class Interrupt(Listener):
        def photograph_done(self, num_done: int, num_pairs: int) -> None:
            if num_done == 2:
                raise KeyboardInterrupt

    config = _config(photographs, tmp_path / "pairs")
    with pytest.raises(KeyboardInterrupt):
        synthesise(config, Interrupt())
    assert not (tmp_path / "pairs" / "manifest.parquet").exists()

    synthesise(config)

    assert _files(tmp_path / "pairs") == _files(output)


def test_pairs_of_other_settings_are_not_mixed(photographs: Path, tmp_path: Path) -> None:
    config = _config(photographs, tmp_path, networks=("nearest-f2",), crops=1)
    synthesise(config)
    before = _files(tmp_path)

    with pytest.raises(FingerprintError, match=r"settings\.json.*give a new --output"):
        synthesise(replace(config, seed=1))

    assert _files(tmp_path) == before


def test_a_blurry_network_draws_nothing_and_is_reported(photographs: Path, tmp_path: Path, output: Path) -> None:
    psnrs = [network["psnr"] for network in json.loads((output / "synth.json").read_text())["networks"]]
    between = sum(psnrs) / 2
    sharp, blurry = sorted(_NETWORKS, key=lambda name: -psnrs[_NETWORKS.index(name)])

    outcome = synthesise(_config(photographs, tmp_path, min_psnr=between))

    assert not (tmp_path / blurry).exists()
    assert (tmp_path / sharp).exists()
    reports = {report.name: report for report in outcome.networks}
    assert (reports[blurry].used, reports[blurry].num_pairs, reports[blurry].pairs_psnr) == (False, 0, None)
    assert reports[blurry].psnr < between <= reports[sharp].psnr
    assert outcome.num_pairs == 4 * _CROPS


def test_without_a_sharp_network_nothing_is_drawn(photographs: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"--min-psnr 90 dB \(shuffle-f2 [\d.]+, nearest-f2 [\d.]+\).*--steps"):
        synthesise(_config(photographs, tmp_path, min_psnr=90.0))

    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]


def test_without_a_photograph_there_is_a_reason(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "small.png").write_bytes(encoded(size=(100, 100)))
    with pytest.raises(TrainingError, match=r"of 1 files, 1 were tried and 0 could be used.*128 pixels"):
        synthesise(_config(tmp_path / "in", tmp_path / "out"))

    with pytest.raises(NotFoundError):
        synthesise(_config(tmp_path / "nowhere", tmp_path / "out"))


def test_networks_draw_by_turns_where_not_all_draw_each_crop(photographs: Path, tmp_path: Path) -> None:
    networks = ("shuffle-f2", "nearest-f2", "transposed-f2")

    outcome = synthesise(_config(photographs, tmp_path, networks=networks, networks_per_crop=2, steps=1, crops=6))

    assert [report.num_pairs for report in outcome.networks] == [16, 16, 16]
    crops = [row["pair"].split("/")[1] for row in _rows(tmp_path) if row["label"] == 0]
    assert sorted({crops.count(crop) for crop in crops}) == [2]


def test_pairs_go_to_s3_and_photographs_come_from_there(
    s3_bucket: str, s3_server: S3Server, photographs: Path, output: Path
) -> None:
    client = s3_server.client()
    for path in photographs.iterdir():
        client.put_object(Bucket=s3_bucket, Key=f"in/{path.name}", Body=path.read_bytes())
    storage = StorageConfig(endpoint_url=s3_server.endpoint_url)
    config = _config(photographs, f"s3://{s3_bucket}/out", storage=storage)

    outcome = synthesise(replace(config, sources=(f"s3://{s3_bucket}/in/",)))

    assert outcome.output == f"s3://{s3_bucket}/out"
    listed = client.list_objects_v2(Bucket=s3_bucket, Prefix="out/")["Contents"]
    pngs = {each["Key"].removeprefix("out/") for each in listed if each["Key"].endswith(".png")}
    assert pngs == {row["uri"] for row in _rows(output)}
    key = min(pngs)
    assert client.get_object(Bucket=s3_bucket, Key=f"out/{key}")["Body"].read() == (output / key).read_bytes()
    manifest = client.get_object(Bucket=s3_bucket, Key="out/manifest.parquet")["Body"].read()
    assert pq.read_table(pa.BufferReader(manifest)).num_rows == len(pngs)


def test_an_uncompressed_png_holds_the_pixels_and_its_size_says_nothing_about_them() -> None:
    busy, flat = np.asarray(picture(64, 64)), np.zeros((64, 64, 3), np.uint8)

    assert np.array_equal(np.asarray(decode_bytes(encode_png(busy)).image), busy)
    assert len(encode_png(busy)) == len(encode_png(flat))
