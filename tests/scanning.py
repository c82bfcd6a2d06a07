"""Running the real command line in tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import pandas as pd
import pyarrow.parquet as pq

from tests.waiting import PATIENCE_S

REPOSITORY: Final = Path(__file__).resolve().parents[1]
SCORE_COLUMNS: Final = ["uri", "status", "logit", "score", "assessable", "flagged", "sha256"]


def command(*arguments: object) -> list[str]:
    """Return the command line of `lfm-scan` in this interpreter."""
    return [sys.executable, "-m", "lfm_scan", *map(str, arguments)]


def lfm_scan(
    *arguments: object, env: Mapping[str, str] | None = None, timeout_s: float = PATIENCE_S
) -> subprocess.CompletedProcess[str]:
    """Run `lfm-scan` to its end."""
    return subprocess.run(
        command(*arguments),
        env={**os.environ, **(env or {}), "COLUMNS": "120"},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def main_in_fresh_python(*arguments: object) -> tuple[str, set[str]]:
    """Run the command line, which must succeed and write nothing to standard error; return what it wrote, and the
    modules it loaded.
    """
    program = (
        "import json, sys; from lfm_scan.cli.main import main; assert main(sys.argv[1:]) == 0; "
        "print(json.dumps(list(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        check=True,
    )
    return done.stdout, set(json.loads(done.stderr))


def read_parts(run_dir: Path) -> pd.DataFrame:
    """Return the rows of all committed parts, each file read on its own."""
    frames = [pq.ParquetFile(path).read().to_pandas() for path in sorted((run_dir / "parts").glob("part-*.parquet"))]
    rows: pd.DataFrame = pd.concat(frames, ignore_index=True)
    return rows
