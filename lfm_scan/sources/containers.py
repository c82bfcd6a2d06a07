"""Files that hold or name many inputs: which they are, and the inputs in them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import Enum
from typing import Final

import pyarrow as pa

from lfm_scan.options import InputConfig, StorageConfig
from lfm_scan.sources import manifest, table
from lfm_scan.sources.inputs import Input
from lfm_scan.sources.inventory import read_inventory
from lfm_scan.sources.manifest import read_manifest, without_query
from lfm_scan.sources.table import carried_types, read_table
from lfm_scan.sources.tar import index_tar
from lfm_scan.storage import ObjectInfo, name_of, open_store


class Container(Enum):
    """What a source's name says it is."""

    ARCHIVE = "archive"
    TABLE = "Parquet file"
    MANIFEST = "manifest"
    INVENTORY = "S3 Inventory"


_SUFFIXES: Final = {
    (".tar", ".tar.gz", ".tgz"): Container.ARCHIVE,
    (".parquet",): Container.TABLE,
    (".csv", ".tsv", ".jsonl", ".ndjson", ".txt", ".list"): Container.MANIFEST,
    (".csv.gz", ".tsv.gz", ".jsonl.gz", ".ndjson.gz", ".txt.gz", ".list.gz"): Container.MANIFEST,
}


def container_named(source: str) -> Container | None:
    """Return what a source is that names such a file, or files, by its last characters; None for a plain source."""
    path = without_query(source)
    name = name_of(path).lower() if not path.endswith("/") else ""
    if name == "manifest.json":
        return Container.INVENTORY
    return next((kind for suffixes, kind in _SUFFIXES.items() if name.endswith(suffixes)), None)


def read_container(kind: Container, found: ObjectInfo, config: InputConfig, storage: StorageConfig) -> Iterator[Input]:
    """Yield the inputs in a container.

    An archive or table that cannot be read yields one input with its status.

    Raises:
        SourceError: If a manifest or an inventory cannot be used, or a table has no column to use.
        StorageError: If a manifest or an inventory cannot be read.
    """
    store = open_store(found.uri, storage)
    match kind:
        case Container.ARCHIVE:
            yield from index_tar(store, found, config.carry)
        case Container.TABLE:
            yield from read_table(store, found, config)
        case Container.MANIFEST:
            yield from read_manifest(store, found, config)
        case Container.INVENTORY:
            yield from read_inventory(store, found, config)


def types_in(kind: Container, found: ObjectInfo, config: InputConfig, storage: StorageConfig) -> dict[str, pa.DataType]:
    """Return the types of the columns to carry: a table's own, text elsewhere."""
    if kind is Container.TABLE:
        return carried_types(open_store(found.uri, storage), found, config)
    return dict.fromkeys(config.carry, pa.string())


def columns_among(kind: Container, found: ObjectInfo, names: Sequence[str], storage: StorageConfig) -> list[str]:
    """Return those of some columns' names that can be carried from a container.

    Any name may be the suffix of side data in an archive, so all of them can.

    Raises:
        SourceError: If it is a damaged manifest.
        StorageError: If it is a manifest and cannot be read.
    """
    match kind:
        case Container.ARCHIVE:
            return list(names)
        case Container.TABLE:
            return table.columns_among(open_store(found.uri, storage), found, names)
        case Container.MANIFEST:
            return manifest.columns_among(open_store(found.uri, storage), found, names)
        case Container.INVENTORY:
            return []
