"""From sources to labelled samples: labels from the names of folders, or from columns of a manifest.

A tree is `NAME/[CLASS/]0_real/...` and `NAME/[CLASS/]1_fake/...`, in a folder, under a prefix or inside an archive. The
last component of that name tells the label. Which components are NAME and CLASS is counted from the source:

| between the source and 0_real | set | class |
|---|---|---|
| nothing: the source is NAME itself | the source's own name | none |
| one component | it | none |
| two | the first | the second |
| more | all but the last, with their slashes | the last |
"""

from __future__ import annotations

import hashlib
import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

import pyarrow as pa

from lfm_scan.concurrency import OrderedMap, map_in_threads
from lfm_scan.errors import ConfigError, TrainingError
from lfm_scan.options import InputConfig, StorageConfig
from lfm_scan.sources.containers import Container, columns_among
from lfm_scan.sources.globs import first_wildcard
from lfm_scan.sources.inputs import INPUT_SCHEMA, Input, Kind, input_schema, to_table
from lfm_scan.sources.listing import Source, check_sources, parse_sources
from lfm_scan.sources.manifest import folder_of
from lfm_scan.sources.select import list_inputs, renaming
from lfm_scan.sources.tar import IMAGE_SUFFIXES
from lfm_scan.status import Status
from lfm_scan.storage import name_of
from lfm_scan.training.columns import LabelColumns
from lfm_scan.training.samples import GENERATED, REAL, SAMPLE_SCHEMA, Split

_logger = logging.getLogger(__name__)

_LABEL_FOLDERS: Final = {"0_real": REAL, "1_fake": GENERATED}
_LABELS: Final = {"0": REAL, "false": REAL, "real": REAL, "1": GENERATED, "true": GENERATED} | dict.fromkeys(
    ("fake", "generated"), GENERATED
)
_NAMES: Final = {REAL: "real", GENERATED: "generated"}
_ARCHIVE_SUFFIXES: Final = (".tar", ".tar.gz", ".tgz")
_HASHES: Final = 2**64


@dataclass(slots=True)
class _Sample:
    """An input and what was learned of it; `stem` is its path below 0_real or 1_fake, without the suffix."""

    planned: Input
    label: int
    set: str
    class_: str | None
    pair: str | None
    stem: str | None


@dataclass(frozen=True, slots=True)
class _Place:
    """What the folders that an image lies in say of it."""

    label: int
    set: str
    class_: str | None
    stem: str | None


def gather_samples(
    sources: Sequence[str],
    inputs: InputConfig,
    storage: StorageConfig,
    columns: LabelColumns,
    split: Split,
    *,
    index_all: OrderedMap = map_in_threads,
) -> pa.Table:
    """Return every labelled image of some sources; none has been read.

    An image that several sources name is one sample, labelled as the manifest says that names it. Images with the same
    path below 0_real and 1_fake of one set and class, but for the suffix, are a pair, unless a column says which are.
    A file without a label whose name is no image's is left out, and the log says how many there were.

    Args:
        sources: As a scan takes them.
        inputs: Which of their inputs to take; what it says of carried columns is not used.
        storage: How to reach stores.
        columns: That hold labels, where a source has columns.
        split: What the samples are for.
        index_all: How to read many archives at once.

    Returns:
        Rows of `SAMPLE_SCHEMA`, null what only a look into the file tells.

    Raises:
        TrainingError: If an image has no label, one that cannot be read, or two that disagree.
        SourceError: If a manifest cannot be used.
        StorageError: If a source cannot be listed.
    """
    check_sources(sources, storage)
    parsed = parse_sources(sources, storage)
    plain = [source for source in parsed if source.container is None]
    samples: dict[str, _Sample] = {}
    # Manifests first: a folder beside them is often where their images lie.
    for source in parsed:
        if source.container is not None:
            planned = _list_carrying(source.container, source, inputs, columns, index_all)
            _add(samples, _labelled_by_columns(source, planned, columns))
    if plain:
        planned = list_inputs([source.uri for source in plain], replace(inputs, carry=()), storage)
        _add(samples, _labelled_by_folders(plain, planned, samples))
    return _to_table(list(samples.values()), split)


def split_off(samples: pa.Table, share: float, seed: int) -> pa.Table:
    """Return samples with a share of the training's moved to validation, pairs as a whole.

    A hash of the pair, or of the URI of an image without one, decides. So in every set about this share moves, and
    images that are added later move none that were there.

    Args:
        samples: Rows of `SAMPLE_SCHEMA`.
        share: In [0, 1).
        seed: Another one moves others.

    Raises:
        ConfigError: If the share is out of range.
    """
    if not 0 <= share < 1:
        raise ConfigError(f"the share of images for validation must be at least 0 and below 1, got {share}")
    salt = seed.to_bytes(8, "little", signed=True)
    splits = [
        Split.VALIDATION if split == Split.TRAIN and _fraction(pair or uri, salt) < share else split
        for uri, pair, split in zip(
            *(samples.column(name).to_pylist() for name in ("uri", "pair", "split")), strict=True
        )
    ]
    index = samples.schema.get_field_index("split")
    return samples.set_column(index, samples.schema.field(index), pa.array(splits, pa.string()))


def _fraction(group: str, salt: bytes) -> float:
    digest = hashlib.blake2b(group.encode(), digest_size=8, salt=salt).digest()
    return int.from_bytes(digest, "little") / _HASHES


def _list_carrying(
    container: Container, source: Source, inputs: InputConfig, columns: LabelColumns, index_all: OrderedMap
) -> Iterator[Input]:
    """Yield the inputs in containers, carrying those of the columns that the first of them has."""
    carry = columns_among(container, next(source.list()), columns.names, source.storage)
    return list_inputs([source.uri], replace(inputs, carry=tuple(carry)), source.storage, index_all=index_all)


def _labelled_by_columns(source: Source, planned: Iterable[Input], columns: LabelColumns) -> Iterator[_Sample]:
    renamed = renaming(columns.names)
    keys = [renamed.get(name, name) for name in columns.names]
    default_set = _stem_of(name_of(source.uri).removesuffix(".gz"))
    unlabelled = _Unlabelled()
    for each in planned:
        text, set_, class_, pair = (_text(each.carried.get(key)) for key in keys)
        place = _place_of(each, _root_of(each, source))
        if text is not None:
            label = _label_of(text, place, f"{source.uri}: the row of {each.uri}", columns.label_column)
        elif place is not None:
            label = place.label
        else:
            unlabelled.add(each, f"{source.uri} has no value for it in a column {columns.label_column!r}")
            continue
        place = place or _Place(label, default_set, None, None)
        yield _Sample(each, label, set_ or place.set, class_ or place.class_, pair, place.stem)
    unlabelled.report()


def _labelled_by_folders(
    sources: Sequence[Source], planned: Iterable[Input], known: dict[str, _Sample]
) -> Iterator[_Sample]:
    unlabelled = _Unlabelled()
    for each in planned:
        source = next(source for source in sources if source.covers(each.uri))
        place = _place_of(each, _root_of(each, source))
        if place is not None:
            yield _Sample(each, place.label, place.set, place.class_, None, place.stem)
        elif each.uri not in known:
            unlabelled.add(each, "no folder of its path is named 0_real or 1_fake")
    unlabelled.report()


class _Unlabelled:
    """Inputs that nothing labels: a mistake if they are images, else what lies about in folders."""

    def __init__(self) -> None:
        self._num_others = 0
        self._example = ""

    def add(self, planned: Input, reason: str) -> None:
        """Take note of one.

        Raises:
            TrainingError: If it looks like an image, or is a report that a source cannot be read.
        """
        if planned.status is not None:
            raise TrainingError(
                f"{planned.uri}: {planned.status}: {planned.error}; what it holds would be missing from the training: "
                "repair it, or leave it out by --exclude"
            )
        if planned.kind is not Kind.OBJECT or planned.uri.lower().endswith(IMAGE_SUFFIXES):
            raise TrainingError(
                f"{planned.uri}: has no label: {reason}. Put it into such a folder, name it in a manifest with a "
                "label, or leave it out by --exclude"
            )
        self._num_others += 1
        self._example = self._example or planned.uri

    def report(self) -> None:
        """Tell how many were left out."""
        if self._num_others:
            _logger.warning(
                "%d files without a label that are not named like images are left out, such as %s",
                self._num_others,
                self._example,
            )


def _label_of(text: str, place: _Place | None, row: str, column: str) -> int:
    """Return the label that a column says, unless the folders contradict it."""
    label = _LABELS.get(text.lower())
    if label is None:
        raise TrainingError(
            f"{row} has {text!r:.60} in column {column!r}; a label is 0, false or real, or 1, true, fake or generated: "
            "correct it, or name the column with labels by --label-column"
        )
    if place is not None and place.label != label:
        raise TrainingError(
            f"{row} says {_NAMES[label]} ({text!r:.60} in column {column!r}), the folder it lies in says "
            f"{_NAMES[place.label]}: here 0 is real and 1 is generated; correct one of the two"
        )
    return label


def _text(value: object) -> str | None:
    """Return a carried value as text, an empty one as None; a number without a fraction as a whole one."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = None if value is None else str(value).strip()
    return text or None


def _root_of(planned: Input, source: Source) -> str:
    """Return the URI of what NAME and CLASS are counted from: the source, or what of it is no pattern."""
    if planned.kind is not Kind.OBJECT:
        return planned.where
    if source.container is not None:
        return folder_of(source.uri)
    if source.is_glob:
        literal = source.uri[: first_wildcard(source.uri)]
        return literal[: literal.rindex("/")]
    root = source.uri.rstrip("/")
    if planned.uri == root or planned.uri.startswith(root + "/"):
        return root
    return root.rpartition("/")[0]  # a prefix that ends within a name


def _place_of(planned: Input, root: str) -> _Place | None:
    """Return what the folders say, or None if none of them is 0_real or 1_fake."""
    uri = planned.uri
    is_below = uri.startswith((root + "/", root + "#"))
    above = root.split("/") if is_below else []
    parts = above + (uri[len(root) + 1 :] if is_below else uri).split("/")
    at = max((index for index, part in enumerate(parts[:-1]) if part in _LABEL_FOLDERS), default=None)
    if at is None:
        return None
    label = _LABEL_FOLDERS[parts[at]]
    # Rows of two tables show the same content by chance only.
    stem = None if planned.kind is Kind.PARQUET else _stem_of("/".join(parts[at + 1 :]))
    between = parts[len(above) : at] if is_below else []
    if not between:  # the folder before it, which the source is or lies in
        return _Place(label, _without_archive_suffix(parts[at - 1]) if at else "", None, stem)
    if len(between) == 1:
        return _Place(label, between[0], None, stem)
    return _Place(label, "/".join(between[:-1]), between[-1], stem)


def _stem_of(path: str) -> str:
    dot = path.rfind(".")
    return path[:dot] if dot > path.rfind("/") + 1 else path


def _without_archive_suffix(name: str) -> str:
    return next((name[: -len(end)] for end in _ARCHIVE_SUFFIXES if name.lower().endswith(end)), name)


def _add(samples: dict[str, _Sample], found: Iterable[_Sample]) -> None:
    for sample in found:
        known = samples.setdefault(sample.planned.uri, sample)
        if known.label != sample.label:
            raise TrainingError(
                f"{sample.planned.uri}: is named twice, once as real and once as generated: correct the label of one, "
                "or leave out one of the sources"
            )


def _to_table(samples: Sequence[_Sample], split: Split) -> pa.Table:
    pairs = _pairs_of(samples)
    planned = to_table((sample.planned for sample in samples), input_schema({}))
    status = [sample.planned.status or Status.OK for sample in samples]
    columns = {name: planned.column(name) for name in INPUT_SCHEMA.names} | {
        "status": status,
        "label": [sample.label for sample in samples],
        "set": [sample.set for sample in samples],
        "class": [sample.class_ for sample in samples],
        "pair": pairs,
        "split": [split] * len(samples),
    }
    nothing = pa.nulls(len(samples))
    return pa.table({name: columns.get(name, nothing) for name in SAMPLE_SCHEMA.names}).cast(SAMPLE_SCHEMA)


def _pairs_of(samples: Sequence[_Sample]) -> list[str | None]:
    """Return the pair of each sample: as its manifest has it, else those whose names agree across the classes."""
    labels: dict[str, set[int]] = defaultdict(set)
    keys = [None if sample.stem is None else _pair_key(sample) for sample in samples]
    for sample, key in zip(samples, keys, strict=True):
        if sample.pair is None and key is not None:
            labels[key].add(sample.label)
    return [
        sample.pair if sample.pair is not None else key if key is not None and len(labels[key]) == 2 else None
        for sample, key in zip(samples, keys, strict=True)
    ]


def _pair_key(sample: _Sample) -> str:
    return "/".join(part for part in (sample.set, sample.class_, sample.stem) if part is not None)
