"""The scaling benchmark still runs."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import scaling


def test_the_smoke_run_scans_on_two_nodes(tmp_path: Path) -> None:
    out = tmp_path / "scaling.json"
    scaling.main(["--smoke", "--out", str(out)])

    (side,) = json.loads(out.read_text())["sides"]
    assert (side["kind"], side["number"]) == ("nodes", 2)
    assert side["images_per_s"] > 0
