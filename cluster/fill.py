#!/usr/bin/env python3
"""Fill the placeholders of a file of this folder, and print the result: `python cluster/fill.py values.env FILE`.

A placeholder is a name in capitals within ${ and }. Its value stands in the first file, one NAME=value a line; lines
that are empty or start with # are left out. Needs nothing but Python.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

_PLACEHOLDER: Final = re.compile(r"\$\{([A-Z][A-Z0-9_]*)\}")
_VALUE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9 !_.,:/@+=*-]*")
"""No quotes, line breaks or backslashes: what is filled in can never become more than a value of YAML or JSON."""


class FillError(Exception):
    """A value is missing, or is none."""


def parse_values(text: str) -> dict[str, str]:
    """Return the values in a file of NAME=value lines.

    Raises:
        FillError: If a line is something else, or a value has characters that no value here needs.
    """
    values: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, equals, value = (part.strip() for part in line.partition("="))
        if not equals or not re.fullmatch(r"[A-Z][A-Z0-9_]*", name):
            raise FillError(f"line {number}: expected NAME=value, got {line!r}")
        if not _VALUE.fullmatch(value):
            raise FillError(f"line {number}: {name} is {value!r}: set it, without quotes")
        values[name] = value
    return values


def fill(text: str, values: Mapping[str, str]) -> str:
    """Return a text with the values in the places of their names.

    Raises:
        FillError: If a placeholder has no value.
    """
    missing = sorted(set(_PLACEHOLDER.findall(text)) - set(values))
    if missing:
        raise FillError(f"no value for {', '.join(missing)}")
    return _PLACEHOLDER.sub(lambda match: values[match[1]], text)


def main(arguments: Sequence[str]) -> int:
    """Print the filled file; say what is missing and return 1 if it cannot be filled."""
    if len(arguments) != 2:
        sys.stderr.write("usage: fill.py VALUES FILE\n")
        return 2
    values_file, template = map(Path, arguments)
    try:
        filled = fill(template.read_text(), parse_values(values_file.read_text()))
    except (FillError, OSError) as exc:
        sys.stderr.write(f"error: {template} with {values_file}: {exc}\n")
        return 1
    sys.stdout.write(filled)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
