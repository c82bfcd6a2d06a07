"""Web servers behind the same door as S3: each URL is one object, read only.

aiohttp does the talking, on fsspec's event loop: unlike a blocking client it can bound a whole exchange in time, so
that no server keeps a worker by sending a byte now and then.
"""

from __future__ import annotations

import atexit
import base64
import contextlib
import email.utils
import functools
import hashlib
import ipaddress
import re
import socket
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from datetime import UTC, datetime
from errno import EACCES
from typing import Any, Final, TypeVar

import aiohttp
import fsspec.asyn
import yarl

from lfm_scan.errors import (
    AccessDeniedError,
    ChangedError,
    NotFoundError,
    OversizeError,
    StorageError,
    UnreachableError,
)
from lfm_scan.options import StorageConfig
from lfm_scan.storage.base import Fetched, ObjectInfo, PutOutcome, check_size
from lfm_scan.storage.tries import QUICK_ATTEMPTS, PassingError, keep_trying
from lfm_scan.version import __version__

T = TypeVar("T")

_MAX_REDIRECTS: Final = 5
_LONGEST_EXCHANGE_S: Final = 300.0
_CHUNK_BYTES: Final = 256 * 1024
_SKIPPED_BYTES: Final = 16 * 2**20
"""A stretch that ends within so many bytes can be had from a server that sends only whole objects."""

_PASSING: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
_BUSY: Final = 429
_DENIED: Final = frozenset({401, 403, 407, 451})
_MISSING: Final = frozenset({404, 410})
_NO_HEAD: Final = frozenset({405, 501})

_PLAIN_URL: Final = re.compile(r"[!-~]+")
_CONTENT_RANGE: Final = re.compile(r"bytes (\d+)-(\d+)/(?:\d+|\*)")

_METADATA: Final = (
    ipaddress.ip_network("100.100.100.200/32"),  # Alibaba Cloud
    ipaddress.ip_network("168.63.129.16/32"),  # Azure
    ipaddress.ip_network("192.0.0.192/32"),  # Oracle Cloud
    ipaddress.ip_network("fd00:ec2::/32"),  # AWS
    ipaddress.ip_network("fd20:ce::/32"),  # Google Cloud
)
"""Where clouds answer their own machines, besides the link-local addresses 169.254.0.0/16 and fe80::/10."""

_NAT64: Final = ipaddress.ip_network("64:ff9b::/96")


class HttpStore:
    """Objects at http:// and https:// URLs.

    URLs may come from a manifest that somebody else wrote, so a scan can be made to send GET requests to any server it
    can reach; of what they answer, results show whether it is an image, its size and its score. Internal web servers
    are legitimate sources and are allowed. Link-local addresses and those where clouds tell machines their credentials
    are always refused, whatever name or redirect leads there: every address is checked just before it is connected.

    Proxy settings, .netrc and cookies of the environment are not used.
    """

    def __init__(self, config: StorageConfig, *, patient: bool = True) -> None:
        self._config = config
        self._max_attempts = config.max_attempts if patient else QUICK_ATTEMPTS

    def list(self, uri: str) -> Iterator[ObjectInfo]:
        """Yield the object at the URL: the web has no folders."""
        yield self.head(uri)

    def folders(self, uri: str) -> Iterator[str]:
        """Refuse: the web has no folders."""
        raise StorageError(f"{uri}: the web has no folders to list")

    def head(self, uri: str, version_id: str | None = None) -> ObjectInfo:
        """Return what the server says of an object."""
        _refuse_version(uri, version_id)
        return self._run(functools.partial(_head, uri))

    def get(self, uri: str, max_bytes: int | None = None, version_id: str | None = None) -> Fetched:
        """Return an object; one that turns out larger than allowed is not read to its end."""
        _refuse_version(uri, version_id)
        return self._run(functools.partial(_get, uri, max_bytes))

    def get_range(
        self, uri: str, start: int, num_bytes: int, etag: str | None = None, version_id: str | None = None
    ) -> bytes:
        """Return a stretch of an object."""
        _refuse_version(uri, version_id)
        return self._run(functools.partial(_get_range, uri, start, num_bytes, etag))

    def create(self, uri: str, data: bytes) -> PutOutcome:
        """Refuse: nothing is ever written to web servers."""
        raise _read_only(uri)

    def replace(self, uri: str, data: bytes) -> None:
        """Refuse: nothing is ever written to web servers."""
        raise _read_only(uri)

    def _run(self, exchange: Callable[[aiohttp.ClientSession], Coroutine[Any, Any, T]]) -> T:
        def attempt() -> T:
            result: T = fsspec.asyn.sync(fsspec.asyn.get_loop(), exchange, _session(self._config))
            return result

        return keep_trying(attempt, self._max_attempts)


def _read_only(uri: str) -> StorageError:
    return StorageError(f"{uri}: web servers are only read: give a local folder or an object store to write to")


def _refuse_version(uri: str, version_id: str | None) -> None:
    if version_id is not None:
        raise StorageError(f"{uri}: web servers keep no versions, version {version_id!r} was asked for")


async def _head(uri: str, session: aiohttp.ClientSession) -> ObjectInfo:
    async with _ask(session, "HEAD", uri) as reply:
        if reply.status not in _NO_HEAD:
            _check_status(reply, uri)
            return _describe(uri, reply)
    async with _ask(session, "GET", uri) as reply:  # closed before its body is read
        _check_status(reply, uri)
        return _describe(uri, reply)


async def _get(uri: str, max_bytes: int | None, session: aiohttp.ClientSession) -> Fetched:
    async with _ask(session, "GET", uri) as reply:
        _check_status(reply, uri)
        info = _describe(uri, reply)
        check_size(info.size_bytes, max_bytes)
        data = bytearray()
        async for chunk in reply.content.iter_chunked(_CHUNK_BYTES):
            data += chunk
            if max_bytes is not None and len(data) > max_bytes:
                raise OversizeError(f"more than {max_bytes:,} bytes, which is the limit")
    promised = reply.headers.get("Content-MD5")
    if promised is not None and promised != base64.b64encode(_md5(data)).decode():
        raise PassingError(StorageError(f"{uri}: the bytes do not match the Content-MD5 that the server sent"))
    return Fetched(bytes(data), ObjectInfo(uri, len(data), info.etag, info.last_modified))


async def _get_range(uri: str, start: int, num_bytes: int, etag: str | None, session: aiohttp.ClientSession) -> bytes:
    end = start + num_bytes
    async with _ask(session, "GET", uri, {"Range": f"bytes={start}-{end - 1}"}) as reply:
        if reply.status == 416:
            raise _ends_earlier(uri, end)
        _check_status(reply, uri, may_be_part=True)
        if etag is not None and _etag(reply) != etag:
            raise ChangedError(f"{uri}: it was overwritten since it was listed: its ETag is another one")
        data, skip = bytearray(), _check_range(uri, reply, start, end)
        async for chunk in reply.content.iter_chunked(_CHUNK_BYTES):
            data += chunk
            if len(data) >= skip + num_bytes:
                break
    if len(data) < skip + num_bytes:
        raise _ends_earlier(uri, end)
    return bytes(data[skip : skip + num_bytes])


def _check_range(uri: str, reply: aiohttp.ClientResponse, start: int, end: int) -> int:
    """Return how many bytes come before those asked for."""
    if reply.status == 206:
        match = _CONTENT_RANGE.fullmatch(reply.headers.get("Content-Range", ""))
        if match is None or int(match[1]) != start:
            raise StorageError(f"{uri}: the server sent another stretch than the one it was asked for")
        return 0
    if end > _SKIPPED_BYTES:
        raise StorageError(
            f"{uri}: the server sends only whole objects, and this one is too large to be read at once: copy it to a "
            "local folder or an object store"
        )
    return start


def _ends_earlier(uri: str, end: int) -> ChangedError:
    return ChangedError(f"{uri}: ends before {end:,}, up to where its bytes were listed")


@contextlib.asynccontextmanager
async def _ask(
    session: aiohttp.ClientSession, method: str, uri: str, headers: dict[str, str] | None = None
) -> AsyncIterator[aiohttp.ClientResponse]:
    """Send a request, and turn what goes wrong until the end of the block into our errors."""
    try:
        async with session.request(
            method, _to_url(uri), headers=headers, max_redirects=_MAX_REDIRECTS + 1, allow_redirects=True
        ) as reply:
            yield reply
    except (aiohttp.ClientError, OSError, ValueError) as exc:
        raise _translate(exc, uri) from exc


def _to_url(uri: str) -> yarl.URL:
    # A URL that is one already goes out as it is: to quote a signed one afresh could break its signature.
    return yarl.URL(uri, encoded=_PLAIN_URL.fullmatch(uri) is not None)


def _check_status(reply: aiohttp.ClientResponse, uri: str, *, may_be_part: bool = False) -> None:
    status = reply.status
    if status == 200 or (status == 206 and may_be_part):
        return
    said = f"{uri}: the server answered {status} {_printed(reply.reason or '')}".rstrip()
    if status in _MISSING:
        raise NotFoundError(f"{uri}: not found ({status})")
    if status in _DENIED:
        raise AccessDeniedError(said)
    if status in _PASSING:
        raise PassingError(UnreachableError(said), _asked_wait(reply), is_busy=status == _BUSY)
    raise StorageError(said)


def _asked_wait(reply: aiohttp.ClientResponse) -> float:
    text = reply.headers.get("Retry-After", "")
    return float(text) if text.isascii() and text.isdigit() else 0.0


def _describe(uri: str, reply: aiohttp.ClientResponse) -> ObjectInfo:
    return ObjectInfo(uri, reply.content_length, _etag(reply), _last_modified(reply))


def _etag(reply: aiohttp.ClientResponse) -> str | None:
    etag = reply.headers.get("ETag")
    return etag and _printed(etag.removeprefix("W/").strip('"'))


def _printed(text: str) -> str:
    """Return what a server says as text that a Parquet string can hold: headers may have any bytes."""
    return text.encode("utf-8", "backslashreplace").decode()


def _last_modified(reply: aiohttp.ClientResponse) -> datetime | None:
    try:
        moment = email.utils.parsedate_to_datetime(reply.headers["Last-Modified"])
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC)
    except (KeyError, ValueError, OverflowError):
        return None  # a server may claim any time, or none


def _translate(exc: Exception, uri: str) -> StorageError | PassingError:
    reason = _printed(str(exc).partition("\n")[0][:300]) or type(exc).__name__
    match exc:
        case aiohttp.ClientConnectorError() if isinstance(exc.os_error, PermissionError):
            return AccessDeniedError(f"{uri}: {exc.os_error.strerror}")
        case aiohttp.ClientConnectorDNSError() if _is_no_such_name(exc.os_error):
            return UnreachableError(f"{uri}: there is no server of this name ({reason})")
        case aiohttp.ClientSSLError():
            return StorageError(f"{uri}: the server's certificate or encryption is not accepted ({reason})")
        case aiohttp.TooManyRedirects():
            return StorageError(f"{uri}: more than {_MAX_REDIRECTS} redirects")
        case aiohttp.InvalidURL() | aiohttp.NonHttpUrlClientError() | ValueError():
            return StorageError(f"{uri}: it is, or leads to, no valid http:// or https:// URL")
        case TimeoutError() if not isinstance(exc, aiohttp.ServerTimeoutError):
            return UnreachableError(f"{uri}: not complete after {_LONGEST_EXCHANGE_S:.0f} s")
        case _:
            return PassingError(UnreachableError(f"{uri}: no complete answer from the server ({reason})"))


def _is_no_such_name(exc: OSError) -> bool:
    return any(isinstance(link, socket.gaierror) and link.errno == socket.EAI_NONAME for link in (exc, exc.__cause__))


def _md5(data: bytearray) -> bytes:
    return hashlib.md5(data, usedforsecurity=False).digest()


def _open_socket(address: Any) -> socket.socket:  # noqa: ANN401 - what getaddrinfo returns
    """Make the socket for a connection, if the address may be connected."""
    family, kind, protocol, _, (host, *_) = address
    if _is_refused(host):
        raise OSError(EACCES, f"{host} is a link-local address or a cloud's metadata service, which are never asked")
    return socket.socket(family, kind, protocol)


def _is_refused(host: str) -> bool:
    address = ipaddress.ip_address(host)
    if isinstance(address, ipaddress.IPv6Address):
        inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF) if address in _NAT64 else address.sixtofour
        address = address.ipv4_mapped or inner or address
    return address.is_link_local or any(address in network for network in _METADATA)


_session_lock = threading.Lock()


def _session(config: StorageConfig) -> aiohttp.ClientSession:
    with _session_lock:
        return _cached_session(config)


@functools.cache
def _cached_session(config: StorageConfig) -> aiohttp.ClientSession:
    loop = fsspec.asyn.get_loop()
    session: aiohttp.ClientSession = fsspec.asyn.sync(loop, _make_session, config)
    atexit.register(fsspec.asyn.sync, loop, session.close, timeout=1)
    return session


async def _make_session(config: StorageConfig) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=config.max_connections, socket_factory=_open_socket),
        timeout=aiohttp.ClientTimeout(
            total=_LONGEST_EXCHANGE_S, sock_connect=config.connect_timeout, sock_read=config.read_timeout
        ),
        headers={"User-Agent": f"lfm-scan/{__version__}", "Accept-Encoding": "identity"},
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        read_bufsize=_CHUNK_BYTES,
    )
