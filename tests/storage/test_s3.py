"""S3Store against a real server; what that server will not do on request, against a proxy or a script."""

from __future__ import annotations

import base64
import hashlib
import re
import socket
import threading
import time
import urllib.parse
import zlib
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any
from xml.sax.saxutils import escape

import pytest

from lfm_scan.errors import (
    AccessDeniedError,
    ChangedError,
    ConfigError,
    NotFoundError,
    OversizeError,
    StorageError,
    UnreachableError,
)
from lfm_scan.storage import LocalStore, PutOutcome, S3Store, StorageConfig, open_object, open_store
from lfm_scan.storage.s3_client import forget_clients
from tests import awkward, faults
from tests.servers import FaultyProxy, Reply, Request, S3Server, ScriptedServer, free_port
from tests.waiting import wait_until

_NUM_RACERS = 16
_NUM_QUICK_TRIES = 5
_LAST_MODIFIED = {"Last-Modified": "Sat, 21 Nov 2026 05:00:00 GMT"}


def md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


def at(endpoint_url: str, *, patient: bool = True, **settings: Any) -> S3Store:  # noqa: ANN401 - as StorageConfig
    return S3Store(StorageConfig(endpoint_url=endpoint_url, **settings), patient=patient)


@pytest.fixture
def store(s3_server: S3Server, s3_bucket: str) -> S3Store:
    return at(s3_server.endpoint_url)


@pytest.fixture
def _credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any credentials, for servers that check none."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any")
    forget_clients()


# --- Keys ---


def test_every_awkward_key_can_be_created_listed_and_fetched(store: S3Store, s3_bucket: str) -> None:
    contents = {**awkward.awkward_bytes(), " lead": b"1", "trail ": b"2", "tab\there": b"3", "<&>;'": b"4"}
    for key, data in contents.items():
        assert store.create(f"s3://{s3_bucket}/{key}", data) == PutOutcome(True, md5(data), len(data))
    found = {item.uri: item for item in store.list(f"s3://{s3_bucket}/")}
    assert sorted(found) == sorted(f"s3://{s3_bucket}/{key}" for key in contents)
    for key, data in contents.items():
        item = found[f"s3://{s3_bucket}/{key}"]
        assert (item.size_bytes, item.etag) == (len(data), md5(data))
        fetched = store.get(item.uri)
        assert fetched.data == data
        assert (fetched.info.uri, fetched.info.size_bytes, fetched.info.etag) == (item.uri, len(data), md5(data))


@pytest.mark.usefixtures("_credentials")
def test_keys_that_look_like_paths_are_not_tidied_up() -> None:
    # SeaweedFS itself merges slashes; S3 does not, so what matters is what goes over the wire.
    keys = ["/lead", "//two", "a//b", "a/./b", "a/../b", "../up", "./here", "a/b/", "%2F", "a+b", "new\nline", "\u00e9"]
    objects = {key: f"body of {key}".encode() for key in keys}

    def answer(request: Request) -> Reply:
        path, _, query = request.target.partition("?")
        if "list-type=2" in query:
            return Reply(body=listing("bucket", objects))
        data = objects[urllib.parse.unquote(path).removeprefix("/bucket/")]
        return Reply(body=data, headers={"ETag": f'"{md5(data)}"', **_LAST_MODIFIED})

    with ScriptedServer(answer) as server:
        found = [item.uri for item in at(server.endpoint_url).list("s3://bucket/")]
        assert found == [f"s3://bucket/{key}" for key in keys]
        assert {uri: at(server.endpoint_url).get(uri).data for uri in found} == {
            f"s3://bucket/{key}": data for key, data in objects.items()
        }


def listing(bucket: str, objects: dict[str, bytes]) -> bytes:
    """Return a page of ListObjectsV2, keys encoded as S3 encodes them when asked to."""
    entries = "".join(
        f"<Contents><Key>{escape(urllib.parse.quote(key))}</Key><Size>{len(data)}</Size>"
        f"<ETag>&quot;{md5(data)}&quot;</ETag><LastModified>2026-11-21T05:00:00.000Z</LastModified></Contents>"
        for key, data in objects.items()
    )
    return (
        '<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        f"<Name>{bucket}</Name><EncodingType>url</EncodingType><IsTruncated>false</IsTruncated>{entries}"
        "</ListBucketResult>"
    ).encode()


# --- list ---


def test_a_listing_of_many_pages_is_complete_and_ordered(s3_server: S3Server, store: S3Store, s3_bucket: str) -> None:
    client = s3_server.client()
    keys = [f"{number * 7919 % 1050:04}.png" for number in range(1050)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: client.put_object(Bucket=s3_bucket, Key=key, Body=b"x"), keys))
    assert [item.uri for item in store.list(f"s3://{s3_bucket}")] == [f"s3://{s3_bucket}/{key}" for key in sorted(keys)]


def test_a_listing_tells_size_etag_and_time(store: S3Store, s3_bucket: str) -> None:
    store.create(f"s3://{s3_bucket}/a.png", b"12345")
    [found] = store.list(f"s3://{s3_bucket}/")
    assert (found.uri, found.size_bytes, found.etag) == (f"s3://{s3_bucket}/a.png", 5, md5(b"12345"))
    assert found.last_modified is not None
    assert abs(found.last_modified - datetime.now(UTC)) < timedelta(minutes=1)


def test_a_listing_goes_by_prefix(store: S3Store, s3_bucket: str) -> None:
    for key in ("in/a", "in/b", "in.txt", "other"):
        store.create(f"s3://{s3_bucket}/{key}", b"x")
    assert {item.uri for item in store.list(f"s3://{s3_bucket}/in/")} == {
        f"s3://{s3_bucket}/in/a",
        f"s3://{s3_bucket}/in/b",
    }
    assert len(list(store.list(f"s3://{s3_bucket}/in"))) == 3


def test_directory_markers_are_left_out(s3_server: S3Server) -> None:
    objects = {"in/": b"", "in/a": b"x", "in/empty": b"", "in/sub/": b"", "in/odd/": b"not empty"}
    with ScriptedServer(lambda _: Reply(body=listing("bucket", objects))) as server:
        found = [item.uri for item in at(server.endpoint_url, anonymous=True).list("s3://bucket/in/")]
    assert found == ["s3://bucket/in/a", "s3://bucket/in/empty", "s3://bucket/in/odd/"]


def test_a_directory_marker_on_the_real_server_is_left_out(s3_server: S3Server, store: S3Store, s3_bucket: str) -> None:
    s3_server.client().put_object(Bucket=s3_bucket, Key="in/", Body=b"")
    store.create(f"s3://{s3_bucket}/in/a", b"x")
    assert [item.uri for item in store.list(f"s3://{s3_bucket}/in/")] == [f"s3://{s3_bucket}/in/a"]


def test_an_empty_bucket_or_prefix_lists_nothing(store: S3Store, s3_bucket: str) -> None:
    assert list(store.list(f"s3://{s3_bucket}")) == []
    assert list(store.list(f"s3://{s3_bucket}/nothing/here")) == []


# --- get ---


def test_an_object_over_the_limit_is_refused(store: S3Store, s3_bucket: str) -> None:
    store.create(f"s3://{s3_bucket}/a", b"12345")
    assert store.get(f"s3://{s3_bucket}/a", max_bytes=5).data == b"12345"
    with pytest.raises(OversizeError, match="5 bytes, the limit is 4"):
        store.get(f"s3://{s3_bucket}/a", max_bytes=4)


@pytest.mark.parametrize("forward_bytes", [0, 100, 50_000])
def test_a_reply_that_breaks_off_is_fetched_again(
    s3_server: S3Server, store: S3Store, s3_bucket: str, forward_bytes: int
) -> None:
    data = bytes(range(256)) * 1000
    store.create(f"s3://{s3_bucket}/a", data)
    with FaultyProxy(s3_server.port, 2, forward_bytes, match=b"GET /") as proxy:
        assert at(proxy.endpoint_url).get(f"s3://{s3_bucket}/a").data == data
        assert proxy.num_broken == 2


def test_a_body_that_always_breaks_off_is_an_error_in_the_end(
    s3_server: S3Server, store: S3Store, s3_bucket: str
) -> None:
    store.create(f"s3://{s3_bucket}/a", bytes(100_000))
    with FaultyProxy(s3_server.port, 99, 5_000, match=b"GET /") as proxy:
        with pytest.raises(StorageError, match=f"s3://{s3_bucket}/a: "):
            at(proxy.endpoint_url, patient=False).get(f"s3://{s3_bucket}/a")
        assert proxy.num_broken == _NUM_QUICK_TRIES


@pytest.mark.usefixtures("_credentials")
def test_a_body_that_differs_from_its_etag_is_fetched_again() -> None:
    good, bodies = b"good bytes", [b"bad  bytes", b"good bytez", b"good bytes"]

    def answer(_: Request) -> Reply:
        return Reply(body=bodies.pop(0), headers={"ETag": f'"{md5(good)}"', **_LAST_MODIFIED})

    with ScriptedServer(answer) as server:
        assert at(server.endpoint_url).get("s3://bucket/a").data == good
        assert len(server.requests) == 3


@pytest.mark.usefixtures("_credentials")
def test_a_body_that_never_matches_its_etag_is_refused() -> None:
    with ScriptedServer(
        lambda _: Reply(body=b"bad", headers={"ETag": f'"{md5(b"good")}"', **_LAST_MODIFIED})
    ) as server:
        with pytest.raises(StorageError, match="s3://bucket/a: the bytes do not match the ETag"):
            at(server.endpoint_url, patient=False).get("s3://bucket/a")
        assert len(server.requests) == _NUM_QUICK_TRIES


@pytest.mark.usefixtures("_credentials")
@pytest.mark.parametrize(
    "headers",
    [
        {"ETag": f'"{md5(b"parts")}-2"'},
        {"ETag": f'"{md5(b"other")}"', "x-amz-server-side-encryption": "aws:kms"},
        {"ETag": f'"{md5(b"other")}"', "x-amz-server-side-encryption-customer-algorithm": "AES256"},
    ],
)
def test_an_etag_that_is_no_md5_of_the_body_is_not_held_against_it(headers: dict[str, str]) -> None:
    with ScriptedServer(lambda _: Reply(body=b"data", headers={**headers, **_LAST_MODIFIED})) as server:
        assert at(server.endpoint_url).get("s3://bucket/a").data == b"data"
        assert len(server.requests) == 1


@pytest.mark.usefixtures("_credentials")
def test_a_verdict_is_not_asked_for_twice() -> None:
    for status, error in ((403, AccessDeniedError), (404, NotFoundError)):
        with ScriptedServer(lambda _, status=status: Reply(status)) as server:  # type: ignore[misc]
            with pytest.raises(error):
                at(server.endpoint_url).get("s3://bucket/a")
            assert len(server.requests) == 1


@pytest.mark.usefixtures("_credentials")
def test_a_busy_store_is_asked_again() -> None:
    replies = [Reply(503), Reply(500), Reply(body=b"x", headers={"ETag": f'"{md5(b"x")}"', **_LAST_MODIFIED})]
    with ScriptedServer(lambda _: replies.pop(0)) as server:
        assert at(server.endpoint_url).get("s3://bucket/a").data == b"x"


# --- create ---


def test_create_never_overwrites(store: S3Store, s3_bucket: str) -> None:
    assert store.create(f"s3://{s3_bucket}/part", b"first").created
    assert store.create(f"s3://{s3_bucket}/part", b"second!") == PutOutcome(False, md5(b"first"), 5)
    assert store.get(f"s3://{s3_bucket}/part").data == b"first"


def test_of_racing_creates_exactly_one_wins(store: S3Store, s3_bucket: str) -> None:
    for turn in range(2):
        barrier = threading.Barrier(_NUM_RACERS)
        uri = f"s3://{s3_bucket}/part-{turn}"

        def race(number: int, uri: str = uri, barrier: threading.Barrier = barrier) -> PutOutcome:
            data = f"racer {number:02}".encode() * 1000
            barrier.wait()
            return store.create(uri, data)

        with ThreadPoolExecutor(_NUM_RACERS) as pool:
            outcomes = list(pool.map(race, range(_NUM_RACERS)))
        [winner] = [number for number, outcome in enumerate(outcomes) if outcome.created]
        assert store.get(uri).data == f"racer {winner:02}".encode() * 1000
        assert {outcome.etag for outcome in outcomes} == {outcomes[winner].etag}


def test_a_put_whose_reply_was_lost_counts_as_created(s3_server: S3Server, store: S3Store, s3_bucket: str) -> None:
    with FaultyProxy(s3_server.port, 1, 0, match=b"PUT /") as proxy:
        outcome = at(proxy.endpoint_url).create(f"s3://{s3_bucket}/part", b"bytes")
        assert proxy.num_broken == 1
    assert outcome == PutOutcome(True, md5(b"bytes"), 5)
    assert store.get(f"s3://{s3_bucket}/part").data == b"bytes"


def test_a_put_whose_reply_was_lost_on_a_taken_key_does_not_count(
    s3_server: S3Server, store: S3Store, s3_bucket: str
) -> None:
    store.create(f"s3://{s3_bucket}/part", b"another driver's")
    with FaultyProxy(s3_server.port, 1, 0, match=b"PUT /") as proxy:
        outcome = at(proxy.endpoint_url).create(f"s3://{s3_bucket}/part", b"bytes")
        assert proxy.num_broken == 1
    assert outcome == PutOutcome(False, md5(b"another driver's"), 16)


@pytest.mark.usefixtures("_credentials")
def test_a_put_that_raced_with_another_is_sent_again_as_s3_asks() -> None:
    conflict = b"<Error><Code>ConditionalRequestConflict</Code><Message>Try again</Message></Error>"
    replies = [Reply(409, conflict), Reply(200, headers={"ETag": f'"{md5(b"x")}"'})]
    with ScriptedServer(lambda _: replies.pop(0)) as server:
        assert at(server.endpoint_url).create("s3://bucket/part", b"x").created
        assert [request.headers["if-none-match"] for request in server.requests] == ["*", "*"]


@pytest.mark.usefixtures("_credentials")
def test_a_put_under_kms_whose_reply_was_lost_is_known_by_its_bytes() -> None:
    stored = {"ours": b"bytes", "another": b"other"}

    def answer(request: Request) -> Reply:
        data = stored[request.target.rsplit("/", 1)[1]]
        headers = {"ETag": f'"{md5(b"no MD5 of these")}"', "x-amz-server-side-encryption": "aws:kms", **_LAST_MODIFIED}
        return Reply(412) if request.method == "PUT" else Reply(body=data, headers=headers)

    with ScriptedServer(answer) as server:
        store = at(server.endpoint_url, sse="aws:kms")
        assert store.create("s3://bucket/ours", b"bytes") == PutOutcome(True, md5(b"no MD5 of these"), 5)
        assert store.create("s3://bucket/another", b"bytes") == PutOutcome(False, md5(b"no MD5 of these"), 5)
        assert [request.method for request in server.requests] == ["PUT", "HEAD", "GET"] * 2


# --- head, get_range, replace ---


def test_head_tells_what_get_does(store: S3Store, s3_bucket: str) -> None:
    store.create(f"s3://{s3_bucket}/a", b"12345")
    facts = store.head(f"s3://{s3_bucket}/a")
    assert (facts.uri, facts.size_bytes, facts.etag) == (f"s3://{s3_bucket}/a", 5, md5(b"12345"))
    assert facts == store.get(f"s3://{s3_bucket}/a").info
    assert facts.last_modified is not None
    assert facts.last_modified.tzinfo is UTC


def test_a_range_has_exactly_its_bytes(store: S3Store, s3_bucket: str) -> None:
    store.create(f"s3://{s3_bucket}/a", b"0123456789")
    etag = md5(b"0123456789")
    assert store.get_range(f"s3://{s3_bucket}/a", 3, 4) == b"3456"
    assert store.get_range(f"s3://{s3_bucket}/a", 0, 10, etag=etag) == b"0123456789"
    assert store.get_range(f"s3://{s3_bucket}/a", 9, 1, etag=etag) == b"9"


def test_a_range_of_an_object_that_changed_is_refused(store: S3Store, s3_bucket: str) -> None:
    uri = f"s3://{s3_bucket}/a"
    store.create(uri, b"0123456789")
    with pytest.raises(ChangedError, match=f"{uri}: it was overwritten since it was listed"):
        store.get_range(uri, 0, 4, etag=md5(b"another"))
    with pytest.raises(ChangedError, match=f"{uri}: ends at 10, its bytes up to 12 were listed"):
        store.get_range(uri, 8, 4)
    with pytest.raises(ChangedError, match=f"{uri}: it is shorter than it was"):
        store.get_range(uri, 10, 1)


@pytest.mark.parametrize("forward_bytes", [0, 100, 50_000])
def test_a_range_that_breaks_off_is_fetched_again(
    s3_server: S3Server, store: S3Store, s3_bucket: str, forward_bytes: int
) -> None:
    data = bytes(range(256)) * 1000
    store.create(f"s3://{s3_bucket}/a", data)
    with FaultyProxy(s3_server.port, 2, forward_bytes, match=b"GET /") as proxy:
        found = at(proxy.endpoint_url).get_range(f"s3://{s3_bucket}/a", 1000, 200_000, etag=md5(data))
        assert found == data[1000:201_000]
        assert proxy.num_broken == 2


@pytest.mark.usefixtures("_credentials")
@pytest.mark.parametrize(
    ("reply", "error", "message"),
    [
        (Reply(200, b"0123456789"), StorageError, "does not serve parts of objects"),
        (Reply(206, b"0123", {"Content-Range": "bytes 0-3/10"}), StorageError, "bytes 2 and on were asked for"),
        (Reply(206, b"2345", {"Content-Range": "bytes 2-5/10", "ETag": '"new"'}), ChangedError, "it was overwritten"),
        (Reply(206, b"23", {"Content-Range": "bytes 2-3/4", "ETag": '"old"'}), ChangedError, "ends at 4"),
        (Reply(412), ChangedError, "it was overwritten"),
    ],
)
def test_a_range_other_than_the_one_asked_for_is_refused(reply: Reply, error: type[StorageError], message: str) -> None:
    etag = "old" if error is ChangedError else None
    with ScriptedServer(lambda _: reply) as server, pytest.raises(error, match=f"s3://bucket/a: .*{message}"):
        at(server.endpoint_url, patient=False).get_range("s3://bucket/a", 2, 4, etag=etag)


@pytest.mark.usefixtures("_credentials")
def test_a_range_is_asked_for_under_its_etag() -> None:
    reply = Reply(206, b"2345", {"Content-Range": "bytes 2-5/10", "ETag": '"old"'})
    with ScriptedServer(lambda _: reply) as server:
        assert at(server.endpoint_url).get_range("s3://bucket/a", 2, 4, etag="old") == b"2345"
        [request] = server.requests
    assert (request.headers["range"], request.headers["if-match"]) == ("bytes=2-5", '"old"')


def test_an_object_is_read_as_a_file(store: S3Store, s3_bucket: str) -> None:
    data = bytes(range(256)) * 100
    store.create(f"s3://{s3_bucket}/a", data)
    [found] = store.list(f"s3://{s3_bucket}/a")
    with open_object(store, found, chunk_bytes=1000) as file:
        file.seek(5000)
        assert (file.read(3000), file.tell()) == (data[5000:8000], 8000)
    store.replace(f"s3://{s3_bucket}/a", data[::-1])
    with open_object(store, found) as file, pytest.raises(ChangedError):
        file.read()


def test_replace_overwrites(store: S3Store, s3_bucket: str) -> None:
    uri = f"s3://{s3_bucket}/status"
    store.replace(uri, b"first")
    store.replace(uri, b"second")
    assert store.get(uri).data == b"second"


# --- Versions ---


def test_a_version_is_read_as_it_was(s3_server: S3Server, store: S3Store, s3_bucket: str) -> None:
    client, uri = s3_server.client(), f"s3://{s3_bucket}/a"
    client.put_bucket_versioning(Bucket=s3_bucket, VersioningConfiguration={"Status": "Enabled"})
    old = client.put_object(Bucket=s3_bucket, Key="a", Body=b"old!")["VersionId"]
    client.put_object(Bucket=s3_bucket, Key="a", Body=b"newer")
    assert store.get(uri).data == b"newer"
    assert store.get(uri, version_id=old).data == b"old!"
    assert store.head(uri, version_id=old).size_bytes == 4
    assert store.get_range(uri, 1, 3, etag=md5(b"old!"), version_id=old) == b"ld!"
    client.delete_object(Bucket=s3_bucket, Key="a")
    assert store.get(uri, version_id=old).data == b"old!"
    with pytest.raises(NotFoundError):
        store.get(uri)


@pytest.mark.usefixtures("_credentials")
def test_the_mark_of_a_deletion_is_no_object() -> None:
    with (
        ScriptedServer(lambda _: Reply(405, headers={"x-amz-delete-marker": "true"})) as server,
        pytest.raises(NotFoundError, match="s3://bucket/a: not found"),
    ):
        at(server.endpoint_url).get("s3://bucket/a", version_id="v1")


def test_other_bytes_than_those_of_the_version_are_refused(s3_server: S3Server, store: S3Store, s3_bucket: str) -> None:
    store.create(f"s3://{s3_bucket}/a", b"x")  # this store has no versions here, and ignores that one is asked for
    with pytest.raises(StorageError, match=f"s3://{s3_bucket}/a: version 'v1' was asked for, its reply names none"):
        at(s3_server.endpoint_url, patient=False).get(f"s3://{s3_bucket}/a", version_id="v1")
    with (
        ScriptedServer(lambda _: Reply(body=b"x", headers={"x-amz-version-id": "v2", **_LAST_MODIFIED})) as server,
        pytest.raises(StorageError, match="version 'v1' was asked for, the store gave 'v2'"),
    ):
        at(server.endpoint_url).head("s3://bucket/a", version_id="v1")
    assert store.get(f"s3://{s3_bucket}/a", version_id="null").data == b"x"


# --- Checksums ---


@pytest.mark.usefixtures("_credentials")
def test_a_body_that_differs_from_its_checksum_is_fetched_again() -> None:
    good, bodies = b"good bytes", [b"bad  bytes", b"good bytes"]
    checksum = base64.b64encode(zlib.crc32(good).to_bytes(4, "big")).decode()

    def answer(_: Request) -> Reply:
        return Reply(
            body=bodies.pop(0),
            headers={"ETag": f'"{md5(b"parts")}-2"', "x-amz-checksum-crc32": checksum, **_LAST_MODIFIED},
        )

    with ScriptedServer(answer) as server:
        assert at(server.endpoint_url).get("s3://bucket/a").data == good
        assert [request.headers["x-amz-checksum-mode"] for request in server.requests] == ["ENABLED"] * 2


def test_an_object_stored_with_a_checksum_is_read(s3_server: S3Server, store: S3Store, s3_bucket: str) -> None:
    client = s3_server.client()
    client.put_object(Bucket=s3_bucket, Key="a", Body=b"0123", ChecksumAlgorithm="SHA256")
    upload = client.create_multipart_upload(Bucket=s3_bucket, Key="b", ChecksumAlgorithm="CRC32")["UploadId"]
    part = client.upload_part(
        Bucket=s3_bucket, Key="b", UploadId=upload, PartNumber=1, Body=b"4567", ChecksumAlgorithm="CRC32"
    )
    parts = [{"ETag": part["ETag"], "ChecksumCRC32": part["ChecksumCRC32"], "PartNumber": 1}]
    client.complete_multipart_upload(Bucket=s3_bucket, Key="b", UploadId=upload, MultipartUpload={"Parts": parts})
    assert store.get(f"s3://{s3_bucket}/a").data == b"0123"
    assert store.get_range(f"s3://{s3_bucket}/a", 1, 2) == b"12"
    assert store.get(f"s3://{s3_bucket}/b").data == b"4567"


# --- What goes wrong at the start ---


def test_a_missing_bucket_is_named(store: S3Store) -> None:
    for act in (
        lambda: list(store.list("s3://no-such-bucket-here/")),
        lambda: store.get("s3://no-such-bucket-here/a"),
        lambda: store.create("s3://no-such-bucket-here/a", b"x"),
    ):
        with pytest.raises(NotFoundError, match=r"s3://no-such-bucket-here/.*the bucket does not exist"):
            act()


def test_a_missing_key_is_not_found(store: S3Store, s3_bucket: str) -> None:
    with pytest.raises(NotFoundError, match=f"s3://{s3_bucket}/nothing: not found"):
        store.get(f"s3://{s3_bucket}/nothing")


@pytest.mark.parametrize("variable", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_credentials_are_denied(
    s3_server: S3Server, s3_bucket: str, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "wrong")
    with pytest.raises(AccessDeniedError, match="check the credentials and their policy"):
        list(at(s3_server.endpoint_url).list(f"s3://{s3_bucket}/"))


def test_unsigned_requests_to_a_private_bucket_are_denied(s3_server: S3Server, s3_bucket: str) -> None:
    with pytest.raises(AccessDeniedError, match=r"refused \w+ \(AccessDenied\)"):
        list(at(s3_server.endpoint_url, anonymous=True).list(f"s3://{s3_bucket}/"))


def test_without_credentials_the_message_says_how_to_give_them(
    s3_server: S3Server, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    with pytest.raises(AccessDeniedError, match="no credentials found: set AWS_ACCESS_KEY_ID"):
        list(at(s3_server.endpoint_url).list(f"s3://{s3_bucket}/"))


@pytest.mark.usefixtures("_credentials")
def test_a_closed_port_is_unreachable_within_seconds() -> None:
    start = time.monotonic()
    with pytest.raises(UnreachableError, match="check --endpoint-url and the network"):
        list(at(f"http://127.0.0.1:{free_port()}", patient=False).list("s3://bucket/"))
    assert time.monotonic() - start < 60  # the patience with an outage is 300 s


@pytest.mark.usefixtures("_credentials")
def test_a_store_that_never_answers_is_unreachable_after_a_few_tries() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(0)
        store = at(f"http://127.0.0.1:{silent.getsockname()[1]}", patient=False, read_timeout=0.5)
        with pytest.raises(UnreachableError, match="no answer from the store"):
            store.get("s3://bucket/a")
        num_connections = 0
        while True:
            try:
                silent.accept()[0].close()
            except BlockingIOError:
                break
            num_connections += 1
    assert num_connections == _NUM_QUICK_TRIES


@pytest.mark.usefixtures("_credentials")
def test_a_body_that_stalls_is_fetched_again_and_unreachable_in_the_end() -> None:
    stalled = Reply(body=b"half", headers={"Content-Length": "8", "ETag": f'"{md5(b"half")}"', **_LAST_MODIFIED})
    with ScriptedServer(lambda _: stalled) as server:
        with pytest.raises(UnreachableError, match=re.escape("s3://bucket/a: no answer from the store")):
            at(server.endpoint_url, patient=False, read_timeout=0.5).get("s3://bucket/a")
        wait_until(lambda: len(server.requests) >= _NUM_QUICK_TRIES)  # the store may give up before the server notes it
        assert len(server.requests) == _NUM_QUICK_TRIES


def test_a_uri_without_bucket_is_refused() -> None:
    with pytest.raises(StorageError, match="s3:///a: names no bucket; expected s3://bucket/prefix"):
        S3Store(StorageConfig()).get("s3:///a")


@pytest.mark.usefixtures("_credentials")
def test_a_bucket_name_that_cannot_be_is_refused() -> None:
    with pytest.raises(StorageError, match="not a valid bucket or key"):
        S3Store(StorageConfig()).get("s3://not a bucket/a")


# --- The door ---


def test_a_uri_opens_its_kind_of_store() -> None:
    assert isinstance(open_store("s3://bucket/a"), S3Store)
    for local in ("/data", "data/x", "file:///data", "odd:name"):
        assert isinstance(open_store(local), LocalStore)
    with pytest.raises(ConfigError, match="nosuch://bucket/a: unknown scheme; use a local path, s3://"):
        open_store("nosuch://bucket/a")


def test_an_error_whose_text_breaks_off_is_asked_for_again(s3_server: S3Server, s3_bucket: str) -> None:
    broken: list[str] = []

    def break_first(request: faults.Request) -> faults.Fault | None:
        if broken:
            return None
        broken.append(request.path)
        return faults.Fault.BROKEN_BODY

    with (
        faults.FaultProxy(s3_server.endpoint_url, on_reply=break_first) as proxy,
        pytest.raises(NotFoundError),
    ):
        at(proxy.endpoint_url).get(f"s3://{s3_bucket}/gone")
    assert broken == [f"/{s3_bucket}/gone"]
