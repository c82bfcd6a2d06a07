"""LocalStore on a real file system."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest

from lfm_scan.errors import AccessDeniedError, NotFoundError, OversizeError, StorageError
from lfm_scan.storage import LocalStore, PutOutcome, local
from tests import awkward

_NUM_RACERS = 16


def write(path: Path, data: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def uris(folder: Path) -> list[str]:
    return [found.uri for found in LocalStore().list(str(folder))]


@pytest.fixture
def shared_folder() -> Iterator[Path]:
    """A folder that every user may enter and read; pytest's own are closed to others."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o555)
        yield Path(name)
        Path(name).chmod(0o755)


@contextlib.contextmanager
def as_an_ordinary_user() -> Iterator[None]:
    """Give up root for a while: root may read and write everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


# --- list ---


def test_the_folders_in_a_folder_are_named_in_order(tmp_path: Path) -> None:
    for name in ("b/deep/x", "a/x", "file"):
        write(tmp_path / name)
    assert list(LocalStore().folders(f"{tmp_path}/")) == [f"{tmp_path}/a", f"{tmp_path}/b"]
    with pytest.raises(NotFoundError, match="nowhere"):
        list(LocalStore().folders(f"{tmp_path}/nowhere"))


def test_a_listing_is_ordered_by_the_bytes_of_the_full_path(tmp_path: Path) -> None:
    names = [
        "a/z",
        "a.png",
        "a-b/c",
        "a/b/c",
        "a0",
        "A",
        "\u00e9",
        "e\u0301",
        "zz",
        "\U0001f600",
        "\uffee",
        ".h",
        "a b",
    ]
    for name in names:
        write(tmp_path / name)
    found = uris(tmp_path)
    assert len(found) == len(names)
    assert found == sorted(found, key=os.fsencode)


def test_an_object_is_described_by_its_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.png", b"12345")
    os.utime(path, (1_700_000_000.5, 1_700_000_000.5))
    [found] = LocalStore().list(str(tmp_path))
    assert (found.uri, found.size_bytes, found.etag) == (str(path), 5, None)
    assert found.last_modified == datetime.fromtimestamp(1_700_000_000.5, UTC)


def test_a_single_file_lists_itself(tmp_path: Path) -> None:
    path = write(tmp_path / "a.png")
    assert uris(path) == [str(path)]


def test_a_relative_path_is_listed_by_absolute_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "in" / "a.png")
    monkeypatch.chdir(tmp_path)
    assert [found.uri for found in LocalStore().list("in")] == [str(path)]


def test_a_file_uri_names_the_same_place(tmp_path: Path) -> None:
    path = write(tmp_path / "with space#%.png", b"here")
    uri = "file://" + str(path).replace("%", "%25").replace(" ", "%20").replace("#", "%23")
    assert [found.uri for found in LocalStore().list(uri)] == [str(path)]
    assert LocalStore().get(uri).data == b"here"


def test_an_empty_folder_lists_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert uris(tmp_path) == []


def test_a_missing_place_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="nowhere: No such file or directory"):
        uris(tmp_path / "nowhere")


def test_links_to_files_are_followed_and_links_to_folders_are_not(tmp_path: Path) -> None:
    write(tmp_path / "real" / "a.png", b"12345")
    (tmp_path / "file-link").symlink_to("real/a.png")
    (tmp_path / "folder-link").symlink_to("real")
    (tmp_path / "real" / "loop").symlink_to(tmp_path)
    found = {Path(item.uri).name: item.size_bytes for item in LocalStore().list(str(tmp_path))}
    assert found == {"file-link": 5, "a.png": 5}


def test_a_folder_named_through_a_link_is_listed(tmp_path: Path) -> None:
    write(tmp_path / "real" / "a.png")
    (tmp_path / "link").symlink_to("real")
    assert uris(tmp_path / "link") == [str(tmp_path / "link" / "a.png")]


@pytest.mark.parametrize("target", ["nowhere", "self"])
def test_a_link_that_leads_nowhere_is_listed_and_missing_when_fetched(tmp_path: Path, target: str) -> None:
    (tmp_path / "self").symlink_to(target)
    [found] = LocalStore().list(str(tmp_path))
    assert (found.uri, found.size_bytes, found.last_modified) == (str(tmp_path / "self"), None, None)
    with pytest.raises(NotFoundError):
        LocalStore().get(found.uri)


def test_a_name_that_is_not_utf8_gets_a_uri_that_is(tmp_path: Path) -> None:
    path = os.path.join(os.fsencode(tmp_path), b"caf\xe9 1.png")
    with open(path, "wb") as file:
        file.write(b"here")
    [found] = LocalStore().list(str(tmp_path))
    assert found.uri == f"file://{tmp_path}/caf%E9%201.png"
    found.uri.encode()
    assert LocalStore().get(found.uri).data == b"here"


def test_everything_listed_among_awkward_names_can_be_fetched(tmp_path: Path) -> None:
    expected = awkward.write_awkward_files(tmp_path)
    found = uris(tmp_path)
    assert sorted(found) == sorted(expected)
    contents = awkward.awkward_bytes()
    for name, data in contents.items():
        assert LocalStore().get(str(tmp_path / name)).data == data


def test_a_folder_that_may_not_be_read_is_denied(shared_folder: Path) -> None:
    shared_folder.chmod(0)
    with as_an_ordinary_user(), pytest.raises(AccessDeniedError, match=f"{shared_folder}: Permission denied"):
        uris(shared_folder)


# --- get ---


def test_get_returns_the_bytes_and_their_facts(tmp_path: Path) -> None:
    path = write(tmp_path / "a", bytes(range(256)) * 1000)
    fetched = LocalStore().get(str(path))
    assert fetched.data == bytes(range(256)) * 1000
    assert (fetched.info.uri, fetched.info.size_bytes) == (str(path), 256_000)


def test_get_of_a_missing_file_is_not_found(tmp_path: Path) -> None:
    write(tmp_path / "file")
    for name in ("nowhere", "file/below"):
        with pytest.raises(NotFoundError):
            LocalStore().get(str(tmp_path / name))


def test_get_stops_at_the_size_limit(tmp_path: Path) -> None:
    path = write(tmp_path / "a", b"12345")
    assert LocalStore().get(str(path), max_bytes=5).data == b"12345"
    with pytest.raises(OversizeError, match="5 bytes, the limit is 4"):
        LocalStore().get(str(path), max_bytes=4)


@pytest.mark.timeout(60)
def test_a_named_pipe_is_refused_and_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StorageError, match="pipe: not a regular file"):
        LocalStore().get(str(tmp_path / "pipe"))


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        LocalStore().get(str(tmp_path))


@pytest.mark.timeout(60)
def test_a_device_without_end_is_refused() -> None:
    with pytest.raises(StorageError, match="not a regular file"):
        LocalStore().get("/dev/zero")


def test_a_file_that_may_not_be_read_is_denied(shared_folder: Path) -> None:
    shared_folder.chmod(0o755)
    secret = write(shared_folder / "secret")
    secret.chmod(0)
    with as_an_ordinary_user(), pytest.raises(AccessDeniedError, match="secret: Permission denied"):
        LocalStore().get(str(secret))


# --- create ---


def test_create_stores_the_bytes_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "part.parquet"
    assert LocalStore().create(str(path), b"bytes") == PutOutcome(True, None, 5)
    assert path.read_bytes() == b"bytes"
    assert os.listdir(path.parent) == ["part.parquet"]


def test_create_never_overwrites(tmp_path: Path) -> None:
    path = write(tmp_path / "part", b"first")
    assert LocalStore().create(str(path), b"second!") == PutOutcome(False, None, 5)
    assert path.read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["part"]


def test_creating_the_same_bytes_again_counts_as_created(tmp_path: Path) -> None:
    path = write(tmp_path / "part", b"first")
    assert LocalStore().create(str(path), b"first") == PutOutcome(True, None, 5)


def test_of_racing_creates_exactly_one_wins(tmp_path: Path) -> None:
    for turn in range(5):
        path = tmp_path / f"part-{turn}"
        barrier = threading.Barrier(_NUM_RACERS)

        def race(number: int, path: Path = path, barrier: threading.Barrier = barrier) -> PutOutcome:
            data = f"racer {number:02}".encode() * 1000
            barrier.wait()
            return LocalStore().create(str(path), data)

        with ThreadPoolExecutor(_NUM_RACERS) as pool:
            outcomes = list(pool.map(race, range(_NUM_RACERS)))
        [winner] = [number for number, outcome in enumerate(outcomes) if outcome.created]
        assert path.read_bytes() == f"racer {winner:02}".encode() * 1000
    assert len(os.listdir(tmp_path)) == 5


def test_create_where_one_may_not_write_is_denied(shared_folder: Path) -> None:
    with as_an_ordinary_user(), pytest.raises(AccessDeniedError, match="part: Permission denied"):
        LocalStore().create(str(shared_folder / "part"), b"x")


def test_create_below_a_file_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "file")
    with pytest.raises(StorageError):
        LocalStore().create(str(tmp_path / "file" / "part"), b"x")


def test_a_file_that_claims_no_bytes_is_read_up_to_the_limit() -> None:
    with pytest.raises(OversizeError):
        LocalStore().get("/proc/self/maps", 100)  # the kernel's own: of size 0, until it is read


@pytest.mark.parametrize("seconds", [2**40, -(2**40), float("nan"), float("inf")])
def test_a_time_no_calendar_holds_is_no_time(seconds: float) -> None:
    assert local._utc(seconds) is None


def test_a_full_disk_is_told_and_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)

    with pytest.raises(StorageError, match=f"{tmp_path}/part: No space left on device: make room, and repeat the"):
        LocalStore().create(f"{tmp_path}/part", b"x")

    assert list(tmp_path.iterdir()) == []
