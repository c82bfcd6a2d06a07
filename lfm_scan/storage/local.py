"""Local files behind the same door as S3."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
import urllib.parse
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import BinaryIO

from lfm_scan.errors import AccessDeniedError, ChangedError, NotFoundError, StorageError
from lfm_scan.storage.base import Fetched, ObjectInfo, PutOutcome, check_size


class LocalStore:
    """Files of this machine, or of a file system every node mounts.

    A file's URI is its absolute path. A name that is not valid UTF-8 cannot be a Parquet string, so its URI is the
    percent-encoded file:// form instead.

    Links to files are followed; links to folders are not, so that no loop and no file twice can come of them.
    """

    def list(self, uri: str) -> Iterator[ObjectInfo]:
        """Yield the file at `uri`, or all files below it."""
        path = to_path(uri)
        try:
            is_folder = stat.S_ISDIR(os.stat(path).st_mode)
        except OSError as exc:
            raise _translate(exc, uri) from exc
        if is_folder:
            yield from _walk(os.path.abspath(path))
        else:
            yield _describe(os.path.abspath(path))

    def folders(self, uri: str) -> Iterator[str]:
        """Yield the folders in a folder, in the order of their names."""
        path = os.path.abspath(to_path(uri))
        try:
            with os.scandir(path) as entries:
                names = sorted(entry.name for entry in entries if entry.is_dir())
        except OSError as exc:
            raise _translate(exc, uri) from exc
        yield from (_to_uri(os.path.join(path, name)) for name in names)

    def get(self, uri: str, max_bytes: int | None = None, version_id: str | None = None) -> Fetched:
        """Return a file's bytes."""
        with _opened(uri, version_id) as (file, facts):
            check_size(facts.st_size, max_bytes)
            # Bounded again: a file may grow, and those of the kernel have any length and claim none.
            data = file.read(-1 if max_bytes is None else max_bytes + 1) or b""
            check_size(len(data), max_bytes)
        return Fetched(data, ObjectInfo(uri, len(data), None, _utc(facts.st_mtime)))

    def head(self, uri: str, version_id: str | None = None) -> ObjectInfo:
        """Return a file's size and time."""
        with _opened(uri, version_id) as (_, facts):
            return ObjectInfo(uri, facts.st_size, None, _utc(facts.st_mtime))

    def get_range(
        self, uri: str, start: int, num_bytes: int, etag: str | None = None, version_id: str | None = None
    ) -> bytes:
        """Return a stretch of a file. Files have no ETag."""
        del etag
        with _opened(uri, version_id) as (file, _):
            file.seek(start)
            data = file.read(num_bytes) or b""
        if len(data) != num_bytes:
            raise ChangedError(
                f"{uri}: ends at {start + len(data):,}, its bytes up to {start + num_bytes:,} were listed"
            )
        return data

    def create(self, uri: str, data: bytes) -> PutOutcome:
        """Write a temporary file, then link it to its name: the name appears with all its bytes, or not at all."""
        path = to_path(uri)
        try:
            with _temporary(path, data) as temporary:
                created = _link(temporary, path)
            if created:
                return PutOutcome(True, None, len(data))
            with open(path, "rb") as file:
                existing = file.read()
        except OSError as exc:
            raise _translate(exc, uri) from exc
        same = hashlib.sha256(existing).digest() == hashlib.sha256(data).digest()
        return PutOutcome(same, None, len(existing))

    def replace(self, uri: str, data: bytes) -> None:
        """Write a temporary file, then give it the name."""
        path = to_path(uri)
        try:
            with _temporary(path, data) as temporary:
                os.replace(temporary, path)
        except OSError as exc:
            raise _translate(exc, uri) from exc


@contextlib.contextmanager
def _temporary(path: str, data: bytes) -> Iterator[str]:
    """Write bytes to a file beside the one they are for, on disk when the block begins and gone when it ends."""
    folder, name = os.path.split(os.path.abspath(path))
    temporary = os.path.join(folder, f".{name}.{uuid.uuid4().hex}.tmp")
    os.makedirs(folder, exist_ok=True)
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


@contextlib.contextmanager
def _opened(uri: str, version_id: str | None) -> Iterator[tuple[BinaryIO, os.stat_result]]:
    """Open a regular file, and turn what goes wrong until the end of the block into our errors."""
    if version_id is not None:
        raise StorageError(f"{uri}: files have no versions, version {version_id!r} was asked for")
    try:
        # Not blocking: opening a named pipe for reading would wait for a writer for ever.
        descriptor = os.open(to_path(uri), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            facts = os.fstat(descriptor)
            if not stat.S_ISREG(facts.st_mode):
                raise StorageError(f"{uri}: not a regular file")
            yield file, facts
    except OSError as exc:
        raise _translate(exc, uri) from exc
    except ValueError as exc:
        raise NotFoundError(f"{uri!r}: not a path: {exc}") from exc


def _link(temporary: str, path: str) -> bool:
    """Give the file its name if that is free; tell whether it was."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as exc:
        if exc.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        # A file system without hard links: still all or nothing, but two drivers at once could both succeed.
        if os.path.exists(path):
            return False
        os.rename(temporary, path)
    return True


def to_path(uri: str) -> str:
    """Return the path of a local URI."""
    if not uri.startswith("file://"):
        return uri
    return os.fsdecode(urllib.parse.unquote_to_bytes(uri.removeprefix("file://")))


def _to_uri(path: str) -> str:
    try:
        path.encode()
    except UnicodeEncodeError:
        return "file://" + urllib.parse.quote_from_bytes(os.fsencode(path))
    return path


def _walk(folder: str) -> Iterator[ObjectInfo]:
    """Yield the files below a folder, ordered as their full paths are."""
    try:
        with os.scandir(folder) as entries:
            # A folder sorts as "name/": that is how its files' paths compare with a sibling called "name.x".
            found = sorted(
                (os.fsencode(entry.name) + b"/" * entry.is_dir(follow_symlinks=False), entry) for entry in entries
            )
    except OSError as exc:
        raise _translate(exc, folder) from exc
    for _, entry in found:
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(entry.path)
        elif not _is_linked_folder(entry):
            yield _describe(entry.path)


def _is_linked_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_symlink() and entry.is_dir()
    except OSError:
        return False  # a link to itself: listed, and missing when it is fetched


def _describe(path: str) -> ObjectInfo:
    try:
        facts = os.stat(path)
    except OSError:
        # A dangling link, or a file gone since: it was listed, so it gets its row.
        return ObjectInfo(_to_uri(path), None, None, None)
    return ObjectInfo(_to_uri(path), facts.st_size, None, _utc(facts.st_mtime))


def _utc(seconds: float) -> datetime | None:
    try:
        return datetime.fromtimestamp(seconds, UTC)
    except (OverflowError, ValueError, OSError):
        return None  # a file may claim any time; year 30,000 is not worth a run


def _translate(exc: OSError, uri: str) -> StorageError:
    reason = exc.strerror or type(exc).__name__
    if exc.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP) and not isinstance(exc, FileExistsError):
        return NotFoundError(f"{uri}: {reason}")
    if exc.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return AccessDeniedError(f"{uri}: {reason}")
    if exc.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(f"{uri}: {reason}: make room, and repeat the command to go on")
    return StorageError(f"{uri}: {reason}")
