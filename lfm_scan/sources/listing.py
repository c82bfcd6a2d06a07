"""From what the user names to the objects that are there."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from lfm_scan.config import absolute
from lfm_scan.errors import NotFoundError
from lfm_scan.options import StorageConfig
from lfm_scan.sources.containers import Container, container_named
from lfm_scan.sources.globs import expand_braces, first_wildcard, glob_matcher
from lfm_scan.storage import ObjectInfo, is_remote, open_store
from lfm_scan.storage.local import to_path


@dataclass(frozen=True)
class Source:
    """One thing the user named: objects, or containers of inputs.

    Attributes:
        uri: Absolute path or URI: of a file, a folder, a prefix or a glob.
        container: What each object found there holds, or None if the objects are the inputs.
        is_glob: Whether `uri` is a pattern.
        storage: How to reach it.
    """

    uri: str
    container: Container | None
    is_glob: bool
    storage: StorageConfig

    def list(self, *, patient: bool = True) -> Iterator[ObjectInfo]:
        """Yield the objects it names.

        Raises:
            StorageError: If they cannot be listed.
        """
        store = open_store(self.uri, self.storage, patient=patient)
        if self.is_glob:
            # From the last folder before the first wildcard; on S3, from the longest literal prefix.
            literal = self.uri[: first_wildcard(self.uri)]
            base = literal if _has_prefixes(self.uri) else literal[: literal.rindex("/") + 1]
            covers = self.covers
            yield from (found for found in store.list(base) if covers(found.uri))
        elif self.container is not None and is_remote(self.uri):
            # By its exact name, of which a remote listing by prefix would also give the neighbours.
            yield store.head(self.uri)
        else:
            yield from store.list(self.uri)

    @functools.cached_property
    def covers(self) -> Callable[[str], bool]:
        """A test for whether listing it gives the object with a URI."""
        if self.is_glob:
            matches = glob_matcher(self.uri)
            return lambda uri: matches(to_path(uri))
        exact, prefix = self.uri, self.uri.rstrip("/") + "/"
        if self.container is not None or _is_web(self.uri):
            return lambda uri: to_path(uri) == exact
        if _has_prefixes(self.uri):
            return lambda uri: uri.startswith(exact)
        return lambda uri: to_path(uri) == exact or to_path(uri).startswith(prefix)


def parse_sources(sources: Iterable[str], storage: StorageConfig) -> list[Source]:
    """Return what the user's words name: plain sources first, containers of inputs after them."""
    parsed = [_parse(absolute(each), storage) for named in sources for each in _expand(named)]
    return sorted(
        parsed, key=lambda source: (source.container is not None, source.uri.encode(errors="surrogateescape"))
    )


def check_sources(sources: Iterable[str], storage: StorageConfig) -> None:
    """Find out within seconds whether every source can be listed and holds anything.

    Raises:
        NotFoundError: If a source does not exist or matches nothing.
        StorageError: If it cannot be listed.
    """
    for source in parse_sources(sources, storage):
        if next(source.list(patient=False), None) is None:
            raise NotFoundError(f"{source.uri}: nothing there to scan")


def uncovered(objects: Iterator[ObjectInfo], covers: Iterable[Callable[[str], bool]]) -> Iterator[ObjectInfo]:
    """Yield the objects that no other source holds already."""
    tests = tuple(covers)
    return (found for found in objects if not any(test(found.uri) for test in tests))


def _parse(uri: str, storage: StorageConfig) -> Source:
    if not is_remote(uri):
        uri = uri.rstrip("/") or "/"
    container = container_named(uri)
    if container is not None and not is_remote(uri) and os.path.isdir(to_path(uri)):
        container = None
    return Source(uri, container, _is_glob(uri), storage)


def _has_prefixes(uri: str) -> bool:
    """Tell whether a store lists by any prefix of its keys; others list folders."""
    return uri.startswith("s3://")


def _is_web(uri: str) -> bool:
    return uri.startswith(("http://", "https://"))


def _is_glob(uri: str) -> bool:
    if _is_web(uri):
        return False
    if is_remote(uri):
        return "*" in uri or "?" in uri  # brackets alone are common in keys
    return first_wildcard(uri) < len(uri) and not os.path.lexists(to_path(uri))


def _expand(named: str) -> Iterator[str]:
    """Yield what braces stand for, unless a file has them in its name."""
    if is_remote(named) or not os.path.lexists(to_path(absolute(named))):
        return expand_braces(named)
    return iter((named,))
