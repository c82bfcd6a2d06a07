"""What a process counts of its requests, against what the server saw."""

from __future__ import annotations

import hashlib

import pytest

from lfm_scan.errors import StorageError
from lfm_scan.options import StorageConfig
from lfm_scan.storage import open_store, tries
from lfm_scan.storage.traffic import Traffic, count_retry, counted, traffic
from tests.servers import Reply, Request, ScriptedServer

_SLOW_DOWN = Reply(503, b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>")
_BROKEN = Reply(500, b"<Error><Code>InternalError</Code><Message>Please try again.</Message></Error>")
_GOOD = Reply(200, b"data", {"ETag": f'"{hashlib.md5(b"data").hexdigest()}"'})


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tries, "_FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(tries, "_LONGEST_WAIT_S", 0.01)


def _server(*replies: Reply) -> ScriptedServer:
    """Answer so, in this order, and well from then on."""
    waiting = list(replies)

    def answer(request: Request) -> Reply:
        reply = waiting.pop(0) if waiting else _GOOD
        return Reply(reply.status, b"" if request.method == "PUT" else reply.body, reply.headers)

    return ScriptedServer(answer)


def test_requests_to_s3_are_counted_with_all_their_tries() -> None:
    with _server(_GOOD, _GOOD, _BROKEN, _SLOW_DOWN) as server:
        store = open_store("s3://b/a", StorageConfig(endpoint_url=server.endpoint_url, anonymous=True, max_attempts=9))
        before = traffic()
        store.head("s3://b/a")
        store.create("s3://b/c", b"data")
        store.get("s3://b/a")

        assert traffic() - before == Traffic({"GET": 3, "HEAD": 1, "PUT": 1}, num_retries=2, num_throttles=1)
        assert len(server.requests) == 5


def test_a_request_that_is_given_up_was_retried_once_less_than_it_was_tried() -> None:
    gone = Reply(404, b"<Error><Code>NoSuchKey</Code><Message>none</Message></Error>")
    with _server(_BROKEN, gone) as server:
        store = open_store("s3://b/a", StorageConfig(endpoint_url=server.endpoint_url, anonymous=True))
        before = traffic()
        with pytest.raises(StorageError):
            store.get("s3://b/a")

        assert traffic() - before == Traffic({"GET": 2}, num_retries=1)


def test_web_servers_that_ask_for_fewer_requests_are_counted() -> None:
    with _server(Reply(429), Reply(503)) as server:
        store = open_store(f"{server.endpoint_url}/a", StorageConfig(max_attempts=4))
        before = traffic()
        store.get(f"{server.endpoint_url}/a")

        assert traffic() - before == Traffic({}, num_retries=2, num_throttles=1)


def test_what_a_call_asks_is_told_with_its_result() -> None:
    def ask(times: int) -> str:
        for _ in range(times):
            count_retry()
        return "done"

    assert counted(ask)(3) == ("done", Traffic({}, num_retries=3))
    assert counted(ask).__name__ == "ask"
