"""The benchmark of decoding still runs."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import decode


def test_the_smoke_run_measures_every_format_and_policy(tmp_path: Path) -> None:
    out = tmp_path / "decode.json"
    decode.main(["--smoke", "--out", str(out)])

    cells = json.loads(out.read_text())["cells"]
    assert {(cell["format"], cell["policy"]) for cell in cells} == {
        (fmt, policy) for fmt in ("JPEG", "WEBP", "PNG") for policy in ("crop256", "resize256")
    }
    assert all(cell["cpu_ms"] > 0 for cell in cells)
