"""How figures read in a terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape


def duration(seconds: float) -> str:
    """Return a length of time with two units: 45 s, 3 min 20 s, 2 h 05 min, 3 d 4 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    if whole < 86_400:
        return f"{whole // 3600} h {whole % 3600 // 60:02} min"
    return f"{whole // 86_400} d {whole % 86_400 // 3600} h"


def printable(text: str) -> str:
    """Return text that is safe to print: names in a store may hold what a terminal would obey."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def safe(text: str) -> str:
    """Return text that is safe to print where rich reads markup."""
    return escape(printable(text))


def print_json(value: Mapping[str, Any], console: Console | None = None) -> None:
    """Print one JSON object to standard output, for programs and for people to read."""
    console = console or Console(soft_wrap=True)
    console.print(json.dumps(value, indent=1), markup=False, highlight=False)


def print_json_line(value: Mapping[str, Any]) -> None:
    """Print one line of JSON to standard output."""
    print(json.dumps(value), flush=True)  # noqa: T201 - for programs: no console may wrap or colour it


def byte_size(size_bytes: float) -> str:
    """Return a number of bytes with its unit: 512 B, 1.5 KiB, 3.0 TiB."""
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"


def money(amount: float) -> str:
    """Return an amount in whatever currency: 12.30, 0.0042."""
    return f"{amount:,.4f}" if amount < 0.1 else f"{amount:,.2f}"


def time_shares(seconds: Mapping[str, float]) -> str:
    """Return what workers spent their time on, the most first: score 61 %, decode 30 %, fetch 9 %."""
    total = sum(seconds.values()) or 1.0
    ordered = sorted(seconds.items(), key=lambda item: item[1], reverse=True)
    return ", ".join(f"{stage} {100 * spent / total:.0f} %" for stage, spent in ordered)
