"""S3 and its compatible stores, through boto3.

boto3 retries a request that failed, but not a body that breaks off while it is read, and it reports a put whose reply
was lost as a conflict with itself. Both are handled here.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeVar

import boto3
import botocore
import botocore.exceptions
from botocore.config import Config

from lfm_scan.errors import (
    AccessDeniedError,
    NoSuchBucketError,
    NotFoundError,
    StorageError,
    UnreachableError,
)
from lfm_scan.options import StorageConfig
from lfm_scan.storage.base import Fetched, ObjectInfo, PutOutcome, check_size

T = TypeVar("T")

_PATIENT_ATTEMPTS: Final = 6
_QUICK_ATTEMPTS: Final = 2
_CONNECT_TIMEOUT_S: Final = 3
_READ_TIMEOUT_S: Final = 10
_QUICK_READ_TIMEOUT_S: Final = 5
_MAX_CONNECTIONS: Final = 64
_MD5_ETAG: Final = re.compile(r"[0-9a-f]{32}")

_NOT_FOUND: Final = frozenset({"404", "NoSuchKey", "NoSuchBucket", "NotFound"})
_DENIED: Final = frozenset(
    {
        "401",
        "403",
        "AccessDenied",
        "AllAccessDisabled",
        "ExpiredToken",
        "Forbidden",
        "InvalidAccessKeyId",
        "InvalidToken",
        "RequestTimeTooSkewed",
        "SignatureDoesNotMatch",
    }
)
_TAKEN: Final = frozenset({"412", "PreconditionFailed"})
# A conditional put that raced with another one: S3 asks to send it again.
_AGAIN: Final = frozenset({"409", "ConditionalRequestConflict", "OperationAborted"})
_UNREACHABLE: Final = (
    botocore.exceptions.EndpointConnectionError,
    botocore.exceptions.ConnectionError,
    botocore.exceptions.HTTPClientError,
)
_BODY_FAULTS: Final = (
    botocore.exceptions.IncompleteReadError,
    botocore.exceptions.ReadTimeoutError,
    botocore.exceptions.ResponseStreamingError,
)


class _BrokenReplyError(Exception):
    """A reply that broke off or stalled, or whose body does not have the bytes its ETag promises."""


class S3Store:
    """Objects of any bucket behind one endpoint."""

    def __init__(self, config: StorageConfig, *, patient: bool = True) -> None:
        self._config = config
        self._attempts = _PATIENT_ATTEMPTS if patient else _QUICK_ATTEMPTS

    def list(self, uri: str) -> Iterator[ObjectInfo]:
        """Yield the objects whose keys start with the URI's key, in key order."""
        bucket, prefix = split(uri)
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        try:
            for page in pages:
                for entry in page.get("Contents", ()):
                    if entry["Size"] == 0 and entry["Key"].endswith("/"):
                        continue
                    yield ObjectInfo(
                        f"s3://{bucket}/{entry['Key']}", entry["Size"], _etag(entry), entry["LastModified"]
                    )
        except (botocore.exceptions.ClientError, botocore.exceptions.BotoCoreError) as exc:
            raise _translate(exc, uri) from exc

    def get(self, uri: str, max_bytes: int | None = None) -> Fetched:
        """Return an object; a body that breaks off, or differs from its ETag's MD5, is fetched again."""
        bucket, key = split(uri)

        def attempt() -> Fetched:
            reply = self._client.get_object(Bucket=bucket, Key=key)
            size_bytes, etag = _size_and_etag(reply)
            # Not the body's own context manager: it hands out urllib3's stream, with urllib3's exceptions.
            with contextlib.closing(reply["Body"]) as body:
                check_size(size_bytes, max_bytes)
                try:
                    data: bytes = body.read()
                except _BODY_FAULTS as exc:
                    raise _BrokenReplyError(f"its body broke off: {exc}") from exc
            if len(data) != size_bytes:
                raise _BrokenReplyError(f"{len(data):,} of {size_bytes:,} bytes arrived")
            if _is_md5(etag, reply) and hashlib.md5(data, usedforsecurity=False).hexdigest() != etag:
                raise _BrokenReplyError("the bytes do not match the ETag")
            return Fetched(data, ObjectInfo(uri, size_bytes, etag, reply.get("LastModified")))

        return self._retry(attempt, uri)

    def create(self, uri: str, data: bytes) -> PutOutcome:
        """Put an object if its key is free (If-None-Match: *), and settle who wrote it if it is not."""
        bucket, key = split(uri)
        digest = hashlib.md5(data, usedforsecurity=False)

        def attempt() -> PutOutcome:
            try:
                reply = self._client.put_object(
                    Bucket=bucket,
                    Key=key,
                    Body=data,
                    IfNoneMatch="*",
                    ContentMD5=base64.b64encode(digest.digest()).decode(),
                )
            except botocore.exceptions.ClientError as exc:
                if _code(exc) not in _TAKEN:
                    raise
                # Taken: by another driver, or by this very put, if its reply was lost and boto3 sent it again.
                size_bytes, etag = _size_and_etag(self._client.head_object(Bucket=bucket, Key=key))
                return PutOutcome(etag == digest.hexdigest(), etag, size_bytes)
            return PutOutcome(True, _etag(reply), len(data))

        return self._retry(attempt, uri)

    @property
    def _client(self) -> Any:  # noqa: ANN401 - boto3 makes its client classes at run time
        return _client(self._config, self._attempts)

    def _retry(self, attempt: Callable[[], T], uri: str) -> T:
        for tries_left in reversed(range(self._attempts)):
            try:
                return attempt()
            except (botocore.exceptions.ClientError, botocore.exceptions.BotoCoreError, _BrokenReplyError) as exc:
                if not tries_left or not _is_worth_another_try(exc):
                    raise _translate(exc, uri) from exc
            # Full jitter, up to 0.2, 0.4, ... 5 s: boto3 has already waited between its own tries.
            time.sleep(random.uniform(0, min(5, 0.2 * 2 ** (self._attempts - tries_left - 1))))  # noqa: S311
        raise AssertionError("unreachable: the last try returns or raises")


def split(uri: str) -> tuple[str, str]:
    """Return bucket and raw key of s3://bucket/key; keys may start with / or hold //.

    Raises:
        StorageError: If there is no bucket.
    """
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not bucket:
        raise StorageError(f"{uri}: names no bucket; expected s3://bucket/prefix")
    return bucket, key


def _client(config: StorageConfig, attempts: int) -> Any:  # noqa: ANN401
    # Making a client is not thread-safe in boto3, using one is.
    with _client_lock:
        return _cached_client(config, attempts)


_client_lock = threading.Lock()


@functools.lru_cache(maxsize=8)
def _cached_client(config: StorageConfig, attempts: int) -> Any:  # noqa: ANN401
    session = boto3.session.Session()
    return session.client(
        "s3",
        endpoint_url=config.endpoint_url,
        region_name=config.region or session.region_name or "us-east-1",
        config=Config(
            retries={"mode": "standard", "total_max_attempts": attempts},
            connect_timeout=_CONNECT_TIMEOUT_S,
            read_timeout=_READ_TIMEOUT_S if attempts >= _PATIENT_ATTEMPTS else _QUICK_READ_TIMEOUT_S,
            max_pool_connections=_MAX_CONNECTIONS,
            # We send Content-MD5 and check ETags; the newer trailing checksums fail on some compatible stores.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            signature_version=botocore.UNSIGNED if config.anonymous else None,
            user_agent_extra="lfm-scan",
        ),
    )


def _etag(reply: dict[str, Any]) -> str | None:
    return str(reply["ETag"]).strip('"') if "ETag" in reply else None


def _size_and_etag(reply: dict[str, Any]) -> tuple[int, str | None]:
    """Return what the headers say. Python's HTTP client takes headers that break off for complete ones."""
    if "ContentLength" not in reply:
        raise _BrokenReplyError("its headers broke off")
    return int(reply["ContentLength"]), _etag(reply)


def _is_md5(etag: str | None, reply: dict[str, Any]) -> bool:
    """Tell whether an ETag is the MD5 of the body: not for multipart uploads, nor under KMS or customer keys."""
    encrypted = str(reply.get("ServerSideEncryption", "")).startswith("aws:kms") or "SSECustomerAlgorithm" in reply
    return etag is not None and _MD5_ETAG.fullmatch(etag) is not None and not encrypted


def _code(exc: botocore.exceptions.ClientError) -> str:
    return str(exc.response.get("Error", {}).get("Code", ""))


def _is_worth_another_try(exc: Exception) -> bool:
    """Tell a fault that may pass from a verdict. boto3 has retried what it knows; the rest is for us."""
    if isinstance(exc, botocore.exceptions.ClientError):
        return _code(exc) in _AGAIN
    return isinstance(exc, _BrokenReplyError)


def _translate(exc: Exception, uri: str) -> StorageError:
    """Turn boto3's error into ours: the object, what is wrong, what to do."""
    if isinstance(exc, botocore.exceptions.ClientError):
        code, message = _code(exc), str(exc.response.get("Error", {}).get("Message", "")) or str(exc)
        if code == "NoSuchBucket":
            return NoSuchBucketError(f"{uri}: the bucket does not exist")
        if code in _NOT_FOUND:
            return NotFoundError(f"{uri}: not found")
        if code in _DENIED:
            return AccessDeniedError(f"{uri}: the store refused ({code}): check the credentials and their policy")
        return StorageError(f"{uri}: the store answered {code}: {message.splitlines()[0]}")
    if isinstance(exc, (botocore.exceptions.NoCredentialsError, botocore.exceptions.PartialCredentialsError)):
        return AccessDeniedError(
            f"{uri}: no credentials found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile or a role, "
            "or pass --anonymous for a public bucket"
        )
    if isinstance(exc, botocore.exceptions.ParamValidationError):
        return StorageError(f"{uri}: not a valid bucket or key")
    if isinstance(exc, _UNREACHABLE) or isinstance(exc.__cause__, _UNREACHABLE):
        return UnreachableError(f"{uri}: no answer from the store ({exc}): check --endpoint-url and the network")
    return StorageError(f"{uri}: {exc}")
