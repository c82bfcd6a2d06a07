from __future__ import annotations

import io
import itertools
import os
import tarfile
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lfm_scan.concurrency import chain_in_threads, map_in_threads
from lfm_scan.errors import ConfigError, NotFoundError, SourceError
from lfm_scan.options import InputConfig, StorageConfig
from lfm_scan.sources.containers import Container, container_named
from lfm_scan.sources.filters import make_filter
from lfm_scan.sources.globs import expand_braces, glob_matcher
from lfm_scan.sources.inputs import INPUT_SCHEMA, Input, Kind, from_table, input_schema, to_table
from lfm_scan.sources.listing import check_sources, parse_sources
from lfm_scan.sources.select import carried_types_of, list_inputs
from lfm_scan.status import Status
from tests.servers import S3Server
from tests.waiting import wait_until


def _uris(*sources: object, exclude: Path | None = None, config: InputConfig | None = None) -> list[str]:
    kept_out = None if exclude is None else str(exclude)
    found = list_inputs(map(str, sources), config or InputConfig(), StorageConfig(), exclude=kept_out)
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


def test_sources_are_taken_in_order(folder: Path) -> None:
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

    found = list_inputs([f"s3://{s3_bucket}/{prefix}" for prefix in prefixes], InputConfig(), storage)

    assert sorted(each.uri for each in found) == [f"s3://{s3_bucket}/{key}" for key in keys]


def test_s3_prefixes_and_globs(s3_server: S3Server, s3_bucket: str) -> None:
    keys = ["a/1.png", "a/2.jpg", "a/deep/3.png", "ab/4.png", "b [1]/5+ %.png"]
    for key in keys:
        s3_server.put(s3_bucket, key, b"x")
    storage = StorageConfig(endpoint_url=s3_server.endpoint_url)

    def listed(source: str) -> list[str]:
        return [found.uri.removeprefix(f"s3://{s3_bucket}/") for found in list_inputs([source], InputConfig(), storage)]

    assert listed(f"s3://{s3_bucket}") == keys
    assert listed(f"s3://{s3_bucket}/a/") == keys[:3]
    assert listed(f"s3://{s3_bucket}/a/*.png") == keys[:1]
    assert listed(f"s3://{s3_bucket}/**/*.png") == [keys[0], *keys[2:]]
    assert listed(f"s3://{s3_bucket}/b [1]/") == keys[4:]


@pytest.fixture
def memory() -> Iterator[str]:
    filesystem = fsspec.filesystem("memory")
    for name in ("x/a.png", "xyz/b.png", "x-1.png", "x-2.png"):
        filesystem.pipe(f"/select-test/{name}", b"x")
    yield "memory://select-test"
    filesystem.rm("/select-test", recursive=True)


def test_folders_of_other_stores_do_not_cover_neighbours_with_longer_names(memory: str) -> None:
    assert _uris(f"{memory}/x", f"{memory}/xyz", f"{memory}/x/a.png") == [f"{memory}/x/a.png", f"{memory}/xyz/b.png"]


def test_globs_in_other_stores_may_begin_in_a_name(memory: str) -> None:
    assert _uris(f"{memory}/x-*.png") == [f"{memory}/x-1.png", f"{memory}/x-2.png"]
    assert _uris(f"{memory}/x*/*.png") == [f"{memory}/x/a.png", f"{memory}/xyz/b.png"]


@pytest.mark.parametrize(
    ("source", "covered", "other"),
    [
        ("https://h/a", "https://h/a", "https://h/ab.jpg"),
        ("gs://b/a", "gs://b/a/1.jpg", "gs://b/ab.jpg"),
        ("s3://b/a", "s3://b/ab.jpg", "s3://b/b.jpg"),
        ("/in/a", "file:///in/a/1.jpg", "/in/ab.jpg"),
        ("file:///in/a%20b", "/in/a b/1.jpg", "/in/a"),
        ("/in/*.jpg", "file:///in/%FF.jpg", "/in/a/1.jpg"),
    ],
)
def test_a_source_covers_what_its_store_lists_for_it(source: str, covered: str, other: str) -> None:
    (parsed,) = parse_sources([source], StorageConfig())

    assert parsed.covers(covered)
    assert not parsed.covers(other)


def test_a_file_uri_is_a_path(folder: Path) -> None:
    assert _uris(folder, folder.as_uri(), f"{folder.as_uri()}/a") == _uris(folder)
    assert _uris(f"file://{folder}/b/*.png") == [f"{folder}/b/5.png"]
    with pytest.raises(ConfigError, match="three slashes"):
        _uris("file://in/a")


def test_names_that_are_not_utf8_are_found_by_globs_and_as_archives(tmp_path: Path) -> None:
    archive = os.fsencode(tmp_path) + b"/\xff.tar"
    with tarfile.open(archive, "w") as writer:
        writer.addfile(tarfile.TarInfo("1.png"))
    quoted = f"file://{tmp_path}/%FF.tar"

    found = list(list_inputs([os.fsdecode(archive), f"{tmp_path}/*.tar"], InputConfig(), StorageConfig()))

    assert to_table(found, INPUT_SCHEMA)["uri"].to_pylist() == [f"{quoted}#1.png"]


def test_a_signed_address_is_known_by_its_path() -> None:
    signature = "?X-Credential=A/2026/s3.tar&X-Signature=b"

    assert container_named(f"https://h/list.csv{signature}") is Container.MANIFEST
    assert container_named(f"https://h/a.jpg{signature}") is None


def test_a_pattern_that_is_none_is_the_users_mistake() -> None:
    with pytest.raises(ConfigError, match="bad character range"):
        glob_matcher("/[z-a].png")


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("shard-{000..002}.tar", ["shard-000.tar", "shard-001.tar", "shard-002.tar"]),
        ("{9..11}.tar", ["9.tar", "10.tar", "11.tar"]),
        ("{train,val}/{0..1}.tar", ["train/0.tar", "train/1.tar", "val/0.tar", "val/1.tar"]),
        ("{a,}.png", ["a.png", ".png"]),
        ("{2..0}", ["2", "1", "0"]),
        ("{a}{}{1..}", ["{a}{}{1..}"]),
    ],
)
def test_braces_stand_for_what_a_shell_makes_of_them(pattern: str, expected: list[str]) -> None:
    assert list(expand_braces(pattern)) == expected


def test_braces_in_a_name_that_exists_are_its_own(tmp_path: Path) -> None:
    (tmp_path / "{a,b}.png").write_bytes(b"x")
    (tmp_path / "a.png").write_bytes(b"x")

    assert _uris(tmp_path / "{a,b}.png") == [f"{tmp_path}/{{a,b}}.png"]
    assert _uris(tmp_path / "{a,c}.png".replace("c", "a")) == [f"{tmp_path}/a.png"]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (InputConfig(include=("*.png",)), ["a/1.png", "a/deep/3.png", "a.b/4.png", "b/5.png", "[c]/6.png"]),
        (InputConfig(include=("a/*",)), ["a/1.png", "a/2.jpg"]),
        (InputConfig(include=("*.jpg", "b/*")), ["a/2.jpg", "b/5.png"]),
        (InputConfig(exclude=("*.png",)), ["a/2.jpg"]),
        (InputConfig(include=("a/**",), exclude=("deep/*",)), ["a/1.png", "a/2.jpg"]),
        (InputConfig(suffix=(".JPG",)), ["a/2.jpg"]),
        (InputConfig(min_size=2), ["b/5.png"]),
        (InputConfig(max_size=1, suffix=(".jpg",)), ["a/2.jpg"]),
        (InputConfig(modified_after="2026-01-01", suffix=(".jpg",)), []),
        (InputConfig(modified_before="2026-01-01T00:00+00:00"), ["a/2.jpg"]),
        (InputConfig(modified_after="2025-12-31T23:59:59Z", modified_before="2026-01-01"), []),
    ],
    ids=str,
)
def test_filters_take_what_the_user_wants(folder: Path, config: InputConfig, expected: list[str]) -> None:
    (folder / "b/5.png").write_bytes(b"xx")
    new_year = datetime(2026, 1, 1, tzinfo=UTC).timestamp()
    os.utime(folder / "a/2.jpg", (new_year - 3600, new_year - 3600))

    assert sorted(_uris(folder, config=config)) == sorted(f"{folder}/{name}" for name in expected)


def test_what_is_not_known_is_not_selected() -> None:
    nameless = Input(uri="s3://b/x.png")

    for config in (InputConfig(min_size=0), InputConfig(modified_before="2030-01-01")):
        wanted = make_filter(config)
        assert wanted is not None
        assert not wanted(nameless)
    assert make_filter(InputConfig()) is None


def test_what_a_source_reports_of_itself_is_kept_unless_it_is_excluded(tmp_path: Path) -> None:
    manifest = tmp_path / "list.csv"
    manifest.write_text("uri,label\na.png,1\nb.jpg,1\nc.png\n")
    archive = tmp_path / "x.tar"
    with tarfile.open(archive, "w") as writer:
        for name in ("1.png", "2.png"):
            member = tarfile.TarInfo(name)
            member.size = 3000
            writer.addfile(member, io.BytesIO(b"x" * 3000))
    archive.write_bytes(archive.read_bytes()[:5000])
    every = [f"{archive}#1.png", str(archive), f"{tmp_path}/a.png", f"{manifest}#line=4"]

    assert sorted(_uris(manifest, archive, config=InputConfig(suffix=(".png",)))) == sorted(every)
    assert sorted(_uris(manifest, archive, config=InputConfig(include=("*.png",)))) == sorted(every)
    assert _uris(archive, config=InputConfig(min_size=3000)) == every[:2]
    assert _uris(archive, config=InputConfig(suffix=(".png",), exclude=("x.tar",))) == every[:1]


def test_names_are_matched_without_what_tells_versions_apart() -> None:
    old = Input(uri="s3://b/a.jpg?versionId=v", location="s3://b/a.jpg", version_id="v")

    for config in (InputConfig(suffix=(".jpg",)), InputConfig(include=("*.jpg",)), InputConfig(exclude=("*.png",))):
        assert make_filter(config)(old)  # type: ignore[misc]
    assert not make_filter(InputConfig(exclude=("a.jpg",)))(old)  # type: ignore[misc]


def test_a_line_that_names_a_listed_object_is_not_a_second_input(folder: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "list.txt"
    manifest.write_text(f"{folder}/b/5.png\n{folder}/a/1.png\n{folder}/b/5.png\n")

    assert _uris(manifest) == [f"{folder}/b/5.png", f"{folder}/a/1.png", f"{folder}/b/5.png"]
    assert _uris(manifest, folder / "b") == [f"{folder}/b/5.png", f"{folder}/a/1.png"]


def test_an_archive_in_a_listed_folder_is_opened_only_by_name(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        member = tarfile.TarInfo("1.png")
        member.size = 1
        archive.addfile(member, io.BytesIO(b"x"))

    assert _uris(tmp_path) == [f"{tmp_path}/x.tar"]
    assert _uris(tmp_path / "x.tar") == [f"{tmp_path}/x.tar#1.png"]
    assert _uris(tmp_path / "*.tar", tmp_path / "x.tar") == [f"{tmp_path}/x.tar#1.png"]
    assert _uris(tmp_path, tmp_path / "x.tar") == [f"{tmp_path}/x.tar", f"{tmp_path}/x.tar#1.png"]
    assert _uris(tmp_path / "*.tar", config=InputConfig(suffix=(".jpg",))) == []


def test_a_container_is_meant_by_its_exact_name(s3_server: S3Server, s3_bucket: str) -> None:
    s3_server.put(s3_bucket, "list.txt", b"a.png\n")
    s3_server.put(s3_bucket, "list.txt.bak", b"b.png\n")
    storage = StorageConfig(endpoint_url=s3_server.endpoint_url)

    found = list_inputs([f"s3://{s3_bucket}/list.txt"], InputConfig(), storage)

    assert [each.uri for each in found] == [f"s3://{s3_bucket}/a.png"]


def test_carried_columns_keep_their_type_where_the_sources_agree(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("uri,label,score\nx.png,7,0.5\n")
    pq.write_table(pa.table({"uri": ["y.png"], "label": [8], "score": [0.25]}), tmp_path / "b.parquet")
    config = InputConfig(carry=("label", "score"))

    alone = carried_types_of([str(tmp_path / "b.parquet")], config, StorageConfig())
    together = carried_types_of([str(tmp_path / "b.parquet"), str(tmp_path / "a.csv")], config, StorageConfig())

    assert alone == {"label": pa.int64(), "input_score": pa.float64()}
    assert together == {"label": pa.string(), "input_score": pa.string()}
    inputs = list(list_inputs([str(tmp_path / "b.parquet"), str(tmp_path / "a.csv")], config, StorageConfig()))
    table = to_table(inputs, input_schema(together))
    assert table.column("carried:label").to_pylist() == ["7", "8"]
    assert [each.carried for each in from_table(table)] == [
        {"label": "7", "input_score": "0.5"},
        {"label": "8", "input_score": "0.25"},
    ]


def test_carrying_from_a_source_without_columns_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="no source is a manifest"):
        carried_types_of([str(folder)], InputConfig(carry=("label",)), StorageConfig())


def test_a_carried_column_whose_new_name_is_carried_too_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("uri,error,input_error\na.png,1,2\n")

    with pytest.raises(ConfigError, match="becomes input_error, which is carried too"):
        _uris(tmp_path / "list.csv", config=InputConfig(carry=("error", "input_error")))


def test_inputs_survive_the_way_through_a_plan() -> None:
    inputs = [
        Input(uri="s3://b/1.png", size_bytes=3, etag="e", last_modified=datetime(2026, 1, 1, tzinfo=UTC)),
        Input(uri="s3://b/x.tar#1", kind=Kind.TAR, location="s3://b/x.tar", position=512, crc32=2**32 - 1),
        Input(uri="s3://b/k?versionId=v", location="s3://b/k", version_id="v"),
        Input(uri="s3://b/y.tar", status=Status.DENIED, error="no"),
    ]

    assert from_table(to_table(inputs, INPUT_SCHEMA)) == inputs


def test_a_map_in_threads_keeps_order_and_stays_a_few_ahead() -> None:
    begun: list[int] = []

    def slow(item: int) -> int:
        begun.append(item)
        time.sleep(0.002 * (item % 3))
        return item

    results = map_in_threads(slow, itertools.count(), num_threads=2)

    assert list(itertools.islice(results, 50)) == list(range(50))
    assert max(begun) <= 55


def test_a_chain_in_threads_keeps_order_and_stops_when_left() -> None:
    taken: list[tuple[int, int]] = []
    before = set(threading.enumerate())

    def endless(item: int) -> Iterator[tuple[int, int]]:
        for number in range(25_000) if item < 2 else itertools.count():
            taken.append((item, number))
            yield item, number

    chain = chain_in_threads(endless, itertools.count(), num_threads=3)

    assert list(itertools.islice(chain, 50_001)) == [(0, n) for n in range(25_000)] + [
        (1, n) for n in range(25_000)
    ] + [(2, 0)]
    chain.close()
    wait_until(lambda: not set(threading.enumerate()) - before)
    assert not set(threading.enumerate()) - before
    assert max(item for item, _ in taken) <= 4


def test_a_chain_in_threads_passes_on_what_goes_wrong() -> None:
    def breaking(item: int) -> Iterator[int]:
        yield item
        if item == 1:
            raise SourceError("no use")

    chain = chain_in_threads(breaking, range(5))

    assert next(chain) == 0
    with pytest.raises(SourceError, match="no use"):
        next(chain)
