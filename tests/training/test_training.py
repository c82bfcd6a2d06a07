"""Whole trainings in one process, through the public function, without Ray."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

import lfm_scan
from lfm_scan.cli.main import main
from lfm_scan.distributed.train import Event, TrainListener, train
from lfm_scan.errors import FingerprintError, StorageError, TrainingError
from lfm_scan.training.config import RecipeConfig, TeacherConfig
from tests.training.runs import assert_same_weights, small_config, write_doubled


@pytest.fixture(scope="module")
def doubled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_doubled(tmp_path_factory.mktemp("data"), 24)


class Interrupter(TrainListener):
    """Stops a training at a step, as Ctrl-C does."""

    def __init__(self, epoch: int, step: int) -> None:
        self._where = (epoch, step)

    def progressed(self, event: Event) -> None:
        if event["kind"] == "step" and (event["epoch"], event["step"]) == self._where:
            raise KeyboardInterrupt


@pytest.fixture
def _every_step_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lfm_scan.training.fit._REPORT_EVERY_S", 0.0)


def test_a_training_learns_leaves_its_records_and_its_checkpoint_scores_images(doubled: Path, tmp_path: Path) -> None:
    recipe = RecipeConfig(crop_px=48, epochs=3, train_batch_size=8, learning_rate=0.002)
    outcome = train(small_config(doubled, tmp_path / "run", recipe=recipe, model_id="doubled-v1"))

    history = json.loads((tmp_path / "run" / "history.json").read_text())
    assert [entry["epoch"] for entry in history] == [1, 2, 3]
    assert history[-1]["loss"] < history[0]["loss"]
    assert history[outcome.position.best_epoch - 1]["by_set"]["doubled"]["auc"] == 1.0
    assert set(history[0]["by_format"]) == {"PNG"}
    scorer = lfm_scan.Scorer(outcome.best_checkpoint, limits=lfm_scan.options.ImageLimits(min_side_px=48))
    real = scorer.score([doubled / "doubled" / "0_real" / "000.png"])[0]
    fake = scorer.score([doubled / "doubled" / "1_fake" / "000.png"])[0]
    assert real.model_id == "doubled-v1"
    assert fake.logit is not None
    assert real.logit is not None
    assert fake.logit > real.logit
    samples = pq.read_table(tmp_path / "run" / "samples.parquet")
    assert samples.num_rows == 48
    with Image.open(tmp_path / "run" / "curves.png") as curves:
        assert min(curves.size) > 500
    assert list((tmp_path / "run" / "tensorboard").glob("events.out.tfevents.*"))


@pytest.mark.usefixtures("_every_step_is_reported")
@pytest.mark.parametrize("where", [(1, 3), (2, 1), (2, 4)])
def test_an_interrupted_training_ends_with_the_weights_of_an_undisturbed_one(
    doubled: Path, tmp_path: Path, where: tuple[int, int]
) -> None:
    undisturbed = small_config(doubled, tmp_path / "undisturbed", checkpoint_every=2)
    interrupted = replace(undisturbed, output=str(tmp_path / "interrupted"))
    train(undisturbed)

    with pytest.raises(KeyboardInterrupt):
        train(interrupted, Interrupter(*where))
    assert not (tmp_path / "interrupted" / "_SUCCESS.json").exists()
    outcome = train(interrupted)

    for name in ("best", "last"):
        file = f"checkpoints/{name}.safetensors"
        assert_same_weights(tmp_path / "undisturbed" / file, tmp_path / "interrupted" / file)
    histories = [json.loads((tmp_path / name / "history.json").read_text()) for name in ("undisturbed", "interrupted")]
    assert histories[0] == histories[1]
    assert not outcome.already_finished


def test_a_finished_training_is_left_alone_and_one_with_other_settings_refused(doubled: Path, tmp_path: Path) -> None:
    config = small_config(doubled, tmp_path / "run")
    first = train(config)
    before = (tmp_path / "run" / "state.bin").stat().st_mtime_ns

    again = train(config)

    assert again.already_finished
    assert again.position == first.position
    assert (tmp_path / "run" / "state.bin").stat().st_mtime_ns == before
    with pytest.raises(FingerprintError, match=r"other settings \(seed\)"):
        train(replace(config, seed=1))


def test_a_training_stops_when_the_metric_no_longer_rises(doubled: Path, tmp_path: Path) -> None:
    recipe = RecipeConfig(crop_px=48, epochs=30, train_batch_size=8, learning_rate=0.002)
    outcome = train(small_config(doubled, tmp_path / "run", recipe=recipe, patience=2))

    assert outcome.position.epoch < 30
    assert outcome.position.epoch == max(outcome.position.best_epoch + 3, 3)


def test_data_whose_files_tell_the_label_are_refused_and_can_be_replaced(tmp_path: Path) -> None:
    root = write_doubled(tmp_path / "data", 24)
    for path in (root / "doubled" / "0_real").glob("*.png"):
        with Image.open(path) as image:
            image.convert("RGB").save(path.with_suffix(".jpg"), quality=90)
        path.unlink()
    config = small_config(root, tmp_path / "run")

    with pytest.raises(TrainingError, match=r"tells 98% of the label .*--max-leak"):
        train(config)

    told = json.loads((tmp_path / "run" / "check.json").read_text())
    assert {leak["attribute"] for leak in told["leaks"]["leaks"] if leak["share"] > 0.9} >= {"format", "lossy"}
    other = write_doubled(tmp_path / "other", 24)
    train(small_config(other, tmp_path / "run", recipe=RecipeConfig(crop_px=48, epochs=1, train_batch_size=8)))


def test_unreadable_images_are_counted_and_left_out(doubled: Path, tmp_path: Path) -> None:
    root = write_doubled(tmp_path / "data", 20)
    (root / "doubled" / "0_real" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    (root / "doubled" / "1_fake" / "empty.png").write_bytes(b"")

    train(small_config(root, tmp_path / "run"))

    counts = json.loads((tmp_path / "run" / "check.json").read_text())["samples"]["counts"]
    by_status: dict[str, int] = {}
    for row in counts:
        by_status[row["status"]] = by_status.get(row["status"], 0) + row["count"]
    assert sum(by_status.values()) == 42
    assert by_status["ok"] == 40
    assert by_status["empty"] == 1


def test_a_class_without_images_and_too_few_images_are_clear_errors(doubled: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no generated image could be used for train"):
        train(small_config(doubled / "doubled" / "0_real", tmp_path / "one"))
    few = write_doubled(tmp_path / "few", 3)
    with pytest.raises(TrainingError, match="do not fill one batch of 8"):
        train(small_config(few, tmp_path / "two"))


def test_losses_that_are_no_numbers_stop_the_training_and_leave_the_last_state(doubled: Path, tmp_path: Path) -> None:
    recipe = RecipeConfig(crop_px=48, epochs=2, train_batch_size=8, learning_rate=1e30)
    with pytest.raises(TrainingError, match=r"step \d+"):
        train(small_config(doubled, tmp_path / "run", recipe=recipe))

    assert not (tmp_path / "run" / "_SUCCESS.json").exists()


def test_a_full_disk_is_one_clear_error(doubled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    class FullDisk(TrainListener):
        def progressed(self, event: Event) -> None:
            monkeypatch.setattr("lfm_scan.storage.local.os.fsync", full)

    with pytest.raises(StorageError, match=r"No space left on device"):
        train(small_config(doubled, tmp_path / "run"), FullDisk())
    monkeypatch.undo()
    assert not list((tmp_path / "run").rglob("*.tmp"))
    train(small_config(doubled, tmp_path / "run"))


@pytest.mark.usefixtures("_every_step_is_reported")
@pytest.mark.parametrize("data", [b"", b"something else", b"lfm-scan-training-state-1\n\x05\0\0\0\0\0\0\0[1,2]"])
def test_a_state_that_this_program_did_not_write_is_refused(doubled: Path, tmp_path: Path, data: bytes) -> None:
    config = small_config(doubled, tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        train(config, Interrupter(1, 4))
    (tmp_path / "run" / "state.bin").write_bytes(data)

    with pytest.raises(TrainingError, match="not the state of a training"):
        train(config)


def test_a_student_learns_from_a_teacher_and_says_so(doubled: Path, tmp_path: Path) -> None:
    teacher = train(small_config(doubled, tmp_path / "teacher"))
    learning = TeacherConfig(start=teacher.best_checkpoint, teacher=teacher.best_checkpoint, logit_weight=1.0)

    outcome = train(small_config(doubled, tmp_path / "student", teacher=learning, seed=1))

    told = lfm_scan.model.load_checkpoint(Path(outcome.best_checkpoint).read_bytes()).metadata.training
    assert told["teacher"]["model_id"] == teacher.model_id
    assert told["weights"]["logit_weight"] == 1.0
    assert told["data"]
    assert told["recipe"]["crop_px"] == 48
    deep = RecipeConfig(crop_px=48, epochs=1, train_batch_size=8, depth=6)
    with pytest.raises(TrainingError, match="--depth"):
        train(small_config(doubled, tmp_path / "deep", teacher=learning, recipe=deep))


def test_the_command_line_trains_and_names_the_checkpoint(
    doubled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--preset",
        "published",
        "--crop-px",
        "48",
        "--epochs",
        "1",
        "--train-batch-size",
        "8",
        "--workers",
        "0",
    ]
    code = main(["train", str(doubled), "--output", str(tmp_path / "run"), *arguments])

    assert code == 0
    printed = capsys.readouterr().out
    assert f"{tmp_path}/run/checkpoints/best.safetensors" in printed
    assert "doubled" in printed
    assert main(["train", str(doubled), "--output", str(tmp_path / "run"), "--crop-px", "49"]) == 2
