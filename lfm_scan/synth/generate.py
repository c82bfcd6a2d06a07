"""`synthesise`: from photographs to a folder of aligned pairs.

    OUT/NETWORK/0_real/ID.png     a crop of a photograph
    OUT/NETWORK/1_fake/ID.png     the same crop, drawn again
    OUT/manifest.parquet, .csv    a row for each image
    OUT/photographs.parquet       a row for each file that was to be a photograph
    OUT/settings.json             written first: what was asked for
    OUT/synth.json                written last: what came of it

The photographs are read twice: a sample of them to train the networks, then all of them one by one, so that memory does
not grow with their number. Nothing is overwritten; as the same settings give the same bytes, a run that was interrupted
goes on when it is repeated.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.csv
import torch
from numpy.typing import NDArray
from PIL import Image

from lfm_scan.concurrency import map_in_threads
from lfm_scan.config import absolute
from lfm_scan.errors import FingerprintError, TrainingError
from lfm_scan.runs.parquet import to_parquet
from lfm_scan.sources.inputs import Input
from lfm_scan.sources.listing import check_sources
from lfm_scan.sources.select import list_inputs
from lfm_scan.storage import Store, join, open_store
from lfm_scan.synth.config import SynthConfig
from lfm_scan.synth.fit import Fitted, draw, fit, psnr_db
from lfm_scan.synth.kinds import KINDS
from lfm_scan.synth.photographs import Photograph, cut_crops, read_photographs, without_duplicates
from lfm_scan.training.samples import GENERATED, REAL, Split
from lfm_scan.version import __version__

PAIR_SCHEMA: Final = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),  # relative to the manifest, so that the folder can be moved
        pa.field("label", pa.int8(), nullable=False),
        pa.field("set", pa.string(), nullable=False),
        pa.field("pair", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("photograph", pa.string(), nullable=False),
        pa.field("network", pa.string()),  # null for a real one, as is
        pa.field("psnr", pa.float64()),  # in dB, of the fake against its real one
    ]
)
"""Columns of the manifest."""

PHOTOGRAPH_SCHEMA: Final = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("error", pa.string()),
        pa.field("sha256", pa.string()),
        pa.field("split", pa.string()),
        pa.field("num_crops", pa.int32(), nullable=False),
    ]
)
"""Columns of photographs.parquet."""

_FIT_PHOTOGRAPHS: Final = 128
_FIT_CROPS: Final = 1024
_MIN_FIT_CROPS: Final = 2
"""One to learn from and one to measure on."""
_CLASS_FOLDERS: Final = {REAL: "0_real", GENERATED: "1_fake"}
_LICENCES: Final = (
    "Every image is a crop of a photograph in photographs.parquet, or was drawn from one by a network that was trained "
    "on those photographs alone; no weights of others were used. An image carries the terms of its photograph."
)


@dataclass(frozen=True, kw_only=True)
class NetworkReport:
    """What became of one network.

    Attributes:
        name: Of its kind.
        psnr: Mean over crops it did not learn from, in dB.
        detail: Strength of the finest detail in what it draws, as a share of the originals': below 1 is blur.
        used: Whether it draws: its psnr reaches min_psnr.
        num_pairs: Pairs it has drawn.
        pairs_psnr: Mean over its pairs, in dB; None without.
    """

    name: str
    psnr: float
    detail: float
    used: bool
    num_pairs: int = 0
    pairs_psnr: float | None = None


@dataclass(frozen=True, kw_only=True)
class SynthOutcome:
    """What `synthesise` made.

    Attributes:
        output: Absolute path or URI of the folder.
        num_photographs: Files that were to be photographs, by status.
        num_used: Photographs that gave crops.
        num_crops: Crops of them.
        num_pairs: Pairs written.
        networks: In the order of the settings.
    """

    output: str
    num_photographs: dict[str, int]
    num_used: int
    num_crops: int
    num_pairs: int
    networks: tuple[NetworkReport, ...]


class Listener:
    """Wants to know how it goes. This one does nothing; the command line overrides what it shows."""

    def listed(self, num_photographs: int) -> None:
        """So many files are to be photographs."""

    def fitted(self, report: NetworkReport) -> None:
        """A network is trained; the report says whether it is sharp enough to be used."""

    def photograph_done(self, num_done: int, num_pairs: int) -> None:
        """So many photographs are done, and so many pairs are written."""


@dataclass
class _Tables:
    """The rows of the two tables as they grow."""

    pairs: list[dict[str, Any]] = field(default_factory=list)
    photographs: list[dict[str, Any]] = field(default_factory=list)


def synthesise(config: SynthConfig, listener: Listener | None = None) -> SynthOutcome:
    """Make aligned pairs of photographs. The same settings on the same machine make the same bytes.

    Args:
        config: Photographs, networks, and where the pairs go.
        listener: Is told how it goes.

    Raises:
        FingerprintError: If the folder holds pairs of other settings.
        TrainingError: If no photograph can be used, or no network is sharp enough.
        SourceError: If a manifest of photographs cannot be used.
        StorageError: If a source cannot be listed or a file cannot be written.
    """
    listener = listener or Listener()
    output = absolute(config.output).rstrip("/")
    writer = _Writer(open_store(output, config.storage), output)
    check_sources(config.sources, config.storage)
    inputs = list(list_inputs(config.sources, config.inputs, config.storage, exclude=output))
    listener.listed(len(inputs))
    writer.create("settings.json", _to_json(_settings(config)))

    fitted, reports = _fit_all(config, _fit_crops(inputs, config), listener)
    tables = _Tables()
    for number, photograph in enumerate(without_duplicates(read_photographs(inputs, config)), 1):
        _synthesise_one(photograph, fitted, config, writer, tables)
        listener.photograph_done(number, len(tables.pairs) // 2)

    outcome = _outcome(output, tables, reports)
    pairs = pa.Table.from_pylist(tables.pairs, schema=PAIR_SCHEMA)
    writer.create("manifest.parquet", to_parquet(pairs))
    writer.create("manifest.csv", _to_csv(pairs))
    photographs = pa.Table.from_pylist(tables.photographs, schema=PHOTOGRAPH_SCHEMA)
    writer.create("photographs.parquet", to_parquet(photographs))
    facts = asdict(outcome) | {"settings": _settings(config), "licences": _LICENCES}
    del facts["output"]
    writer.create("synth.json", _to_json(facts))
    return outcome


def encode_png(image_hwc: NDArray[np.uint8]) -> bytes:
    """Return a PNG file that is not compressed: of all images with one size it has one number of bytes.

    Compressed, a fake would be the smaller file wherever it is a little smoother, and size would predict the label.
    """
    buffer = io.BytesIO()
    Image.fromarray(image_hwc, "RGB").save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


@dataclass(frozen=True)
class _Writer:
    """Writes files of the output folder, none of them twice."""

    store: Store
    output: str

    def create(self, name: str, data: bytes) -> None:
        """Write a file, or find it as it would be written.

        Raises:
            FingerprintError: If there is another one of that name.
        """
        uri = join(self.output, name)
        if not self.store.create(uri, data).created:
            raise FingerprintError(
                f"{uri}: is there already and differs: the folder holds pairs of other settings, photographs or "
                "libraries; give a new --output"
            )

    def create_image(self, made: tuple[dict[str, Any], NDArray[np.uint8]]) -> dict[str, Any]:
        """Write an image where its row says, and return the row."""
        row, image = made
        self.create(row["uri"], encode_png(image))
        return row


def _fit_crops(inputs: Sequence[Input], config: SynthConfig) -> NDArray[np.uint8]:
    """Return crops (N, S, S, 3) of a sample of the photographs to train networks on.

    Raises:
        TrainingError: If there are too few.
    """
    chosen = np.random.default_rng(config.seed).permutation(len(inputs))[:_FIT_PHOTOGRAPHS]
    sample = [inputs[index] for index in np.sort(chosen)]
    each = max(_MIN_FIT_CROPS, min(config.crops, _FIT_CROPS // max(1, len(sample))))
    usable = (one for one in without_duplicates(read_photographs(sample, config)) if one.image is not None)
    crops = [cut_crops(photograph, config, each) for photograph in usable]
    if sum(map(len, crops)) < _MIN_FIT_CROPS:
        raise TrainingError(
            f"no photograph to train networks on: of {len(inputs):,} files, {len(sample)} were tried and {len(crops)} "
            f"could be used; their shorter side must have {config.min_side_px:g} pixels (--crop-px times --min-shrink)"
        )
    return np.concatenate(crops)


def _fit_all(
    config: SynthConfig, crops: NDArray[np.uint8], listener: Listener
) -> tuple[list[Fitted], list[NetworkReport]]:
    """Train every network; return those that are sharp enough, and a report of each.

    Raises:
        TrainingError: If none is.
    """
    fitted, reports = [], []
    for name in config.kinds:
        network = fit(KINDS[name], crops, config.steps, config.seed)
        used = network.psnr_db >= config.min_psnr
        reports.append(NetworkReport(name=name, psnr=network.psnr_db, detail=network.detail, used=used))
        listener.fitted(reports[-1])
        if used:
            fitted.append(network)
    if not fitted:
        found = ", ".join(f"{report.name} {report.psnr:.1f}" for report in reports)
        raise TrainingError(
            f"no network reaches --min-psnr {config.min_psnr:g} dB ({found}): their fakes would teach blur; give more "
            f"than {config.steps} --steps, or more photographs"
        )
    return fitted, reports


def _synthesise_one(
    photograph: Photograph, networks: Sequence[Fitted], config: SynthConfig, writer: _Writer, tables: _Tables
) -> None:
    """Write all pairs of one photograph, and add its rows."""
    row = {"uri": photograph.uri, "status": photograph.status, "error": photograph.error, "num_crops": 0}
    tables.photographs.append(row | {"sha256": photograph.sha256, "split": None})
    if photograph.image is None:
        return
    crops, split = cut_crops(photograph, config, config.crops), photograph.split(config)
    if not len(crops):
        tables.photographs[-1]["error"] = "gives no crops: it has no contrast anywhere that was tried"
        return
    tables.photographs[-1] |= {"num_crops": len(crops), "split": split}
    for network, numbers in zip(networks, _turns(photograph, len(crops), len(networks), config), strict=True):
        drawn = _draw_pairs(photograph, split, network, crops, numbers)
        tables.pairs += map_in_threads(writer.create_image, drawn)


def _turns(
    photograph: Photograph, num_crops: int, num_networks: int, config: SynthConfig
) -> Iterator[NDArray[np.int64]]:
    """Yield, for each network, the numbers of the crops it draws."""
    each = min(config.networks_per_crop or num_networks, num_networks)
    first = int(photograph.random(config, "turns").integers(num_networks))
    starts = first + each * np.arange(num_crops)
    for network in range(num_networks):
        yield np.flatnonzero((network - starts) % num_networks < each)


def _draw_pairs(
    photograph: Photograph,
    split: Split,
    network: Fitted,
    crops: NDArray[np.uint8],
    numbers: NDArray[np.int64],
) -> Iterator[tuple[dict[str, Any], NDArray[np.uint8]]]:
    """Yield the row and the pixels of both images of each pair, for the crops with these numbers."""
    reals, name = crops[numbers], network.kind.name
    fakes = draw(network.model, reals)
    decibels = psnr_db(reals, fakes).tolist()
    for number, real, fake, psnr in zip(numbers.tolist(), reals, fakes, decibels, strict=True):
        key = f"{photograph.key}-{number:03}"
        shared = {"set": name, "pair": f"{name}/{key}", "split": split, "photograph": photograph.uri}
        for label, image in ((REAL, real), (GENERATED, fake)):
            made = {"network": name, "psnr": psnr} if label == GENERATED else {"network": None, "psnr": None}
            yield {"uri": f"{name}/{_CLASS_FOLDERS[label]}/{key}.png", "label": label} | shared | made, image


def _outcome(output: str, tables: _Tables, reports: Sequence[NetworkReport]) -> SynthOutcome:
    decibels: dict[str, list[float]] = {report.name: [] for report in reports}
    for row in tables.pairs:
        if row["label"] == GENERATED:
            decibels[row["network"]].append(row["psnr"])
    networks = tuple(
        NetworkReport(
            name=report.name,
            psnr=report.psnr,
            detail=report.detail,
            used=report.used,
            num_pairs=len(decibels[report.name]),
            pairs_psnr=float(np.mean(decibels[report.name])) if decibels[report.name] else None,
        )
        for report in reports
    )
    return SynthOutcome(
        output=output,
        num_photographs=dict(Counter(str(row["status"]) for row in tables.photographs)),
        num_used=sum(row["num_crops"] > 0 for row in tables.photographs),
        num_crops=sum(row["num_crops"] for row in tables.photographs),
        num_pairs=len(tables.pairs) // 2,
        networks=networks,
    )


def _settings(config: SynthConfig) -> dict[str, Any]:
    """Return all that decides which bytes are made, but for the photographs."""
    networks = {name: asdict(KINDS[name]) for name in config.kinds}
    versions = {"lfm_scan": __version__, "torch": torch.__version__, "numpy": np.__version__}
    return {"config": config.to_json(), "networks": networks, "versions": versions}


def _to_json(facts: dict[str, Any]) -> bytes:
    return (json.dumps(facts, indent=2) + "\n").encode()


def _to_csv(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pyarrow.csv.write_csv(table, sink)
    return sink.getvalue()
