"""Batches, memory, the choice of the network, and, where there is a GPU, copies and graphs."""

from __future__ import annotations

import logging
import sys
import types

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lfm_scan.errors import ConfigError
from lfm_scan.model import ArchitectureConfig, Checkpoint
from lfm_scan.scoring.cuda import backend as module
from lfm_scan.scoring.cuda.backend import CudaBackend, fitting_batch_size
from lfm_scan.scoring.cuda.folded import FoldedLFM, Precision
from tests.scoring.cuda.networks import DEVICE, make_checkpoint, make_pixels, needs_gpu, needs_triton, published_logits


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return make_checkpoint()


class Recorder(nn.Module):
    """Gives each image's first pixel, remembers batches, and runs out of memory past a size."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most
        self.batches: list[int] = []

    def forward(self, pixels_bhwc: Tensor) -> Tensor:
        self.batches.append(len(pixels_bhwc))
        if len(pixels_bhwc) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return pixels_bhwc[:, 0, 0, 0].float()


def recording(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, most: int) -> tuple[CudaBackend, Recorder]:
    backend = CudaBackend(checkpoint, batch_size=8, kernels="torch", device="cpu")
    recorder = Recorder(most)
    monkeypatch.setattr(backend, "_network", recorder)
    return backend, recorder


@pytest.mark.parametrize("count", [0, 1, 5])
def test_logits_are_those_of_the_network(checkpoint: Checkpoint, count: int) -> None:
    pixels = make_pixels(count)
    backend = CudaBackend(checkpoint, precision="fp32", batch_size=2, kernels="torch", device=DEVICE)
    found = backend.logits(pixels)
    assert found.shape == (count,)
    assert found.dtype == np.dtype(np.float32)
    if count:
        np.testing.assert_allclose(found, published_logits(checkpoint, pixels).numpy(), rtol=0, atol=1e-3)


def test_pixels_that_may_not_be_written_are_scored(checkpoint: Checkpoint) -> None:
    pixels = make_pixels(3)
    pixels.flags.writeable = False
    backend = CudaBackend(checkpoint, precision="fp32", batch_size=2, kernels="torch", device=DEVICE)
    assert np.isfinite(backend.logits(pixels)).all()


def test_out_of_memory_halves_the_batch_and_goes_on_where_it_was(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    backend, recorder = recording(checkpoint, monkeypatch, most=8)
    pixels = np.arange(20, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
    logits = backend.logits(pixels[:8])
    recorder.most = 2  # somebody else took the rest
    with caplog.at_level(logging.WARNING):
        logits = np.concatenate([logits, backend.logits(pixels[8:])])
    np.testing.assert_array_equal(logits, np.arange(20))
    assert recorder.batches == [8, 8, 4, 2, 2, 2, 2, 2, 2]
    assert backend.batch_size == 2
    assert [record.getMessage() for record in caplog.records] == [
        "GPU memory ran out: going on with 4 images a batch",
        "GPU memory ran out: going on with 2 images a batch",
    ]


def test_out_of_memory_for_one_image_is_raised(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, recorder = recording(checkpoint, monkeypatch, most=0)
    with pytest.raises(torch.OutOfMemoryError):
        backend.logits(make_pixels(3))
    assert recorder.batches == [3, 3, 2, 1]


def test_another_error_of_the_device_is_not_taken_for_a_lack_of_memory(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, _ = recording(checkpoint, monkeypatch, most=8)

    def fail(pixels_bhwc: Tensor) -> Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(backend, "_network", fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        backend.logits(make_pixels(3))
    assert backend.batch_size == 8


@pytest.mark.parametrize(
    ("free_bytes", "bytes_per_image", "expected"),
    [
        (140 * 2**30, 4 * 2**20, 256),  # a large GPU
        (2 * 2**30, 12 * 2**20, 64),  # 0.8 * 2048 / 24 = 68.3
        (1000, 4, 64),  # 100
        (1280, 4, 128),  # exactly 128
        (1279, 4, 64),
        (10, 2**20, 1),  # nothing fits: one is tried all the same
        (0, 0, 1),
    ],
)
def test_the_batch_is_a_power_of_two_that_fits_twice(free_bytes: int, bytes_per_image: int, expected: int) -> None:
    assert fitting_batch_size(free_bytes, bytes_per_image) == expected


def test_an_unknown_precision_is_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(ConfigError, match="precision must be one of fp32, tf32, bf16, fp16, got 'int8'"):
        CudaBackend(checkpoint, precision="int8", device="cpu")  # type: ignore[arg-type]


def test_a_batch_of_nothing_is_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(ConfigError, match="batch_size must be at least 1, got 0"):
        CudaBackend(checkpoint, batch_size=0, device="cpu")


class Kernels(FoldedLFM):
    """Stands for the kernels, in torch."""

    factor = 1.0
    offset = 0.0

    def feature_map(self, pixels_bhwc: Tensor) -> Tensor:
        return super().feature_map(pixels_bhwc).permute(0, 2, 3, 1) * self.factor

    def topk_head(self, map_bhwc: Tensor) -> Tensor:
        return self.head(self.pool(map_bhwc.permute(0, 3, 1, 2)).flatten(1)).squeeze(1) + self.offset  # type: ignore[no-any-return]

    def forward(self, pixels_bhwc: Tensor) -> Tensor:
        return self.topk_head(self.feature_map(pixels_bhwc))


def stand_in(monkeypatch: pytest.MonkeyPatch, factor: float = 1, offset: float = 0, fusible: bool = True) -> None:
    fake = types.ModuleType("fused")
    fake.FusedLFM = type("Fake", (Kernels,), {"factor": factor, "offset": offset})  # type: ignore[attr-defined]
    fake.is_fusible = lambda config, precision: fusible  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lfm_scan.scoring.cuda.fused", fake)


@pytest.fixture
def small_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PROBE_SIDE_PX", 64)


@pytest.mark.usefixtures("small_probe")
def test_kernels_that_agree_are_used(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)
    assert CudaBackend(checkpoint, batch_size=2, device="cpu").kernels == "triton"


@pytest.mark.usefixtures("small_probe")
@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"factor": 1.1}, "their map is off by 0.1 of its norm"),
        ({"factor": float("nan")}, "their map is off by nan of its norm"),
        ({"offset": 1.0}, "their logits are off by"),
    ],
    ids=["map", "nan", "head"],
)
def test_kernels_that_disagree_are_not_used(
    checkpoint: Checkpoint,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    wrong: dict[str, float],
    reason: str,
) -> None:
    stand_in(monkeypatch, **wrong)  # type: ignore[arg-type]
    assert CudaBackend(checkpoint, batch_size=2, device="cpu").kernels == "torch"
    assert f"the fused kernels do not work here, torch's operations are used: {reason}" in caplog.text
    with pytest.raises(ConfigError, match="kernels triton: they do not work here"):
        CudaBackend(checkpoint, batch_size=2, kernels="triton", device="cpu")


def test_what_has_no_kernels_runs_in_torch_without_a_word(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stand_in(monkeypatch, factor=2, fusible=False)
    assert CudaBackend(checkpoint, batch_size=2, device="cpu").kernels == "torch"
    assert caplog.text == ""


def test_without_triton_torch_is_used(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delitem(sys.modules, "lfm_scan.scoring.cuda.fused", raising=False)
    monkeypatch.delitem(sys.modules, "lfm_scan.scoring.cuda.kernels", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    assert CudaBackend(checkpoint, batch_size=2, device="cpu").kernels == "torch"
    assert "torch's operations are used" in caplog.text


@needs_gpu
@needs_triton
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_kernels_agree_with_torch_on_this_gpu(checkpoint: Checkpoint, precision: Precision) -> None:
    assert CudaBackend(checkpoint, precision=precision, kernels="triton").kernels == "triton"


@needs_gpu
@pytest.mark.parametrize("kernels", ["torch", pytest.param("triton", marks=needs_triton)])
@torch.inference_mode()
def test_copies_and_graphs_change_nothing(checkpoint: Checkpoint, kernels: module.Kernels) -> None:
    pixels = make_pixels(45, 256, 256)
    backend = CudaBackend(checkpoint, batch_size=8, kernels=kernels)
    first, second = backend.logits(pixels), backend.logits(pixels)
    assert backend._graph is not None
    np.testing.assert_array_equal(first, second)
    alone = np.concatenate(
        [backend._eager(torch.from_numpy(part).cuda()).cpu().numpy() for part in np.split(pixels, 9)]
    )
    np.testing.assert_allclose(first, alone, rtol=0, atol=0 if kernels == "triton" else 1e-2)


@needs_gpu
def test_the_batch_of_an_empty_gpu_is_the_largest(checkpoint: Checkpoint) -> None:
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB free")
    assert CudaBackend(checkpoint).batch_size == module.MAX_BATCH


@needs_gpu
def test_every_architecture_is_scored(checkpoint: Checkpoint) -> None:
    pixels = make_pixels(2, 256, 256)
    for config in (ArchitectureConfig(depth=7), ArchitectureConfig(pooling="cbam"), ArchitectureConfig(depth=4, k=4)):
        other = make_checkpoint(config)
        expected = published_logits(other, pixels).numpy()
        found = CudaBackend(other, precision="fp32", batch_size=2).logits(pixels)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)
    del checkpoint
