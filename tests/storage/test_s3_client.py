"""How requests are signed, addressed and paid for; credentials that renew themselves."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from lfm_scan.errors import AccessDeniedError, ConfigError
from lfm_scan.storage import S3Store, StorageConfig
from lfm_scan.storage.s3_client import forget_clients, open_client
from tests.servers import Reply, Request, ScriptedServer

_ROLE = "arn:aws:iam::123456789012:role/scanner"
_LISTING = (
    b'<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
    b"<IsTruncated>false</IsTruncated></ListBucketResult>"
)


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Credentials in the environment, others in two profiles."""
    (tmp_path / "credentials").write_text(
        "[default]\naws_access_key_id = of-default\naws_secret_access_key = secret\n"
        "[other]\naws_access_key_id = of-other\naws_secret_access_key = secret\n"
    )
    (tmp_path / "config").write_text("[profile other]\nregion = eu-west-3\n")
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "of-environment")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    forget_clients()
    yield
    forget_clients()


def good(request: Request) -> Reply:
    if "list-type" in request.target:
        return Reply(body=_LISTING)
    if "range" in request.headers:
        return Reply(206, b"d", {"Content-Range": "bytes 0-0/4"})
    headers = {"ETag": f'"{hashlib.md5(b"data").hexdigest()}"', "Last-Modified": "Sat, 21 Nov 2026 05:00:00 GMT"}
    return Reply(200, b"" if request.method == "PUT" else b"data", headers)


def do_everything(store: S3Store) -> None:
    list(store.list("s3://bucket/"))
    store.get("s3://bucket/a")
    store.get_range("s3://bucket/a", 0, 1)
    store.head("s3://bucket/a")
    store.create("s3://bucket/a", b"data")
    store.replace("s3://bucket/a", b"data")


def requests_of(**settings: Any) -> list[Request]:  # noqa: ANN401 - as StorageConfig
    """Return the requests that doing everything takes: list, get, get_range, head, create, replace."""
    with ScriptedServer(good) as server:
        do_everything(S3Store(StorageConfig(endpoint_url=server.endpoint_url, **settings)))
        assert len(server.requests) == 6
        return server.requests


def signer_of(request: Request) -> str:
    """Return key and region a request was signed with."""
    found = re.search(r"Credential=([^/]+)/\d+/([^/]+)/", request.headers["authorization"])
    assert found is not None
    return f"{found[1]} {found[2]}"


# --- Settings ---


def test_every_request_says_who_pays_if_it_is_us() -> None:
    assert [request.headers.get("x-amz-request-payer") for request in requests_of()] == [None] * 6
    paying = requests_of(requester_pays=True)
    assert [request.headers.get("x-amz-request-payer") for request in paying] == ["requester"] * 6


def test_what_is_written_is_encrypted_as_asked() -> None:
    def encryption(**settings: str) -> list[tuple[str | None, str | None]]:
        return [
            (
                request.headers.get("x-amz-server-side-encryption"),
                request.headers.get("x-amz-server-side-encryption-aws-kms-key-id"),
            )
            for request in requests_of(**settings)
        ]

    assert encryption() == [(None, None)] * 6
    assert encryption(sse="AES256") == [(None, None)] * 4 + [("AES256", None)] * 2
    assert encryption(sse="aws:kms", kms_key_id="key") == [(None, None)] * 4 + [("aws:kms", "key")] * 2


def test_what_is_written_carries_its_md5() -> None:
    *reads, create, replace = requests_of()
    assert [request.headers.get("content-md5") for request in reads] == [None] * 4
    assert create.headers["content-md5"] == replace.headers["content-md5"] == "jXd/OF09/siBXSD3SWAm3A=="
    assert (create.headers.get("if-none-match"), replace.headers.get("if-none-match")) == ("*", None)


def test_anonymous_requests_are_not_signed() -> None:
    assert not any("authorization" in request.headers for request in requests_of(anonymous=True))


@pytest.mark.parametrize(
    ("addressing", "url"),
    [
        ("auto", "https://s3.example.org/bucket/key"),
        ("path", "https://s3.example.org/bucket/key"),
        ("virtual", "https://bucket.s3.example.org/key"),
    ],
)
def test_the_bucket_is_where_the_addressing_puts_it(addressing: Any, url: str) -> None:  # noqa: ANN401
    config = StorageConfig(endpoint_url="https://s3.example.org", addressing=addressing)
    signed = open_client(config, patient=True).boto.generate_presigned_url(
        "get_object", {"Bucket": "bucket", "Key": "key"}
    )
    assert signed.partition("?")[0] == url


def test_a_client_has_the_timeouts_and_connections_of_its_configuration() -> None:
    config = StorageConfig(connect_timeout=4, read_timeout=20, max_connections=7, region="eu-north-1")
    patient = open_client(config, patient=True).boto.meta
    assert (patient.config.connect_timeout, patient.config.read_timeout) == (4, 20)
    assert (patient.config.max_pool_connections, patient.region_name) == (7, "eu-north-1")
    quick = open_client(config, patient=False).boto.meta.config
    assert (quick.connect_timeout, quick.read_timeout) == (2, 5)


def test_one_client_serves_all_stores_of_a_configuration() -> None:
    config = StorageConfig(endpoint_url="https://s3.example.org")
    assert open_client(config, patient=True) is open_client(config, patient=True)
    assert open_client(config, patient=True) is not open_client(config, patient=False)
    assert open_client(config, patient=True) is not open_client(StorageConfig(), patient=True)


def test_an_endpoint_that_is_no_url_is_a_wrong_setting() -> None:
    with pytest.raises(ConfigError, match="--endpoint-url http:// or --region"):
        S3Store(StorageConfig(endpoint_url="http://")).head("s3://bucket/a")


# --- Profiles ---


def test_a_profile_has_its_own_credentials_and_region() -> None:
    assert {signer_of(request) for request in requests_of()} == {"of-environment us-east-1"}
    assert {signer_of(request) for request in requests_of(profile="other")} == {"of-other eu-west-3"}
    assert {signer_of(request) for request in requests_of(profile="other", region="x-1")} == {"of-other x-1"}


def test_a_profile_that_does_not_exist_is_a_wrong_setting() -> None:
    with pytest.raises(ConfigError, match="--profile nobody: the AWS configuration files have no such profile"):
        S3Store(StorageConfig(profile="nobody")).head("s3://bucket/a")


def test_credentials_that_were_missing_once_are_looked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with ScriptedServer(good) as server:
        store = S3Store(StorageConfig(endpoint_url=server.endpoint_url))
        with monkeypatch.context() as without:
            for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
                without.delenv(name)
            without.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
            with pytest.raises(AccessDeniedError, match="no credentials found"):
                store.get("s3://bucket/a")
        assert store.get("s3://bucket/a").data == b"data"


# --- Roles ---


class TokenService:
    """STS: hands out credentials that expire after some seconds, numbered."""

    def __init__(self, lifetime_s: int) -> None:
        self._lifetime = timedelta(seconds=lifetime_s)
        self.num_issued = 0

    def __call__(self, _: Request) -> Reply:
        self.num_issued += 1
        expiration = (datetime.now(UTC) + self._lifetime).isoformat()
        return Reply(
            body=(
                '<AssumeRoleResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><AssumeRoleResult><Credentials>'
                f"<AccessKeyId>of-role-{self.num_issued}</AccessKeyId><SecretAccessKey>secret</SecretAccessKey>"
                f"<SessionToken>token-{self.num_issued}</SessionToken><Expiration>{expiration}</Expiration>"
                "</Credentials></AssumeRoleResult></AssumeRoleResponse>"
            ).encode()
        )


@pytest.mark.parametrize(("lifetime_s", "tokens"), [(60, ["token-1", "token-2", "token-3"]), (3600, ["token-1"] * 3)])
def test_credentials_of_a_role_are_renewed_before_they_expire(
    monkeypatch: pytest.MonkeyPatch, lifetime_s: int, tokens: list[str]
) -> None:
    with ScriptedServer(TokenService(lifetime_s)) as sts, ScriptedServer(good) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", sts.endpoint_url)
        store = S3Store(StorageConfig(endpoint_url=server.endpoint_url, assume_role=_ROLE, external_id="ext"))
        for _ in range(3):
            store.get("s3://bucket/a")
        assert [request.headers["x-amz-security-token"] for request in server.requests] == tokens
        assert len(sts.requests) == len(set(tokens))
        for part in (b"RoleSessionName=lfm-scan", b"ExternalId=ext", b"role%2Fscanner"):
            assert part in sts.requests[0].body
        assert signer_of(sts.requests[0]) == "of-environment us-east-1"


def test_a_role_is_assumed_with_the_credentials_of_the_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    with ScriptedServer(TokenService(3600)) as sts, ScriptedServer(good) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", sts.endpoint_url)
        S3Store(StorageConfig(endpoint_url=server.endpoint_url, profile="other", assume_role=_ROLE)).head("s3://b/a")
        assert signer_of(sts.requests[0]) == "of-other eu-west-3"
        assert signer_of(server.requests[0]) == "of-role-1 eu-west-3"


def test_a_role_that_may_not_be_assumed_is_denied(monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = (
        b"<ErrorResponse><Error><Code>AccessDenied</Code><Message>not authorized</Message></Error></ErrorResponse>"
    )
    with ScriptedServer(lambda _: Reply(403, refusal)) as sts:
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", sts.endpoint_url)
        with pytest.raises(AccessDeniedError, match=r"--assume-role was refused \(AccessDenied\): not authorized"):
            S3Store(StorageConfig(endpoint_url="http://127.0.0.1:1", assume_role=_ROLE)).head("s3://bucket/a")
