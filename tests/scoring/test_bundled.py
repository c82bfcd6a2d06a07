"""What the bundled checkpoint says of the pictures that the README's first command scans."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from lfm_scan.scoring.scorer import Scorer
from lfm_scan.status import Unassessable

EXAMPLES: Final = Path(__file__).parents[2] / "examples" / "images"


def test_it_flags_the_generated_examples_and_no_photograph() -> None:
    paths = sorted(EXAMPLES.glob("*/*.png"))
    results = Scorer(device="cpu").score(paths)

    assert len(paths) == 20
    assert all(result.assessable for result in results)
    assert [result.flagged for result in results] == [path.parent.name == "generated" for path in paths]


def test_it_does_not_judge_lossy_copies_of_them() -> None:
    paths = [path for path in sorted(EXAMPLES.glob("*/*")) if path.suffix != ".png"]
    results = Scorer(device="cpu").score(paths)

    assert len(paths) == 3
    assert {result.unassessable_reason for result in results} == {Unassessable.LOSSY}
    assert not any(result.assessable or result.flagged for result in results)
