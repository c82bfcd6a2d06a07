"""The scorer: whatever goes in, one result comes out, in order."""

from __future__ import annotations

import hashlib
import io
import os
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lfm_scan.errors import CheckpointError, ConfigError
from lfm_scan.imaging import ImageLimits
from lfm_scan.scoring.result import ImageResult
from lfm_scan.scoring.scorer import Scorer
from lfm_scan.status import Status, Unassessable
from lfm_scan.storage import StorageConfig
from tests.awkward import awkward_files, encode, scene
from tests.servers import S3Server


@pytest.fixture(scope="module")
def scorer(tiny_weights: Path) -> Scorer:
    return Scorer(tiny_weights, device="cpu")


@pytest.fixture(scope="module")
def noise_png() -> bytes:
    return encode(noise(0), "PNG")


def noise(seed: int, side: int = 256) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def logit_of(result: ImageResult) -> float:
    assert result.status == Status.OK, result.error
    assert result.logit is not None
    return result.logit


def test_every_kind_of_source_gives_the_same_result(scorer: Scorer, noise_png: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a picture.png"
    path.write_bytes(noise_png)
    with path.open("rb") as file:
        sources = [noise_png, bytearray(noise_png), path, str(path), f"file://{tmp_path}/a%20picture.png", file]
        results = scorer.score([*sources, io.BytesIO(noise_png)])  # type: ignore[list-item]
    assert [asdict(result) for result in results] == [asdict(results[0])] * 7
    first = results[0]
    assert (first.sha256, first.size_bytes) == (hashlib.sha256(noise_png).hexdigest(), len(noise_png))
    assert (first.format, first.mode, first.width, first.height) == ("PNG", "RGB", 256, 256)


def test_an_image_in_memory_has_the_same_logit_and_no_file(scorer: Scorer, noise_png: bytes) -> None:
    from_file, from_memory = scorer.score([noise_png, noise(0)])
    assert from_memory.logit == from_file.logit
    assert (from_memory.sha256, from_memory.size_bytes, from_memory.format) == (None, None, None)


def test_an_object_in_s3_is_scored(
    tiny_weights: Path, noise_png: bytes, s3_server: S3Server, s3_bucket: str, scorer: Scorer
) -> None:
    s3_server.put(s3_bucket, "in/a b+c.png", noise_png)
    s3_server.put(s3_bucket, "weights", tiny_weights.read_bytes())
    storage = StorageConfig(endpoint_url=s3_server.endpoint_url)
    remote = Scorer(f"s3://{s3_bucket}/weights", device="cpu", storage=storage)
    found, missing = remote.score([f"s3://{s3_bucket}/in/a b+c.png", f"s3://{s3_bucket}/in/gone.png"])
    assert found == scorer.score([noise_png])[0]
    assert missing.status == Status.MISSING


def test_the_order_is_kept_over_many_images_good_and_bad(scorer: Scorer) -> None:
    # More than one chunk of 64, with every third one bad, so that a slip by one would show.
    files = [b"not an image" if number % 3 == 1 else encode(noise(number), "PNG") for number in range(70)]
    results = scorer.score(iter(files))
    assert [result.sha256 for result in results] == [hashlib.sha256(data).hexdigest() for data in files]
    assert [result.status for result in results] == [
        Status.UNSUPPORTED if number % 3 == 1 else Status.OK for number in range(70)
    ]
    for number in (0, 2, 63, 65, 69):
        assert results[number].logit == scorer.score([files[number]])[0].logit
    assert len({result.logit for result in results if result.logit is not None}) == 47


def test_a_bad_image_is_a_result_and_no_exception(scorer: Scorer, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    sources: dict[Status, bytes | Path | Image.Image] = {
        Status.EMPTY: b"",
        Status.UNSUPPORTED: b"This is text",
        Status.CORRUPT: awkward_files()["bad-crc.png"].data,
        Status.TRUNCATED: awkward_files()["cut-at-half.jpg"].data,
        Status.TOO_LARGE: awkward_files()["claims-50000x50000.png"].data,
        Status.TOO_SMALL: scene(255, 256),
        Status.MISSING: tmp_path / "nowhere.png",
        Status.ERROR: tmp_path / "pipe",
    }
    results = scorer.score(sources.values())
    assert [result.status for result in results] == list(sources)
    for result in results:
        assert result.error
        assert (result.logit, result.score, result.assessable, result.flagged) == (None, None, False, False)
        assert result.unassessable_reason == Unassessable.NOT_SCORED


def test_the_result_says_what_scored_it(scorer: Scorer, tiny_weights: Path, noise_png: bytes) -> None:
    [result] = scorer.score([noise_png])
    assert result.model_id == "lfm-test"
    assert result.weights_sha256 == hashlib.sha256(tiny_weights.read_bytes()).hexdigest()
    assert result.preprocess == "crop256"


def test_the_batch_size_does_not_change_results(scorer: Scorer, tiny_weights: Path) -> None:
    images = [noise(seed) for seed in range(5)]
    alone = [logit_of(result) for result in scorer.score(images)]
    batched = [logit_of(result) for result in Scorer(tiny_weights, device="cpu", batch_size=3).score(images)]
    assert batched == pytest.approx(alone, rel=1e-5)


def test_nothing_to_score_gives_nothing(scorer: Scorer) -> None:
    assert scorer.score([]) == []


def test_the_default_policy_is_the_checkpoints(scorer: Scorer, tiny_weights: Path, published_weights: Path) -> None:
    assert scorer.policy.id == "crop256"
    assert Scorer(published_weights, device="cpu").policy.id == "resize256"
    assert Scorer(tiny_weights, "resize256", device="cpu").policy.id == "resize256"


def test_the_policy_decides_what_the_model_sees(scorer: Scorer, tiny_weights: Path) -> None:
    big = noise(1, 300)
    [cropped] = scorer.score([big])
    [resized] = Scorer(tiny_weights, "resize256", device="cpu").score([big])
    assert logit_of(cropped) == logit_of(scorer.score([big.crop((22, 22, 278, 278))])[0])
    assert logit_of(resized) == logit_of(scorer.score([big.resize((256, 256), Image.Resampling.BILINEAR)])[0])
    assert cropped.logit != resized.logit
    assert (cropped.unassessable_reason, resized.unassessable_reason) == (None, Unassessable.RESAMPLED)


def test_threshold_and_flagging_are_the_users(tiny_weights: Path, noise_png: bytes) -> None:
    jpeg = encode(noise(0), "JPEG", quality=100, subsampling=0)
    low, strict = Scorer(tiny_weights, device="cpu", threshold=0.0), Scorer(tiny_weights, device="cpu", threshold=1.0)
    always = Scorer(tiny_weights, device="cpu", threshold=0.0, flag_unassessable=True)
    scores = [result.score for result in low.score([noise_png, jpeg])]
    assert all(score is not None and score > 0 for score in scores)
    assert [result.flagged for result in low.score([noise_png, jpeg])] == [True, False]
    assert [result.flagged for result in always.score([noise_png, jpeg])] == [True, True]
    assert [result.flagged for result in strict.score([noise_png, jpeg])] == [False, False]
    assert [result.unassessable_reason for result in low.score([noise_png, jpeg])] == [None, Unassessable.LOSSY]


def test_limits_are_the_users(tiny_weights: Path, noise_png: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(noise_png)
    by_bytes = Scorer(tiny_weights, device="cpu", limits=ImageLimits(max_image_bytes=len(noise_png) - 1))
    reader = io.BytesIO(noise_png * 3)
    results = by_bytes.score([noise_png, path, reader])
    assert [result.status for result in results] == [Status.TOO_LARGE] * 3
    assert reader.tell() == len(noise_png)
    by_pixels = Scorer(tiny_weights, device="cpu", limits=ImageLimits(max_image_pixels=65_535))
    assert by_pixels.score([noise(0)])[0].status == Status.TOO_LARGE


def test_a_file_without_its_end_is_scored_on_request_and_says_so(tiny_weights: Path, scorer: Scorer) -> None:
    whole = encode(noise(0), "PNG")
    cut = whole[: len(whole) // 2]
    lenient = Scorer(tiny_weights, device="cpu", threshold=0.0, limits=ImageLimits(score_truncated=True))
    part, full = lenient.score([cut, whole])
    assert (part.status, part.unassessable_reason, part.flagged) == (Status.OK, Unassessable.TRUNCATED, False)
    assert part.error == "scored although the end of the file is missing (--score-truncated)"
    assert logit_of(part) != logit_of(full)
    assert (full.error, full.assessable) == (None, True)
    assert scorer.score([cut])[0].status == Status.TRUNCATED


def test_something_that_is_no_image_source_is_the_callers_mistake(scorer: Scorer) -> None:
    with pytest.raises(TypeError, match="cannot score a int: give bytes, a path, a binary file or a Pillow image"):
        scorer.score([7])  # type: ignore[list-item]


def test_wrong_arguments_are_refused(tiny_weights: Path, tmp_path: Path) -> None:
    for threshold in (-0.1, 1.1, float("nan")):
        with pytest.raises(ConfigError, match="threshold must be 0 to 1"):
            Scorer(tiny_weights, threshold=threshold)
    with pytest.raises(ConfigError, match="no preprocess policy 'crop224'"):
        Scorer(tiny_weights, "crop224")
    with pytest.raises(CheckpointError, match=r"/nowhere; give a path, an s3:// URI, 'bundled' or 'published'"):
        Scorer(tmp_path / "nowhere")
    (tmp_path / "text").write_text("not weights")
    with pytest.raises(CheckpointError, match="expected a file written by lfm-scan"):
        Scorer(tmp_path / "text")
