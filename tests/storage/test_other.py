"""FsspecStore in memory, on a file system that fails as told, and, where their packages are, on the clouds' APIs."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import re
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from fsspec.registry import _registry

from lfm_scan.errors import (
    AccessDeniedError,
    ChangedError,
    ConfigError,
    NotFoundError,
    OversizeError,
    StorageError,
    UnreachableError,
)
from lfm_scan.storage import FsspecStore, PutOutcome, StorageConfig, open_object, open_store, other, tries
from tests import awkward
from tests.servers import Reply, Request, ScriptedServer, free_port

HAS_GCSFS = importlib.util.find_spec("gcsfs") is not None
HAS_ADLFS = importlib.util.find_spec("adlfs") is not None
HAS_EMULATOR = HAS_GCSFS and importlib.util.find_spec("gcp_storage_emulator") is not None


class ToldFileSystem(MemoryFileSystem):  # type: ignore[misc]
    """A file system in memory that first fails as it is told, and changes what it reads and tells."""

    protocol = ("told",)
    failures: Iterator[Exception | None] = iter(())
    facts: dict[str, Any]
    change: Callable[[bytes], bytes]
    calls: list[str]

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.replace("told://", "memory://", 1)))

    def info(self, path: str, **kwargs: object) -> dict[str, Any]:
        self._obey("info")
        found: dict[str, Any] = super().info(path, **kwargs)
        return {**found, **self.facts} if found["type"] == "file" else found

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: object) -> bytes:
        self._obey("cat_file")
        return type(self).change(super().cat_file(path, start, end, **kwargs))

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: object) -> None:
        super().pipe_file(path, value, mode, **kwargs)
        self._obey("pipe_file")  # after it has acted: the reply is what is lost

    def _obey(self, call: str) -> None:
        self.calls.append(call)
        failure = next(ToldFileSystem.failures, None)
        if failure is not None:
            raise failure


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tries, "_FIRST_WAIT_S", 0.01)


@pytest.fixture(autouse=True)
def memory() -> Iterator[MemoryFileSystem]:
    """The one file system in memory that a process has, empty."""
    filesystem = fsspec.filesystem("memory")
    yield filesystem
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]


@pytest.fixture
def store() -> FsspecStore:
    return FsspecStore("memory://", StorageConfig())


@pytest.fixture
def told(memory: MemoryFileSystem) -> type[ToldFileSystem]:
    """The failing file system, with one object told://a."""
    fsspec.register_implementation("told", ToldFileSystem, clobber=True)
    ToldFileSystem.failures = iter(())
    ToldFileSystem.facts = {}
    ToldFileSystem.change = staticmethod(lambda data: data)
    ToldFileSystem.calls = []
    memory.pipe_file("/a", b"12345")
    return ToldFileSystem


def open_told(max_attempts: int = 3) -> FsspecStore:
    return FsspecStore("told://", StorageConfig(max_attempts=max_attempts))


# --- list ---


def test_every_awkward_key_can_be_created_listed_and_fetched(store: FsspecStore) -> None:
    contents = {key: data for key, data in awkward.awkward_bytes().items() if key == key.strip("/")}
    assert len(contents) > 5
    for key, data in contents.items():
        assert store.create(f"memory://in/{key}", data) == PutOutcome(True, None, len(data))
    found = {item.uri: item for item in store.list("memory://in")}
    assert sorted(found) == sorted(f"memory://in/{key}" for key in contents)
    for key, data in contents.items():
        assert found[f"memory://in/{key}"].size_bytes == len(data)
        assert store.get(f"memory://in/{key}").data == data


def test_a_listing_goes_by_the_bytes_of_whole_uris(store: FsspecStore, memory: MemoryFileSystem) -> None:
    keys = ["a!/b", "a-", "a.png", "a/b", "a/c/d", "a0", "b", "z", "\u00e9/x", "\U0001f600"]
    for key in keys:
        memory.store[f"/in/{key}"] = memory_file(memory, f"/in/{key}")
    assert [item.uri for item in store.list("memory://in/")] == [f"memory://in/{key}" for key in keys]


def memory_file(memory: MemoryFileSystem, path: str) -> Any:  # noqa: ANN401
    return MemoryFile(memory, path, b"x")


def test_one_object_and_an_empty_folder_can_be_listed(store: FsspecStore, memory: MemoryFileSystem) -> None:
    memory.pipe_file("/in/a.png", b"12345")
    memory.mkdir("/empty")
    [found] = store.list("memory://in/a.png")
    assert (found.uri, found.size_bytes) == ("memory://in/a.png", 5)
    assert list(store.list("memory://empty")) == []
    with pytest.raises(NotFoundError, match="memory://nowhere: not found"):
        list(store.list("memory://nowhere"))


def test_the_folders_in_a_folder_are_named_in_order(store: FsspecStore, memory: MemoryFileSystem) -> None:
    for key in ("/in/b/deep/x", "/in/a/x", "/in/file"):
        memory.pipe_file(key, b"x")
    assert list(store.folders("memory://in/")) == ["memory://in/a", "memory://in/b"]
    with pytest.raises(NotFoundError, match="memory://nowhere"):
        list(store.folders("memory://nowhere"))


def test_folders_as_deep_as_names_allow_are_listed(store: FsspecStore, memory: MemoryFileSystem) -> None:
    path = "/in" + "/d" * 1500 + "/a"
    memory.store[path] = memory_file(memory, path)
    assert [item.uri for item in store.list("memory://in")] == [f"memory:/{path}"]


# --- get, head ---


def test_an_object_comes_whole_and_within_the_limit(store: FsspecStore, memory: MemoryFileSystem) -> None:
    memory.pipe_file("/a", b"12345")
    memory.pipe_file("/empty", b"")
    assert store.get("memory://a", 5).data == b"12345"
    assert store.get("memory://empty").data == b""
    assert store.head("memory://a").size_bytes == 5
    with pytest.raises(OversizeError, match="5 bytes, the limit is 4"):
        store.get("memory://a", 4)


def test_an_object_too_large_is_not_read(told: type[ToldFileSystem]) -> None:
    with pytest.raises(OversizeError):
        open_told().get("told://a", 4)
    assert told.calls == ["info"]


def test_an_object_of_unknown_size_is_read_up_to_the_limit(told: type[ToldFileSystem]) -> None:
    told.facts = {"size": None}
    assert open_told().get("told://a", 5).data == b"12345"
    with pytest.raises(OversizeError, match="more than 4 bytes, which is the limit"):
        open_told().get("told://a", 4)


def test_what_is_missing_or_a_folder_is_not_found(store: FsspecStore, memory: MemoryFileSystem) -> None:
    memory.pipe_file("/in/a", b"x")
    for read in (store.get, store.head):
        with pytest.raises(NotFoundError, match="memory://b: not found"):
            read("memory://b")
        with pytest.raises(NotFoundError, match="memory://in: a folder, not an object"):
            read("memory://in")


@pytest.mark.parametrize(
    "facts",
    [
        {"md5Hash": base64.b64encode(hashlib.md5(b"12345").digest()).decode()},
        {"content_settings": {"content_md5": bytearray(hashlib.md5(b"12345").digest())}},
    ],
)
def test_bytes_are_checked_against_the_digest_that_the_store_has(
    told: type[ToldFileSystem], facts: dict[str, Any]
) -> None:
    told.facts = facts
    assert open_told().get("told://a").data == b"12345"
    told.change = staticmethod(lambda _: b"12344")
    with pytest.raises(StorageError, match="told://a: the bytes do not match the MD5 that the store has"):
        open_told().get("told://a")
    assert told.calls == ["info", "cat_file"] * 4


def first(num_calls: int, change: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    """Change what is read the first times, and then no more."""
    left = iter(range(num_calls))
    return lambda data: data if next(left, None) is None else change(data)


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"6"])
def test_bytes_too_few_or_too_many_are_fetched_again(
    told: type[ToldFileSystem], change: Callable[[bytes], bytes]
) -> None:
    told.change = staticmethod(first(2, change))
    assert open_told().get("told://a").data == b"12345"
    told.change = staticmethod(first(3, change))
    with pytest.raises(StorageError, match="bytes arrived where 5 were promised"):
        open_told().get("told://a")


@pytest.mark.parametrize(
    ("facts", "etag", "moment"),
    [
        ({"etag": '"v1"', "mtime": datetime(2026, 11, 21, 5, tzinfo=UTC)}, "v1", datetime(2026, 11, 21, 5, tzinfo=UTC)),
        ({"etag": "v1", "last_modified": datetime(2026, 11, 21)}, "v1", datetime(2026, 11, 21, tzinfo=UTC)),
        ({"mtime": 86400}, None, datetime(1970, 1, 2, tzinfo=UTC)),
        ({"mtime": 1e20}, None, None),
        ({"mtime": "yesterday"}, None, None),
    ],
)
def test_facts_are_told_alike_whoever_tells_them(
    told: type[ToldFileSystem], facts: dict[str, Any], etag: str | None, moment: datetime | None
) -> None:
    told.facts = facts
    found = open_told().head("told://a")
    assert (found.etag, found.last_modified) == (etag, moment)


# --- Failures ---


class StatusError(Exception):
    """As aiohttp, azure and gcsfs raise them."""

    def __init__(self, name: str, status: object) -> None:
        super().__init__(f"the store says {status}\nand much more")
        setattr(self, name, status)


class DefaultCredentialsError(Exception):
    """As google.auth raises it."""


@pytest.mark.parametrize(
    "failure",
    [ConnectionResetError(), TimeoutError(), StatusError("status", 503), StatusError("code", "429"), OSError()],
)
def test_a_failure_that_may_pass_is_tried_as_often_as_allowed(told: type[ToldFileSystem], failure: Exception) -> None:
    told.failures = iter([failure] * 2)
    assert open_told().get("told://a").data == b"12345"
    told.failures = iter([failure] * 3)
    with pytest.raises(UnreachableError, match="told://a: no complete answer from the store"):
        open_told().get("told://a")


@pytest.mark.parametrize(
    ("failure", "error", "message"),
    [
        (FileNotFoundError(), NotFoundError, "not found"),
        (StatusError("status_code", 404), NotFoundError, "not found"),
        (PermissionError("no"), AccessDeniedError, r"the store refused \(no\): check the credentials"),
        (StatusError("status_code", 403), AccessDeniedError, r"the store refused \(the store says 403\)"),
        (OSError("Forbidden: b/k\nmore"), AccessDeniedError, r"the store refused \(Forbidden: b/k\)"),
        (DefaultCredentialsError("none"), AccessDeniedError, r"no valid credentials \(none\)"),
        (StatusError("code", 400), StorageError, "the store says 400"),
        (NotImplementedError("never"), StorageError, "never"),
        (ValueError("bad"), StorageError, "bad"),
    ],
)
def test_a_verdict_is_accepted_at_once(
    told: type[ToldFileSystem], failure: Exception, error: type[StorageError], message: str
) -> None:
    told.failures = iter([failure])
    with pytest.raises(StorageError, match=f"^told://a: {message}[^\n]*$") as caught:
        open_told(max_attempts=6).get("told://a")
    assert type(caught.value) is error
    assert told.calls == ["info"]


def test_an_impatient_store_tries_twice(told: type[ToldFileSystem]) -> None:
    told.failures = iter([ConnectionResetError()] * 6)
    with pytest.raises(UnreachableError):
        open_store("told://a", patient=False).get("told://a")
    assert told.calls == ["info"] * 2


# --- get_range ---


def test_a_stretch_is_exact_or_refused(store: FsspecStore, memory: MemoryFileSystem) -> None:
    memory.pipe_file("/a", b"0123456789")
    assert store.get_range("memory://a", 3, 4) == b"3456"
    assert store.get_range("memory://a", 0, 10) == b"0123456789"
    with pytest.raises(ChangedError, match="memory://a: ends at 10, its bytes up to 11 were listed"):
        store.get_range("memory://a", 8, 3)


def test_a_stretch_of_an_object_that_changed_is_refused(told: type[ToldFileSystem]) -> None:
    told.facts = {"etag": '"v2"'}
    assert open_told().get_range("told://a", 1, 2, etag="v2") == b"23"
    with pytest.raises(ChangedError, match="its ETag is another one"):
        open_told().get_range("told://a", 1, 2, etag="v1")


def test_a_stretch_that_breaks_off_is_fetched_again(told: type[ToldFileSystem]) -> None:
    told.change = staticmethod(first(1, lambda data: data[:-1]))
    assert open_told().get_range("told://a", 1, 3) == b"234"
    told.change = staticmethod(lambda data: data[:-1])
    with pytest.raises(StorageError, match="2 of 3 bytes arrived"):
        open_told().get_range("told://a", 1, 3)


def test_an_object_can_be_read_as_a_file(store: FsspecStore) -> None:
    data = bytes(range(256)) * 40
    store.replace("memory://a", data)
    with open_object(store, store.head("memory://a"), chunk_bytes=1000) as file:
        file.seek(-300, 2)
        assert file.read() == data[-300:]
        file.seek(0)
        assert file.read() == data


def test_versions_are_refused(store: FsspecStore) -> None:
    for read in (store.get, store.head):
        with pytest.raises(StorageError, match="versions are read from S3 only, version 'v' was asked for"):
            read("memory://a", version_id="v")


# --- create, replace ---


def test_create_never_overwrites_and_replace_does(store: FsspecStore) -> None:
    assert store.create("memory://run/a", b"one") == PutOutcome(True, None, 3)
    assert store.create("memory://run/a", b"three") == PutOutcome(False, None, 3)
    assert store.create("memory://run/a", b"two") == PutOutcome(False, None, 3)
    assert store.create("memory://run/a", b"one") == PutOutcome(True, None, 3)
    assert store.get("memory://run/a").data == b"one"
    store.replace("memory://run/a", b"three")
    assert store.get("memory://run/a").data == b"three"


def test_a_put_whose_reply_was_lost_is_ours(told: type[ToldFileSystem]) -> None:
    told.failures = iter([None, ConnectionResetError()])  # of info, which finds the name free, and of the put
    assert open_told().create("told://b", b"x") == PutOutcome(True, None, 1)
    assert told.calls.count("pipe_file") == 1


def test_only_stores_with_conditional_puts_create_exclusively(store: FsspecStore) -> None:
    assert not store.creates_exclusively


# --- Schemes and sharing ---


@pytest.mark.parametrize(
    "uri",
    [
        *("nope://a", "NOPE://a", "://a", "1://a"),
        *(
            "simplecache::https://host/a",
            "filecache://a",
            "zip://a::memory://b",
            "reference://a",
            "dir://a",
            "dask://a",
        ),
        *("local:///etc/passwd", "asynclocal:///etc/passwd", "s3a://b/k"),
    ],
)
def test_schemes_that_are_unknown_wrap_others_or_run_things_are_refused(uri: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(uri)}: unknown scheme; use a local path, s3://"):
        open_store(uri)


@pytest.mark.parametrize(
    ("uri", "extra", "package"),
    [("gs://b/k", "gcs", "gcsfs"), ("az://c/k", "azure", "adlfs"), ("abfs://c/k", "azure", "adlfs")],
)
def test_a_missing_package_is_named_as_the_extra_to_install(
    monkeypatch: pytest.MonkeyPatch, uri: str, extra: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(_registry, uri.partition(":")[0], raising=False)
    with pytest.raises(ConfigError, match=re.escape(f"{uri}: needs another package: pip install 'lfm-scan[{extra}]'")):
        open_store(uri)


def test_a_file_system_that_cannot_be_made_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    class UnwillingFileSystem(MemoryFileSystem):  # type: ignore[misc]
        def __init__(self, **_: object) -> None:
            raise ValueError("no account name\nand a long story")

    fsspec.register_implementation("unwilling", UnwillingFileSystem, clobber=True)
    with pytest.raises(ConfigError, match=r"^unwilling://: cannot be opened: no account name$"):
        open_store("unwilling://a")


def test_a_file_system_is_made_once_for_all_stores_with_its_settings() -> None:
    def opened(config: StorageConfig) -> object:
        return FsspecStore("memory://x", config)._fs

    assert opened(StorageConfig()) is opened(StorageConfig())
    assert opened(StorageConfig()) is not opened(StorageConfig(max_attempts=2))


def test_a_file_system_that_blocks_serves_one_request_at_a_time(told: type[ToldFileSystem]) -> None:
    running, most = [0], [0]
    lock = threading.Lock()

    def change(data: bytes) -> bytes:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        threading.Event().wait(0.01)
        with lock:
            running[0] -= 1
        return data

    told.change = staticmethod(change)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda _: open_told().get("told://a").data, range(16))) == [b"12345"] * 16
    assert most == [1]


# --- Google Cloud Storage ---


@pytest.fixture
def google(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], FsspecStore]]:
    """Opens gs:// at an endpoint, without credentials."""

    def open_at(endpoint_url: str) -> FsspecStore:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", endpoint_url)
        return FsspecStore("gs://bucket", StorageConfig(anonymous=True, max_attempts=2))

    other._cached_filesystem.cache_clear()
    yield open_at
    other._cached_filesystem.cache_clear()


@pytest.mark.skipif(not HAS_EMULATOR, reason="needs gcsfs and gcp-storage-emulator")
def test_googles_api_lists_reads_and_writes(google: Callable[[str], FsspecStore]) -> None:
    create_server = importlib.import_module("gcp_storage_emulator.server").create_server
    port = free_port()
    with create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket"):
        store = google(f"http://127.0.0.1:{port}")
        assert store.creates_exclusively
        # The emulator takes a carriage return at the end of a body for part of the boundary.
        contents = {key: data.rstrip(b"\r") for key, data in awkward.awkward_bytes().items() if key == key.strip("/")}
        contents |= {"a": b"beside a/", "a/b#123": b"no generation", "a.png": b"x", "empty": b""}
        for key, data in contents.items():
            assert store.create(f"gs://bucket/in/{key}", data) == PutOutcome(True, None, len(data))
        found = list(store.list("gs://bucket/in"))
        assert [item.uri for item in found] == sorted((f"gs://bucket/in/{key}" for key in contents), key=str.encode)
        for item in found:
            fetched = store.get(item.uri)
            assert fetched.data == contents[item.uri.removeprefix("gs://bucket/in/")]
            assert fetched.info == item == store.head(item.uri)
            assert item.last_modified is not None
        assert store.get_range("gs://bucket/in/a/b#123", 3, 4) == b"gene"
        store.replace("gs://bucket/in/a.png", b"new")
        assert store.get("gs://bucket/in/a.png").data == b"new"
        with pytest.raises(NotFoundError):
            store.get("gs://bucket/in/missing")


@pytest.mark.skipif(not HAS_GCSFS, reason="needs gcsfs")
def test_googles_api_is_asked_to_create_only_what_is_not_there(google: Callable[[str], FsspecStore]) -> None:
    # The emulator knows no conditions, so this server stands for the store that refuses.
    stored = b"other"
    facts = (
        b'{"kind": "storage#object", "name": "run/a", "bucket": "bucket", "size": "%d", "etag": "v1", "md5Hash": "%b"}'
        % (len(stored), base64.b64encode(hashlib.md5(stored).digest()))
    )

    def answer(request: Request) -> Reply:
        if request.method == "POST":
            return Reply(412, b'{"error": {"code": 412, "message": "conditionNotMet"}}')
        if "alt=media" in request.target:
            return Reply(206, stored)
        if "prefix=" in request.target:
            return Reply(body=b'{"kind": "storage#objects", "items": []}')
        return Reply(body=facts, headers={"Content-Type": "application/json"})

    with ScriptedServer(answer) as server:
        store = google(server.endpoint_url)
        assert store.create("gs://bucket/run/a", b"mine!") == PutOutcome(False, "v1", 5)
        assert store.create("gs://bucket/run/a", b"other") == PutOutcome(True, "v1", 5)
        puts = [request.target for request in server.requests if request.method == "POST"]
    assert len(puts) == 2
    assert all("ifGenerationMatch=0" in target for target in puts)


# --- Azure Blob Storage ---


@pytest.mark.skipif(not HAS_ADLFS, reason="needs adlfs")
def test_azures_api_is_asked_to_create_only_what_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = b"other"
    facts = {
        "ETag": '"v1"',
        "Last-Modified": "Sat, 21 Nov 2026 05:00:00 GMT",
        "Content-MD5": base64.b64encode(hashlib.md5(stored).digest()).decode(),
        "x-ms-blob-type": "BlockBlob",
    }

    def answer(request: Request) -> Reply:
        if request.method == "PUT":
            return Reply(409, headers={"x-ms-error-code": "BlobAlreadyExists"})
        if request.method == "HEAD":
            return Reply(200, stored, facts)
        return Reply(206, stored, {**facts, "Content-Range": "bytes 0-4/5"})

    other._cached_filesystem.cache_clear()
    with ScriptedServer(answer) as server:
        account = f"AccountName=account;AccountKey=a2V5;BlobEndpoint={server.endpoint_url}/account;"
        monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", f"DefaultEndpointsProtocol=http;{account}")
        store = FsspecStore("az://container", StorageConfig())
        assert store.creates_exclusively
        assert store.create("az://container/run/a", b"mine!") == PutOutcome(False, "v1", 5)
        assert store.create("az://container/run/a", b"other") == PutOutcome(True, "v1", 5)
        assert store.get("az://container/run/a").data == b"other"
        found = store.head("az://container/run/a")
        assert (found.size_bytes, found.etag, found.last_modified) == (5, "v1", datetime(2026, 11, 21, 5, tzinfo=UTC))
        puts = [request for request in server.requests if request.method == "PUT"]
    other._cached_filesystem.cache_clear()
    assert [request.headers.get("if-none-match") for request in puts] == ["*", "*"]
