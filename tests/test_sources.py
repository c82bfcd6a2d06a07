from __future__ import annotations

from pathlib import Path

import pytest

from lfm_scan.errors import NotFoundError
from lfm_scan.options import StorageConfig
from lfm_scan.sources import check_sources, glob_matcher, list_sources
from tests.servers import S3Server


def _uris(*sources: object, exclude: Path | None = None) -> list[str]:
    found = list_sources(map(str, sources), StorageConfig(), exclude=None if exclude is None else str(exclude))
    return [each.uri for each in found]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a/1.png", "a/2.jpg", "a/deep/3.png", "a.b/4.png", "b/5.png", "[c]/6.png"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return tmp_path / "in"


def test_a_folder_is_listed_in_the_order_of_its_paths(folder: Path) -> None:
    uris = _uris(folder)

    assert uris == sorted(uris, key=str.encode)
    assert len(uris) == 6


def test_overlapping_sources_give_each_file_once(folder: Path) -> None:
    assert _uris(folder, folder / "a", folder / "a/1.png", f"{folder}/**/*.png", folder) == _uris(folder)


def test_sources_are_merged_in_order(folder: Path) -> None:
    assert _uris(folder / "b", folder / "a") == [f"{folder}/{name}" for name in (
        "a/1.png", "a/2.jpg", "a/deep/3.png", "b/5.png"
    )]  # fmt: skip


def test_the_run_directory_inside_a_source_is_left_out(folder: Path) -> None:
    assert _uris(folder, exclude=folder / "a") == [f"{folder}/{name}" for name in ("[c]/6.png", "a.b/4.png", "b/5.png")]


def test_a_folder_named_like_a_glob_is_a_folder(folder: Path) -> None:
    assert _uris(f"{folder}/[c]") == [f"{folder}/[c]/6.png"]


@pytest.mark.parametrize(
    ("pattern", "matching", "other"),
    [
        ("/a/*.png", "/a/1.png", "/a/deep/1.png"),
        ("/a/**/*.png", "/a/deep/er/1.png", "/a/1.jpg"),
        ("/a/**/*.png", "/a/1.png", "/b/1.png"),
        ("/a/?.png", "/a/1.png", "/a/12.png"),
        ("/a/[0-3].png", "/a/2.png", "/a/4.png"),
        ("/a/[!0-3].png", "/a/4.png", "/a/2.png"),
        ("/a/(1)+.png", "/a/(1)+.png", "/a/11.png"),
        ("/a/**", "/a/b/c\nd", "/b"),
    ],
)
def test_globs_match_as_a_shell_has_it(pattern: str, matching: str, other: str) -> None:
    matches = glob_matcher(pattern)

    assert matches(matching)
    assert not matches(other)


def test_a_source_with_nothing_in_it_is_named(folder: Path) -> None:
    with pytest.raises(NotFoundError, match=r"\*\.webp: nothing there"):
        check_sources([str(folder), f"{folder}/*.webp"], StorageConfig())


def test_overlapping_s3_sources_give_each_object_once_whatever_the_stores_order(
    s3_server: S3Server, s3_bucket: str
) -> None:
    keys = ["deep.png", "deep/x.png", "deep/y.jpg", "deeper/z.png"]  # SeaweedFS lists deep/ before deep.png
    for key in keys:
        s3_server.put(s3_bucket, key, b"x")
    storage = StorageConfig(endpoint_url=s3_server.endpoint_url)
    prefixes = ("", "deep", "deep/", "*.png", "**/*.png", "deep/x.png", "")

    found = list_sources([f"s3://{s3_bucket}/{prefix}" for prefix in prefixes], storage)

    assert sorted(each.uri for each in found) == [f"s3://{s3_bucket}/{key}" for key in keys]


def test_s3_prefixes_and_globs(s3_server: S3Server, s3_bucket: str) -> None:
    keys = ["a/1.png", "a/2.jpg", "a/deep/3.png", "ab/4.png", "b [1]/5+ %.png"]
    for key in keys:
        s3_server.put(s3_bucket, key, b"x")
    storage = StorageConfig(endpoint_url=s3_server.endpoint_url)

    def listed(source: str) -> list[str]:
        return [found.uri.removeprefix(f"s3://{s3_bucket}/") for found in list_sources([source], storage)]

    assert listed(f"s3://{s3_bucket}") == keys
    assert listed(f"s3://{s3_bucket}/a/") == keys[:3]
    assert listed(f"s3://{s3_bucket}/a/*.png") == keys[:1]
    assert listed(f"s3://{s3_bucket}/**/*.png") == [keys[0], *keys[2:]]
    assert listed(f"s3://{s3_bucket}/b [1]/") == keys[4:]
