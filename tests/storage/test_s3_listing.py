"""Listings, folder by folder and several at once: exact on every store, whatever the keys, and gone when closed."""

from __future__ import annotations

import random
import threading
import urllib.parse
import zlib
from concurrent.futures import ThreadPoolExecutor
from xml.sax.saxutils import escape

import pytest

from lfm_scan.errors import AccessDeniedError, StorageError
from lfm_scan.storage import S3Store, StorageConfig, s3_listing, tries
from tests.servers import Reply, Request, S3Server, ScriptedServer

_ROOT = "s3://bucket/"


class Bucket:
    """ListObjectsV2 as S3 documents it, of a bucket in memory.

    Args:
        keys: Of its objects; each has one byte.
        page_size: Keys and folders a page.
        in_key_order: False lists in an order that has nothing to do with the keys.
    """

    def __init__(self, keys: list[str], *, page_size: int = 1000, in_key_order: bool = True) -> None:
        self._keys = keys
        self._page_size = page_size
        self._order = str.encode if in_key_order else _scrambled

    def __call__(self, request: Request) -> Reply:
        query = params_of(request)
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        found: set[tuple[str, bool]] = set()
        for key in self._keys:
            if key.startswith(prefix):
                head, cut, _ = key[len(prefix) :].partition(delimiter) if delimiter else (key, "", "")
                found.add((prefix + head + cut, True) if cut else (key, False))
        entries = sorted(found, key=lambda entry: self._order(entry[0]))
        start = int(query.get("continuation-token", 0))
        end = start + self._page_size
        return Reply(body=_page(entries[start:end], end if end < len(entries) else None))


def params_of(request: Request) -> dict[str, str]:
    return dict(urllib.parse.parse_qsl(request.target.partition("?")[2], keep_blank_values=True))


def _scrambled(key: str) -> bytes:
    return zlib.crc32(key.encode()).to_bytes(4, "big")


def _page(entries: list[tuple[str, bool]], token: int | None) -> bytes:
    shown = "".join(
        f"<CommonPrefixes><Prefix>{escape(urllib.parse.quote(name))}</Prefix></CommonPrefixes>"
        if is_folder
        else f"<Contents><Key>{escape(urllib.parse.quote(name))}</Key><Size>1</Size>"
        "<ETag>&quot;x&quot;</ETag><LastModified>2026-11-21T05:00:00.000Z</LastModified></Contents>"
        for name, is_folder in entries
    )
    more = f"<NextContinuationToken>{token}</NextContinuationToken>" if token is not None else ""
    return (
        '<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        f"<Name>bucket</Name><EncodingType>url</EncodingType><IsTruncated>{str(token is not None).lower()}"
        f"</IsTruncated>{more}{shown}</ListBucketResult>"
    ).encode()


def at(server: ScriptedServer, **settings: int) -> S3Store:
    return S3Store(StorageConfig(endpoint_url=server.endpoint_url, anonymous=True, **settings))  # type: ignore[arg-type]


def keys_of(store: S3Store, prefix: str = "") -> list[str]:
    return [found.uri.removeprefix(_ROOT) for found in store.list(_ROOT + prefix)]


def folders(*sizes: int) -> list[str]:
    return [f"{folder:03}/{number:05}" for folder, size in enumerate(sizes) for number in range(size)]


def list_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("list-")]


@pytest.fixture
def _quick_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tries, "_FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(tries, "_LONGEST_WAIT_S", 0.01)


# --- Exactness ---


def test_large_folders_are_listed_side_by_side_and_in_key_order() -> None:
    keys = sorted([*folders(*[300] * 12), "000", "003.txt", "zz", *(f"loose-{number}" for number in range(5))])
    with ScriptedServer(Bucket(keys, page_size=100)) as server:
        assert keys_of(at(server)) == keys
        prefixes = {params_of(request).get("prefix", "") for request in server.requests}
    assert {f"{number:03}/" for number in range(12)} <= prefixes


@pytest.mark.parametrize("in_key_order", [True, False])
@pytest.mark.parametrize("page_size", [2, 5, 23])
@pytest.mark.parametrize("seed", range(2))
def test_no_key_is_lost_or_doubled_whatever_keys_look_like(seed: int, page_size: int, in_key_order: bool) -> None:
    chosen = random.Random(seed)
    names = ["", "a", "b", "a.x", "a b", "..", ".", "%2F", "\u00e9", "\U0001f600", "\uffee", "A", "~"]
    keys = {"/".join(chosen.choices(names, k=chosen.randint(1, 5))) for _ in range(60)} - {""}
    # A key that is a folder's name, with and without its slash, and with two.
    keys |= {"a", "a/", "a//", "a//b", "/", "//", "/a", "a/a/", "a/a"}
    with ScriptedServer(Bucket(sorted(keys), page_size=page_size, in_key_order=in_key_order)) as server:
        for prefix in ("", "a", "a/", "a//", "/", "b/a", "nothing/"):
            expected = sorted(key for key in keys if key.startswith(prefix))
            found = keys_of(at(server), prefix)
            assert (found if in_key_order else sorted(found)) == expected, prefix


def test_a_folder_with_too_many_folders_is_listed_flat() -> None:
    keys = [f"{number:04}/x" for number in range(3000)]
    with ScriptedServer(Bucket(keys)) as server:
        assert keys_of(at(server)) == keys
        assert len(server.requests) == 3


def test_a_level_that_takes_too_many_pages_is_given_up() -> None:
    keys = [*folders(50), *(f"1-{number:03}" for number in range(50))]
    with ScriptedServer(Bucket(keys, page_size=10)) as server:
        assert keys_of(at(server)) == keys
        assert sum("delimiter" in request.target for request in server.requests) == s3_listing._MAX_LEVEL_PAGES
        assert len(server.requests) == 10 + s3_listing._MAX_LEVEL_PAGES


def test_a_few_folders_are_split_further() -> None:
    keys = [f"data/{split}/{key}" for split in ("test", "train") for key in folders(*[30] * 5)]
    with ScriptedServer(Bucket(keys, page_size=10)) as server:
        assert keys_of(at(server), "data/") == keys
        levels = {params_of(request)["prefix"] for request in server.requests if "delimiter" in request.target}
    assert {"data/", "data/test/", "data/train/"} <= levels


def test_a_store_that_ignores_delimiters_is_listed_once() -> None:
    keys = folders(20, 20)
    bucket = Bucket(keys, page_size=10)

    def answer(request: Request) -> Reply:
        return bucket(Request(request.method, request.target.replace("delimiter=", "ignored="), request.headers))

    with ScriptedServer(answer) as server:
        assert keys_of(at(server)) == keys


def test_folders_of_a_real_store_are_listed_exactly(s3_server: S3Server, s3_bucket: str) -> None:
    client = s3_server.client()
    keys = [*(f"in/{folder}/{number}" for folder in "abc" for number in range(380)), "in/a.txt", "in/b", "in/zz"]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: client.put_object(Bucket=s3_bucket, Key=key, Body=b"x"), keys))
    store = S3Store(StorageConfig(endpoint_url=s3_server.endpoint_url))
    found = [item.uri for item in store.list(f"s3://{s3_bucket}/in")]
    assert sorted(found) == sorted(f"s3://{s3_bucket}/{key}" for key in keys)


def test_folders_are_named_once_page_by_page_and_objects_are_passed_over() -> None:
    keys = [*folders(3, 1, 2), "000.txt", "runs/a/config.json", "runs/b/c/x", "runs//x", "runs.txt", "runs/loose"]
    with ScriptedServer(Bucket(sorted(keys), page_size=2)) as server:
        assert list(at(server).folders(_ROOT)) == [_ROOT + name for name in ("000", "001", "002", "runs")]
        assert list(at(server).folders(f"{_ROOT}runs")) == [_ROOT + name for name in ("runs/", "runs/a", "runs/b")]
        assert list(at(server).folders(f"{_ROOT}nothing")) == []


# --- Faults ---


@pytest.mark.usefixtures("_quick_waits")
@pytest.mark.parametrize("in_key_order", [True, False])
def test_faults_in_and_between_pages_neither_lose_nor_double_a_key(in_key_order: bool) -> None:
    keys = folders(*[40] * 12)
    bucket = Bucket(keys, page_size=10, in_key_order=in_key_order)
    chosen = random.Random(5)

    def answer(request: Request) -> Reply:
        good = bucket(request)
        cut = good.body[: chosen.randrange(len(good.body))]
        broken = [
            Reply(500),
            Reply(body=b""),
            Reply(body=cut),  # XML that breaks off, its length as announced
            Reply(body=cut, headers={"Content-Length": str(len(good.body)), "Connection": "close"}),
            Reply(body=b"<html>busy</html>"),
        ]
        return chosen.choice(broken) if chosen.random() < 0.3 else good

    with ScriptedServer(answer) as server:
        found = keys_of(at(server, read_timeout=1, max_attempts=20))
    assert (found if in_key_order else sorted(found)) == keys


def test_only_the_page_that_failed_is_asked_for_again() -> None:
    keys = [f"{number:03}" for number in range(30)]
    bucket = Bucket(keys, page_size=10)
    faults = [Reply(500)]

    def answer(request: Request) -> Reply:
        return faults.pop() if "continuation-token=20" in request.target and faults else bucket(request)

    with ScriptedServer(answer) as server:
        assert keys_of(at(server)) == keys
        tokens = [
            urllib.parse.parse_qs(request.target).get("continuation-token", [""])[0] for request in server.requests
        ]
    # The first page; then the whole level, whose last page is asked for twice.
    assert tokens == ["", "", "10", "20", "20"]


def test_a_fault_in_a_thread_reaches_the_reader_and_ends_the_threads() -> None:
    keys = folders(*[40] * 12)
    bucket = Bucket(keys, page_size=10)

    def answer(request: Request) -> Reply:
        return Reply(403) if "prefix=005" in request.target else bucket(request)

    found: list[str] = []
    with (
        ScriptedServer(answer) as server,
        pytest.raises(AccessDeniedError, match="s3://bucket/005/: the store refused ListObjectsV2"),
    ):
        found.extend(item.uri.removeprefix(_ROOT) for item in at(server).list(_ROOT))
    assert found == folders(*[40] * 5)
    assert list_threads() == []


def test_a_listing_that_does_not_advance_is_an_error() -> None:
    with (
        ScriptedServer(lambda _: Reply(body=_page([("a", False)], 7))) as server,
        pytest.raises(StorageError, match="s3://bucket/: the listing does not advance"),
    ):
        keys_of(at(server))


# --- The end ---


def test_the_first_object_takes_one_request_and_no_thread() -> None:
    with ScriptedServer(Bucket(folders(*[40] * 12), page_size=10)) as server:
        listing = at(server).list(_ROOT)
        assert next(listing).uri == _ROOT + "000/00000"
        assert (len(server.requests), list_threads()) == (1, [])


def test_a_listing_closed_early_ends_its_threads_and_requests() -> None:
    with ScriptedServer(Bucket(folders(*[2000] * 12), page_size=10)) as server:
        listing = at(server).list(_ROOT)
        for _ in range(25):
            next(listing)
        assert len(list_threads()) == 8
        listing.close()  # type: ignore[attr-defined]
        assert list_threads() == []
        assert len(server.requests) < 12 * 200
        num_requests = len(server.requests)
        assert list(listing) == []
        assert len(server.requests) == num_requests


def test_what_is_read_ahead_is_bounded() -> None:
    with ScriptedServer(Bucket(folders(*[2000] * 24), page_size=10)) as server:
        listing = at(server).list(_ROOT)
        for _ in range(25):
            next(listing)
        # Every thread fills its listing's queue, then waits: the ninth listing gets no thread.
        bound = 1 + 3 + 8 * (s3_listing._MAX_PAGES_AHEAD + 2)
        waited = threading.Event()
        waited.wait(1.5)
        assert len(server.requests) <= bound
        listing.close()  # type: ignore[attr-defined]
