"""What boto3's errors mean: which faults may pass, and how each reads in our words."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto
from typing import Any, Final

import botocore.exceptions
import urllib3.exceptions
from botocore.parsers import ResponseParserError

from lfm_scan.errors import (
    AccessDeniedError,
    ChangedError,
    NoSuchBucketError,
    NotFoundError,
    StorageError,
    UnreachableError,
)

_NOT_FOUND: Final = frozenset({"404", "NoSuchKey", "NoSuchBucket", "NoSuchVersion", "NotFound"})
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
TAKEN: Final = frozenset({"412", "PreconditionFailed"})
_OUT_OF_RANGE: Final = frozenset({"416", "InvalidRange"})
# A conditional put that raced with another one, or a request that was damaged on its way: S3 asks to send it again.
_AGAIN: Final = frozenset({"409", "ConditionalRequestConflict", "OperationAborted", "BadDigest", "IncompleteBody"})
_BUSY: Final = frozenset(
    {
        "429",
        "BandwidthLimitExceeded",
        "RequestLimitExceeded",
        "RequestThrottled",
        "SlowDown",
        "SlowDownRead",
        "SlowDownWrite",
        "Throttling",
        "ThrottlingException",
        "TooManyRequests",
        "TooManyRequestsException",
    }
)
_FAILING: Final = frozenset({"InternalError", "RequestTimeout", "ServiceUnavailable"})
_NOT_OFFERED: Final = frozenset({501, 505})
_UNREACHABLE: Final = (botocore.exceptions.ConnectionError, botocore.exceptions.HTTPClientError)

BODY_FAULTS: Final = (
    botocore.exceptions.FlexibleChecksumError,
    botocore.exceptions.IncompleteReadError,
    botocore.exceptions.ReadTimeoutError,
    botocore.exceptions.ResponseStreamingError,
    urllib3.exceptions.HTTPError,
)
"""What reading a body may raise."""


class BrokenReplyError(Exception):
    """A reply that broke off, stalled, makes no sense, or does not have the bytes its ETag promises."""


REPLY_ERRORS: Final = (botocore.exceptions.ClientError, botocore.exceptions.BotoCoreError, BrokenReplyError)
"""What a request may raise that `ask` made."""


class Fault(Enum):
    """What a failed try tells."""

    FINAL = auto()
    """A verdict: another try would get the same."""
    AGAIN = auto()
    """The store answered, and wants the request once more."""
    BUSY = auto()
    """The store wants fewer requests; it says nothing about this one's object."""
    PASSING = auto()
    """No answer, a broken one, or a failing server: the object's fault or the store's."""


def ask(method: Callable[..., dict[str, Any]], **params: Any) -> dict[str, Any]:  # noqa: ANN401
    """Send one request.

    Raises:
        ClientError: If the store refuses.
        BotoCoreError: If it does not answer.
        BrokenReplyError: If it answers what boto3 cannot read: XML, headers or an error that broke off.
    """
    try:
        return method(**params)
    except botocore.exceptions.BotoCoreError:
        raise  # some of them are ValueErrors too
    except (ResponseParserError, ValueError) as exc:
        raise BrokenReplyError(f"its reply makes no sense: {exc}") from exc
    except urllib3.exceptions.HTTPError as exc:  # boto3 lets them out while it reads the text of an error
        raise BrokenReplyError(f"its reply broke off: {exc}") from exc


def code_of(exc: botocore.exceptions.ClientError) -> str:
    """Return the code of an error, or the HTTP status where the reply had no body."""
    return str(exc.response.get("Error", {}).get("Code", ""))


def classify(exc: Exception) -> Fault:
    """Tell a fault that may pass from a verdict."""
    if isinstance(exc, botocore.exceptions.ClientError):
        code, status = code_of(exc), int(_metadata(exc).get("HTTPStatusCode", 0))
        if code in _BUSY or status == 429:
            return Fault.BUSY
        if code in _FAILING or (status >= 500 and status not in _NOT_OFFERED):
            return Fault.PASSING
        return Fault.AGAIN if code in _AGAIN else Fault.FINAL
    return Fault.PASSING if isinstance(exc, (BrokenReplyError, *_UNREACHABLE)) else Fault.FINAL


def translate(exc: Exception, uri: str) -> StorageError:
    """Turn boto3's error into ours: the object, what is wrong, what to do."""
    if isinstance(exc, botocore.exceptions.ClientError):
        return _translate_answer(exc, uri)
    if isinstance(exc, (botocore.exceptions.NoCredentialsError, botocore.exceptions.PartialCredentialsError)):
        return AccessDeniedError(
            f"{uri}: no credentials found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile or a role, "
            "or pass --anonymous for a public bucket"
        )
    if isinstance(exc, (botocore.exceptions.CredentialRetrievalError, botocore.exceptions.SSOError)):
        return AccessDeniedError(f"{uri}: no valid credentials: {exc}")
    if isinstance(exc, botocore.exceptions.ParamValidationError):
        return StorageError(f"{uri}: not a valid bucket or key")
    if isinstance(exc, _UNREACHABLE) or isinstance(exc.__cause__, _UNREACHABLE):
        return UnreachableError(f"{uri}: no answer from the store ({exc}): check --endpoint-url and the network")
    return StorageError(f"{uri}: {exc}")


def overwritten(uri: str) -> ChangedError:
    """Return the error for an object that has another ETag than it should."""
    return ChangedError(f"{uri}: it was overwritten since it was listed: its ETag is another one")


def _translate_answer(exc: botocore.exceptions.ClientError, uri: str) -> StorageError:
    code, message = code_of(exc), str(exc.response.get("Error", {}).get("Message", "")) or str(exc)
    if exc.operation_name == "AssumeRole":
        return AccessDeniedError(f"{uri}: --assume-role was refused ({code}): {message.splitlines()[0]}")
    if code == "NoSuchBucket":
        return NoSuchBucketError(f"{uri}: the bucket does not exist")
    if code in _NOT_FOUND or _is_delete_marker(exc):
        return NotFoundError(f"{uri}: not found")
    if code in _DENIED:
        return AccessDeniedError(
            f"{uri}: the store refused {exc.operation_name} ({code}): check the credentials and their policy"
        )
    if code in TAKEN:
        return overwritten(uri)
    if code in _OUT_OF_RANGE:
        return ChangedError(f"{uri}: it is shorter than it was when it was listed")
    return StorageError(f"{uri}: the store answered {code}: {message.splitlines()[0]}")


def _is_delete_marker(exc: botocore.exceptions.ClientError) -> bool:
    """Tell whether the version asked for is the mark of a deletion: S3 answers 405 to that."""
    return dict(_metadata(exc).get("HTTPHeaders", {})).get("x-amz-delete-marker") == "true"


def _metadata(exc: botocore.exceptions.ClientError) -> dict[str, Any]:
    return dict(exc.response.get("ResponseMetadata", {}))
