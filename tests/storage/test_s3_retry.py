"""Who is at fault when a request fails: the object costs a row, the store is waited for."""

from __future__ import annotations

import hashlib
import re
import threading
import time
import urllib.parse
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from lfm_scan.errors import NotFoundError, OutageError, StorageError, UnreachableError
from lfm_scan.storage import S3Store, StorageConfig, s3_retry, tries
from lfm_scan.storage.s3_client import open_client
from lfm_scan.storage.s3_retry import Health
from tests.servers import Reply, Request, ScriptedServer, free_port

_LISTING = (
    b'<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
    b"<IsTruncated>false</IsTruncated></ListBucketResult>"
)
_SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tries, "_FIRST_WAIT_S", 0.02)
    monkeypatch.setattr(tries, "_LONGEST_WAIT_S", 0.05)


def good(request: Request) -> Reply:
    """Answer any request of ours the way a store in order does."""
    if "list-type" in request.target:
        return Reply(body=_LISTING)
    if "range" in request.headers:
        first, _, last = request.headers["range"].removeprefix("bytes=").partition("-")
        return Reply(206, b"data"[int(first) : int(last) + 1], {"Content-Range": f"bytes {first}-{last}/4"})
    headers = {"ETag": f'"{hashlib.md5(b"data").hexdigest()}"', "Last-Modified": "Sat, 21 Nov 2026 05:00:00 GMT"}
    return Reply(200, b"" if request.method == "PUT" else b"data", headers)


def key_of(request: Request) -> str:
    return urllib.parse.unquote(request.target.partition("?")[0]).removeprefix("/bucket").removeprefix("/")


def at(server: ScriptedServer, *, max_attempts: int = 3, outage_patience: float = 300, **settings: float) -> S3Store:
    config = StorageConfig(
        endpoint_url=server.endpoint_url,
        anonymous=True,
        max_attempts=max_attempts,
        outage_patience=outage_patience,
        **settings,  # type: ignore[arg-type]
    )
    return S3Store(config)


OPERATIONS: dict[str, Callable[[S3Store], object]] = {
    "list": lambda store: list(store.list("s3://bucket/")),
    "get": lambda store: store.get("s3://bucket/a").data,
    "get_range": lambda store: store.get_range("s3://bucket/a", 1, 2),
    "head": lambda store: store.head("s3://bucket/a").size_bytes,
    "create": lambda store: store.create("s3://bucket/a", b"data").created,
    "replace": lambda store: store.replace("s3://bucket/a", b"data"),
}
RESULTS = {"list": [], "get": b"data", "get_range": b"at", "head": 4, "create": True, "replace": None}


# --- The store is down ---


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_waits_for_a_store_that_is_down(name: str) -> None:
    faults = [Reply(500)] * 12

    def answer(request: Request) -> Reply:
        return faults.pop() if faults else good(request)

    with ScriptedServer(answer) as server:
        assert OPERATIONS[name](at(server)) == RESULTS[name]
        assert len(server.requests) == 13


def test_an_outage_costs_no_image_in_flight() -> None:
    def answer(request: Request) -> Reply:
        # Refused are a hundred in a row, so each of the eight uses up its tries many times over.
        return Reply(503) if 20 < len(server.requests) <= 120 else good(request)

    with ScriptedServer(answer) as server, ThreadPoolExecutor(8) as pool:
        store = at(server, max_attempts=2)
        fetches = [pool.submit(store.get, f"s3://bucket/{number}") for number in range(300)]
        assert {fetch.result().data for fetch in fetches} == {b"data"}
        assert len(server.requests) >= 300 + 100


def test_a_store_silent_for_longer_than_the_patience_is_an_outage() -> None:
    with ScriptedServer(lambda _: Reply(503)) as server:
        store = at(server, outage_patience=0.5)
        with pytest.raises(OutageError) as caught:
            store.get("s3://bucket/a")
        assert re.fullmatch(
            rf"{server.endpoint_url} has answered nobody for \d+ s, the last was s3://bucket/a \(.*503.*\): "
            r"nothing is lost, repeat the command to go on; --outage-patience waits longer",
            str(caught.value),
        )
        # The others do not wait for as long again.
        num_requests = len(server.requests)
        with pytest.raises(OutageError):
            store.get("s3://bucket/b")
        assert len(server.requests) == num_requests + 3 + 1  # its tries, and a knock at the bucket


def test_nobody_listening_is_an_outage_too() -> None:
    config = StorageConfig(
        endpoint_url=f"http://127.0.0.1:{free_port()}", anonymous=True, max_attempts=2, outage_patience=0.3
    )
    with pytest.raises(OutageError, match="Could not connect to the endpoint"):
        S3Store(config).get("s3://bucket/a")


def test_a_store_that_lost_its_disks_is_down_though_it_knows_its_buckets() -> None:
    has_disks = True

    def answer(request: Request) -> Reply:
        return good(request) if has_disks or not key_of(request) else Reply(500)

    with ScriptedServer(answer) as server:
        store = at(server, outage_patience=0.5)
        store.get("s3://bucket/a")
        has_disks = False
        with pytest.raises(OutageError):
            store.get("s3://bucket/b")


def test_a_start_up_check_does_not_wait_for_a_store_that_is_down() -> None:
    with ScriptedServer(lambda _: Reply(503)) as server:
        config = StorageConfig(endpoint_url=server.endpoint_url, anonymous=True)
        with pytest.raises(StorageError, match="the store answered 503"):
            S3Store(config, patient=False).get("s3://bucket/a")
        assert len(server.requests) == 5


def test_a_start_up_check_puts_up_with_the_faults_of_a_store_that_has_worked() -> None:
    replies = [Reply(503)] * 7

    def answer(request: Request) -> Reply:
        return replies.pop() if key_of(request) == "b" and replies else good(request)

    with ScriptedServer(answer) as server:
        store = S3Store(StorageConfig(endpoint_url=server.endpoint_url, anonymous=True), patient=False)
        store.get("s3://bucket/a")
        store.get("s3://bucket/b")
        assert not replies


# --- The object is at fault ---


@pytest.mark.parametrize(
    ("bad", "error", "read_timeout"),
    [
        (Reply(500), StorageError, 20),
        (Reply(200, b"data", {"ETag": f'"{hashlib.md5(b"other").hexdigest()}"'}), StorageError, 20),
        (Reply(200, b"half", {"Content-Length": "8"}), UnreachableError, 1),  # it stalls
    ],
)
def test_an_object_that_always_fails_costs_its_tries_while_others_are_answered(
    bad: Reply, error: type[StorageError], read_timeout: float
) -> None:
    def answer(request: Request) -> Reply:
        return bad if key_of(request) == "bad" else good(request)

    done = threading.Event()
    with ScriptedServer(answer) as server, ThreadPoolExecutor(2) as pool:
        store = at(server, read_timeout=read_timeout)

        def fetch_others() -> None:
            while not done.is_set():
                store.get("s3://bucket/good")

        others = pool.submit(fetch_others)
        try:
            with pytest.raises(error) as caught:
                store.get("s3://bucket/bad")
        finally:
            done.set()
        others.result()
        assert caught.type is error
        # A try after which nobody else was answered in time does not count, so there may be a few more.
        assert 3 <= sum(key_of(request) == "bad" for request in server.requests) <= 9


def test_an_object_that_fails_when_nobody_else_asks_is_told_from_an_outage_by_one_that_worked() -> None:
    def answer(request: Request) -> Reply:
        return Reply(500) if key_of(request) == "bad" else good(request)

    with ScriptedServer(answer) as server:
        store = at(server)
        store.get("s3://bucket/good")
        with pytest.raises(StorageError, match="s3://bucket/bad: the store answered 500") as caught:
            store.get("s3://bucket/bad")
        assert caught.type is StorageError
        keys = [key_of(request) for request in server.requests]
        # Three tries, then three more that count: each time the object that worked does again.
        assert keys == ["good", "bad", "bad", *["bad", "good"] * 3]
        assert server.requests[-1].headers["range"] == "bytes=0-0"


def test_the_only_object_of_a_run_does_not_stop_it_for_good() -> None:
    with ScriptedServer(lambda request: Reply(500) if key_of(request) else Reply()) as server:
        with pytest.raises(StorageError, match="s3://bucket/bad: the store answered 500") as caught:
            at(server, outage_patience=0.3).get("s3://bucket/bad")
        assert caught.type is StorageError
        assert (server.requests[-1].method, key_of(server.requests[-1])) == ("HEAD", "")


def test_a_refusal_counts_as_an_answer() -> None:
    health = {True: Reply(404), False: Reply(500)}

    def answer(request: Request) -> Reply:
        return health[key_of(request) == "missing"]

    done = threading.Event()
    with ScriptedServer(answer) as server, ThreadPoolExecutor(2) as pool:
        store = at(server)

        def ask_for_missing() -> None:
            while not done.is_set():
                with pytest.raises(NotFoundError):
                    store.get("s3://bucket/missing")

        others = pool.submit(ask_for_missing)
        try:
            with pytest.raises(StorageError, match="the store answered 500") as caught:
                store.get("s3://bucket/bad")
        finally:
            done.set()
        others.result()
        assert caught.type is StorageError


def test_what_a_store_does_not_offer_is_not_asked_for_twice() -> None:
    with ScriptedServer(lambda _: Reply(501)) as server:
        with pytest.raises(StorageError, match="the store answered 501"):
            at(server).create("s3://bucket/a", b"x")
        assert len(server.requests) == 1


# --- The store is busy ---


def test_a_busy_store_is_never_the_objects_fault() -> None:
    num_left = 3

    def answer(request: Request) -> Reply:
        nonlocal num_left
        if key_of(request) == "a" and num_left:
            num_left -= 1
            return Reply(503, _SLOW_DOWN)
        return good(request)

    done = threading.Event()
    with ScriptedServer(answer) as server, ThreadPoolExecutor(1) as pool:
        store = at(server, max_attempts=2)

        def fetch_others() -> None:
            while not done.is_set():
                store.get("s3://bucket/good")

        others = pool.submit(fetch_others)
        try:
            assert store.get("s3://bucket/a").data == b"data"
        finally:
            done.set()
        others.result()
    assert num_left == 0


def test_a_client_told_to_slow_down_sends_fewer_requests() -> None:
    with ScriptedServer(lambda _: Reply(503, _SLOW_DOWN)) as server:
        config = StorageConfig(endpoint_url=server.endpoint_url, anonymous=True)
        boto = open_client(config, patient=True).boto
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            with pytest.raises(boto.exceptions.ClientError, match="SlowDown"):
                boto.get_object(Bucket="bucket", Key="a")
        # One in two seconds is the lowest rate; unhindered there would be hundreds.
        assert len(server.requests) <= 4


# --- What is known of a store ---


def test_silence_begins_with_a_failure_and_ends_with_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(s3_retry, "time", SimpleNamespace(monotonic=lambda: now))
    health = Health()
    now = 1000.0
    assert health.silent_s() == 0  # nobody asked
    assert health.failed() == 1000
    now = 1007.0
    assert health.failed() == 1007
    assert (health.silent_s(), health.answered_since(1000)) == (7, False)
    health.answered(began=1003)
    assert (health.silent_s(), health.answered_since(1000), health.answered_since(1003)) == (0, True, False)
