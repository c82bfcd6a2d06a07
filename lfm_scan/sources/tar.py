"""Images in tar archives and WebDataset shards: indexed in one pass, read in place, never unpacked to disk.

An archive's index is its images' names, places and CRC-32s. The scan later fetches the stretches it needs and checks
them against the index, as a store verifies whole objects only. Nothing is ever written under a member's name.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import re
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from lfm_scan.errors import (
    AccessDeniedError,
    ChangedError,
    ImageError,
    NotFoundError,
    OutageError,
    OversizeError,
    StorageError,
    UnreachableError,
)
from lfm_scan.scoring.prepare import image_error
from lfm_scan.sources.inputs import Input, Kind
from lfm_scan.sources.tarstream import Member, TarStream, inflate, is_gzip
from lfm_scan.status import Status
from lfm_scan.storage import Fetched, ObjectInfo, Store, check_size, open_object

IMAGE_SUFFIXES: Final = (
    *(".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    *(".avif", ".heic", ".heif"),
)
"""Ends of the names that tell a sample's images from its side data."""

_TRIES: Final = 3
_MD5: Final = re.compile(r"[0-9a-f]{32}")
_DRAIN_BYTES: Final = 2**20
_MAX_TEXT_BYTES: Final = 64 * 2**10
_MAX_INDEX_BYTES: Final = 2**30
_INPUT_BYTES: Final = 500
"""Memory that an input takes beside its strings: measured, rounded up."""

_SPAN_BYTES: Final = 8 * 2**20
_GAP_BYTES: Final = 64 * 2**10


# --- From an archive to its inputs ---


def index_tar(store: Store, found: ObjectInfo, carry: Sequence[str] = ()) -> list[Input]:
    """Return the inputs that a tar archive holds, compressed or not, in the archive's order.

    They are its regular files; links and devices are not followed. Adjacent files whose names agree up to the first dot
    are one WebDataset sample: if any of them is named like an image, the others are its side data and no inputs.

    Every archive gives at least one input: one that is broken, unreadable or empty gives one for itself, with its
    status, after those for the members that are whole. An index takes at most about 1 GiB of memory; what an archive
    holds beyond that is left out, and its own input says so.

    Args:
        store: The archive lies in.
        found: The archive, as listed.
        carry: Suffixes (what follows the first dot) of side data whose text each image of the sample is to carry: cls,
            caption.txt. A text that is missing or has over 64 KiB is None.

    Raises:
        OutageError: If the store answers nobody.
    """
    try:
        if found.size_bytes is None:
            found = store.head(found.uri)
    except OutageError:
        raise
    except StorageError as exc:
        return [_failed(found, image_error(exc))]
    digests: set[str] = set()
    for _ in range(_TRIES):
        inputs, digest = _index_once(store, found, carry)
        # Two reads that agree are right: under KMS keys an ETag looks like an MD5 and is none.
        if digest is None or digest == found.etag or digest in digests:
            return inputs
        digests.add(digest)
    error = ImageError(
        Status.ERROR, f"{_TRIES} reads of it gave other bytes each time: check the network and the store"
    )
    return [_failed(found, error)]


def _index_once(store: Store, found: ObjectInfo, carry: Sequence[str]) -> tuple[list[Input], str | None]:
    """Return an archive's inputs, and the MD5 of its bytes if its ETag may be one and they could be read."""
    index = _Index(found, carry)
    digest = None
    error = None
    try:
        with open_object(store, found) as file:
            whole = _DigestedFile(file)
            try:
                _fill(index, whole, is_compressed=is_gzip(file))
            except ImageError as exc:
                error = exc
            if found.etag is not None and _MD5.fullmatch(found.etag):
                digest = whole.digest_to_end()
    except OutageError:
        raise
    except StorageError as exc:
        error = image_error(exc)
    inputs = index.finish()
    if error is not None:
        inputs.append(_failed(found, error))
    elif not inputs:
        reason = "no regular file is in the archive" if found.size_bytes else "zero bytes"
        inputs.append(_failed(found, ImageError(Status.EMPTY, reason)))
    return inputs, digest


def _fill(index: _Index, whole: _DigestedFile, *, is_compressed: bool) -> None:
    """Read an archive and add what it holds to its index.

    Raises:
        ImageError: If it is broken; what was added by then is good.
        StorageError: If it cannot be read.
    """
    index.kind = Kind.TAR_GZ if is_compressed else Kind.TAR
    file = inflate(whole) if is_compressed else whole
    stream = TarStream(file)
    for member in stream.members():
        if member.is_file:
            is_carried = index.begin(member)
            index.complete(member, *_digest(stream.chunks(), _MAX_TEXT_BYTES if is_carried else -1))
    if is_compressed:
        # The checksum of what was unpacked comes last, and the end mark of the archive before it.
        while file.read(_DRAIN_BYTES):
            pass


def _digest(chunks: Iterator[bytes], max_text_bytes: int) -> tuple[int, str | None]:
    """Return the CRC-32 of a member's data, and the data as text unless they are longer."""
    crc32 = 0
    text = b""
    for chunk in chunks:
        crc32 = zlib.crc32(chunk, crc32)
        text += chunk[: max_text_bytes + 1 - len(text)]
    return crc32, None if len(text) > max_text_bytes else text.decode("utf-8", "replace")


class _DigestedFile:
    """A file that is digested while it is read."""

    def __init__(self, file: io.BufferedReader) -> None:
        self._file = file
        self._md5 = hashlib.md5(usedforsecurity=False)

    def read(self, size: int, /) -> bytes:
        """Return the next bytes, fewer than asked for only at the end."""
        data = self._file.read(size)
        self._md5.update(data)
        return data

    def digest_to_end(self) -> str:
        """Read what is left, and return the MD5 of everything."""
        while self.read(_DRAIN_BYTES):
            pass
        return self._md5.hexdigest()


class _Index:
    """An archive's inputs as they are found."""

    def __init__(self, archive: ObjectInfo, carry: Sequence[str]) -> None:
        self.kind = Kind.TAR
        self._archive = archive
        self._carry = {name.lstrip(".").lower(): name for name in carry}
        self._inputs: list[Input] = []
        self._uris: set[str] = set()
        self._num_namesakes: dict[str, int] = {}
        self._memory_bytes = 0
        self._key: str | None = None
        self._sample: list[tuple[Member, int]] = []
        self._carried: dict[str, str] = {}
        self._has_images = False

    def begin(self, member: Member) -> bool:
        """Take note of the next regular file, before its data are read: they may break off.

        Returns:
            Whether its text is to be carried.

        Raises:
            ImageError: If there are too many.
        """
        self._memory_bytes += _INPUT_BYTES + sys.getsizeof(self._archive.uri) + sys.getsizeof(member.name)
        if self._memory_bytes > _MAX_INDEX_BYTES:
            raise ImageError(
                Status.TOO_LARGE,
                f"an index of its first {member.index:,} members takes {_MAX_INDEX_BYTES:,} bytes, the limit: "
                "split the archive; what follows is not read",
            )
        key, suffix = _split_name(member.name)
        if key != self._key:
            self._end_sample()
            self._key = key
        self._has_images |= _is_named_like_image(member.name)
        return suffix in self._carry

    def complete(self, member: Member, crc32: int, text: str | None) -> None:
        """Add the file that began last.

        Args:
            member: It.
            crc32: Of its data.
            text: Its data, if it is to be carried and not too long.
        """
        self._sample.append((member, crc32))
        if text is not None:
            self._memory_bytes += sys.getsizeof(text)
            self._carried[self._carry[_split_name(member.name)[1]]] = text

    def finish(self) -> list[Input]:
        """Return the inputs."""
        self._end_sample()
        return self._inputs

    def _end_sample(self) -> None:
        carried = {name: self._carried.get(name) for name in self._carry.values()}
        self._inputs += [
            self._input_of(member, crc32, carried)
            for member, crc32 in self._sample
            if not self._has_images or _is_named_like_image(member.name)
        ]
        self._sample, self._carried, self._has_images = [], {}, False

    def _input_of(self, member: Member, crc32: int, carried: Mapping[str, str | None]) -> Input:
        is_whole = member.problem is None
        return Input(
            uri=self._new_uri(member.name),
            size_bytes=member.size_bytes if is_whole else None,
            etag=self._archive.etag,
            last_modified=self._archive.last_modified,
            kind=self.kind,
            location=self._archive.uri,
            position=member.offset if self.kind == Kind.TAR else member.index,
            crc32=crc32 if is_whole else None,
            status=None if is_whole else Status.UNSUPPORTED,
            error=member.problem,
            carried=carried,
        )

    def _new_uri(self, name: str) -> str:
        """Return a URI that no other member has: an archive may hold a name twice, and names that end in #2."""
        uri = first = f"{self._archive.uri}#{name}"
        while uri in self._uris:
            # Counting goes on where it ended last time, so that a million namesakes take no million steps each.
            self._num_namesakes[first] = self._num_namesakes.get(first, 1) + 1
            uri = f"{first}#{self._num_namesakes[first]}"
        self._uris.add(uri)
        return uri


def _split_name(name: str) -> tuple[str, str]:
    """Return a WebDataset's key, the path up to the first dot of the file's name, and the lower-case suffix after it.

    A dot that the file's name begins with does not count: hidden files have no key in common.
    """
    dot = name.find(".", name.rfind("/") + 2)
    return (name, "") if dot < 0 else (name[:dot], name[dot + 1 :].lower())


def _is_named_like_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def _failed(found: ObjectInfo, error: ImageError) -> Input:
    message = error.message.encode("utf-8", "backslashreplace").decode()  # a store may be quoted in it
    return dataclasses.replace(Input.of(found), status=error.status, error=message)


# --- From inputs to their bytes ---


def read_members(store: Store, inputs: Sequence[Input], max_bytes: int) -> Iterator[Fetched | ImageError]:
    """Yield the bytes of one archive's inputs, or why there are none, in their order.

    A compressed archive is unpacked from its start up to the last input, with one image in memory at a time.

    Args:
        store: The archive lies in.
        inputs: As `index_tar` gave them, or some of them in the same order.
        max_bytes: A larger one is too_large, and not fetched.

    Raises:
        OutageError: If the store answers nobody.
    """
    if any(item.kind == Kind.TAR_GZ for item in inputs):
        unpacked = _unpack(store, [item for item in inputs if _refusal(item, max_bytes) is None])
        for item in inputs:
            yield _refusal(item, max_bytes) or next(unpacked)
    else:
        for span in spans(inputs):
            yield from read_span(store, span, max_bytes)


def spans(inputs: Sequence[Input]) -> list[list[Input]]:
    """Return the inputs of one uncompressed archive, in their order, as runs to fetch with one request each.

    A run spans at most 8 MiB, or is one input; between its inputs lie at most 64 KiB that nobody asked for.
    """
    runs: list[list[Input]] = []
    for item in inputs:
        if runs and _adjoins(runs[-1], item):
            runs[-1].append(item)
        else:
            runs.append([item])
    return runs


def read_span(store: Store, span: Sequence[Input], max_bytes: int) -> list[Fetched | ImageError]:
    """Return the bytes of inputs that lie side by side in an uncompressed archive, or why there are none.

    Each is verified against its planned CRC-32, and fetched again alone if it differs.

    Args:
        store: The archive lies in.
        span: One of those that `spans` returns.
        max_bytes: A larger input is too_large.

    Raises:
        OutageError: If the store answers nobody.
    """
    wanted = [item for item in span if _refusal(item, max_bytes) is None]
    found = iter(_fetch_side_by_side(store, wanted) if wanted else [])
    return [_refusal(item, max_bytes) or next(found) for item in span]


def _fetch_side_by_side(store: Store, items: list[Input]) -> list[Fetched | ImageError]:
    start = _start(items[0])
    try:
        stretch = memoryview(_get_range(store, items[0], start, _end(items[-1]) - start))
    except OutageError:
        raise
    except (NotFoundError, AccessDeniedError, UnreachableError) as exc:
        return [image_error(exc)] * len(items)
    except ChangedError as exc:
        if items[0].etag is not None:
            return [_changed(exc)] * len(items)
        return [_fetch_alone(store, item) for item in items]  # a file that has lost its end may have the others
    except StorageError:
        return [_fetch_alone(store, item) for item in items]
    outcomes: list[Fetched | ImageError] = []
    for item in items:
        data = bytes(stretch[_start(item) - start : _end(item) - start])
        outcomes.append(_fetched(item, data) if _is_as_planned(item, data) else _fetch_alone(store, item))
    return outcomes


def _fetch_alone(store: Store, item: Input) -> Fetched | ImageError:
    for _ in range(_TRIES):
        try:
            data = _get_range(store, item, _start(item), _end(item) - _start(item))
        except OutageError:
            raise
        except ChangedError as exc:
            return _changed(exc)
        except StorageError as exc:
            return image_error(exc)
        if _is_as_planned(item, data):
            return _fetched(item, data)
    return _differs(item)


def _get_range(store: Store, item: Input, start: int, num_bytes: int) -> bytes:
    return store.get_range(item.where, start, num_bytes, etag=item.etag) if num_bytes else b""


def _unpack(store: Store, items: Sequence[Input]) -> Iterator[Fetched | ImageError]:
    """Yield the bytes of inputs of a compressed archive; start over, but twice at most, if they are not as planned."""
    num_done = 0
    for tries_left in reversed(range(_TRIES)):
        for outcome, is_final in _unpack_once(store, items[num_done:]):
            if tries_left and not is_final:
                break
            yield outcome
            num_done += 1


def _unpack_once(store: Store, items: Sequence[Input]) -> Iterator[tuple[Fetched | ImageError, bool]]:
    """Yield an outcome for each input, and whether it would be the same another time."""
    num_done = 0
    if not items:
        return
    try:
        with open_object(store, _facts_now(store, items[0])) as file:
            stream = TarStream(inflate(file) if is_gzip(file) else file)
            members = stream.members()
            for item in items:
                data = _data_of(item, stream, members)
                if data is not None and _is_as_planned(item, data):
                    yield _fetched(item, data), True
                else:
                    yield _differs(item), False
                num_done += 1
        return
    except OutageError:
        raise
    except ImageError as exc:
        failure, is_final = ImageError(Status.ERROR, f"not as it was planned: {exc.message}"), False
    except ChangedError as exc:
        failure, is_final = _changed(exc), True
    except StorageError as exc:
        failure, is_final = image_error(exc), True
    for _ in items[num_done:]:
        yield failure, is_final


def _facts_now(store: Store, item: Input) -> ObjectInfo:
    """Return an archive's facts.

    Raises:
        ChangedError: If it is not the one that was indexed.
        StorageError: If the store does not tell.
    """
    facts = store.head(item.where)
    if item.etag is not None and facts.etag != item.etag:
        raise ChangedError(f"{item.where}: its ETag is {facts.etag}, was {item.etag}")
    return facts


def _data_of(item: Input, stream: TarStream, members: Iterator[Member]) -> bytes | None:
    """Return the bytes of the member that an input was, or None if there is none of its size in its place."""
    member = next((member for member in members if member.index == item.position), None)
    if member is None or member.size_bytes != item.size_bytes:
        return None
    return b"".join(stream.chunks())


def _refusal(item: Input, max_bytes: int) -> ImageError | None:
    """Return why an input need not be fetched, or None."""
    if item.status is not None:
        return ImageError(item.status, item.error or item.status)
    try:
        check_size(item.size_bytes, max_bytes)
    except OversizeError as exc:
        return image_error(exc)
    return None


def _adjoins(span: list[Input], item: Input) -> bool:
    gap_bytes = _start(item) - _end(span[-1])
    return 0 <= gap_bytes <= _GAP_BYTES and _end(item) - _start(span[0]) <= _SPAN_BYTES


def _start(item: Input) -> int:
    return item.position or 0


def _end(item: Input) -> int:
    return _start(item) + (item.size_bytes or 0)


def _is_as_planned(item: Input, data: bytes) -> bool:
    return zlib.crc32(data) == item.crc32


def _fetched(item: Input, data: bytes) -> Fetched:
    return Fetched(data, ObjectInfo(item.uri, len(data), item.etag, item.last_modified))


def _changed(exc: ChangedError) -> ImageError:
    return ImageError(Status.ERROR, f"changed since it was planned, start a new run: {exc}")


def _differs(item: Input) -> ImageError:
    return ImageError(
        Status.ERROR,
        f"its bytes in {item.where} are not those that were planned: the archive has changed, start a new run, or the "
        "store damages it",
    )
