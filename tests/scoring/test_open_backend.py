"""Which backend is chosen, and what is refused."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from lfm_scan.errors import ConfigError
from lfm_scan.model import Checkpoint
from lfm_scan.scoring import backend as backends
from lfm_scan.scoring.backend import has_openvino, open_backend
from lfm_scan.scoring.torch_backend import TorchBackend
from tests.scoring.networks import logits_by_definition, random_checkpoint, random_pixels

needs_openvino = pytest.mark.skipif(not has_openvino(), reason="OpenVINO is not installed")


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return random_checkpoint()


@pytest.fixture
def num_threads() -> Iterator[int]:
    """torch's number of threads, put back afterwards."""
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


@pytest.fixture
def no_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "has_openvino", lambda: False)


@needs_openvino
def test_auto_is_openvino_on_a_cpu(checkpoint: Checkpoint) -> None:
    assert type(open_backend(checkpoint, "cpu")).__name__ == "OpenVINOBackend"


@pytest.mark.usefixtures("no_openvino")
def test_auto_is_torch_without_openvino_and_says_what_it_costs(
    checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    assert isinstance(open_backend(checkpoint, "cpu"), TorchBackend)
    assert "pip install openvino" in caplog.text


def test_torch_is_taken_on_request_with_the_threads_asked_for(
    checkpoint: Checkpoint, num_threads: int, caplog: pytest.LogCaptureFixture
) -> None:
    assert isinstance(open_backend(checkpoint, "cpu", backend="torch"), TorchBackend)
    assert torch.get_num_threads() == num_threads
    open_backend(checkpoint, "cpu", backend="torch", num_threads=num_threads + 1)
    assert torch.get_num_threads() == num_threads + 1
    assert not caplog.records


def test_every_backend_scores_what_the_network_scores(checkpoint: Checkpoint) -> None:
    pixels = random_pixels(2)
    expected = logits_by_definition(checkpoint, pixels)
    for name in ("torch", "openvino") if has_openvino() else ("torch",):
        found = open_backend(checkpoint, "cpu", backend=name).logits(pixels)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.ptp(expected))


@needs_openvino
def test_bf16_on_a_processor_without_it_is_fp32_and_says_so(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("lfm_scan.scoring.openvino_backend.supports_bf16", lambda: False)
    pixels = random_pixels(2)
    found = open_backend(checkpoint, "cpu", precision="bf16", num_threads=1).logits(pixels)
    np.testing.assert_array_equal(found, open_backend(checkpoint, "cpu", num_threads=1).logits(pixels))
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "this processor does not compute in bfloat16; scoring in fp32" in caplog.text


def test_bf16_with_torch_is_fp32_and_says_so(checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture) -> None:
    open_backend(checkpoint, "cpu", backend="torch", precision="bf16")
    assert "the torch backend on cpu computes in fp32 only" in caplog.text


@needs_openvino
@pytest.mark.parametrize(("threshold", "decision"), [(0.5, 0), (0.9, np.log(9)), (0, -np.inf), (1, np.inf)])
def test_the_threshold_says_which_logits_are_checked(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, threshold: float, decision: float
) -> None:
    given: dict[str, float] = {}
    monkeypatch.setattr(
        "lfm_scan.scoring.openvino_backend.OpenVINOBackend", lambda checkpoint, **options: given.update(options)
    )
    open_backend(checkpoint, "cpu", threshold=threshold)
    assert given["decision"] == pytest.approx(decision)


@pytest.mark.parametrize(
    ("device", "options", "message"),
    [
        ("cpu", {"backend": "onnx"}, "backend must be one of auto, torch, openvino, got 'onnx'"),
        ("cpu", {"precision": "int4"}, "precision must be one of fp32, fp16, bf16, got 'int4'"),
        ("cpu", {"num_threads": 0}, "num_threads must be at least 1, got 0"),
        ("cpu", {"threshold": 1.5}, "threshold must be 0 to 1, got 1.5"),
        ("cuda", {"backend": "openvino"}, "backend openvino runs on a CPU only, not on cuda"),
    ],
)
def test_what_cannot_be_is_refused_with_the_remedy(
    checkpoint: Checkpoint, device: str, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        open_backend(checkpoint, device, **options)  # type: ignore[arg-type]


@pytest.mark.usefixtures("no_openvino")
def test_openvino_that_is_not_there_is_refused_with_the_remedy(checkpoint: Checkpoint) -> None:
    with pytest.raises(ConfigError, match="pip install openvino, or use backend torch"):
        open_backend(checkpoint, "cpu", backend="openvino")
