"""All that fsspec can open behind the same door as S3: gs://, az:// and more."""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import importlib
import importlib.util
import re
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any, Final, TypeVar

import aiohttp
import fsspec

from lfm_scan.errors import (
    AccessDeniedError,
    ChangedError,
    ConfigError,
    NotFoundError,
    OversizeError,
    StorageError,
    UnreachableError,
)
from lfm_scan.options import StorageConfig
from lfm_scan.storage.base import Fetched, ObjectInfo, PutOutcome, check_size
from lfm_scan.storage.tries import QUICK_ATTEMPTS, PassingError, keep_trying

T = TypeVar("T")

_SCHEME: Final = re.compile(r"([a-z][a-z0-9+.-]*)://")

_GOOGLE: Final = frozenset({"gs", "gcs"})
_AZURE: Final = frozenset({"az", "abfs", "abfss"})

_EXCLUSIVE: Final = _GOOGLE | _AZURE
"""Whose pipe_file(mode="create") is a conditional request: ifGenerationMatch=0 in gcsfs, If-None-Match: * in adlfs."""

_RETRYING: Final = _GOOGLE | _AZURE
"""Whose clients try again themselves: what fails all the same is tried twice, not often times often."""

_REFUSED: Final = frozenset(
    {
        # They open another file system, or run what they find.
        *("async_wrapper", "asyncwrapper", "blockcache", "cached", "dask", "dir", "filecache", "generic", "libarchive"),
        *("pyscript", "reference", "simplecache", "tar", "zip"),
        # Others of our stores open these.
        *("asynclocal", "file", "http", "https", "local", "s3", "s3a"),
    }
)

_EXTRAS: Final = dict.fromkeys(_GOOGLE, "gcs") | dict.fromkeys(_AZURE, "azure")

_PASSING: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
_BUSY: Final = 429
_DENIED: Final = frozenset({401, 403})
_CREDENTIALS_ERRORS: Final = frozenset(
    {"ClientAuthenticationError", "CredentialUnavailableError", "DefaultCredentialsError", "RefreshError"}
)
_WRONG_USE: Final = (IsADirectoryError, NotADirectoryError, NotImplementedError, TypeError, ValueError)


class FsspecStore:
    """Objects of any fsspec file system that keeps them by path.

    Credentials are the file system's own business: gcsfs takes GOOGLE_APPLICATION_CREDENTIALS, gcloud's login or the
    machine's role; adlfs takes AZURE_STORAGE_* or what azure-identity finds. `StorageConfig.anonymous` and
    `requester_pays` reach both where they know them; `outage_patience` is S3's.

    File systems that block, such as FTP, serve one request at a time in each process.

    A listing holds one folder in memory at a time, as fsspec does: about 1 KB an entry.

    Args:
        uri: Any URI of the store.
        config: How to reach it.
        patient: Try as often as a long run should.

    Raises:
        ConfigError: If no file system of this scheme is there, or it lacks a setting.
    """

    def __init__(self, uri: str, config: StorageConfig, *, patient: bool = True) -> None:
        self._scheme = _scheme_of(uri)
        self._fs, self._turn = _open_filesystem(uri, self._scheme, config)
        self._max_attempts = config.max_attempts if patient and self._scheme not in _RETRYING else QUICK_ATTEMPTS

    @property
    def creates_exclusively(self) -> bool:
        """Whether `create` is all or nothing and has one winner, however many try.

        Elsewhere it looks first and writes then: of two drivers at once both may believe that they were first.
        """
        return self._scheme in _EXCLUSIVE

    def list(self, uri: str) -> Iterator[ObjectInfo]:
        """Yield the object at `uri`, or all objects in the folder `uri` and below it."""
        root = self._path(uri).rstrip("/")
        found = self._ask(lambda: self._fs.info(root), uri)
        if _is_folder(found):
            yield from self._walk(uri.rstrip("/"), root)
        else:
            yield _describe(uri, found)

    def folders(self, uri: str) -> Iterator[str]:
        """Yield the folders in a folder, in the order of their names."""
        root = self._path(uri).rstrip("/")
        for entry in self._entries(uri, root, root):
            if _is_folder(entry):
                yield uri.rstrip("/") + str(entry["name"]).rstrip("/")[len(root) :]

    def get(self, uri: str, max_bytes: int | None = None, version_id: str | None = None) -> Fetched:
        """Return an object, checked by its size, and by its MD5 or CRC32C where the store has one."""
        self._refuse_version(uri, version_id)

        def attempt() -> Fetched:
            facts = self._facts(uri)
            info = _describe(uri, facts)
            check_size(info.size_bytes, max_bytes)
            data = self._read(uri, info.size_bytes, max_bytes)
            _check_digest(uri, facts, data)
            return Fetched(data, ObjectInfo(uri, len(data), info.etag, info.last_modified))

        return self._ask(attempt, uri)

    def head(self, uri: str, version_id: str | None = None) -> ObjectInfo:
        """Return an object's facts."""
        self._refuse_version(uri, version_id)
        return self._ask(lambda: _describe(uri, self._facts(uri)), uri)

    def get_range(
        self, uri: str, start: int, num_bytes: int, etag: str | None = None, version_id: str | None = None
    ) -> bytes:
        """Return a stretch of an object."""
        self._refuse_version(uri, version_id)
        end = start + num_bytes

        def attempt() -> bytes:
            info = _describe(uri, self._facts(uri))
            if etag is not None and info.etag != etag:
                raise ChangedError(f"{uri}: it was overwritten since it was listed: its ETag is another one")
            if info.size_bytes is not None and info.size_bytes < end:
                raise ChangedError(f"{uri}: ends at {info.size_bytes:,}, its bytes up to {end:,} were listed")
            data: bytes = self._fs.cat_file(self._path(uri), start=start, end=end)
            if len(data) != num_bytes:
                raise PassingError(StorageError(f"{uri}: {len(data):,} of {num_bytes:,} bytes arrived"))
            return data

        return self._ask(attempt, uri)

    def create(self, uri: str, data: bytes) -> PutOutcome:
        """Store an object if its name is free, as safely as the store allows: see `creates_exclusively`."""
        path = self._path(uri)

        def attempt() -> PutOutcome:
            if not self.creates_exclusively and self._fs.exists(path):
                return self._settle(uri, data)
            try:
                self._put(path, data, mode="create")
            except FileExistsError:
                # Taken: by another driver, or by this very put, if its reply was lost and it was sent again.
                return self._settle(uri, data)
            return PutOutcome(True, None, len(data))

        return self._ask(attempt, uri)

    def replace(self, uri: str, data: bytes) -> None:
        """Store an object, whatever its name has."""
        self._ask(lambda: self._put(self._path(uri), data, mode="overwrite"), uri)

    def _walk(self, root_uri: str, root: str) -> Iterator[ObjectInfo]:
        """Yield the objects below a folder, ordered as their full paths are; however deep, no recursion."""
        waiting = [self._entries(root_uri, root, root)]
        while waiting:
            entry = next(waiting[-1], None)
            if entry is None:
                waiting.pop()
                continue
            path = str(entry["name"]).rstrip("/")
            uri = root_uri + path[len(root) :]
            if _is_folder(entry):
                waiting.append(self._entries(uri, root, path))
            else:
                yield _describe(uri, entry)

    def _entries(self, uri: str, root: str, folder: str) -> Iterator[dict[str, Any]]:
        """Yield what is in a folder; not the marker that stands for the folder itself."""
        entries = self._ask(lambda: self._fs.ls(folder, detail=True), uri)
        self._fs.invalidate_cache(
            folder
        )  # the next listing must be the store's, and memory must not fill with old ones
        inside = [entry for entry in entries if str(entry["name"]).rstrip("/").startswith(folder + "/")]
        # A folder sorts as "name/": that is how its objects' paths compare with a sibling called "name.x".
        inside.sort(
            key=lambda entry: (str(entry["name"]).rstrip("/") + "/" * _is_folder(entry)).encode(errors="replace")
        )
        yield from inside

    def _facts(self, uri: str) -> dict[str, Any]:
        facts: dict[str, Any] = self._fs.info(self._path(uri))
        if _is_folder(facts):
            raise NotFoundError(f"{uri}: a folder, not an object")
        return facts

    def _read(self, uri: str, size_bytes: int | None, max_bytes: int | None) -> bytes:
        """Return all bytes; one more than expected is asked for, to notice an object that grew."""
        if size_bytes == 0:
            return b""
        bound = max_bytes if size_bytes is None else size_bytes
        end = None if bound is None else bound + 1
        data: bytes = self._fs.cat_file(self._path(uri), start=0, end=end)
        if size_bytes is not None and len(data) != size_bytes:
            raise PassingError(StorageError(f"{uri}: {len(data):,} bytes arrived where {size_bytes:,} were promised"))
        if max_bytes is not None and len(data) > max_bytes:
            raise OversizeError(f"more than {max_bytes:,} bytes, which is the limit")
        return data

    def _put(self, path: str, data: bytes, *, mode: str) -> None:
        if self._scheme in _EXCLUSIVE:
            self._fs.pipe_file(path, data, mode=mode)
            return
        self._fs.makedirs(self._fs._parent(path), exist_ok=True)
        self._fs.pipe_file(path, data)

    def _settle(self, uri: str, data: bytes) -> PutOutcome:
        """Tell whether what is stored is what we sent."""
        info = _describe(uri, self._facts(uri))
        is_ours = info.size_bytes == len(data) and self._read(uri, info.size_bytes, None) == data
        return PutOutcome(is_ours, info.etag, info.size_bytes or 0)

    def _path(self, uri: str) -> str:
        path: str = self._fs._strip_protocol(uri)
        return path

    def _refuse_version(self, uri: str, version_id: str | None) -> None:
        if version_id is not None:
            raise StorageError(f"{uri}: versions are read from S3 only, version {version_id!r} was asked for")

    def _ask(self, request: Callable[[], T], uri: str) -> T:
        def attempt() -> T:
            try:
                with self._turn:
                    return request()
            except (StorageError, PassingError):
                raise
            except Exception as exc:
                # Every file system raises what its own client raises.
                raise _translate(exc, uri) from exc

        return keep_trying(attempt, self._max_attempts)


def _is_folder(facts: dict[str, Any]) -> bool:
    return bool(facts["type"] == "directory")


def _describe(uri: str, facts: dict[str, Any]) -> ObjectInfo:
    etag, size = facts.get("etag"), facts.get("size")
    return ObjectInfo(uri, None if size is None else int(size), etag and str(etag).strip('"'), _last_modified(facts))


def _last_modified(facts: dict[str, Any]) -> datetime | None:
    moment = next(
        (facts[name] for name in ("mtime", "last_modified", "modified", "LastModified") if name in facts), None
    )
    try:
        if isinstance(moment, (int, float)):
            return datetime.fromtimestamp(moment, UTC)
        if isinstance(moment, datetime):
            return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC)
    except (OverflowError, ValueError, OSError):
        pass  # a file may claim any time
    return None


def _check_digest(uri: str, facts: dict[str, Any], data: bytes) -> None:
    for name, promised, digest in _promised_digests(facts):
        if digest(data) != promised:
            raise PassingError(StorageError(f"{uri}: the bytes do not match the {name} that the store has"))


def _promised_digests(facts: dict[str, Any]) -> Iterator[tuple[str, bytes, Callable[[bytes], bytes]]]:
    """Yield the digests a store tells of an object: Google's in base64, Azure's as bytes."""
    md5 = facts.get("md5Hash") or (facts.get("content_settings") or {}).get("content_md5")
    if md5:
        yield "MD5", base64.b64decode(md5) if isinstance(md5, str) else bytes(md5), _md5
    elif facts.get("crc32c") and importlib.util.find_spec("google_crc32c"):
        yield "CRC32C", base64.b64decode(facts["crc32c"]), _crc32c


def _md5(data: bytes) -> bytes:
    return hashlib.md5(data, usedforsecurity=False).digest()


def _crc32c(data: bytes) -> bytes:
    checksum: int = importlib.import_module("google_crc32c").value(data)
    return checksum.to_bytes(4, "big")


def _translate(exc: Exception, uri: str) -> StorageError | PassingError:
    reason = str(exc).partition("\n")[0][:300] or type(exc).__name__
    status = _status_of(exc)
    if isinstance(exc, FileNotFoundError) or status == 404:
        return NotFoundError(f"{uri}: not found")
    if isinstance(exc, PermissionError) or status in _DENIED or reason.startswith("Forbidden"):
        return AccessDeniedError(f"{uri}: the store refused ({reason}): check the credentials and their policy")
    if any(kind.__name__ in _CREDENTIALS_ERRORS for kind in type(exc).__mro__):
        return AccessDeniedError(f"{uri}: no valid credentials ({reason}): log in, or set --anonymous for public data")
    if isinstance(exc, _WRONG_USE) or (status is not None and status not in _PASSING):
        return StorageError(f"{uri}: {reason}")
    return PassingError(
        UnreachableError(f"{uri}: no complete answer from the store ({reason})"), is_busy=status == _BUSY
    )


def _status_of(exc: Exception) -> int | None:
    """Return the HTTP status in an error: gcsfs calls it code, azure status_code, aiohttp status."""
    for name in ("status_code", "code", "status"):
        value = getattr(exc, name, None)
        if isinstance(value, int) or (isinstance(value, str) and value.isdigit()):
            return int(value)
    return None


def _scheme_of(uri: str) -> str:
    match = _SCHEME.match(uri)
    if match is None or match[1] in _REFUSED:
        raise _unknown_scheme(uri)
    return match[1]


def _unknown_scheme(uri: str) -> ConfigError:
    return ConfigError(
        f"{uri}: unknown scheme; use a local path, s3://, https://, http://, gs://, az://, abfs://, or one that an "
        "installed fsspec file system knows"
    )


def _open_filesystem(
    uri: str, scheme: str, config: StorageConfig
) -> tuple[Any, contextlib.AbstractContextManager[object]]:
    """Return the file system, which has no types, and what to hold while using it."""
    kind = _filesystem_class(uri, scheme)
    with _filesystem_lock:
        try:
            # Buckets say nothing of how to reach them. Elsewhere hosts, users and accounts are part of a URI.
            in_uri = {} if scheme in _GOOGLE else kind._get_kwargs_from_urls(uri)
            return _cached_filesystem(kind, scheme, config, tuple(sorted(in_uri.items())))
        except Exception as exc:
            # Every file system raises what its own client raises.
            reason = str(exc).partition("\n")[0] or type(exc).__name__
            raise ConfigError(f"{scheme}://: cannot be opened: {reason}") from exc


def _filesystem_class(uri: str, scheme: str) -> Any:  # noqa: ANN401
    try:
        # gcsfs's other class asks over gRPC what kind each bucket is, for a minute where nobody answers, and leaves
        # objects of zonal buckets unfinished. This one speaks the JSON API, whose conditional puts we rely on.
        return _plain_gcsfs() if scheme in _GOOGLE else fsspec.get_filesystem_class(scheme)
    except ValueError as exc:
        raise _unknown_scheme(uri) from exc
    except ImportError as exc:
        if scheme in _EXTRAS:
            raise ConfigError(f"{uri}: needs another package: pip install 'lfm-scan[{_EXTRAS[scheme]}]'") from exc
        raise ConfigError(f"{uri}: needs another package: {exc}") from exc


def _plain_gcsfs() -> Any:  # noqa: ANN401
    return importlib.import_module("gcsfs.core").GCSFileSystem


_filesystem_lock = threading.Lock()


@functools.lru_cache(maxsize=16)
def _cached_filesystem(
    kind: Any,  # noqa: ANN401
    scheme: str,
    config: StorageConfig,
    in_uri: tuple[tuple[str, Any], ...],
) -> tuple[Any, contextlib.AbstractContextManager[object]]:
    filesystem = kind(**dict(in_uri), **_settings(scheme, config), skip_instance_cache=True)
    # One that talks on fsspec's event loop serves many threads at once. Another may have a single connection, as FTP.
    return filesystem, contextlib.nullcontext() if kind.async_impl else threading.RLock()


def _settings(scheme: str, config: StorageConfig) -> dict[str, Any]:
    """Return what a file system's constructor takes of our settings."""
    if scheme in _GOOGLE:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=config.connect_timeout, sock_read=config.read_timeout)
        return {
            "session_kwargs": {"timeout": timeout},
            "requester_pays": config.requester_pays,
            "use_listings_cache": False,
            "consistency": "md5",  # of what is written
            **({"token": "anon"} if config.anonymous else {}),
        }
    if scheme in _AZURE:
        return {
            "connection_timeout": config.connect_timeout,
            "read_timeout": config.read_timeout,
            **({"anon": True} if config.anonymous else {}),
        }
    return {}
