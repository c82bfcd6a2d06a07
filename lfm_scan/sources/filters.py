"""Which inputs the user wants: by name, size and time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lfm_scan.options import InputConfig, parse_time
from lfm_scan.sources.globs import glob_matcher
from lfm_scan.sources.inputs import Input, Kind
from lfm_scan.storage.local import to_path


def make_filter(config: InputConfig) -> Callable[[Input], bool] | None:
    """Return a test for whether an input is wanted, or None if all are.

    A size or time that the source does not tell passes no bound on it: what cannot be checked is not selected. What a
    source reports of itself, a line or an archive that cannot be read, is selected unless it is excluded by name: what
    it should have held may have been wanted.
    """
    test = _test_of(config)
    if test is None:
        return None
    excluded = _any_of(config.exclude)
    return lambda each: test(each) or (_is_report(each) and not excluded(_name_of(each)))


def _test_of(config: InputConfig) -> Callable[[Input], bool] | None:
    tests: list[Callable[[Input], bool]] = []
    if config.include:
        included = _any_of(config.include)
        tests.append(lambda each: included(_name_of(each)))
    if config.exclude:
        excluded = _any_of(config.exclude)
        tests.append(lambda each: not excluded(_name_of(each)))
    if config.suffix:
        suffixes = tuple(suffix.lower() for suffix in config.suffix)
        tests.append(lambda each: _name_of(each).lower().endswith(suffixes))
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


def _is_report(each: Input) -> bool:
    return each.status is not None and each.kind is Kind.OBJECT


def _name_of(each: Input) -> str:
    """Return what patterns are matched with: the object's name and not the version's, and no percent-encoded path."""
    return to_path(each.where if each.kind is Kind.OBJECT else each.uri)


def _any_of(patterns: Sequence[str]) -> Callable[[str], bool]:
    matchers = [glob_matcher(pattern if _is_whole(pattern) else f"**/{pattern}") for pattern in patterns]
    return lambda uri: any(matches(uri) for matches in matchers)


def _is_whole(pattern: str) -> bool:
    return "://" in pattern or pattern.startswith(("/", "**"))
