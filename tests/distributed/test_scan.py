"""Whole scans on one local Ray that the session shares, through `lfm_scan.scan`."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

import lfm_scan
from lfm_scan.config import ScanConfig
from lfm_scan.errors import FingerprintError, NotFoundError, RunError
from lfm_scan.options import ComputeConfig, StorageConfig
from lfm_scan.runs import finalize
from tests.awkward import write_awkward_files
from tests.distributed.shapes import staged_on_cpus
from tests.images import encoded, write_pictures
from tests.scanning import SCORE_COLUMNS, read_parts
from tests.servers import S3Server

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    write_pictures(folder, 40)
    return folder


@pytest.fixture
def config(pictures: Path, tmp_path: Path, tiny_weights: Path) -> ScanConfig:
    return ScanConfig((str(pictures),), output=str(tmp_path / "run"), weights=str(tiny_weights))


def test_every_input_gets_one_row_and_the_scorers_score(config: ScanConfig, pictures: Path) -> None:
    outcome = lfm_scan.scan(config)
    frame = lfm_scan.read_results(config.output)

    files = sorted(str(path) for path in pictures.rglob("*") if path.is_file())
    assert frame["uri"].tolist() == files
    assert outcome.summary.num_rows == len(files)
    scorer = lfm_scan.Scorer(config.weights)
    assert frame["logit"].tolist() == pytest.approx([result.logit for result in scorer.score(files)], abs=1e-4)
    lossy = frame["uri"].str.endswith(".jpg")
    assert (frame["lossy"] == lossy).all()
    assert not frame.loc[lossy, "assessable"].any()
    assert frame.loc[~lossy, "assessable"].all()


def test_results_read_with_plain_pandas_and_filters(config: ScanConfig) -> None:
    lfm_scan.scan(replace(config, threshold=0.0, flag_unassessable=True))

    frame = pd.read_parquet(f"{config.output}/results", filters=[("score", ">", 0.0), ("format", "==", "PNG")])

    assert len(frame) == 20
    assert frame["flagged"].all()


def test_a_finished_run_is_left_alone(config: ScanConfig) -> None:
    lfm_scan.scan(config)
    before = {path: path.stat().st_mtime_ns for path in Path(config.output).rglob("*")}

    again = lfm_scan.scan(config)

    assert again.already_finished
    assert {path: path.stat().st_mtime_ns for path in Path(config.output).rglob("*")} == before


def test_a_run_goes_on_where_parts_are_missing(config: ScanConfig, tmp_path: Path) -> None:
    lfm_scan.scan(config)
    undisturbed = lfm_scan.read_results(config.output)
    # What a driver killed midway leaves: some parts, no results, no success.
    broken = tmp_path / "broken"
    shutil.copytree(config.output, broken)
    (broken / "_SUCCESS.json").unlink()
    shutil.rmtree(broken / "results")
    kept = {path.name: path.read_bytes() for path in sorted((broken / "parts").iterdir())[::2]}
    for path in (broken / "parts").iterdir():
        if path.name not in kept:
            path.unlink()

    outcome = lfm_scan.scan(replace(config, output=str(broken)))

    assert 0 < outcome.num_rows_resumed < outcome.summary.num_rows
    pd.testing.assert_frame_equal(lfm_scan.read_results(broken)[SCORE_COLUMNS], undisturbed[SCORE_COLUMNS])
    assert all((broken / "parts" / name).read_bytes() == data for name, data in kept.items())


def test_other_settings_are_refused_and_named(config: ScanConfig) -> None:
    lfm_scan.scan(config)

    with pytest.raises(FingerprintError, match=r"threshold was 0\.5, now 0\.9"):
        lfm_scan.scan(replace(config, threshold=0.9))


def test_an_unfinished_run_is_not_read_by_mistake(config: ScanConfig) -> None:
    lfm_scan.scan(config)
    (Path(config.output) / "_SUCCESS.json").unlink()

    with pytest.raises(RunError, match="has not finished"):
        lfm_scan.read_results(config.output)
    assert len(lfm_scan.read_results(config.output, allow_incomplete=True)) == 40


def test_parts_and_results_hold_the_same_rows(config: ScanConfig) -> None:
    lfm_scan.scan(config)

    pd.testing.assert_frame_equal(read_parts(Path(config.output)), lfm_scan.read_results(config.output))


def test_many_result_files_are_merged_on_the_cluster(config: ScanConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finalize, "_MAX_GROUP_ROWS", 15)
    lfm_scan.scan(config)

    assert len(list(Path(config.output, "results").iterdir())) == 3
    frame = lfm_scan.read_results(config.output)
    assert frame["uri"].is_unique
    assert frame["uri"].is_monotonic_increasing
    assert len(frame) == 40


def test_success_lists_every_part_and_file(config: ScanConfig) -> None:
    lfm_scan.scan(config)
    run_dir = Path(config.output)
    success = json.loads((run_dir / "_SUCCESS.json").read_text())

    assert sum(part["rows"] for part in success["parts"]) == sum(file["rows"] for file in success["results"]) == 40
    assert {file["name"]: file["bytes"] for file in success["results"]} == {
        f"results/{path.name}": path.stat().st_size for path in (run_dir / "results").iterdir()
    }
    assert len(success["parts"]) == len(list((run_dir / "parts").iterdir()))


def test_a_fault_of_the_run_on_a_worker_is_the_drivers_error(config: ScanConfig, tmp_path: Path) -> None:
    lfm_scan.scan(config)
    broken = tmp_path / "broken"  # a new place: workers remember plans they have read
    shutil.copytree(config.output, broken)
    (broken / "_SUCCESS.json").unlink()
    next((broken / "parts").iterdir()).unlink()
    next((broken / "plan").glob("*.parquet")).unlink()

    with pytest.raises(NotFoundError, match=r"plan-.*\.parquet: No such file"):
        lfm_scan.scan(replace(config, output=str(broken)))


def test_missing_source_writes_nothing(config: ScanConfig) -> None:
    with pytest.raises(NotFoundError):
        lfm_scan.scan(replace(config, sources=("/no/such/folder",)))

    assert not Path(config.output).exists()


def test_the_shape_of_the_pool_does_not_change_a_score(config: ScanConfig, tmp_path: Path) -> None:
    lfm_scan.scan(config)
    other = replace(
        config, output=str(tmp_path / "other"), compute=ComputeConfig(max_actors=1, batch_size=7, shard_size=13)
    )
    lfm_scan.scan(other)

    mine, theirs = lfm_scan.read_results(config.output), lfm_scan.read_results(other.output)
    assert mine["uri"].tolist() == theirs["uri"].tolist()
    assert (mine["logit"] - theirs["logit"]).abs().max() < 1e-4


def test_separate_stages_give_the_rows_of_fused_ones(
    config: ScanConfig, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(pictures, tmp_path / "in")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnot really")
    (folder / "twin.png").write_bytes(min(folder.rglob("*.png")).read_bytes())
    config = replace(config, sources=(str(folder),))
    lfm_scan.scan(config)
    other = replace(config, output=str(tmp_path / "other"))
    monkeypatch.setattr("lfm_scan.distributed.scan.shape_pipeline", staged_on_cpus)
    lfm_scan.scan(other)

    mine, theirs = lfm_scan.read_results(config.output), lfm_scan.read_results(other.output)
    assert len(mine) == 42
    assert mine["sha256"].duplicated().any()
    pd.testing.assert_frame_equal(mine[SCORE_COLUMNS], theirs[SCORE_COLUMNS])


def test_awkward_files_end_as_one_row_each_with_the_right_status(tmp_path: Path, tiny_weights: Path) -> None:
    expected = write_awkward_files(tmp_path / "in")
    config = ScanConfig((str(tmp_path / "in"),), output=str(tmp_path / "run"), weights=str(tiny_weights))
    lfm_scan.scan(config)

    frame = lfm_scan.read_results(config.output)

    assert dict(zip(frame["uri"], frame["status"], strict=True)) == expected
    assert len(frame) == len(expected) >= 40
    assert frame.loc[frame["status"] != "ok", "error"].notna().all()
    assert frame.loc[frame["status"] != "ok", "score"].isna().all()


def test_s3_and_a_folder_give_the_same_rows(
    s3_server: S3Server, s3_bucket: str, config: ScanConfig, pictures: Path
) -> None:
    names = [str(path.relative_to(pictures)) for path in pictures.rglob("*") if path.is_file()]
    for name in names:
        s3_server.put(s3_bucket, f"in/{name}", (pictures / name).read_bytes())
    s3_server.put(s3_bucket, "in/marker/", b"")
    s3_server.put(s3_bucket, "in/odd name + 100%#?.png", encoded(seed=99))
    storage = StorageConfig(endpoint_url=s3_server.endpoint_url)
    remote = replace(config, sources=(f"s3://{s3_bucket}/in/",), output=f"s3://{s3_bucket}/runs/1", storage=storage)

    lfm_scan.scan(config)
    outcome = lfm_scan.scan(remote)

    assert outcome.summary.num_rows == len(names) + 1
    theirs = lfm_scan.read_results(remote.output, storage=storage)
    options = {"endpoint_url": s3_server.endpoint_url}
    with_pandas = pd.read_parquet(f"{remote.output}/results/", storage_options=options)
    pd.testing.assert_frame_equal(with_pandas, theirs)
    mine = lfm_scan.read_results(config.output).set_index("sha256")
    theirs = theirs.set_index("sha256").loc[mine.index]
    assert theirs["logit"].tolist() == mine["logit"].tolist()
    assert theirs["etag"].str.fullmatch("[0-9a-f]{32}").all()
    assert lfm_scan.scan(remote).already_finished
