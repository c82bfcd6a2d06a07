"""The check before training: every sample is read and decoded once, and what it is like is written down."""

from __future__ import annotations

import functools
import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa

from lfm_scan.concurrency import OrderedMap, map_in_threads
from lfm_scan.errors import ImageError, TrainingError
from lfm_scan.imaging.preprocess import SIDE_PX
from lfm_scan.scoring.isolated import EncodedImage, IsolatedDecoder
from lfm_scan.scoring.prepare import Prepared
from lfm_scan.status import Status
from lfm_scan.training.reading import SampleReader
from lfm_scan.training.recipe import Recipe
from lfm_scan.training.samples import GENERATED, REAL, SAMPLE_SCHEMA, Split

CHUNK_ROWS: Final = 256
"""Samples checked by one call, so by one task: seconds of work."""

_FACTS: Final = ("format", "width", "height", "lossy", "jpeg_quality")
_NAMES: Final = {REAL: "real", GENERATED: "generated"}
_MAX_EXAMPLES: Final = 3
_MARKER: Final = 0xFF
_DQT: Final = 0xDB
_SOS: Final = 0xDA
_FRAMES: Final = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_WITHOUT_LENGTH: Final = frozenset({0x01, *range(0xD0, 0xD9)})


def check_samples(
    samples: pa.Table, recipe: Recipe, reader: SampleReader, map_all: OrderedMap = map_in_threads
) -> pa.Table:
    """Read and decode every sample; return them with the facts of their files, and with the status of bad ones.

    Each is decoded as a scan would, in a process of its own: a file that kills its decoder costs one sample here, and
    is not asked for again in the training.

    Args:
        samples: Rows of `SAMPLE_SCHEMA`.
        recipe: What the images must be large enough for: a training image for its crop, one for validation for the
            preprocess policy.
        reader: How to get at them.
        map_all: Does chunks of `CHUNK_ROWS` rows at once; what it applies can be pickled.

    Returns:
        The same rows in the same order.

    Raises:
        OutageError: If a store answers nobody.
    """
    chunks = (samples.slice(start, CHUNK_ROWS) for start in range(0, samples.num_rows, CHUNK_ROWS))
    checked = list(map_all(functools.partial(check_chunk, recipe, reader), chunks))
    return pa.concat_tables([SAMPLE_SCHEMA.empty_table(), *checked]).combine_chunks()


def check_chunk(recipe: Recipe, reader: SampleReader, samples: pa.Table) -> pa.Table:
    """Check some samples, as `check_samples` does all."""
    rows: list[dict[str, Any]] = samples.to_pylist()
    in_decoder: list[dict[str, Any]] = []

    def files() -> Iterator[EncodedImage]:
        for index, file in reader.read(samples):
            row = rows[index]
            if isinstance(file, ImageError):
                row |= _outcome(Prepared.failed(file))
                continue
            row |= {"num_bytes": len(file), "quantization": quantization_digest(file)}
            in_decoder.append(row)
            yield EncodedImage(row["uri"], file)

    # Any policy would do, the pixels are not kept; this one takes images of every size.
    with IsolatedDecoder("resize256", reader.limits) as decoder:
        for number, prepared in enumerate(decoder.prepare_all(files())):
            row = in_decoder[number]
            row |= _outcome(prepared)
            if row["status"] == Status.OK:
                row |= _judge_size(row, recipe)
    return pa.Table.from_pylist(rows, schema=SAMPLE_SCHEMA)


def quantization_digest(file: bytes) -> str | None:
    """Return a digest of a JPEG's quantisation tables and chroma sampling, None of another file.

    Files that are equal in both, whatever else differs, have the same digest: 16 hexadecimal digits.
    """
    if not file.startswith(b"\xff\xd8\xff"):
        return None
    tables: dict[int, bytes] = {}
    sampling = b""
    position = 2
    while position + 4 <= len(file) and file[position] == _MARKER:
        kind = file[position + 1]
        if kind == _SOS:
            break
        if kind == _MARKER or kind in _WITHOUT_LENGTH:
            position += 1 if kind == _MARKER else 2
            continue
        end = position + 2 + int.from_bytes(file[position + 2 : position + 4], "big")
        if kind == _DQT:
            tables |= _tables_in(file[position + 4 : end])
        elif kind in _FRAMES:
            sampling = file[position + 11 : end : 3]  # of three bytes a component, the second
        position = end
    content = b"".join(tables[number] for number in sorted(tables)) + sampling
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def _tables_in(segment: bytes) -> dict[int, bytes]:
    """Return the tables of a DQT segment by their number; each begins with its precision and number."""
    tables = {}
    while segment:
        end = 1 + (128 if segment[0] >> 4 else 64)
        tables[segment[0] & 15] = segment[1:end]
        segment = segment[end:]
    return tables


def _outcome(prepared: Prepared) -> dict[str, Any]:
    facts = {name: getattr(prepared.info, name) for name in _FACTS}
    return facts | {"status": prepared.status, "error": prepared.error}


def _judge_size(row: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """Return the status of an image that is too small for what the recipe does with it; nothing of another."""
    if recipe.preprocess != "crop256":
        return {}
    if row["split"] == Split.TRAIN:
        least_px, what = recipe.crop_px, f"the recipe crops {recipe.crop_px} pixels (--crop-px)"
    else:
        least_px, what = SIDE_PX, f"policy {recipe.preprocess} needs {SIDE_PX} pixels a side"
    if min(row["width"], row["height"]) >= least_px:
        return {}
    return {"status": Status.TOO_SMALL, "error": f"{row['width']}x{row['height']}: {what}"}


@dataclass(frozen=True)
class CheckReport:
    """How many samples there are, of what, and how many cannot be used.

    Attributes:
        counts: Number of samples by (split, set, label, status).
        examples: By status, messages of some samples that cannot be used.
        num_in_both: Images that are in training and in validation.
        in_both: The URI of one of them.
    """

    counts: dict[tuple[str, str, int, str], int]
    examples: dict[str, list[str]]
    num_in_both: int
    in_both: str | None

    @classmethod
    def of(cls, samples: pa.Table) -> CheckReport:
        """Return the report on checked samples."""
        names = ("split", "set", "label", "status", "uri", "error")
        counts: Counter[tuple[str, str, int, str]] = Counter()
        examples: dict[str, list[str]] = defaultdict(list)
        split_of: dict[str, str] = {}
        in_both: list[str] = []
        for split, set_, label, status, uri, error in zip(
            *(samples.column(name).to_pylist() for name in names), strict=True
        ):
            counts[split, set_, label, status] += 1
            if status != Status.OK and len(examples[status]) < _MAX_EXAMPLES:
                examples[status].append(f"{uri}: {error}")
            if split_of.setdefault(uri, split) != split:
                in_both.append(uri)
        return cls(dict(counts), dict(sorted(examples.items())), len(in_both), in_both[0] if in_both else None)

    @property
    def num_samples(self) -> int:
        """Of all."""
        return sum(self.counts.values())

    @property
    def num_unusable(self) -> int:
        """Whose status is not ok."""
        return sum(count for (*_, status), count in self.counts.items() if status != Status.OK)

    def num_usable(self, split: Split, label: int) -> int:
        """Return how many samples of a split and class can be used."""
        return sum(self.counts.get(key, 0) for key in self.counts if key[0] == split and key[2:] == (label, Status.OK))

    def refuse(self) -> None:
        """Refuse samples that nothing can be learned from, or be measured with.

        Raises:
            TrainingError: If a class has no usable image in the training, or none of those it has in the validation; or
                if the validation holds images of the training.
        """
        for split, label in ((split, label) for split in Split for label in (REAL, GENERATED)):
            num_given = sum(count for key, count in self.counts.items() if key[0] == split and key[2] == label)
            if self.num_usable(split, label) or not (num_given or split == Split.TRAIN):
                continue
            raise TrainingError(
                f"no {_NAMES[label]} image could be used for {split}: " + self._reason(num_given, label)
            )
        if self.num_in_both:
            raise TrainingError(
                f"{self.num_in_both:,} images are in training and in validation, such as {self.in_both}: the "
                "figures would be of images that were learned by heart. Leave them out of one by --exclude, or give no "
                "source for validation, and a share of each set is split off"
            )

    def _reason(self, num_given: int, label: int) -> str:
        if not num_given:
            folder = "0_real" if label == REAL else "1_fake"
            return f"the sources have none. Images need folders named {folder}, or a manifest with a label"
        example = next((texts[0] for texts in self.examples.values()), "")
        return f"of {num_given:,} none is ok; the first of those that are not is {example}"

    def lines(self) -> list[str]:
        """Return it as lines of text."""
        groups = sorted({key[:3] for key in self.counts}, key=lambda key: (list(Split).index(Split(key[0])), key[1:]))
        width = max((len(set_) for _, set_, _ in groups), default=0)
        lines = []
        for split, set_, label in groups:
            of_group = {key[3]: count for key, count in self.counts.items() if key[:3] == (split, set_, label)}
            bad = [f"{count:,} {status}" for status, count in sorted(of_group.items()) if status != Status.OK]
            lines.append(
                f"{split:<10}  {set_:<{width}}  {_NAMES[label]:<9}  {of_group.get(Status.OK, 0):>9,} usable"
                + (f", not {', '.join(bad)}" if bad else "")
            )
        lines += [f"{status}: {text}" for status, texts in self.examples.items() for text in texts]
        return lines

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        rows = [
            {"split": split, "set": set_, "label": label, "status": status, "count": count}
            for (split, set_, label, status), count in sorted(self.counts.items())
        ]
        return {"counts": rows, "examples": self.examples, "num_in_both": self.num_in_both}
