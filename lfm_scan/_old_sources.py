"""From what the user names to a stream of objects: sorted by URI, each once, in bounded memory."""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from lfm_scan.config import absolute
from lfm_scan.errors import NotFoundError
from lfm_scan.options import StorageConfig
from lfm_scan.storage import ObjectInfo, is_remote, open_store
from lfm_scan.storage.local import to_path

_GLOB_CHARACTERS: Final = re.compile(r"[*?\[]")
_GLOB_TOKEN: Final = re.compile(r"\*\*/|\*\*|\*|\?|\[!?\]?[^\]]*\]|.", re.DOTALL)


def list_sources(sources: Iterable[str], storage: StorageConfig, exclude: str | None = None) -> Iterator[ObjectInfo]:
    """Yield every object of all sources, none twice, ordered by the UTF-8 bytes of its URI.

    That none comes twice does not hang on the order: some S3-compatible stores do not list by key, and what they list
    comes in their order.

    Args:
        sources: Folders, files, globs, or s3://bucket/prefix.
        storage: How to reach S3.
        exclude: A folder to leave out: the run directory, which may lie inside a source.

    Raises:
        StorageError: If a source cannot be listed.
    """
    named = [absolute(source) for source in sources]
    covered = [] if exclude is None else [_coverage(absolute(exclude).rstrip("/") + "/")]
    listings = []
    for source in named:
        listings.append(_uncovered(_list_source(source, storage, patient=True), tuple(covered)))
        covered.append(_coverage(source))
    return heapq.merge(*listings, key=_order)


def _uncovered(objects: Iterator[ObjectInfo], covered: tuple[Callable[[str], bool], ...]) -> Iterator[ObjectInfo]:
    """Yield the objects that no earlier source, and not the run directory, holds already."""
    return (found for found in objects if not any(covers(found.uri) for covers in covered))


def _coverage(source: str) -> Callable[[str], bool]:
    """Return a test for whether a source holds a URI."""
    if _is_glob(source):
        return glob_matcher(source)
    if is_remote(source):
        return lambda uri: uri.startswith(source)
    folder = source.rstrip("/") + "/"
    return lambda uri: to_path(uri) == source or to_path(uri).startswith(folder)


def check_sources(sources: Iterable[str], storage: StorageConfig) -> None:
    """Find out within seconds whether every source can be listed and holds anything.

    Raises:
        NotFoundError: If a source does not exist or matches nothing.
        StorageError: If it cannot be listed.
    """
    for source in sources:
        if next(_list_source(absolute(source), storage, patient=False), None) is None:
            raise NotFoundError(f"{source}: nothing there to scan")


def _list_source(source: str, storage: StorageConfig, *, patient: bool) -> Iterator[ObjectInfo]:
    store = open_store(source, storage, patient=patient)
    if not _is_glob(source):
        return store.list(source)
    # List from the last folder before the first wildcard; on S3, from the longest literal prefix.
    literal = source[: _first_wildcard(source)]
    base = literal if is_remote(source) else literal.rpartition("/")[0] or "/"
    matches = glob_matcher(source)
    return (found for found in store.list(base) if matches(found.uri))


def _is_glob(source: str) -> bool:
    if not _GLOB_CHARACTERS.search(source):
        return False
    if is_remote(source):
        return "*" in source or "?" in source  # brackets alone are common in keys
    try:
        next(open_store(source).list(source), None)
    except NotFoundError:
        return True
    return False  # a file or folder of exactly that name


def _first_wildcard(source: str) -> int:
    found = _GLOB_CHARACTERS.search(source)
    return found.start() if found else len(source)


def glob_matcher(pattern: str) -> Callable[[str], bool]:
    """Return a test for a whole URI against a shell pattern: * and ? stop at /, ** does not."""

    def translate(token: str) -> str:
        match token:
            case "**/":
                return "(?:.*/)?"
            case "**":
                return ".*"
            case "*":
                return "[^/]*"
            case "?":
                return "[^/]"
            case _ if token.startswith("[") and len(token) > 1:
                inner = token[1:-1].replace("\\", "\\\\")
                return f"[^{inner[1:]}]" if inner.startswith("!") else f"[{inner}]"
            case _:
                return re.escape(token)

    expression = re.compile("".join(map(translate, _GLOB_TOKEN.findall(pattern))), re.DOTALL)
    return lambda uri: expression.fullmatch(uri) is not None


def _order(found: ObjectInfo) -> bytes:
    return found.uri.encode("utf-8", "surrogateescape")
