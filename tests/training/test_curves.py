"""The picture of a training and its figures for TensorBoard: any names, any gaps, and without the extra."""

from __future__ import annotations

import io
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lfm_scan.training.board import open_board
from lfm_scan.training.curves import draw_curves
from lfm_scan.training.step import StepResult


def history(num_epochs: int, names: tuple[str, ...] = ("progan", "kodak")) -> list[dict[str, Any]]:
    entries = []
    for epoch in range(1, num_epochs + 1):
        auc = 1 - 0.5 / epoch
        figures = {"auc": auc, "ap": auc, "acc": auc - 0.1, "tpr_at_1_fpr": 0.0}
        by_set: dict[str, dict[str, float | None]] = {name: dict(figures) for name in names}
        by_set[names[-1]] |= {"auc": None, "ap": None, "tpr_at_1_fpr": None}  # one class alone
        entries.append(
            {
                "epoch": epoch,
                "loss": 0.7 / epoch,
                "learning_rate": 1e-4 * 0.9 ** (epoch // 3),
                "by_set": by_set,
                "mean_auc": auc,
                "mean_acc": None,
            }
        )
    return entries


def pixels_of(png: bytes | None) -> np.ndarray:
    assert png is not None
    with Image.open(io.BytesIO(png)) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def test_the_picture_is_a_png_that_shows_the_figures() -> None:
    short, long = pixels_of(draw_curves(history(3))), pixels_of(draw_curves(history(30)))
    assert short.shape == long.shape == (825, 1320, 3)
    assert (short != long).any()
    # The first two colours of the sets' lines, and none of a third.
    colors = {tuple(color) for color in short.reshape(-1, 3).tolist()}
    assert {(31, 119, 180), (255, 127, 14)} <= colors
    assert (44, 160, 44) not in colors


def test_the_same_history_gives_the_same_bytes() -> None:
    assert draw_curves(history(3)) == draw_curves(history(3))


@pytest.mark.parametrize("num_epochs", [0, 1])
def test_a_training_that_has_hardly_begun_has_a_picture(num_epochs: int) -> None:
    assert pixels_of(draw_curves(history(num_epochs))).size


def test_names_of_sets_are_shown_as_they_are_whatever_they_hold() -> None:
    names = ("_hidden", r"$\frac{$", "a\nb\x00", "\udcff", "\u65e5\u672c", "x" * 500, "")
    assert pixels_of(draw_curves(history(2, names))).shape == (825, 1320, 3)


def test_a_hundred_sets_do_not_burst_the_picture() -> None:
    names = tuple(f"set{index}" for index in range(100))
    assert pixels_of(draw_curves(history(2, names))).shape == (825, 1320, 3)


def test_without_matplotlib_there_is_no_picture_and_a_note(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with caplog.at_level(logging.WARNING):
        assert draw_curves(history(2)) is None
    assert "matplotlib is missing (pip install 'lfm-scan[train]')" in caplog.text


def step_result(step: int) -> StepResult:
    return StepResult(step, 1.0 / step, {"label": 0.5, "auxiliary": 0.25}, 3.0, 1e-4)


def scalars_of(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_the_board_holds_steps_and_epochs(tmp_path: Path) -> None:
    board = open_board(tmp_path)
    assert board is not None
    with board:
        for step in (1, 2):
            board.write_step(step_result(step))
        board.write_epoch(history(1)[0], step=2)
    found = scalars_of(tmp_path)
    assert found["train/loss"] == [(1, 1.0), (2, 0.5)]
    assert found["train/loss_auxiliary"] == [(1, 0.25), (2, 0.25)]
    assert found["train/gradient_norm"] == [(1, 3.0), (2, 3.0)]
    assert found["validation/mean_auc"] == [(2, 0.5)]
    assert found["auc/progan"] == [(2, 0.5)]
    assert "auc/kodak" not in found
    assert "acc/kodak" in found


def test_a_resumed_training_hides_the_steps_that_it_takes_again(tmp_path: Path) -> None:
    for first_step, steps in ((0, (1, 2, 3)), (1, (2,))):
        board = open_board(tmp_path, first_step)
        assert board is not None
        with board:
            for step in steps:
                board.write_step(step_result(step))
    assert [step for step, _ in scalars_of(tmp_path)["train/loss"]] == [1, 2]


def test_without_tensorboard_there_is_no_board_and_a_note(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with caplog.at_level(logging.WARNING):
        assert open_board(tmp_path) is None
    assert "tensorboard is missing (pip install 'lfm-scan[train]')" in caplog.text
