"""Shell patterns over whole URIs, and the brace ranges that WebDataset shards are named by."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterator
from typing import Final

from lfm_scan.errors import ConfigError

_WILDCARD: Final = re.compile(r"[*?\[]")
_TOKEN: Final = re.compile(r"\*\*/|\*\*|\*|\?|\[!?\]?[^\]]*\]|.", re.DOTALL)
_BRACES: Final = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{},]*(?:,[^{},]*)+))\}")


def first_wildcard(pattern: str) -> int:
    """Return where the first wildcard is, or the length of a pattern without any."""
    found = _WILDCARD.search(pattern)
    return found.start() if found else len(pattern)


@functools.lru_cache(maxsize=256)
def glob_matcher(pattern: str) -> Callable[[str], bool]:
    """Return a test for a whole URI against a shell pattern: * and ? stop at /, ** does not.

    Raises:
        ConfigError: If it has a range that runs backwards.
    """
    try:
        expression = re.compile("".join(map(_translate, _TOKEN.findall(pattern))), re.DOTALL)
    except re.error as exc:
        raise ConfigError(f"{pattern}: not a pattern: {exc.msg}") from exc
    return lambda uri: expression.fullmatch(uri) is not None


def expand_braces(pattern: str) -> Iterator[str]:
    """Yield what a pattern with {000..099} or {a,b} stands for, in order; one without them as it is."""
    found = _BRACES.search(pattern)
    if found is None:
        yield pattern
        return
    first, last, choices = found.groups()
    middles = choices.split(",") if choices is not None else _numbers(first, last)
    for middle, tail in itertools.product(middles, tuple(expand_braces(pattern[found.end() :]))):
        yield pattern[: found.start()] + middle + tail


def _numbers(first: str, last: str) -> list[str]:
    step = 1 if int(first) <= int(last) else -1
    width = len(first) if first.startswith("0") or len(first) == len(last) else 1
    return [f"{number:0{width}d}" for number in range(int(first), int(last) + step, step)]


def _translate(token: str) -> str:
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
