"""Reading and writing weights: round trips, and files that must be refused."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from lfm_scan.errors import CheckpointError
from lfm_scan.model import (
    LFM,
    ArchitectureConfig,
    Checkpoint,
    CheckpointMetadata,
    Domain,
    checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from lfm_scan.model.published import key_table
from lfm_scan.options import Pooling

METADATA = CheckpointMetadata(
    model_id="lfm-test",
    preprocess="resize256",
    domain=Domain(lossy=True),
    mean=(0.5, 0.4, 0.3),
    std=(0.1, 0.2, 0.3),
    training={"epochs": 50, "data": ["car", "cat"]},
)


@pytest.fixture(scope="module")
def model() -> LFM:
    torch.manual_seed(1)
    return LFM()


@pytest.fixture(scope="module")
def saved(model: LFM) -> bytes:
    return save_checkpoint(model, METADATA)


def rewritten(
    saved: bytes,
    change_tensors: Callable[[dict[str, Tensor]], object] = lambda tensors: None,
    change_metadata: Callable[[dict[str, Any]], object] = lambda values: None,
) -> bytes:
    """Return a checkpoint with its tensors or metadata changed in place."""
    tensors = safetensors.torch.load(saved)
    header = json.loads(saved[8 : 8 + int.from_bytes(saved[:8], "little")])
    values = json.loads(header["__metadata__"]["lfm_scan"])
    change_tensors(tensors)
    change_metadata(values)
    return safetensors.torch.save(tensors, {"lfm_scan": json.dumps(values)})


def pytorch_file(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def published_layout(model: LFM) -> dict[str, Tensor]:
    """Return a model's weights as the authors' code would save them."""
    down, up = torch.zeros(3, 3, 2, 2), torch.zeros(3, 3, 2, 2)
    for channel in range(3):
        down[channel, channel, 0, 0] = 1
        up[channel, channel] = 1
    ours = model.state_dict()
    named = {theirs: ours[key] for key, theirs in key_table(len(model.blocks)).items()}
    return {"downsample_conv.weight": down, "upsample_conv.weight": up, **named}


def refusal(data: bytes) -> str:
    """Return the message with which a file is refused."""
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(data, name="w.bin")
    assert str(caught.value).startswith("w.bin: ")
    return str(caught.value)


def test_a_checkpoint_comes_back_as_it_was_saved(model: LFM, saved: bytes) -> None:
    loaded = load_checkpoint(saved)
    assert loaded.metadata == METADATA
    assert loaded.sha256 == hashlib.sha256(saved).hexdigest()
    assert not loaded.model.training
    assert loaded.model.state_dict().keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[key], value), key


@pytest.mark.parametrize("config", [ArchitectureConfig(depth=7, k=4), ArchitectureConfig(pooling="cbam")])
def test_every_architecture_comes_back(config: ArchitectureConfig) -> None:
    loaded = load_checkpoint(save_checkpoint(LFM(config), replace(METADATA, architecture=config)))
    assert loaded.model.config == config


@pytest.mark.parametrize("pooling", ["gap", "gmp", "cbam", "tkp"])
@pytest.mark.parametrize("depth", range(4, 9))
def test_the_shapes_of_an_architecture_are_those_of_its_network(depth: int, pooling: Pooling) -> None:
    config = ArchitectureConfig(depth, pooling, k=3)
    expected = {key: tuple(value.shape) for key, value in LFM(config).state_dict().items()}
    assert config.shapes() == expected
    assert list(config.shapes()) == list(expected)


def test_saving_twice_gives_the_same_bytes(model: LFM, saved: bytes) -> None:
    assert save_checkpoint(model, METADATA) == saved
    loaded = load_checkpoint(saved)
    assert save_checkpoint(loaded.model, loaded.metadata) == saved


def test_saving_under_another_architecture_is_refused(model: LFM) -> None:
    with pytest.raises(ValueError, match=r"metadata says .*depth=6.*, the model is .*depth=5"):
        save_checkpoint(model, replace(METADATA, architecture=ArchitectureConfig(depth=6)))


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 100, 0.5, -1])
def test_a_safetensors_file_cut_anywhere_is_refused(saved: bytes, keep: float) -> None:
    cut = saved[: int(len(saved) * keep) if 0 < keep < 1 else int(keep)]
    assert "expected a file written by lfm-scan or the authors' published weights" in refusal(cut)


@pytest.mark.parametrize(
    "data",
    [
        b"This is a text file, and a rather long one at that.\n" * 20,
        b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (4).to_bytes(8, "little") + b"null",
        (2**63).to_bytes(8, "little") + b"{}",
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused(data: bytes) -> None:
    assert "expected a file written by lfm-scan" in refusal(data)


def test_safetensors_of_another_program_are_named_as_such() -> None:
    assert "without lfm-scan metadata: it is of another program" in refusal(
        safetensors.torch.save({"weight": torch.zeros(3)})
    )
    assert "without lfm-scan metadata: it is of another program" in refusal(
        safetensors.torch.save({"weight": torch.zeros(3)}, {"format": "pt"})
    )


def test_a_wrong_shape_is_named_with_the_one_expected(saved: bytes) -> None:
    damaged = rewritten(saved, lambda tensors: tensors.update({"head.weight": torch.zeros(1, 64)}))
    assert "head.weight has shape (1, 64), expected (1, 1024)" in refusal(damaged)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(saved: bytes, value: float) -> None:
    damaged = rewritten(saved, lambda tensors: tensors["projection.weight"].view(-1)[7].fill_(value))
    assert "projection.weight holds values that are not finite numbers" in refusal(damaged)


def test_a_missing_key_is_named(saved: bytes) -> None:
    damaged = rewritten(saved, lambda tensors: tensors.pop("blocks.2.norm.running_var"))
    assert "blocks.2.norm.running_var is missing" in refusal(damaged)


def test_an_extra_key_is_named(saved: bytes) -> None:
    damaged = rewritten(saved, lambda tensors: tensors.update({"backdoor": torch.zeros(1)}))
    assert "backdoor is not part of the model" in refusal(damaged)


def test_many_problems_are_counted_rather_than_listed(saved: bytes) -> None:
    damaged = rewritten(saved, lambda tensors: [tensors.pop(key) for key in list(tensors)[:10]])
    assert "(and 7 more)" in refusal(damaged)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "format is not 'lfm-scan-checkpoint'"),
        ({"format_version": 2}, "format version 2, this program reads 1"),
        ({"architecture": {"depth": 99}}, "SNet depth must be 4 to 8, got 99"),
        ({"architecture": {"depth": "5"}}, "cannot be used"),
        ({"architecture": {"width": 5}}, "width"),
        ({"architecture": None}, "cannot be used"),
        ({"domain": {"everything": True}}, "everything"),
        ({"mean": [0.5, 0.5]}, "mean and std must be three numbers"),
        ({"mean": None}, "cannot be used"),
        ({"mean": ["a", "b", "c"]}, "must be real number"),
        ({"mean": [float("nan"), 0.5, 0.5]}, "mean and std must be three numbers"),
        ({"std": [0.1, 0, 0.1]}, "std positive"),
        ({"model_id": ""}, "model_id must have 1 to 200 characters"),
        ({"model_id": 7}, "model_id and preprocess must be strings"),
        ({"preprocess": 7}, "model_id and preprocess must be strings"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_wrong_metadata_are_refused_with_the_reason(saved: bytes, change: dict[str, object], message: str) -> None:
    assert message in refusal(rewritten(saved, change_metadata=lambda values: values.update(change)))


@pytest.mark.parametrize("described", ["not json", "[]", "null", "7"])
def test_metadata_that_are_no_object_are_refused(described: str) -> None:
    data = safetensors.torch.save({"weight": torch.zeros(3)}, {"lfm_scan": described})
    assert "its lfm-scan metadata cannot be used" in refusal(data)


def test_a_file_larger_than_any_checkpoint_is_refused_unread(saved: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "MAX_CHECKPOINT_BYTES", len(saved) - 1)
    assert f"{len(saved):,} bytes; a checkpoint has at most {len(saved) - 1:,}" in refusal(saved)


def test_the_published_layout_gives_the_same_model(model: LFM) -> None:
    loaded = load_checkpoint(pytorch_file(published_layout(model)))
    assert loaded.metadata.architecture == model.config
    assert loaded.metadata.preprocess == "resize256"
    assert loaded.metadata.domain == Domain(lossy=False, resampled=False)
    assert loaded.metadata.model_id == f"lfm-{loaded.sha256[:12]}"
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[key], value), key


class _Hostile:
    """Runs a command when it is unpickled by a reader without guard."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (self.command,)


def test_a_pickle_that_runs_a_command_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    hostile = _Hostile(f"touch {proof}")
    # Proof that the bait works on an unguarded reader: otherwise the test could not fail.
    pickle.loads(pickle.dumps(hostile))
    assert proof.exists()
    proof.unlink()

    message = refusal(pytorch_file({"fc1.weight": torch.zeros(1), "payload": hostile}))
    assert "refused: it holds pickled objects other than tensors" in message
    assert not proof.exists()
    assert "neither a safetensors file nor a PyTorch checkpoint" in refusal(pickle.dumps(hostile))
    assert not proof.exists()


@pytest.mark.parametrize("keep", [4, 100, 0.5, 0.99])
def test_a_pytorch_file_cut_anywhere_is_refused(model: LFM, keep: float) -> None:
    data = pytorch_file(published_layout(model))
    assert "a damaged PyTorch file" in refusal(data[: int(len(data) * keep) if keep < 1 else int(keep)])


def test_a_zip_file_of_something_else_is_refused() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "a damaged PyTorch file" in refusal(buffer.getvalue())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(1)], "expected a state dict of tensors, found list"),
        ({"epoch": 7}, "expected a state dict of tensors"),
        ({"conv1.weight": torch.zeros(1)}, "but not LFM's: expected keys such as cnn.layer1.0.weight"),
        ({}, "found none"),
        ({1: torch.zeros(1)}, "expected a state dict of tensors"),
    ],
)
def test_a_pytorch_file_of_another_model_is_refused(content: object, message: str) -> None:
    assert message in refusal(pytorch_file(content))


def test_the_published_layout_is_checked_key_by_key(model: LFM) -> None:
    def after(change: Callable[[dict[str, Tensor]], object]) -> str:
        tensors = {key: value.clone() for key, value in published_layout(model).items()}
        change(tensors)
        return refusal(pytorch_file(tensors))

    assert "head.bias is missing" in after(lambda tensors: tensors.pop("fc1.bias"))
    assert "extra is not part of the model" in after(lambda tensors: tensors.update(extra=torch.zeros(1)))
    assert "is not the fixed NPR kernel" in after(lambda tensors: tensors["upsample_conv.weight"].mul_(2))
    assert "is not the fixed NPR kernel" in after(lambda tensors: tensors.pop("downsample_conv.weight"))
    assert "has shape" in after(lambda tensors: tensors.update({"cnn.layer2.0.weight": torch.zeros(1)}))
    for key in ("covn1_1.weight", "fc1.weight"):
        assert "not an architecture of LFM" in after(lambda tensors, key=key: tensors.update({key: torch.tensor(1.0)}))  # type: ignore[misc]


@pytest.mark.parametrize("kind", ["sparse", "complex"])
def test_tensors_that_are_not_plain_numbers_are_refused(model: LFM, kind: str) -> None:
    tensors = published_layout(model)
    weight = tensors["covn1_1.weight"]
    tensors["covn1_1.weight"] = weight.to_sparse() if kind == "sparse" else weight.to(torch.complex64)
    assert "projection.weight holds values that are not finite numbers" in refusal(pytorch_file(tensors))


def test_a_tensor_that_claims_more_than_any_memory_is_refused(model: LFM) -> None:
    tensors = published_layout(model)
    tensors["covn1_1.weight"] = torch.zeros(1).expand(2**40)  # a file of a few bytes
    assert "not an architecture of LFM" in refusal(pytorch_file(tensors))
    tensors["covn1_1.weight"] = torch.zeros(1).expand(64, 2**34, 1, 1)
    assert "expected (64, 512, 1, 1)" in refusal(pytorch_file(tensors))


def test_weights_in_half_precision_are_taken(model: LFM) -> None:
    tensors = {
        key: value.bfloat16() if value.is_floating_point() else value for key, value in published_layout(model).items()
    }
    loaded = load_checkpoint(pytorch_file(tensors))
    assert torch.equal(loaded.model.head.weight, model.head.weight.bfloat16().float())


def test_the_model_runs_after_loading(saved: bytes) -> None:
    loaded: Checkpoint = load_checkpoint(saved)
    with torch.inference_mode():
        assert loaded.model(torch.zeros(1, 3, 256, 256)).isfinite().all()
