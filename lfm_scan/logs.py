"""What is written for people and programs to read as it happens: on one line, and without credentials."""

from __future__ import annotations

import re
from typing import Final

_MAX_CHARS: Final = 500
_SECRETS: Final = (
    re.compile(r"(://)[^/@\s]+(?=@)"),
    re.compile(r"(?i)([?&;][\w-]*(?:signature|sig|credential|token|secret|password|key)[\w-]*=)[^&\s'\"]+"),
)
"""What a URL may hold besides an address: a user with a password, and the signature of a presigned one."""


def one_line(text: str) -> str:
    """Return a text on one line of bounded length, without the credentials that a URL in it may hold."""
    text = " ".join(text.split())
    for pattern in _SECRETS:
        text = pattern.sub(r"\1***", text)
    return text[:_MAX_CHARS]
