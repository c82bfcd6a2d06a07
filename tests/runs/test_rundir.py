from __future__ import annotations

from pathlib import Path

from lfm_scan.options import StorageConfig
from lfm_scan.runs.rundir import RunDirectory


def test_names_that_are_not_utf8_are_read_as_they_were_written(tmp_path: Path) -> None:
    directory = RunDirectory(str(tmp_path))
    value = {"sources": ["/pictures/\udcff", "/bücher"]}

    directory.create_json("config.json", value)

    assert directory.read_json("config.json") == value


def test_a_file_uri_is_a_local_path(tmp_path: Path) -> None:
    assert RunDirectory.at(f"file://{tmp_path}/a%20b/", StorageConfig()).uri == f"{tmp_path}/a b"
