"""Every fault of the proxy, as boto3 and plain sockets see it, in front of a real store."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import botocore.exceptions
import pytest
from botocore.config import Config

from tests.faults import Callback, Fault, FaultProxy, Faults, Odds, Request
from tests.servers import Reply, S3Server, ScriptedServer
from tests.waiting import PATIENCE_S, wait_until

BODY = bytes(range(256)) * 400


def client_of(server: S3Server, endpoint_url: str) -> Any:  # noqa: ANN401
    """Return a boto3 client, which never tries twice, of the server behind a proxy."""
    return boto3.session.Session().client(
        "s3",
        endpoint_url=endpoint_url,
        aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
        region_name="us-east-1",
        config=Config(
            retries={"total_max_attempts": 1},
            connect_timeout=3,
            read_timeout=PATIENCE_S,
            max_pool_connections=80,
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            s3={"addressing_style": "path"},
        ),
    )


@contextlib.contextmanager
def proxied(
    server: S3Server,
    faults: Faults | None = None,
    *,
    seed: int = 0,
    on_request: Callback | None = None,
    on_reply: Callback | None = None,
) -> Iterator[tuple[FaultProxy, Any]]:
    """Run a proxy in front of the server; yield it and a client that goes through it."""
    with FaultProxy(server.endpoint_url, seed, faults, on_request=on_request, on_reply=on_reply) as proxy:
        client = client_of(server, proxy.endpoint_url)
        yield proxy, client
        client.close()


def always(fault: Fault) -> Odds:
    return Odds(**{fault.value: 1.0})


def always_on_reads(fault: Fault, *, stall_s: float = 600, max_per_request: int | None = None) -> Faults:
    return Faults(reads=always(fault), stall_s=stall_s, max_per_request=max_per_request)


def get(client: Any, bucket: str, key: str = "a") -> bytes:  # noqa: ANN401
    body: bytes = client.get_object(Bucket=bucket, Key=key)["Body"].read()
    return body


# --- Without faults ---


def test_without_faults_everything_passes_unchanged_on_one_connection(s3_server: S3Server, s3_bucket: str) -> None:
    with proxied(s3_server) as (proxy, client):
        client.put_object(Bucket=s3_bucket, Key="a b/ü", Body=BODY)  # asks to continue before it sends the body
        client.put_object(Bucket=s3_bucket, Key="empty", Body=b"")
        assert get(client, s3_bucket, "a b/ü") == BODY
        assert get(client, s3_bucket, "empty") == b""
        assert client.head_object(Bucket=s3_bucket, Key="a b/ü")["ContentLength"] == len(BODY)
        part = client.get_object(Bucket=s3_bucket, Key="a b/ü", Range="bytes=10-19")["Body"].read()
        assert part == BODY[10:20]
        listed = client.list_objects_v2(Bucket=s3_bucket)["Contents"]
        assert [entry["Key"] for entry in listed] == ["a b/ü", "empty"]
        client.delete_object(Bucket=s3_bucket, Key="empty")
        with pytest.raises(client.exceptions.NoSuchKey):
            get(client, s3_bucket, "empty")
        assert len(proxy._connections) == 1
        statuses = [(record.method, record.status, record.fault) for record in proxy.journal]
    assert statuses == [
        ("PUT", 200, None),
        ("PUT", 200, None),
        ("GET", 200, None),
        ("GET", 200, None),
        ("HEAD", 200, None),
        ("GET", 206, None),
        ("GET", 200, None),
        ("DELETE", 204, None),
        ("GET", 404, None),
    ]


def test_a_chunked_request_and_a_chunked_reply_pass_and_the_connection_stays_open(s3_server: S3Server) -> None:
    chunked = b"4;note=x\r\nabcd\r\n10\r\n0123456789abcdef\r\n0\r\nTrailer: t\r\n\r\n"
    script = Reply(body=chunked, headers={"Transfer-Encoding": "chunked", "Content-Length": ""})
    with _raw_server(script) as (url, bodies), FaultProxy(url) as proxy:
        host = proxy.endpoint_url.removeprefix("http://")
        connection = http.client.HTTPConnection(host, timeout=PATIENCE_S)
        for _ in range(2):
            connection.request("POST", "/x", body=iter([b"one", b"two"]), encode_chunked=True)
            assert connection.getresponse().read() == b"abcd0123456789abcdef"
        connection.close()
    assert bodies == [b"3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n"] * 2


@contextlib.contextmanager
def _raw_server(reply: Reply) -> Iterator[tuple[str, list[bytes]]]:
    """Serve one connection on which every request is chunked; collect the raw bodies."""
    bodies: list[bytes] = []
    answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + reply.body

    def serve() -> None:
        connection, _ = listener.accept()
        with connection, connection.makefile("rb") as stream:
            while stream.readline():
                while stream.readline() != b"\r\n":
                    pass
                body = b""
                while not body.endswith(b"0\r\n\r\n"):
                    body += stream.readline()
                bodies.append(body)
                connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", bodies
        thread.join(10)


def test_an_early_refusal_reaches_a_client_that_is_still_sending(s3_server: S3Server, s3_bucket: str) -> None:
    with FaultProxy(s3_server.endpoint_url) as proxy:
        client = boto3.session.Session().client(
            "s3",
            endpoint_url=proxy.endpoint_url,
            aws_access_key_id=s3_server.access_key,
            aws_secret_access_key="wrong",
            region_name="us-east-1",
            config=Config(retries={"total_max_attempts": 1}, s3={"addressing_style": "path"}),
        )
        with pytest.raises(botocore.exceptions.ClientError, match="SignatureDoesNotMatch"):
            client.put_object(Bucket=s3_bucket, Key="a", Body=BODY)
        client.close()
        assert [record.status for record in proxy.journal] == [403]


def test_sixty_four_clients_at_once_each_get_their_own_answers(s3_server: S3Server, s3_bucket: str) -> None:
    with proxied(s3_server) as (proxy, client):
        keys = [f"{number:02}" for number in range(64)]
        barrier = threading.Barrier(64)

        def put_and_get(key: str) -> bytes:
            barrier.wait(PATIENCE_S)
            client.put_object(Bucket=s3_bucket, Key=key, Body=key.encode() * 1000)
            return get(client, s3_bucket, key)

        with ThreadPoolExecutor(64) as pool:
            assert list(pool.map(put_and_get, keys)) == [key.encode() * 1000 for key in keys]
        assert len(proxy.journal) == 128


# --- Each fault ---


def test_a_status_is_answered_in_the_stores_place(s3_server: S3Server, s3_bucket: str) -> None:
    faults = Faults(reads=always(Fault.STATUS), writes=always(Fault.STATUS))
    seen = set()
    with proxied(s3_server, faults=faults) as (proxy, client):
        for number in range(12):
            with pytest.raises(botocore.exceptions.ClientError) as caught:
                client.put_object(Bucket=s3_bucket, Key=f"{number}", Body=BODY)
            seen.add((caught.value.response["ResponseMetadata"]["HTTPStatusCode"], _code(caught.value)))
            with pytest.raises(botocore.exceptions.ClientError):
                get(client, s3_bucket, f"{number}")
            with pytest.raises(botocore.exceptions.ClientError, match=r"\(50[03]\)"):
                client.head_object(Bucket=s3_bucket, Key=f"{number}")
        assert {(record.fault, record.status) for record in proxy.journal} == {(Fault.STATUS, None)}
    assert seen == {(503, "SlowDown"), (500, "InternalError")}
    assert "Contents" not in s3_server.client().list_objects_v2(Bucket=s3_bucket)


def _code(exc: botocore.exceptions.ClientError) -> str:
    return str(exc.response["Error"]["Code"])


def test_a_reset_comes_before_the_store_is_asked(s3_server: S3Server, s3_bucket: str) -> None:
    with proxied(s3_server, faults=Faults(writes=always(Fault.RESET))) as (proxy, client):
        with pytest.raises(botocore.exceptions.BotoCoreError, match="Connection was closed"):
            client.put_object(Bucket=s3_bucket, Key="a", Body=b"x")
        with pytest.raises(client.exceptions.NoSuchKey):
            get(client, s3_bucket)
        assert [(record.fault, record.status) for record in proxy.journal] == [(Fault.RESET, None), (None, 404)]


def test_a_reset_is_a_reset_and_not_an_end(s3_server: S3Server) -> None:
    with (
        FaultProxy(s3_server.endpoint_url, faults=always_on_reads(Fault.RESET)) as proxy,
        socket.create_connection(("127.0.0.1", port_of(proxy)), PATIENCE_S) as sock,
    ):
        sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        with pytest.raises(ConnectionResetError):
            sock.recv(1)


def port_of(proxy: FaultProxy) -> int:
    return int(proxy.endpoint_url.rsplit(":", 1)[1])


def test_a_lost_reply_hides_what_the_store_did(s3_server: S3Server, s3_bucket: str) -> None:
    with proxied(s3_server, faults=Faults(writes=always(Fault.LOST_REPLY))) as (proxy, client):
        with pytest.raises(botocore.exceptions.BotoCoreError):
            client.put_object(Bucket=s3_bucket, Key="a", Body=BODY)
        assert get(client, s3_bucket) == BODY
        with pytest.raises(botocore.exceptions.BotoCoreError):
            client.delete_object(Bucket=s3_bucket, Key="a")
        assert "Contents" not in client.list_objects_v2(Bucket=s3_bucket)
        assert [(record.fault, record.status) for record in proxy.journal] == [
            (Fault.LOST_REPLY, 200),
            (None, 200),
            (Fault.LOST_REPLY, 204),
            (None, 200),
        ]


def test_a_broken_body_ends_early_at_a_seeded_place(s3_server: S3Server, s3_bucket: str) -> None:
    s3_server.put(s3_bucket, "a", BODY)
    sent = []
    for seed in (1, 2, 1):
        with proxied(s3_server, seed=seed, faults=always_on_reads(Fault.BROKEN_BODY)) as (proxy, client):
            reply = client.get_object(Bucket=s3_bucket, Key="a")
            assert reply["ContentLength"] == len(BODY)
            with pytest.raises(botocore.exceptions.BotoCoreError):
                reply["Body"].read()
            [record] = proxy.journal
            assert (record.fault, record.status) == (Fault.BROKEN_BODY, 200)
            sent.append(record.bytes)
    assert sent[0] == sent[2] != sent[1]
    assert max(sent) < len(BODY)


def test_what_arrives_of_a_broken_body_is_its_beginning(s3_server: S3Server) -> None:
    with (
        ScriptedServer(lambda _: Reply(body=BODY)) as server,
        FaultProxy(server.endpoint_url, 1, always_on_reads(Fault.BROKEN_BODY)) as proxy,
    ):
        connection = http.client.HTTPConnection(proxy.endpoint_url.removeprefix("http://"), timeout=PATIENCE_S)
        connection.request("GET", "/b/k")
        received = read_until_reset(connection.getresponse())
        connection.close()
        [record] = proxy.journal
    assert 0 < record.bytes < len(BODY)
    assert received == BODY[: record.bytes]


def read_until_reset(reply: http.client.HTTPResponse) -> bytes:
    received = b""
    try:
        while piece := reply.read1():
            received += piece
    except ConnectionResetError:
        return received
    raise AssertionError("it ended in good order")


def test_a_reply_without_a_body_breaks_in_its_headers(s3_server: S3Server, s3_bucket: str) -> None:
    faults = Faults(reads=always(Fault.BROKEN_BODY), writes=always(Fault.BROKEN_BODY))
    with proxied(s3_server, faults=faults) as (proxy, client):
        with pytest.raises(botocore.exceptions.BotoCoreError):
            client.put_object(Bucket=s3_bucket, Key="a", Body=BODY)
        with pytest.raises(botocore.exceptions.BotoCoreError):
            client.head_object(Bucket=s3_bucket, Key="a")
        assert [record.status for record in proxy.journal] == [200, 200]
    assert get(s3_server.client(), s3_bucket) == BODY


def test_a_broken_chunked_reply_never_gets_its_last_chunk() -> None:
    chunked = b"4\r\nabcd\r\n0\r\n\r\n"
    with (
        _raw_server(Reply(body=chunked)) as (url, _),
        FaultProxy(url, faults=Faults(writes=always(Fault.BROKEN_BODY))) as proxy,
    ):
        connection = http.client.HTTPConnection(proxy.endpoint_url.removeprefix("http://"), timeout=PATIENCE_S)
        connection.request("POST", "/x", body=iter([b"one"]), encode_chunked=True)
        with pytest.raises((ConnectionResetError, http.client.IncompleteRead)):
            connection.getresponse().read()
        connection.close()
        assert [(record.fault, record.status) for record in proxy.journal] == [(Fault.BROKEN_BODY, 200)]


def test_a_stall_lasts_until_the_client_gives_up(s3_server: S3Server, s3_bucket: str) -> None:
    s3_server.put(s3_bucket, "a", BODY)
    with FaultProxy(s3_server.endpoint_url, faults=always_on_reads(Fault.STALL, stall_s=600)) as proxy:
        client = client_of(s3_server, proxy.endpoint_url)
        reply = client.get_object(Bucket=s3_bucket, Key="a")
        reply["Body"].set_socket_timeout(0.5)
        with pytest.raises(botocore.exceptions.ReadTimeoutError):
            reply["Body"].read()
        reply["Body"].close()
        client.close()
        [record] = proxy.journal
        assert record.fault is Fault.STALL
        assert record.bytes < len(BODY)


def test_a_stall_ends_with_a_reset_when_its_time_is_over(s3_server: S3Server, s3_bucket: str) -> None:
    s3_server.put(s3_bucket, "a", BODY)
    with proxied(s3_server, faults=always_on_reads(Fault.STALL, stall_s=0.2)) as (_, client):
        reply = client.get_object(Bucket=s3_bucket, Key="a")
        with pytest.raises(botocore.exceptions.ResponseStreamingError):
            reply["Body"].read()


def test_a_flip_changes_one_bit_of_an_object_and_none_of_a_listing(s3_server: S3Server, s3_bucket: str) -> None:
    s3_server.put(s3_bucket, "a", BODY)
    flipped = []
    for seed in (1, 2, 1):
        with proxied(s3_server, seed=seed, faults=always_on_reads(Fault.FLIP)) as (proxy, client):
            assert client.list_objects_v2(Bucket=s3_bucket)["KeyCount"] == 1
            with pytest.raises(client.exceptions.NoSuchKey):
                get(client, s3_bucket, "missing")
            reply = client.get_object(Bucket=s3_bucket, Key="a")
            flipped.append(reply["Body"].read())
            assert [record.fault for record in proxy.journal] == [None, None, Fault.FLIP]
    assert flipped[0] == flipped[2] != flipped[1]
    difference = int.from_bytes(flipped[0]) ^ int.from_bytes(BODY)
    assert difference.bit_count() == 1


def test_no_request_is_broken_more_often_in_a_row_than_allowed(s3_server: S3Server, s3_bucket: str) -> None:
    s3_server.put(s3_bucket, "a", BODY)
    faults = always_on_reads(Fault.STATUS, max_per_request=3)
    with proxied(s3_server, faults=faults) as (proxy, client):
        for _ in range(2):
            for _ in range(3):
                with pytest.raises(botocore.exceptions.ClientError):
                    get(client, s3_bucket)
            assert get(client, s3_bucket) == BODY
        assert [record.fault for record in proxy.journal] == [*[Fault.STATUS] * 3, None] * 2
        assert proxy.count() == {Fault.STATUS: 6, None: 2}


# --- The seed ---


def test_the_same_seed_and_requests_meet_the_same_faults_however_they_are_scheduled(
    s3_server: S3Server, s3_bucket: str
) -> None:
    keys = [f"{number:02}" for number in range(40)]
    for key in keys:
        s3_server.put(s3_bucket, key, key.encode() * 50)
    odds = Odds(status=0.15, reset=0.1, broken_body=0.1, flip=0.1, lost_reply=0.1)

    def outcome(seed: int, num_threads: int, order: list[str]) -> dict[tuple[str, str], list[tuple[Fault | None, int]]]:
        with proxied(s3_server, seed=seed, faults=Faults(reads=odds, writes=odds)) as (proxy, client):

            def work(key: str) -> None:
                for _ in range(3):
                    for request in (client.get_object, client.delete_object_tagging):
                        with contextlib.suppress(
                            botocore.exceptions.ClientError, botocore.exceptions.BotoCoreError, OSError
                        ):
                            reply = request(Bucket=s3_bucket, Key=key)
                            if "Body" in reply:
                                reply["Body"].read()

            with ThreadPoolExecutor(num_threads) as pool:
                list(pool.map(work, order))
            found: dict[tuple[str, str], list[tuple[Fault | None, int]]] = {}
            for record in proxy.journal:
                found.setdefault((record.method, record.path), []).append((record.fault, record.bytes))
            return found

    first = outcome(5, 1, keys)
    assert len(first) == 80
    assert {fault for faults in first.values() for fault, _ in faults} == {
        None,
        Fault.STATUS,
        Fault.RESET,
        Fault.BROKEN_BODY,
        Fault.FLIP,
        Fault.LOST_REPLY,
    }
    assert outcome(5, 16, keys[::-1]) == first
    assert outcome(6, 16, keys) != first


def test_faults_come_about_as_often_as_their_odds_say() -> None:
    odds = Odds(status=0.2, reset=0.1, broken_body=0.1, stall=0.05, flip=0.05, lost_reply=0.1)
    picked = [odds.pick(request(n).draw(3, "fault")) for n in range(10_000)]
    for fault in Fault:
        assert picked.count(fault) == pytest.approx(10_000 * getattr(odds, fault), rel=0.15)


def request(n: int, **headers: str) -> Request:
    return Request(n=n, method="GET", path=f"/b/{n}", query="", headers=headers, seen=0)


def test_stretches_of_one_object_are_requests_of_their_own() -> None:
    draws = {request(0, range=f"bytes={start}-{start + 9}").draw(0, "fault") for start in range(100)}
    assert len(draws) == 100


@pytest.mark.parametrize("odds", [{"status": -0.1}, {"status": 0.6, "reset": 0.6}])
def test_impossible_odds_are_refused(odds: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="at least 0 each and at most 1 together"):
        Odds(**odds)


# --- The store is down; named moments ---


def test_a_store_that_is_down_refuses_new_connections_and_resets_open_ones(s3_server: S3Server, s3_bucket: str) -> None:
    s3_server.put(s3_bucket, "a", BODY)
    with proxied(s3_server) as (proxy, client):
        port = port_of(proxy)
        with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as idle:
            assert get(client, s3_bucket) == BODY
            proxy.down = True
            with pytest.raises(ConnectionResetError):
                idle.recv(1)
        with pytest.raises(botocore.exceptions.EndpointConnectionError):
            get(client, s3_bucket)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), PATIENCE_S)
        proxy.down = False
        assert get(client, s3_bucket) == BODY
        assert len(proxy.journal) == 2


def test_a_put_can_be_held_before_the_store_has_it(s3_server: S3Server, s3_bucket: str) -> None:
    with proxied(s3_server) as (proxy, client), ThreadPoolExecutor(1) as pool:
        with proxy.hold(lambda request: request.path.endswith("/a")) as hold:
            putting = pool.submit(client.put_object, Bucket=s3_bucket, Key="a", Body=b"x")
            hold.wait()
            client.put_object(Bucket=s3_bucket, Key="b", Body=b"y")  # others pass
            assert keys_in(s3_server, s3_bucket) == ["b"]
        putting.result(PATIENCE_S)
    assert keys_in(s3_server, s3_bucket) == ["a", "b"]


def test_a_put_can_be_held_when_the_store_has_it_and_the_client_does_not_know(
    s3_server: S3Server, s3_bucket: str
) -> None:
    with proxied(s3_server) as (proxy, client), ThreadPoolExecutor(1) as pool:
        hold = proxy.hold(lambda request: request.method == "PUT", after=True)
        putting = pool.submit(client.put_object, Bucket=s3_bucket, Key="a", Body=b"x")
        hold.wait()
        assert keys_in(s3_server, s3_bucket) == ["a"]
        assert not putting.done()
        proxy.down = True  # the store has it, and goes away before it can say so
        hold.release()
        with pytest.raises(botocore.exceptions.BotoCoreError):
            putting.result(PATIENCE_S)


def keys_in(server: S3Server, bucket: str) -> list[str]:
    return [entry["Key"] for entry in server.client().list_objects_v2(Bucket=bucket).get("Contents", ())]


def test_waiting_for_a_request_that_never_comes_says_so(s3_server: S3Server) -> None:
    with (
        FaultProxy(s3_server.endpoint_url) as proxy,
        proxy.hold(lambda _: True) as hold,
        pytest.raises(TimeoutError, match=r"no matching request came within 0\.05 s"),
    ):
        hold.wait(0.05)


def test_callbacks_choose_a_fault_at_each_of_the_two_moments(s3_server: S3Server, s3_bucket: str) -> None:
    def on_request(request: Request) -> Fault | None:
        return Fault.RESET if request.path.endswith("/a") else None

    def on_reply(request: Request) -> Fault | None:
        return Fault.LOST_REPLY if request.path.endswith("/b") else None

    with proxied(s3_server, on_request=on_request, on_reply=on_reply) as (proxy, client):
        for key in ("a", "b"):
            with pytest.raises(botocore.exceptions.BotoCoreError):
                client.put_object(Bucket=s3_bucket, Key=key, Body=b"x")
        client.put_object(Bucket=s3_bucket, Key="c", Body=b"x")
        assert [record.fault for record in proxy.journal] == [Fault.RESET, Fault.LOST_REPLY, None]
    assert keys_in(s3_server, s3_bucket) == ["b", "c"]


def test_a_callback_can_take_the_store_down_with_the_request_it_was_asked_about(
    s3_server: S3Server, s3_bucket: str
) -> None:
    def on_reply(_: Request) -> None:
        proxy.down = True

    with proxied(s3_server, on_reply=on_reply) as (proxy, client):
        with pytest.raises(botocore.exceptions.ConnectionClosedError):
            client.put_object(Bucket=s3_bucket, Key="a", Body=b"x")
        with pytest.raises(botocore.exceptions.EndpointConnectionError):
            client.put_object(Bucket=s3_bucket, Key="b", Body=b"x")
    assert keys_in(s3_server, s3_bucket) == ["a"]


def test_no_thread_outlives_the_proxy(s3_server: S3Server, s3_bucket: str) -> None:
    before = set(threading.enumerate())
    with contextlib.ExitStack() as stack:
        with FaultProxy(s3_server.endpoint_url, faults=always_on_reads(Fault.STALL, stall_s=600)) as proxy:
            hold = proxy.hold(lambda request: request.method == "HEAD")
            for data in (b"", b"GET", b"GET / HTTP/1.1\r\n\r\n", b"HEAD / HTTP/1.1\r\n\r\n", b"nonsense\r\n\r\n"):
                sock = stack.enter_context(socket.create_connection(("127.0.0.1", port_of(proxy)), PATIENCE_S))
                sock.sendall(data)
            hold.wait()
        wait_until(lambda: not set(threading.enumerate()) - before)
        assert not set(threading.enumerate()) - before


# --- As a process of its own ---


def test_as_a_process_it_says_where_it_listens_and_leaves_a_journal(
    s3_server: S3Server, s3_bucket: str, tmp_path: Path
) -> None:
    journal = tmp_path / "journal.jsonl"
    command = [sys.executable, "-m", "tests.faults", "--target", s3_server.endpoint_url, "--seed", "3"]
    command += ["--write-lost-reply", "1", "--max-per-request", "1", "--journal", str(journal)]
    root = Path(__file__).resolve().parents[1]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root, env=dict(os.environ)) as process:
        try:
            assert process.stdout is not None
            client = client_of(s3_server, json.loads(process.stdout.readline())["endpoint_url"])
            with pytest.raises(botocore.exceptions.BotoCoreError):
                client.put_object(Bucket=s3_bucket, Key="a", Body=b"x")
            assert get(client, s3_bucket) == b"x"
            client.close()
            process.send_signal(signal.SIGTERM)
            assert json.loads(process.stdout.readline()) == {"lost_reply": 1, "none": 1}
            assert process.wait(PATIENCE_S) == 0
        finally:
            process.kill()
    path = f"/{s3_bucket}/a"
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    query = lines[1]["query"]  # boto3's own business
    assert lines == [
        {"n": 0, "method": "PUT", "path": path, "query": "", "fault": "lost_reply", "status": 200, "bytes": 0},
        {"n": 1, "method": "GET", "path": path, "query": query, "fault": None, "status": 200, "bytes": 1},
    ]
