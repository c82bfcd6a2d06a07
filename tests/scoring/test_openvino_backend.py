"""The OpenVINO backend against the network as it is trained."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.waiting import PATIENCE_S

pytest.importorskip("openvino", reason="OpenVINO is not installed: no wheel for this platform, or left out")

from lfm_scan.imaging import ImageLimits, decode_bytes, get_policy
from lfm_scan.model import ArchitectureConfig, Checkpoint, load_checkpoint
from lfm_scan.model.layers import NPR
from lfm_scan.options import Pooling, Precision
from lfm_scan.scoring import openvino_backend
from lfm_scan.scoring.openvino_backend import RECHECK_LOGITS, OpenVINOBackend, npr_uint8, supports_bf16
from lfm_scan.scoring.torch_backend import TorchBackend
from lfm_scan.scoring.weights import read_weights
from tests.scoring.networks import logits_by_definition, random_checkpoint, random_pixels

_FILES_PER_SET = 7

needs_bf16 = pytest.mark.skipif(not supports_bf16(), reason="this processor does not compute in bfloat16")
each_precision = pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=needs_bf16)])


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return random_checkpoint()


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return random_pixels(5)


@pytest.mark.parametrize(
    ("depth", "pooling", "k"),
    [(4, "tkp", 16), (5, "tkp", 1), (5, "tkp", 256), (6, "gap", 16), (7, "gmp", 16), (8, "cbam", 16), (8, "tkp", 64)],
)
def test_logits_are_those_of_the_network_for_every_architecture(
    depth: int, pooling: Pooling, k: int, pixels: np.ndarray
) -> None:
    checkpoint = random_checkpoint(ArchitectureConfig(depth, pooling, k))
    expected = logits_by_definition(checkpoint, pixels[:3])
    found = OpenVINOBackend(checkpoint, num_threads=1).logits(pixels[:3])
    assert found.dtype == np.dtype(np.float32)
    # The differences between images are what must agree.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.ptp(expected))


@needs_bf16
@pytest.mark.parametrize(("depth", "pooling"), [(4, "tkp"), (5, "tkp"), (6, "cbam"), (8, "gap")])
def test_bf16_rounds_little_for_every_architecture(depth: int, pooling: Pooling, pixels: np.ndarray) -> None:
    checkpoint = random_checkpoint(ArchitectureConfig(depth, pooling))
    expected = logits_by_definition(checkpoint, pixels[:3])
    found = OpenVINOBackend(checkpoint, precision="bf16", num_threads=1, decision=np.inf).logits(pixels[:3])
    assert not np.array_equal(found, expected)
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.15 * np.ptp(expected))


@pytest.mark.parametrize("num_images", [0, 1, 5])
@pytest.mark.parametrize("num_threads", [1, 2, 8])
def test_any_number_of_images_is_scored_in_order(
    checkpoint: Checkpoint, pixels: np.ndarray, num_images: int, num_threads: int
) -> None:
    found = OpenVINOBackend(checkpoint, num_threads=num_threads).logits(pixels[:num_images])
    assert found.shape == (num_images,)
    expected = logits_by_definition(checkpoint, pixels[:num_images])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)


@each_precision
def test_no_bit_depends_on_the_batch_or_the_threads(
    checkpoint: Checkpoint, pixels: np.ndarray, precision: Precision
) -> None:
    one = OpenVINOBackend(checkpoint, precision=precision, num_threads=1)
    together = one.logits(pixels)
    np.testing.assert_array_equal(np.concatenate([one.logits(image[None]) for image in pixels]), together)
    np.testing.assert_array_equal(one.logits(pixels[::-1]), together[::-1])
    three = OpenVINOBackend(checkpoint, precision=precision, num_threads=3)
    np.testing.assert_array_equal(three.logits(pixels), together)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_several_callers_at_once_get_their_own_logits(
    checkpoint: Checkpoint, pixels: np.ndarray, num_threads: int
) -> None:
    shared = OpenVINOBackend(checkpoint, num_threads=num_threads)
    expected = shared.logits(pixels)
    with ThreadPoolExecutor(4) as callers:
        found = list(callers.map(lambda shift: shared.logits(np.roll(pixels, shift, axis=0)), range(8)))
    for shift, logits in enumerate(found):
        np.testing.assert_array_equal(logits, np.roll(expected, shift))


def test_the_residual_is_exact_in_uint8(pixels: np.ndarray) -> None:
    expected = NPR()(torch.from_numpy(pixels.transpose(0, 3, 1, 2)).double()).numpy().transpose(0, 2, 3, 1)
    for image, residual in zip(pixels, expected, strict=True):
        out = np.empty_like(image)
        npr_uint8(image, out, np.empty_like(image))
        np.testing.assert_array_equal(out, residual)
    as_bf16 = torch.arange(256).bfloat16()
    assert torch.equal(as_bf16.int(), torch.arange(256))


def test_read_only_pixels_are_taken_and_not_changed(checkpoint: Checkpoint, pixels: np.ndarray) -> None:
    given = pixels.copy()
    given.flags.writeable = False
    OpenVINOBackend(checkpoint, num_threads=1).logits(given)
    np.testing.assert_array_equal(given, pixels)


@needs_bf16
def test_bf16_logits_near_the_decision_are_those_of_fp32(checkpoint: Checkpoint, pixels: np.ndarray) -> None:
    exact = OpenVINOBackend(checkpoint, num_threads=1).logits(pixels)
    rounded = OpenVINOBackend(checkpoint, precision="bf16", num_threads=1, decision=np.inf).logits(pixels)
    assert (exact != rounded).all()
    decision = float(rounded[2]) + 0.9 * RECHECK_LOGITS
    found = OpenVINOBackend(checkpoint, precision="bf16", num_threads=1, decision=decision).logits(pixels)
    near = np.abs(rounded - decision) <= RECHECK_LOGITS
    assert near[2]
    assert not near.all()
    np.testing.assert_array_equal(found, np.where(near, exact, rounded))


def test_a_channel_without_bias_is_left_as_it_is() -> None:
    weights = [np.ones((2, 1, 2, 2)), np.ones((1, 2, 1, 1))]
    biases = [np.array([0, 1.001])]
    openvino_backend._spare_biases(weights, biases)
    factor = 1 / 1.001  # the nearest bfloat16 number is 1
    assert biases[0].tolist() == [0, 1]
    np.testing.assert_allclose(weights[0][:, 0, 0, 0], [1, factor], rtol=1e-12)
    np.testing.assert_allclose(weights[1][0, :, 0, 0], [1, 1 / factor], rtol=1e-12)


def test_rounding_to_bfloat16_is_torchs() -> None:
    values = np.random.default_rng(0).normal(size=10_000) * np.logspace(-30, 30, 10_000)
    values = np.concatenate([values, [0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8]])  # the last two lie halfway
    expected = torch.from_numpy(values).bfloat16().double().numpy()
    np.testing.assert_array_equal(openvino_backend._bfloat16(values), expected)


@pytest.fixture(scope="module")
def development_images(dev_data: Path) -> tuple[np.ndarray, np.ndarray]:
    """Pixels of a few files of every set, the paper's preprocessing, and the logits of the authors' code."""
    with (dev_data / "dev.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    by_set: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        by_set.setdefault(row["set"], []).append(row)
    chosen = [row for members in by_set.values() for row in members[:: -(-len(members) // _FILES_PER_SET)]]
    chosen += sorted(rows, key=lambda row: abs(float(row["logit_resize256"])))[:5]  # where a decision flips first
    policy, limits = get_policy("resize256"), ImageLimits(min_side_px=1)
    files = [(dev_data / "dev" / row["path"]).read_bytes() for row in chosen]
    pixels = [policy(decode_bytes(data, limits, traces=False)) for data in files]
    return np.stack(pixels), np.array([float(row["logit_resize256"]) for row in chosen])


@each_precision
@pytest.mark.parametrize("weights", ["published", "bundled"])
def test_logits_on_development_images_are_those_of_the_network(
    weights: str, precision: Precision, development_images: tuple[np.ndarray, np.ndarray], published_weights: Path
) -> None:
    pixels, expected = development_images
    if weights == "published":
        checkpoint = load_checkpoint(published_weights.read_bytes())
    else:
        _, checkpoint = read_weights("bundled")
        expected = TorchBackend(checkpoint).logits(pixels)
    found = OpenVINOBackend(checkpoint, precision=precision).logits(pixels)
    np.testing.assert_array_equal(found > 0, expected > 0)
    # Of all development images the farthest is 0.13 off in bf16; with biases or the first weights rounded, 0.3 to 0.9.
    assert np.abs(found - expected).max() < (1e-3 if precision == "fp32" else 0.15)
    assert len(pixels) >= 50
    assert (expected > 0).sum() >= 10


_OFFLINE = """
import socket
def refuse(*args): raise OSError("no network")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
import numpy as np
from lfm_scan.scoring.backend import open_backend
from lfm_scan.scoring.weights import read_weights
backend = open_backend(read_weights("bundled")[1], "cpu", backend="openvino", num_threads=1)
print(backend.logits(np.zeros((1, 256, 256, 3), np.uint8)).shape)
import sys
print("torch" in sys.modules)
"""


def test_nothing_is_asked_of_the_network_and_torch_is_not_loaded() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _OFFLINE],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env=dict(os.environ),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "(1,)\nFalse\n"
