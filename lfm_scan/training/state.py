"""A training between two steps, as bytes: safetensors with JSON beside them, so that reading it runs nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from lfm_scan.errors import CheckpointError

FORMAT_NAME: Final = "lfm-scan-training-state"
FORMAT_VERSION: Final = 1
MAX_STATE_BYTES: Final = 2**30
"""Weights and two moments of the largest architecture are a hundredth of this."""

_METADATA_KEY: Final = "lfm_scan"
_MAX_PROBLEMS: Final = 3


@dataclass(frozen=True)
class TrainingState:
    """A state as read.

    Attributes:
        num_steps: Steps taken.
        num_epochs: Epochs ended.
        tensors: By name, unchecked; see `copy_into`.
        name: How error messages call it.
    """

    num_steps: int
    num_epochs: int
    tensors: dict[str, Tensor]
    name: str

    @torch.no_grad()
    def copy_into(self, live: Mapping[str, Tensor]) -> None:
        """Copy the tensors into those of a training, in place: all or, on an error, none.

        Raises:
            CheckpointError: If names, shapes or types differ, or a value is not a finite number.
        """
        problems = [f"{key} is missing" for key in live if key not in self.tensors]
        problems += [f"{key} is not part of the training" for key in self.tensors if key not in live]
        for key, value in self.tensors.items():
            if key not in live:
                continue
            found, expected = (tuple(value.shape), value.dtype), (tuple(live[key].shape), live[key].dtype)
            if found != expected:
                problems.append(f"{key} is {found[0]} {found[1]}, expected {expected[0]} {expected[1]}")
            elif not value.isfinite().all():
                problems.append(f"{key} holds values that are not finite numbers")
        if problems:
            raise CheckpointError(f"{self.name}: does not fit this training: {_some(problems)}")
        for key, value in live.items():
            value.copy_(self.tensors[key])


def write_state(
    identity: Mapping[str, object], num_steps: int, num_epochs: int, tensors: Mapping[str, Tensor]
) -> bytes:
    """Return the bytes of a state; the same state always gives the same bytes.

    Args:
        identity: What a training must have in common with this one to go on from it; JSON values.
        num_steps: Steps taken.
        num_epochs: Epochs ended.
        tensors: By name.
    """
    described = {
        "format": FORMAT_NAME,
        "format_version": FORMAT_VERSION,
        "identity": dict(identity),
        "num_steps": num_steps,
        "num_epochs": num_epochs,
    }
    plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    return safetensors.torch.save(plain, {_METADATA_KEY: json.dumps(described, sort_keys=True)})


def read_state(data: bytes, name: str, identity: Mapping[str, object]) -> TrainingState:
    """Read a state.

    Args:
        data: The whole file.
        name: How error messages call it, usually its path.
        identity: Of the training that is to go on from it.

    Raises:
        CheckpointError: If it is damaged, too large, or of a training with another identity.
    """
    if len(data) > MAX_STATE_BYTES:
        raise CheckpointError(f"{name}: {len(data):,} bytes; a training state has at most {MAX_STATE_BYTES:,}")
    try:
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        described = json.loads(header["__metadata__"][_METADATA_KEY])
        num_steps, num_epochs, theirs = _parse(described)
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, AttributeError) as exc:
        raise CheckpointError(
            f"{name}: not a training state of lfm-scan, or a damaged one ({exc}): resume from another checkpoint, or "
            "start anew"
        ) from exc
    ours: dict[str, Any] = json.loads(json.dumps(dict(identity), sort_keys=True))
    differing = [key for key in sorted(ours.keys() | theirs.keys()) if ours.get(key) != theirs.get(key)]
    if differing:
        named = _some([f"{key} was {theirs.get(key)!r} and now is {ours.get(key)!r}" for key in differing])
        raise CheckpointError(f"{name}: of another training: {named}; give the same settings, or start anew")
    return TrainingState(num_steps, num_epochs, tensors, name)


def _parse(described: dict[str, Any]) -> tuple[int, int, dict[str, Any]]:
    if described["format"] != FORMAT_NAME:
        raise ValueError(f"format is not {FORMAT_NAME!r}")
    if described["format_version"] != FORMAT_VERSION:
        raise ValueError(f"format version {described['format_version']}, this program reads {FORMAT_VERSION}")
    counts = described["num_steps"], described["num_epochs"]
    if not all(type(count) is int and count >= 0 for count in counts) or not isinstance(described["identity"], dict):
        raise ValueError("its counts of steps and epochs cannot be used")
    return *counts, described["identity"]


def _some(problems: list[str]) -> str:
    more = f" (and {len(problems) - _MAX_PROBLEMS} more)" if len(problems) > _MAX_PROBLEMS else ""
    return "; ".join(problems[:_MAX_PROBLEMS]) + more
