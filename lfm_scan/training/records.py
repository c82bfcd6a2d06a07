"""What a training keeps in its run directory, in any store.

config.json                     what was asked for, and the fingerprint of what decides the weights
samples.parquet                 every image, its label and split, and what the check saw
check.json                      counts by class, unreadable images, and what format, size and quality tell of the label
state.bin                       to go on from: replaced whole, so it is always one moment's
history.json                    the figures of each epoch
checkpoints/best.safetensors    what to scan with
checkpoints/last.safetensors
curves.png
_SUCCESS.json                   last of all
"""

from __future__ import annotations

import io
import json
import struct
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from lfm_scan.domain import Domain
from lfm_scan.errors import NotFoundError, TrainingError
from lfm_scan.model import LFM, CheckpointMetadata, save_checkpoint
from lfm_scan.runs.rundir import RunDirectory

SAMPLES: Final = "samples.parquet"
STATE: Final = "state.bin"
HISTORY: Final = "history.json"
CURVES: Final = "curves.png"

_MAGIC: Final = b"lfm-scan-training-state-1\n"
_LENGTH: Final = struct.Struct("<Q")


@dataclass(frozen=True)
class Position:
    """Where a training is.

    Attributes:
        epoch: Epochs that are finished.
        losses: Of the steps taken since.
        history: What is known of each finished epoch.
        best_epoch: Number of finished epochs when the metric was best; 0 before the first.
        best_value: The metric then.
    """

    epoch: int = 0
    losses: tuple[float, ...] = ()
    history: tuple[dict[str, Any], ...] = ()
    best_epoch: int = 0
    best_value: float | None = None

    def within(self, losses: list[float]) -> Position:
        """Return the position some steps into the epoch."""
        return replace(self, losses=tuple(losses))

    def after(self, entry: dict[str, Any], value: float | None) -> Position:
        """Return the position at the end of the epoch.

        Args:
            entry: What is known of the epoch.
            value: The metric, higher is better, or None if it cannot be measured: then each epoch counts as best.
        """
        is_best = value is None or self.best_value is None or value > self.best_value
        return Position(
            epoch=self.epoch + 1,
            history=(*self.history, entry),
            best_epoch=self.epoch + 1 if is_best else self.best_epoch,
            best_value=value if is_best else self.best_value,
        )

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @classmethod
    def from_json(cls, parsed: dict[str, Any]) -> Position:
        """Return what `to_json` made."""
        return cls(**{**parsed, "losses": tuple(parsed["losses"]), "history": tuple(parsed["history"])})


@dataclass(frozen=True)
class TrainingDirectory:
    """The run directory of a training. Small, and safe to send to workers.

    Attributes:
        directory: The place.
        metadata: What its checkpoints say of themselves, but for the figures.
    """

    directory: RunDirectory
    metadata: CheckpointMetadata = field(default_factory=lambda: CheckpointMetadata(model_id="lfm"))

    def read_state(self) -> tuple[Position, bytes] | None:
        """Return the last saved position and the trainer's state, or None before the first.

        Raises:
            TrainingError: If it was not written by this program.
            StorageError: If it cannot be read.
        """
        data = self._read(STATE)
        if data is None:
            return None
        try:
            if not data.startswith(_MAGIC):
                raise ValueError("it does not begin as one")
            start = len(_MAGIC) + _LENGTH.size
            (num_bytes,) = _LENGTH.unpack(data[len(_MAGIC) : start])
            position = Position.from_json(json.loads(data[start : start + num_bytes]))
        except (ValueError, TypeError, KeyError, struct.error) as exc:
            raise TrainingError(
                f"{self.directory.path(STATE)}: not the state of a training ({exc}); choose another --output"
            ) from exc
        return position, data[start + num_bytes :]

    def write_state(self, position: Position, state: bytes) -> None:
        """Save a position and the trainer's state, over the last."""
        described = json.dumps(position.to_json()).encode()
        self._replace(STATE, b"".join((_MAGIC, _LENGTH.pack(len(described)), described, state)))

    def write_checkpoint(self, name: str, model: LFM, position: Position, domain: Domain) -> None:
        """Write a checkpoint that the scanner reads, over the last of its name."""
        training = {**self.metadata.training, "epochs": position.epoch, "validation": position.history[-1]}
        metadata = replace(self.metadata, architecture=model.config, domain=domain, training=training)
        self._replace(f"checkpoints/{name}.safetensors", save_checkpoint(model, metadata))

    def write_history(self, position: Position) -> None:
        """Write the figures of all epochs, over the last."""
        self.replace_json(HISTORY, position.history)

    def write_curves(self, picture: bytes) -> None:
        """Write the training curves, a PNG, over the last."""
        self._replace(CURVES, picture)

    def write_board(self, folder: Path) -> None:
        """Copy TensorBoard's files from a local folder, over their last copies."""
        for path in sorted(folder.iterdir()):
            self._replace(f"tensorboard/{path.name}", path.read_bytes())

    def replace_json(self, name: str, value: Any) -> None:  # noqa: ANN401 - any JSON value
        """Write a small file for people to read, over the last."""
        self._replace(name, json.dumps(value, indent=1, ensure_ascii=False).encode("utf-8", "surrogateescape"))

    def read_samples(self) -> pa.Table | None:
        """Return the checked samples, or None before the check."""
        data = self._read(SAMPLES)
        return None if data is None else pq.read_table(io.BytesIO(data))

    def create_samples(self, samples: pa.Table) -> None:
        """Write the checked samples, once."""
        sink = io.BytesIO()
        pq.write_table(samples, sink, compression="zstd")
        self.directory.store.create(self.directory.path(SAMPLES), sink.getvalue())

    def _read(self, name: str) -> bytes | None:
        try:
            return self.directory.store.get(self.directory.path(name)).data
        except NotFoundError:
            return None

    def _replace(self, name: str, data: bytes) -> None:
        self.directory.store.replace(self.directory.path(name), data)
