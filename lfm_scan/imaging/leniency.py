"""Pillow's switch for files without their end, thrown for one decode at a time."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Final

from PIL import ImageFile


class Leniency:
    """Keeps strict and lenient decodes apart: the switch is one variable for all threads.

    Strict decodes run side by side; a lenient one, which is rare, waits until it is alone.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._num_strict = 0

    @contextlib.contextmanager
    def strict(self) -> Iterator[None]:
        """Decode under Pillow's default, or what the program has set: a file must be whole."""
        with self._condition:
            self._num_strict += 1
        try:
            yield
        finally:
            with self._condition:
                self._num_strict -= 1
                self._condition.notify_all()

    @contextlib.contextmanager
    def lenient(self) -> Iterator[None]:
        """Decode a file as far as it goes."""
        with self._condition:
            self._condition.wait_for(lambda: self._num_strict == 0)
            before = ImageFile.LOAD_TRUNCATED_IMAGES
            ImageFile.LOAD_TRUNCATED_IMAGES = True
            try:
                yield
            finally:
                ImageFile.LOAD_TRUNCATED_IMAGES = before


PILLOW: Final = Leniency()
"""The one for Pillow's one switch."""
