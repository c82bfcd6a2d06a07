"""The end-to-end benchmark still runs, and its sides agree."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import end_to_end
from benchmarks.steady import rate


def test_the_smoke_run_scores_every_image_on_every_side(tmp_path: Path) -> None:
    out = tmp_path / "end_to_end.json"
    # Ray's documented way starts a Ray of its own and pays no attention to ours: left to the real runs.
    end_to_end.main(["--smoke", "--sides", "loop", "bare", "--out", str(out)])

    report = json.loads(out.read_text())
    assert set(report["sides"]) == {"loop", "bare"}
    assert report["largest_score_difference_to_first"]["bare"] < 1e-3
    assert report["sides"]["loop"]["times_first"] == 1


def test_a_rate_counts_what_came_after_the_first_mark() -> None:
    assert rate([(5, 10.0), (20, 12.0), (35, 15.0)]) == 6.0
    assert rate([(5, 10.0)]) == 0.0
