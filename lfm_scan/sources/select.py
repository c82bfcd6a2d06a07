"""From what the user names to a stream of inputs, each once, in bounded memory."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import pyarrow as pa

from lfm_scan.concurrency import OrderedMap, chain_in_threads, map_in_threads
from lfm_scan.config import absolute
from lfm_scan.errors import ConfigError
from lfm_scan.options import InputConfig, StorageConfig
from lfm_scan.schema import RESULT_SCHEMA
from lfm_scan.sources.containers import Container, read_container, types_in
from lfm_scan.sources.filters import make_filter
from lfm_scan.sources.inputs import Input, Kind
from lfm_scan.sources.listing import Source, parse_sources, uncovered
from lfm_scan.storage import ObjectInfo


def list_inputs(
    sources: Iterable[str],
    config: InputConfig,
    storage: StorageConfig,
    exclude: str | None = None,
    index_all: OrderedMap = map_in_threads,
) -> Iterator[Input]:
    """Yield every input of all sources that the user wants.

    An object that several listed sources hold is one input. Lines of manifests and members of archives are inputs each,
    unless a listed source holds the object that a line names.

    Args:
        sources: Folders, files, globs, prefixes, archives, Parquet files, manifests, inventories.
        config: Which of their inputs to take.
        storage: How to reach stores.
        exclude: A folder to leave out: the run directory, which may lie inside a source.
        index_all: How to read many archives at once.

    Raises:
        SourceError: If a manifest or an inventory cannot be used.
        StorageError: If a source cannot be listed.
    """
    wanted = make_filter(config)
    inputs = _all_inputs(parse_sources(sources, storage), config, storage, exclude, index_all)
    return _renamed(inputs if wanted is None else filter(wanted, inputs), config.carry)


def carried_types_of(sources: Iterable[str], config: InputConfig, storage: StorageConfig) -> dict[str, pa.DataType]:
    """Return names and types, in the results, of the columns to carry: text where the sources do not agree.

    Raises:
        ConfigError: If there is no source that has columns.
        SourceError: If a source has not got one of them.
    """
    if not config.carry:
        return {}
    found: list[dict[str, pa.DataType]] = []
    for source in parse_sources(sources, storage):
        first = next(source.list(patient=False), None) if source.container is not None else None
        if source.container is not None and first is not None:
            found.append(types_in(source.container, first, config, storage))
    if not found:
        raise ConfigError(
            "--carry: no source is a manifest, a Parquet file or an archive, so there is nothing to carry"
        )
    renamed = renaming(config.carry)
    types: dict[str, pa.DataType] = {}
    for name in config.carry:
        kinds = {each[name] for each in found if name in each}
        types[renamed.get(name, name)] = kinds.pop() if len(kinds) == 1 else pa.string()
    return types


def inputs_in(kind: Container, found: ObjectInfo, config: InputConfig, storage: StorageConfig) -> Iterator[Input]:
    """Yield the inputs in a container as `list_inputs` would, wanted or not.

    Raises:
        SourceError: If it cannot be used.
        StorageError: If it is a manifest or an inventory and cannot be read.
    """
    return _renamed(read_container(kind, found, config, storage), config.carry)


def renaming(carry: Sequence[str]) -> dict[str, str]:
    """Return the new names of carried columns whose own would clash with a column of the results.

    Raises:
        ConfigError: If another carried column has the new name.
    """
    renamed = {name: f"input_{name}" for name in carry if name in RESULT_SCHEMA.names}
    twice = next((name for name, new in renamed.items() if new in carry), None)
    if twice is not None:
        raise ConfigError(
            f"--carry {twice}: the results have a column of that name, so it becomes {renamed[twice]}, which is "
            "carried too: give one of the two"
        )
    return renamed


def _all_inputs(
    sources: Sequence[Source],
    config: InputConfig,
    storage: StorageConfig,
    exclude: str | None,
    index_all: OrderedMap,
) -> Iterator[Input]:
    kept_out = [] if exclude is None else [Source(absolute(exclude).rstrip("/") + "/", None, False, storage).covers]
    listed = [source.covers for source in sources if source.container is None]
    for position, source in enumerate(sources):
        earlier = [other.covers for other in sources[:position] if other.container is source.container]
        objects = uncovered(source.list(), kept_out + earlier)
        if source.container is None:
            yield from map(Input.of, objects)
            continue
        for each in _contents(source.container, objects, config, storage, index_all):
            if each.kind is not Kind.OBJECT or not any(covers(each.where) for covers in listed):
                yield each


def _contents(
    kind: Container,
    objects: Iterator[ObjectInfo],
    config: InputConfig,
    storage: StorageConfig,
    index_all: OrderedMap,
) -> Iterator[Input]:
    match kind:
        case Container.ARCHIVE:
            # Read to their ends, so best by many machines; and each yields no more than a list can hold.
            for inputs in index_all(functools.partial(_index, kind, config, storage), objects):
                yield from inputs
        case Container.TABLE:
            # Only their footers and small columns are read, but one of them may name a billion inputs.
            yield from chain_in_threads(
                functools.partial(read_container, kind, config=config, storage=storage), objects
            )
        case _:
            for found in objects:
                yield from read_container(kind, found, config, storage)


def _index(kind: Container, config: InputConfig, storage: StorageConfig, found: ObjectInfo) -> list[Input]:
    return list(read_container(kind, found, config, storage))


def _renamed(inputs: Iterator[Input], carry: Sequence[str]) -> Iterator[Input]:
    renamed = renaming(carry)
    return (_rename(each, renamed) for each in inputs) if renamed else inputs


def _rename(each: Input, renamed: dict[str, str]) -> Input:
    return replace(each, carried={renamed.get(name, name): value for name, value in each.carried.items()})
