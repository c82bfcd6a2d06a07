"""Which inputs the user wants: by name, size and time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lfm_scan.options import InputConfig, parse_time
from lfm_scan.sources.globs import glob_matcher
from lfm_scan.sources.inputs import Input


def make_filter(config: InputConfig) -> Callable[[Input], bool] | None:
    """Return a test for whether an input is wanted, or None if all are.

    A size or time that the source does not tell passes no bound on it: what cannot be checked is not selected.
    """
    tests: list[Callable[[Input], bool]] = []
    if config.include:
        included = _any_of(config.include)
        tests.append(lambda each: included(each.uri))
    if config.exclude:
        excluded = _any_of(config.exclude)
        tests.append(lambda each: not excluded(each.uri))
    if config.suffix:
        suffixes = tuple(suffix.lower() for suffix in config.suffix)
        tests.append(lambda each: each.uri.lower().endswith(suffixes))
    if (smallest := config.min_size) is not None:
        tests.append(lambda each: each.size_bytes is not None and each.size_bytes >= smallest)
    if (largest := config.max_size) is not None:
        tests.append(lambda each: each.size_bytes is not None and each.size_bytes <= largest)
    if config.modified_after is not None:
        first = parse_time(config.modified_after, "--modified-after")
        tests.append(lambda each: each.last_modified is not None and each.last_modified >= first)
    if config.modified_before is not None:
        end = parse_time(config.modified_before, "--modified-before")
        tests.append(lambda each: each.last_modified is not None and each.last_modified < end)
    return (lambda each: all(test(each) for test in tests)) if tests else None


def _any_of(patterns: Sequence[str]) -> Callable[[str], bool]:
    matchers = [glob_matcher(pattern if _is_whole(pattern) else f"**/{pattern}") for pattern in patterns]
    return lambda uri: any(matches(uri) for matches in matchers)


def _is_whole(pattern: str) -> bool:
    return "://" in pattern or pattern.startswith(("/", "**"))
