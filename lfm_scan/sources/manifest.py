"""Manifests: files whose lines name images, as CSV, TSV, JSON lines or a plain list."""

from __future__ import annotations

import json
import re
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from lfm_scan.errors import SourceError
from lfm_scan.options import InputConfig
from lfm_scan.sources.inputs import Input
from lfm_scan.sources.lines import BadLine, open_lines, read_records
from lfm_scan.status import Status
from lfm_scan.storage import ObjectInfo, Store
from lfm_scan.storage.local import to_path

URI_COLUMNS: Final = (
    "uri",
    "url",
    "path",
    "file",
    "filename",
    "image",
    "image_uri",
    "image_url",
    "image_path",
    "s3_uri",
    "key",
)
"""Names, in lower case, of columns taken to hold URIs; the first that is there counts."""

_DELIMITERS: Final = {".csv": ",", ".tsv": "\t"}
_JSON_LINES: Final = (".jsonl", ".ndjson")
_LISTS: Final = (".txt", ".list")
_SCHEME: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_PLACE: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^/]*|")
_MAX_SHOWN: Final = 20

_Row = tuple[int, object, Mapping[str, Any]]
"""Number of its line, value that should name an image, carried values."""


def read_manifest(store: Store, found: ObjectInfo, config: InputConfig) -> Iterator[Input]:
    """Yield the input that each line names, in the manifest's order, in bounded memory.

    One line is one input, also where two lines name the same object: what else they say may differ. A line that cannot
    be used is an input too, `<manifest>#line=<n>` with status error. Sizes, ETags and times are not taken from a
    manifest: they come from the store.

    CSV and TSV have a header. In JSON lines the first object with members decides which of them holds the URI. A list
    has one URI a line, taken as it stands; empty lines and those that start with # are skipped.

    Args:
        store: The manifest lies in.
        found: The manifest; its name ends in .csv, .tsv, .jsonl, .ndjson, .txt or .list, and perhaps .gz.
        config: Which column holds URIs, and which ones to carry: text from CSV and TSV, text or JSON from JSON lines.

    Raises:
        SourceError: If it has no usable column, is no text, is damaged, or its name ends otherwise.
        StorageError: If it cannot be read.
    """
    suffix, lines = _open(store, found)
    if suffix in _DELIMITERS:
        rows = _csv_rows(found.uri, read_records(lines, _DELIMITERS[suffix]), config)
    elif suffix in _JSON_LINES:
        rows = _json_rows(found.uri, lines, config)
    elif suffix in _LISTS:
        rows = _list_rows(found.uri, lines, config)
    else:
        known = ", ".join((*_DELIMITERS, *_JSON_LINES, *_LISTS))
        raise SourceError(f"{found.uri}: not a manifest by its name; known are {known}, each also with .gz")
    folder = folder_of(found.uri)
    for number, value, carried in rows:
        yield named_input(value, folder, f"{found.uri}#line={number}", carried)


def columns_among(store: Store, found: ObjectInfo, names: Sequence[str]) -> list[str]:
    """Return those of some columns' names that a manifest has: CSV by its header, JSON lines perhaps any, a list none.

    Args:
        store: The manifest lies in.
        found: The manifest.
        names: Of columns that it may have.

    Raises:
        SourceError: If it is damaged.
        StorageError: If it cannot be read.
    """
    suffix, lines = _open(store, found)
    if suffix in _JSON_LINES:
        return list(names)
    if suffix not in _DELIMITERS:
        return []
    header = next((cells for _, cells in read_records(lines, _DELIMITERS[suffix]) if cells), None)
    has = {name.strip() for name in header} if isinstance(header, list) else set()
    return [name for name in names if name in has]


def named_input(value: object, folder: str, place: str, carried: Mapping[str, Any]) -> Input:
    """Return the input that a value names, or one that says why it names none.

    Args:
        value: From a manifest.
        folder: What a relative path is relative to, as `folder_of` gives it.
        place: URI of the line or row, for an input that has no other.
        carried: Other columns.
    """
    uri = _resolve(value, folder)
    if isinstance(uri, BadLine):
        return Input(uri=place, status=Status.ERROR, error=uri.reason, carried=carried)
    return Input(uri=uri, carried=carried)


def folder_of(uri: str) -> str:
    """Return URI or path of the folder a file lies in, without a slash at its end."""
    return without_query(uri).rpartition("/")[0]


def find_uri_column(names: Iterable[str]) -> str | None:
    """Return the name among these that `URI_COLUMNS` has first, in whatever case; None if it has none."""
    by_name = {name.lower(): name for name in reversed(list(names))}
    return next((by_name[known] for known in URI_COLUMNS if known in by_name), None)


def listed(names: Sequence[str]) -> str:
    """Return names for an error message, which a file may have thousands of, each as long as it likes."""
    shown = ", ".join(f"{name!r:.60}" for name in names[:_MAX_SHOWN])
    return shown + (f" and {len(names) - _MAX_SHOWN:,} more" if len(names) > _MAX_SHOWN else "")


def _open(store: Store, found: ObjectInfo) -> tuple[str, Iterator[tuple[int, str | BadLine]]]:
    """Return the suffix that tells a manifest's format, and its lines."""
    name = without_query(found.uri).lower()
    plain = name.removesuffix(".gz")
    return plain[plain.rfind(".") :], open_lines(store, found, compressed=plain != name)


def _csv_rows(uri: str, records: Iterator[tuple[int, list[str] | BadLine]], config: InputConfig) -> Iterator[_Row]:
    header = next((cells for _, cells in records if cells), None)
    if header is None:
        raise SourceError(f"{uri}: is empty; its first line must name the columns")
    if isinstance(header, BadLine):
        raise SourceError(f"{uri}: its first line must name the columns: {header.reason}")
    names = [name.strip() for name in header]
    column = _column(uri, names, config)
    _check_carried(uri, names, config)
    where = names.index(column)
    carry = {name: names.index(name) for name in config.carry}
    for number, cells in records:
        if isinstance(cells, BadLine):
            yield number, cells, {}
        elif len(cells) == len(names):
            yield number, cells[where], {name: cells[index] for name, index in carry.items()}
        elif cells:
            yield number, BadLine(f"{len(cells)} cells, the header names {len(names)}: quote cells with delimiters"), {}


def _json_rows(uri: str, lines: Iterator[tuple[int, str | BadLine]], config: InputConfig) -> Iterator[_Row]:
    column = None
    for number, line in lines:
        if not isinstance(line, BadLine) and not line.strip():
            continue
        members = _parse_object(line)
        if isinstance(members, BadLine):
            yield number, members, {}
            continue
        if column is None and members:
            column = _column(uri, list(members), config)
        carried = {name: _as_text(members.get(name)) for name in config.carry}
        yield number, members.get(column) if column is not None else None, carried


def _list_rows(uri: str, lines: Iterator[tuple[int, str | BadLine]], config: InputConfig) -> Iterator[_Row]:
    _check_carried(uri, [], config)
    for number, line in lines:
        if isinstance(line, BadLine):
            yield number, line, {}
        elif line.strip() and not line.startswith("#"):
            yield number, line.rstrip("\r\n"), {}


def _column(uri: str, names: Sequence[str], config: InputConfig) -> str:
    if config.uri_column is not None:
        if config.uri_column not in names:
            raise SourceError(f"{uri}: has no column {config.uri_column!r} (--uri-column); it has {listed(names)}")
        return config.uri_column
    column = find_uri_column(names)
    if column is None:
        raise SourceError(
            f"{uri}: no column is named {', '.join(URI_COLUMNS)}; it has {listed(names)}: name the one with URIs by "
            "--uri-column, or call a file of URIs alone .txt"
        )
    return column


def _check_carried(uri: str, names: Sequence[str], config: InputConfig) -> None:
    for name in config.carry:
        if name not in names:
            has = f"it has {listed(names)}" if names else "a list of URIs has no columns"
            raise SourceError(f"{uri}: has no column {name!r} to carry (--carry); {has}")


def _parse_object(line: str | BadLine) -> dict[str, Any] | BadLine:
    if isinstance(line, BadLine):
        return line
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as exc:
        return BadLine(f"not JSON: {exc}")
    return value if isinstance(value, dict) else BadLine(f"a JSON object is needed, this is {_kind(value)}")


def _as_text(value: object) -> str | None:
    """Return a JSON value as text that a Parquet string can hold: half a surrogate pair is written out."""
    if value is None:
        return None
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    return json.dumps(value, separators=(",", ":"))


def _resolve(value: object, folder: str) -> str | BadLine:
    """Return the URI or absolute path that a value of a manifest means."""
    if isinstance(value, BadLine):
        return value
    if value is None:
        return BadLine("no URI")
    if not isinstance(value, str):
        return BadLine(f"the URI should be text, this is {_kind(value)}")
    if not value.strip():
        return BadLine("no URI")
    if not value.isascii() and not _is_unicode(value):
        return BadLine("the URI has half a surrogate pair, which no name has")
    if value.startswith("file://"):
        path = to_path(value)
        if not path.startswith("/"):
            return BadLine(f"{value!r:.100}: a file:// URI has three slashes and a whole path: file:///folder/name")
    else:
        path = value
    if "\0" in path:
        return BadLine("the URI has a zero byte, which no name has")
    return value if value.startswith("/") or _SCHEME.match(value) else _below(folder, value)


def _below(folder: str, relative: str) -> str | BadLine:
    """Return the URI of a relative path. Only . and .. at its start mean something: in a key they are plain names."""
    top = _PLACE.match(folder)[0]  # type: ignore[index]
    steps = relative.split("/")
    while steps and steps[0] in (".", ".."):
        if steps.pop(0) == "..":
            if folder == top:
                return BadLine(f"{relative!r:.100}: leads out of {top or '/'}")
            folder = folder.rpartition("/")[0]
    below = "/".join(steps)
    if not below:
        return BadLine(f"{relative!r:.100}: names a folder")
    return f"{folder}/{urllib.parse.quote(below) if folder.startswith('file://') else below}"


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _kind(value: object) -> str:
    match value:
        case bool():
            return "true or false"
        case int() | float():
            return "a number"
        case list():
            return "a list"
        case dict():
            return "an object"
        case str():
            return "text"
        case _:
            return "null"


def without_query(uri: str) -> str:
    """Return a web address without what follows its path, such as a signature; another URI as it is."""
    return uri.partition("?")[0] if uri.startswith(("http://", "https://")) else uri
