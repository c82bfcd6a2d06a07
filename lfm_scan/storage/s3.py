"""S3 and its compatible stores, through boto3.

What boto3 leaves to its users is done here: a body that breaks off is fetched again, a put whose reply was lost is not
a conflict with itself, and a store that is down for a while is waited for (`s3_retry`).
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeVar

import botocore.exceptions

from lfm_scan.errors import ChangedError, StorageError
from lfm_scan.options import StorageConfig
from lfm_scan.storage.base import Fetched, ObjectInfo, PutOutcome, check_size
from lfm_scan.storage.s3_client import open_client
from lfm_scan.storage.s3_errors import BODY_FAULTS, TAKEN, BrokenReplyError, ask, code_of, overwritten, translate
from lfm_scan.storage.s3_listing import Page, list_folders, list_objects

T = TypeVar("T")

_MD5_ETAG: Final = re.compile(r"[0-9a-f]{32}")
_CONTENT_RANGE: Final = re.compile(r"bytes (\d+)-(\d+)/(?:\d+|\*)")


class S3Store:
    """Objects of any bucket behind one endpoint."""

    def __init__(self, config: StorageConfig, *, patient: bool = True) -> None:
        self._config = config
        self._patient = patient

    def list(self, uri: str) -> Iterator[ObjectInfo]:
        """Yield the objects whose keys start with the URI's key, in key order if the store lists so.

        Large prefixes are listed folder by folder, several at once, until the generator is closed.
        """
        bucket, prefix = split(uri)
        yield from list_objects(functools.partial(self._page, bucket), bucket, prefix)

    def folders(self, uri: str) -> Iterator[str]:
        """Yield what the keys under a prefix have up to their next slash: a request for each 1,000 names."""
        bucket, key = split(uri)
        prefix = key if key.endswith("/") or not key else f"{key}/"
        for folder in list_folders(functools.partial(self._page, bucket), bucket, prefix):
            yield f"s3://{bucket}/{folder.removesuffix('/')}"

    def get(self, uri: str, max_bytes: int | None = None, version_id: str | None = None) -> Fetched:
        """Return an object; a body that breaks off, or differs from its ETag's MD5 or checksum, is fetched again."""
        return self._run(lambda client: self._get(client, uri, max_bytes, version_id), uri, is_read=True)

    def head(self, uri: str, version_id: str | None = None) -> ObjectInfo:
        """Return an object's facts."""
        params = self._object(uri, version_id)

        def attempt(client: Any) -> ObjectInfo:  # noqa: ANN401 - boto3 makes its client classes at run time
            return _facts(uri, ask(client.head_object, **params), version_id)

        return self._run(attempt, uri)

    def get_range(
        self, uri: str, start: int, num_bytes: int, etag: str | None = None, version_id: str | None = None
    ) -> bytes:
        """Return a stretch of an object; one that breaks off is fetched again."""
        params = self._object(
            uri, version_id, Range=f"bytes={start}-{start + num_bytes - 1}", IfMatch=etag and f'"{etag}"'
        )

        def attempt(client: Any) -> bytes:  # noqa: ANN401
            reply = ask(client.get_object, **params)
            with contextlib.closing(reply["Body"]) as body:
                facts = _facts(uri, reply, version_id)
                if etag is not None and facts.etag is None:
                    raise BrokenReplyError("its headers broke off: they lack the ETag")
                if etag not in (None, facts.etag):
                    raise overwritten(uri)
                _check_range(uri, reply, start, num_bytes)
                return _read(body, num_bytes)

        return self._run(attempt, uri, is_read=True)

    def create(self, uri: str, data: bytes) -> PutOutcome:
        """Put an object if its key is free (If-None-Match: *), and settle who wrote it if it is not."""
        params = self._put_params(uri, data, IfNoneMatch="*")

        def attempt(client: Any) -> PutOutcome:  # noqa: ANN401
            try:
                reply = ask(client.put_object, **params)
            except botocore.exceptions.ClientError as exc:
                if code_of(exc) not in TAKEN:
                    raise
                # Taken: by another driver, or by this very put, if its reply was lost and it was sent again.
                return self._settle(client, uri, data)
            return PutOutcome(True, _etag(reply), len(data))

        return self._run(attempt, uri)

    def replace(self, uri: str, data: bytes) -> None:
        """Put an object, whatever its key has."""
        params = self._put_params(uri, data)
        self._run(lambda client: ask(client.put_object, **params), uri)

    def _page(self, bucket: str, prefix: str, *, delimiter: str, token: str | None, stop: threading.Event) -> Page:
        params = {"Bucket": bucket, "Prefix": prefix, "Delimiter": delimiter, "ContinuationToken": token}
        return self._run(
            lambda client: _to_page(bucket, ask(client.list_objects_v2, **self._params(params))),
            f"s3://{bucket}/{prefix}",
            stop=stop,
        )

    def _get(self, client: Any, uri: str, max_bytes: int | None, version_id: str | None) -> Fetched:  # noqa: ANN401
        # Checksums are there for objects whose ETag is no MD5: boto3 checks what the store has, if it is asked to.
        reply = ask(client.get_object, **self._object(uri, version_id, ChecksumMode="ENABLED"))
        # Not the body's own context manager: it hands out urllib3's stream, with urllib3's exceptions.
        with contextlib.closing(reply["Body"]) as body:
            facts = _facts(uri, reply, version_id)
            check_size(facts.size_bytes, max_bytes)
            data = _read(body, facts.size_bytes)
        if _is_md5(facts.etag, reply) and _md5(data).hexdigest() != facts.etag:
            raise BrokenReplyError("the bytes do not match the ETag")
        return Fetched(data, facts)

    def _settle(self, client: Any, uri: str, data: bytes) -> PutOutcome:  # noqa: ANN401
        """Tell whether what is stored is what we sent."""
        facts = _facts(uri, ask(client.head_object, **self._object(uri)))
        if facts.size_bytes != len(data):
            is_ours = False
        elif facts.etag == _md5(data).hexdigest():
            is_ours = True
        else:
            # Not the MD5 of our bytes: other bytes, or a store whose ETags are no MD5, as under KMS.
            is_ours = self._get(client, uri, len(data), None).data == data
        return PutOutcome(is_ours, facts.etag, facts.size_bytes or 0)

    def _run(
        self, attempt: Callable[[Any], T], uri: str, *, is_read: bool = False, stop: threading.Event | None = None
    ) -> T:
        """Make a request with all the tries it takes."""
        bucket, _ = split(uri)
        try:
            client = open_client(self._config, patient=self._patient)
        except botocore.exceptions.BotoCoreError as exc:
            raise translate(exc, uri) from exc
        return client.persistence.run(
            lambda: attempt(client.boto),
            uri,
            knock=lambda: ask(client.boto.head_bucket, Bucket=bucket),
            # An object once read is the best sign of life: a store may answer for its buckets and have lost its disks.
            witness=functools.partial(_peek, client.boto, self._object(uri)) if is_read else None,
            stop=stop,
        )

    def _object(self, uri: str, version_id: str | None = None, **params: str | None) -> dict[str, Any]:
        bucket, key = split(uri)
        return self._params({"Bucket": bucket, "Key": key, "VersionId": version_id, **params})

    def _put_params(self, uri: str, data: bytes, **params: str | None) -> dict[str, Any]:
        md5 = base64.b64encode(_md5(data).digest()).decode()
        encryption = {"ServerSideEncryption": self._config.sse, "SSEKMSKeyId": self._config.kms_key_id}
        return self._object(uri, ContentMD5=md5, **encryption, **params) | {"Body": data}

    def _params(self, params: dict[str, Any]) -> dict[str, Any]:
        """Return the parameters that are set, and those that every request has."""
        payer = "requester" if self._config.requester_pays else None
        return {name: value for name, value in {**params, "RequestPayer": payer}.items() if value not in (None, "")}


def split(uri: str) -> tuple[str, str]:
    """Return bucket and raw key of s3://bucket/key; keys may start with / or hold //.

    Raises:
        StorageError: If there is no bucket.
    """
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not bucket:
        raise StorageError(f"{uri}: names no bucket; expected s3://bucket/prefix")
    return bucket, key


def _to_page(bucket: str, reply: dict[str, Any]) -> Page:
    """Return a page of a listing, which must say whether it goes on: no body at all parses as an empty listing."""
    if "IsTruncated" not in reply or (reply["IsTruncated"] and not reply.get("NextContinuationToken")):
        raise BrokenReplyError("its listing does not say whether it goes on")
    return Page(
        objects=[
            ObjectInfo(f"s3://{bucket}/{entry['Key']}", entry.get("Size"), _etag(entry), entry.get("LastModified"))
            for entry in reply.get("Contents", ())
            if entry.get("Size") != 0 or not entry["Key"].endswith("/")
        ],
        folders=[entry["Prefix"] for entry in reply.get("CommonPrefixes", ())],
        next_token=reply["NextContinuationToken"] if reply["IsTruncated"] else None,
    )


def _peek(client: Any, params: dict[str, Any]) -> None:  # noqa: ANN401
    """Read the first byte of an object."""
    reply = ask(client.get_object, **params, Range="bytes=0-0")
    with contextlib.closing(reply["Body"]) as body:
        try:
            body.read(1)
        except BODY_FAULTS as exc:
            raise BrokenReplyError(f"its body broke off: {exc}") from exc


def _read(body: Any, num_bytes: int | None) -> bytes:  # noqa: ANN401
    try:
        data: bytes = body.read()
    except BODY_FAULTS as exc:
        raise BrokenReplyError(f"its body broke off: {exc}") from exc
    if len(data) != num_bytes:
        raise BrokenReplyError(f"{len(data):,} of {num_bytes:,} bytes arrived")
    return data


def _facts(uri: str, reply: dict[str, Any], version_id: str | None = None) -> ObjectInfo:
    """Return what the headers say. Python's HTTP client takes headers that break off for complete ones."""
    if "ContentLength" not in reply:
        raise BrokenReplyError("its headers broke off")
    if version_id not in (None, "null"):
        # A store without versions ignores that one is asked for, and would give us other bytes.
        if "VersionId" not in reply:
            raise BrokenReplyError(f"version {version_id!r} was asked for, its reply names none")
        if reply["VersionId"] != version_id:
            raise StorageError(f"{uri}: version {version_id!r} was asked for, the store gave {reply['VersionId']!r}")
    return ObjectInfo(uri, int(reply["ContentLength"]), _etag(reply), reply.get("LastModified"))


def _check_range(uri: str, reply: dict[str, Any], start: int, num_bytes: int) -> None:
    """See that a reply has the stretch that was asked for, before its body is read."""
    size_bytes = int(reply["ContentLength"])
    if reply["ResponseMetadata"]["HTTPStatusCode"] != 206:
        if (start, num_bytes) == (0, size_bytes):
            return
        raise StorageError(f"{uri}: the store does not serve parts of objects: it ignored the range that was asked for")
    found = _CONTENT_RANGE.fullmatch(reply.get("ContentRange", ""))
    if found is None or (int(found[1]), int(found[2])) != (start, start + size_bytes - 1):
        raise BrokenReplyError(f"bytes {start:,} and on were asked for, its headers say {reply.get('ContentRange')!r}")
    if size_bytes != num_bytes:
        raise ChangedError(f"{uri}: ends at {start + size_bytes:,}, its bytes up to {start + num_bytes:,} were listed")


def _etag(reply: dict[str, Any]) -> str | None:
    if "ETag" not in reply:
        return None
    etag = str(reply["ETag"])
    if etag.startswith('"') and not etag.endswith('"', 1):
        raise BrokenReplyError("its headers broke off")
    return etag.strip('"')


def _is_md5(etag: str | None, reply: dict[str, Any]) -> bool:
    """Tell whether an ETag is the MD5 of the body: not for multipart uploads, nor under KMS or customer keys."""
    encrypted = str(reply.get("ServerSideEncryption", "")).startswith("aws:kms") or "SSECustomerAlgorithm" in reply
    return etag is not None and _MD5_ETAG.fullmatch(etag) is not None and not encrypted


def _md5(data: bytes) -> Any:  # noqa: ANN401 - hashlib does not name its type
    return hashlib.md5(data, usedforsecurity=False)
