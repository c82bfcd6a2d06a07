"""Names and small files of a run directory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from lfm_scan.config import absolute
from lfm_scan.errors import NoSuchBucketError, NotFoundError, RunError
from lfm_scan.options import StorageConfig
from lfm_scan.storage import ObjectInfo, PutOutcome, Store, join, name_of, open_store

CONFIG: Final = "config.json"
PLAN_INDEX: Final = "plan/index.json"
REPORT: Final = "run.json"
SUCCESS: Final = "_SUCCESS.json"
_PART_PREFIX: Final = "part-"
_PARQUET: Final = ".parquet"


@dataclass(frozen=True)
class RunDirectory:
    """A run directory in any store. Small, and safe to send to workers.

    Attributes:
        uri: Absolute path or s3:// URI.
        storage: How to reach it.
        patient: Whether requests are retried as long as a long run should.
    """

    uri: str
    storage: StorageConfig = field(default_factory=StorageConfig)
    patient: bool = True

    @classmethod
    def at(cls, output: str, storage: StorageConfig, *, patient: bool = True) -> RunDirectory:
        """Return the directory that a user's --output names."""
        return cls(absolute(output).rstrip("/"), storage, patient)

    @property
    def store(self) -> Store:
        """The store it lies in."""
        return open_store(self.uri, self.storage, patient=self.patient)

    def path(self, name: str) -> str:
        """Return the URI of something in it."""
        return join(self.uri, name)

    def read_json(self, name: str, max_bytes: int | None = None) -> dict[str, Any] | None:
        """Return a small file, or None if it is not there.

        Raises:
            RunError: If it is not JSON.
            StorageError: If it cannot be read, or has more than `max_bytes`.
        """
        try:
            data = self.store.get(self.path(name), max_bytes).data
        except NoSuchBucketError:
            raise
        except NotFoundError:
            return None
        try:
            parsed: dict[str, Any] = json.loads(data.decode("utf-8", "surrogateescape"))  # as it was written
        except ValueError as exc:
            raise RunError(f"{self.path(name)}: not JSON: {exc}; it was not written by lfm-scan") from exc
        return parsed

    def create_json(self, name: str, value: dict[str, Any]) -> PutOutcome:
        """Write a small file once."""
        data = json.dumps(value, indent=1, ensure_ascii=False).encode("utf-8", "surrogateescape")
        return self.store.create(self.path(name), data)

    def part_uri(self, shard: int) -> str:
        """Return where a shard's results go."""
        return self.path(f"parts/{_PART_PREFIX}{shard:09d}{_PARQUET}")

    def result_uri(self, index: int) -> str:
        """Return where a merged file goes."""
        return self.path(f"results/results-{index:05d}{_PARQUET}")

    def list_parts(self) -> dict[int, ObjectInfo]:
        """Return the committed parts by shard: the whole state of a run, in one LIST."""
        return dict(self.iter_parts())

    def iter_parts(self) -> Iterator[tuple[int, ObjectInfo]]:
        """Yield the committed parts with their shards, as they are listed: millions of them need no memory."""
        try:
            for part in self.store.list(self.path("parts/")):
                shard = _shard_of(part.uri)
                if shard is not None:
                    yield shard, part
        except NotFoundError:
            return  # a run directory without parts/ is one without parts


def _shard_of(uri: str) -> int | None:
    name = name_of(uri)
    if not (name.startswith(_PART_PREFIX) and name.endswith(_PARQUET)):
        return None
    digits = name.removeprefix(_PART_PREFIX).removesuffix(_PARQUET)
    return int(digits) if digits.isascii() and digits.isdigit() else None
