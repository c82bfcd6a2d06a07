"""HttpStore against real servers: one that answers what it is told, one that breaks replies, one that speaks oddly."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import re
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lfm_scan.errors import (
    AccessDeniedError,
    ChangedError,
    NotFoundError,
    OversizeError,
    StorageError,
    UnreachableError,
)
from lfm_scan.storage import Fetched, HttpStore, ObjectInfo, StorageConfig, http, open_object, open_store, tries
from tests.faults import Fault, FaultProxy
from tests.servers import Reply, Request, ScriptedServer, free_port
from tests.waiting import PATIENCE_S, wait_until

BODY = bytes(range(256)) * 1200
FACTS = {"ETag": '"v1"', "Last-Modified": "Sat, 21 Nov 2026 05:00:00 GMT"}
MODIFIED = datetime(2026, 11, 21, 5, tzinfo=UTC)


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tries, "_FIRST_WAIT_S", 0.01)


@pytest.fixture
def store() -> HttpStore:
    return HttpStore(StorageConfig(max_attempts=3))


def store_for(fault: Fault) -> HttpStore:
    """A store that waits for the bytes of a stalled reply for a short time, and else as long as usual."""
    config = StorageConfig(max_attempts=3)
    return HttpStore(replace(config, read_timeout=3) if fault is Fault.STALL else config)


def in_turn(*replies: Reply) -> Callable[[Request], Reply]:
    """Answer with one reply after the other."""
    remaining = iter(replies)
    return lambda _: next(remaining)


@contextlib.contextmanager
def raw_server(reply: bytes) -> Iterator[str]:
    """Answer every connection's first request with these bytes, then close it."""

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(reply)
                    connection.shutdown(socket.SHUT_WR)
                    connection.recv(65536)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(10)


# --- get ---


def test_an_object_comes_with_its_facts(store: HttpStore) -> None:
    with ScriptedServer(lambda _: Reply(body=BODY, headers=FACTS)) as server:
        uri = f"{server.endpoint_url}/a.png"
        assert store.get(uri, len(BODY)) == Fetched(BODY, ObjectInfo(uri, len(BODY), "v1", MODIFIED))


def test_an_empty_object_is_one(store: HttpStore) -> None:
    with ScriptedServer(lambda _: Reply()) as server:
        assert store.get(server.endpoint_url).data == b""


def test_an_object_that_says_it_is_too_large_is_not_read(store: HttpStore) -> None:
    with (
        raw_server(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000000\r\n\r\n") as url,
        pytest.raises(OversizeError, match=r"1,000,000,000,000 bytes, the limit is 1,000"),
    ):
        store.get(url, 1000)


@pytest.mark.parametrize("framing", ["until close", "chunked"])
def test_a_body_of_unknown_length_is_read_up_to_the_limit(store: HttpStore, framing: str) -> None:
    if framing == "chunked":
        head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
    else:
        head, body = b"HTTP/1.1 200 OK\r\n\r\n", BODY
    with raw_server(head + body) as url:
        assert store.get(url, len(BODY)).data == BODY
        with pytest.raises(OversizeError, match="more than 307,199 bytes, which is the limit"):
            store.get(url, len(BODY) - 1)


def test_an_endless_body_is_given_up_at_the_limit(store: HttpStore) -> None:
    def pour() -> None:
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):
            connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            while True:
                connection.sendall(BODY)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=pour)
        thread.start()
        with pytest.raises(OversizeError):
            store.get(f"http://127.0.0.1:{listener.getsockname()[1]}", 2**20)
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


def test_a_chunked_body_that_lacks_its_last_chunk_is_not_taken_for_whole(store: HttpStore) -> None:
    with (
        raw_server(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nabcd\r\n") as url,
        pytest.raises(UnreachableError, match="no complete answer"),
    ):
        store.get(url)


def test_a_body_is_taken_as_it_comes_and_never_inflated(store: HttpStore) -> None:
    with ScriptedServer(lambda _: Reply(body=b"not gzip", headers={"Content-Encoding": "gzip"})) as server:
        assert store.get(server.endpoint_url).data == b"not gzip"
        assert server.requests[0].headers["accept-encoding"] == "identity"


def test_a_body_is_checked_against_the_md5_that_comes_with_it(store: HttpStore) -> None:
    headers = {"Content-MD5": base64.b64encode(hashlib.md5(BODY).digest()).decode()}
    damaged = Reply(body=BODY[:-1] + b"\0", headers=headers)
    with ScriptedServer(in_turn(damaged, Reply(body=BODY, headers=headers))) as server:
        assert store.get(server.endpoint_url).data == BODY
    with (
        ScriptedServer(lambda _: damaged) as server,
        pytest.raises(StorageError, match="do not match the Content-MD5"),
    ):
        store.get(server.endpoint_url)


# --- Failures that may pass ---


@pytest.mark.parametrize("fault", [Fault.BROKEN_BODY, Fault.STALL, Fault.RESET, Fault.STATUS, Fault.LOST_REPLY])
def test_a_fault_that_passes_is_not_noticed(fault: Fault) -> None:
    faults = iter([fault, fault])
    with (
        ScriptedServer(lambda _: Reply(body=BODY)) as server,
        FaultProxy(server.endpoint_url, on_request=lambda _: next(faults, None)) as proxy,
    ):
        assert store_for(fault).get(f"{proxy.endpoint_url}/a").data == BODY
        assert [record.fault for record in proxy.journal] == [fault, fault, None]


@pytest.mark.parametrize(
    ("fault", "num_requests"),
    # A request that is lost without an answer is sent once more by aiohttp itself.
    [(Fault.BROKEN_BODY, 3), (Fault.STALL, 3), (Fault.STATUS, 3), (Fault.RESET, 6)],
)
def test_a_fault_that_lasts_is_given_up_after_as_many_tries_as_allowed(fault: Fault, num_requests: int) -> None:
    with (
        ScriptedServer(lambda _: Reply(body=BODY)) as server,
        FaultProxy(server.endpoint_url, on_request=lambda _: fault) as proxy,
    ):
        with pytest.raises(UnreachableError):
            store_for(fault).get(f"{proxy.endpoint_url}/a")
        wait_until(lambda: proxy.count()[fault] >= num_requests)  # the store may give up before the proxy notes it
        assert proxy.count() == {fault: num_requests}


def test_an_impatient_store_tries_twice() -> None:
    with ScriptedServer(lambda _: Reply(503)) as server:
        with pytest.raises(UnreachableError, match="answered 503"):
            open_store(server.endpoint_url, patient=False).get(server.endpoint_url)
        assert len(server.requests) == 2


def test_a_busy_server_is_asked_again_when_it_says(store: HttpStore, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(tries, "time", SimpleNamespace(sleep=waits.append))
    busy = [Reply(429, headers={"Retry-After": "7"}), Reply(503, headers={"Retry-After": "86400"})]
    with ScriptedServer(in_turn(*busy, Reply(body=b"x"))) as server:
        assert store.get(server.endpoint_url).data == b"x"
    assert [int(wait) for wait in waits] == [7, 30]


def test_nobody_at_the_other_end_is_unreachable(store: HttpStore) -> None:
    with pytest.raises(UnreachableError, match="no complete answer from the server"):
        store.get(f"http://127.0.0.1:{free_port()}/a")


def test_a_name_without_a_server_is_asked_for_once(store: HttpStore, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    really_resolve = socket.getaddrinfo

    def resolve(host: str, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        if host != "gone.example":  # another thread's
            return really_resolve(host, *args, **kwargs)
        asked.append(host)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with pytest.raises(UnreachableError, match="there is no server of this name"):
        store.get("http://gone.example/a")
    assert asked == ["gone.example"]


def test_a_server_that_sends_a_byte_now_and_then_is_given_up_once(
    store: HttpStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "_LONGEST_EXCHANGE_S", 0.5)
    http._cached_session.cache_clear()
    accepted: list[socket.socket] = []
    over = threading.Event()

    def drip() -> None:
        connection, _ = listener.accept()
        accepted.append(connection)
        with connection, contextlib.suppress(OSError):
            connection.sendall(b"HTTP/1.1 200 OK\r\nX: ")
            while not over.wait(0.05):
                connection.sendall(b"x")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=drip)
        thread.start()
        with pytest.raises(UnreachableError, match="not complete after"):
            store.get(f"http://127.0.0.1:{listener.getsockname()[1]}")
        over.set()
        thread.join(10)
    http._cached_session.cache_clear()
    assert len(accepted) == 1


# --- Verdicts ---


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (404, NotFoundError),
        (410, NotFoundError),
        (401, AccessDeniedError),
        (403, AccessDeniedError),
        (204, StorageError),
        (206, StorageError),
        (304, StorageError),
        (418, StorageError),
    ],
)
def test_a_verdict_is_accepted_at_once(store: HttpStore, status: int, error: type[StorageError]) -> None:
    with ScriptedServer(lambda _: Reply(status)) as server:
        with pytest.raises(StorageError, match=f"^{re.escape(server.endpoint_url)}: .*{status}") as caught:
            store.get(server.endpoint_url)
        assert type(caught.value) is error
        assert len(server.requests) == 1


def test_redirects_are_followed_up_to_a_limit(store: HttpStore) -> None:
    def answer(request: Request) -> Reply:
        left = int(request.target.removeprefix("/"))
        return Reply(302, headers={"Location": f"/{left - 1}"}) if left else Reply(body=b"x", headers=FACTS)

    with ScriptedServer(answer) as server:
        uri = f"{server.endpoint_url}/5"
        assert store.get(uri) == Fetched(b"x", ObjectInfo(uri, 1, "v1", MODIFIED))
        with pytest.raises(StorageError, match="more than 5 redirects"):
            store.get(f"{server.endpoint_url}/6")


@pytest.mark.parametrize("location", ["file:///etc/passwd", "ftp://127.0.0.1/a", "gopher://x", "http://[bad"])
def test_a_redirect_leads_nowhere_but_to_the_web(store: HttpStore, location: str) -> None:
    with ScriptedServer(lambda _: Reply(302, headers={"Location": location})) as server:
        with pytest.raises(StorageError, match="no valid http:// or https:// URL"):
            store.get(server.endpoint_url)
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    "uri",
    [
        *("http://", "http:///a", "http://host:port/", "http://[::1/a"),
        *("http://2852039166/", "http://169.254.43518/"),  # 169.254.169.254, spelled otherwise
    ],
)
def test_what_is_no_url_is_refused(store: HttpStore, uri: str) -> None:
    with pytest.raises(StorageError, match=re.escape(f"{uri}: it is, or leads to, no valid")):
        store.get(uri)


def test_a_url_goes_out_as_it_is_and_only_what_is_none_is_quoted(store: HttpStore) -> None:
    targets = ["/a%2Fb/%7Ec?sig=a%2Bb%3D&x=+%20", "/a//b/../c?x='(1)'"]
    with ScriptedServer(lambda _: Reply()) as server:
        for target in targets:
            store.get(server.endpoint_url + target)
        store.get(f"{server.endpoint_url}/a b/ü.png")
        store.get(f"{server.endpoint_url}/a\r\nX-Evil: 1")
        assert [request.target for request in server.requests[:2]] == targets
        assert server.requests[2].target == "/a%20b/%C3%BC.png"
        assert "x-evil" not in server.requests[3].headers


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl, to make a certificate")
def test_a_server_whose_certificate_nobody_vouches_for_is_not_trusted(store: HttpStore, tmp_path: Path) -> None:
    with (
        signing_server(tmp_path) as url,
        pytest.raises(StorageError, match="certificate or encryption is not accepted"),
    ):
        store.get(url)


@contextlib.contextmanager
def signing_server(folder: Path) -> Iterator[str]:
    """An HTTPS server with a certificate that it signed itself."""
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=127.0.0.1"
    subprocess.run([*command.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    def serve() -> None:
        with contextlib.suppress(OSError), context.wrap_socket(listener.accept()[0], server_side=True) as connection:
            connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield f"https://127.0.0.1:{listener.getsockname()[1]}"
        thread.join(10)


# --- Addresses that are never asked ---


@pytest.mark.parametrize(
    "host",
    [
        "169.254.169.254",
        "169.254.0.1:8080",
        "0xA9FEA9FE",
        "100.100.100.200",
        "168.63.129.16",
        "[fe80::1]",
        "[fd00:ec2::254]",
        "[::ffff:169.254.169.254]",
        "[64:ff9b::a9fe:a9fe]",
        "[2002:a9fe:a9fe::]",
    ],
)
def test_metadata_services_are_never_asked_however_they_are_spelled(store: HttpStore, host: str) -> None:
    with pytest.raises(AccessDeniedError, match="link-local address or a cloud's metadata service"):
        store.get(f"http://{host}/latest/meta-data/")


def test_no_name_and_no_redirect_leads_to_a_metadata_service(store: HttpStore, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        ScriptedServer(lambda _: Reply(302, headers={"Location": "http://169.254.169.254/x"})) as server,
        pytest.raises(AccessDeniedError, match=r"169\.254\.169\.254 is a link-local address"),
    ):
        store.get(server.endpoint_url)
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("169.254.169.254", 80))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with pytest.raises(AccessDeniedError, match=r"169\.254\.169\.254 is a link-local address"):
        store.get("http://innocent.example/x")


@pytest.mark.parametrize("host", ["127.0.0.1", "10.0.0.1", "192.168.1.1", "::1", "fd12::1", "8.8.8.8", "2001:db8::1"])
def test_internal_servers_may_be_asked(host: str) -> None:
    assert not http._is_refused(host)


# --- head and list ---


def test_head_and_list_tell_the_facts_without_the_body(store: HttpStore) -> None:
    with ScriptedServer(lambda _: Reply(body=BODY, headers=FACTS)) as server:
        uri = f"{server.endpoint_url}/a.png"
        assert store.head(uri) == ObjectInfo(uri, len(BODY), "v1", MODIFIED)
        assert list(store.list(uri)) == [ObjectInfo(uri, len(BODY), "v1", MODIFIED)]
        assert {request.method for request in server.requests} == {"HEAD"}


def test_a_server_that_knows_no_head_is_asked_otherwise(store: HttpStore) -> None:
    def answer(request: Request) -> Reply:
        return Reply(405) if request.method == "HEAD" else Reply(body=BODY, headers={"ETag": 'W/"v1"'})

    with ScriptedServer(answer) as server:
        assert store.head(server.endpoint_url) == ObjectInfo(server.endpoint_url, len(BODY), "v1", None)


@pytest.mark.parametrize("text", ["yesterday", "Sat, 21 Nov 99999 05:00:00 GMT", ""])
def test_a_time_that_is_none_is_left_out(store: HttpStore, text: str) -> None:
    with ScriptedServer(lambda _: Reply(headers={"Last-Modified": text})) as server:
        assert store.head(server.endpoint_url).last_modified is None


def test_headers_of_any_bytes_are_text_that_a_table_can_hold(store: HttpStore) -> None:
    with raw_server(b'HTTP/1.1 200 OK\r\nETag: "\xff"\r\nContent-Length: 1\r\nConnection: close\r\n\r\nx') as url:
        assert store.get(url).info.etag == "\\udcff"
    with (
        raw_server(b"HTTP/1.1 403 \xff\r\nContent-Length: 0\r\nConnection: close\r\n\r\n") as url,
        pytest.raises(AccessDeniedError) as caught,
    ):
        store.get(url)
    assert str(caught.value).encode().endswith(b"answered 403 \\udcff")


def test_what_is_not_there_cannot_be_listed(store: HttpStore) -> None:
    with ScriptedServer(lambda _: Reply(404)) as server, pytest.raises(NotFoundError):
        list(store.list(server.endpoint_url))


# --- get_range ---


def serve_ranges(request: Request) -> Reply:
    match = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("range", ""))
    if match is None:
        return Reply(body=BODY, headers=FACTS)
    start, end = int(match[1]), min(int(match[2]) + 1, len(BODY))
    if start >= len(BODY):
        return Reply(416)
    return Reply(206, BODY[start:end], {**FACTS, "Content-Range": f"bytes {start}-{end - 1}/{len(BODY)}"})


@pytest.mark.parametrize("answer", [serve_ranges, lambda _: Reply(body=BODY, headers=FACTS)])
def test_a_stretch_is_exact_from_servers_with_and_without_ranges(
    store: HttpStore, answer: Callable[[Request], Reply]
) -> None:
    with ScriptedServer(answer) as server:
        uri = server.endpoint_url
        assert store.get_range(uri, 0, 1) == BODY[:1]
        assert store.get_range(uri, 1000, 300_000, etag="v1") == BODY[1000:301_000]
        assert store.get_range(uri, len(BODY) - 5, 5) == BODY[-5:]
        for start in (len(BODY) - 5, len(BODY), 10 * len(BODY)):
            with pytest.raises(ChangedError, match=f"ends before {start + 6:,}"):
                store.get_range(uri, start, 6)
        with pytest.raises(ChangedError, match="its ETag is another one"):
            store.get_range(uri, 0, 5, etag="v0")


def test_another_stretch_than_asked_for_is_refused(store: HttpStore) -> None:
    reply = Reply(206, b"12345", {"Content-Range": "bytes 1-5/10"})
    with ScriptedServer(lambda _: reply) as server, pytest.raises(StorageError, match="another stretch"):
        store.get_range(server.endpoint_url, 0, 5)


def test_large_objects_are_not_read_again_and_again_for_want_of_ranges(store: HttpStore) -> None:
    with (
        ScriptedServer(lambda _: Reply(body=BODY)) as server,
        pytest.raises(StorageError, match="sends only whole objects"),
    ):
        store.get_range(server.endpoint_url, 16 * 2**20, 1)


def test_an_object_can_be_read_as_a_file(store: HttpStore) -> None:
    with ScriptedServer(serve_ranges) as server:
        file = open_object(store, store.head(server.endpoint_url), chunk_bytes=1000)
        file.seek(-300, 2)
        assert file.read() == BODY[-300:]
        file.seek(0)
        assert file.read() == BODY


# --- The rest ---


def test_nothing_is_written_to_the_web(store: HttpStore) -> None:
    with ScriptedServer(lambda _: Reply()) as server:
        for write in (store.create, store.replace):
            with pytest.raises(StorageError, match="web servers are only read"):
                write(server.endpoint_url, b"x")
        assert server.requests == []


def test_the_web_has_no_versions(store: HttpStore) -> None:
    for read in (store.get, store.head):
        with pytest.raises(StorageError, match="no versions, version 'v' was asked for"):
            read("http://127.0.0.1/", version_id="v")
    with pytest.raises(StorageError, match="no versions, version 'v' was asked for"):
        store.get_range("http://127.0.0.1/", 0, 1, version_id="v")


def test_many_threads_share_a_store(store: HttpStore) -> None:
    with (
        ScriptedServer(lambda request: Reply(body=request.target.encode() * 1000)) as server,
        ThreadPoolExecutor(32) as pool,
    ):
        uris = [f"{server.endpoint_url}/{number}" for number in range(200)]
        found = [fetched.data for fetched in pool.map(store.get, uris)]
    assert found == [f"/{number}".encode() * 1000 for number in range(200)]


@pytest.mark.parametrize("uri", ["http://127.0.0.1/a", "https://host.example/a?b=c"])
def test_open_store_gives_web_addresses_to_this_store(uri: str) -> None:
    assert isinstance(open_store(uri), HttpStore)
