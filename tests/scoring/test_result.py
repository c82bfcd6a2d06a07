"""From a logit to a verdict."""

from __future__ import annotations

import dataclasses
import math

import pytest

from lfm_scan.imaging import ImageInfo, get_policy
from lfm_scan.model import Domain
from lfm_scan.schema import RESULT_SCHEMA
from lfm_scan.scoring.result import ImageResult, Verdict, judge, sigmoid
from lfm_scan.status import Unassessable

PNG_512 = ImageInfo(format="PNG", width=512, height=512, lossy=False)
PNG_256 = ImageInfo(format="PNG", width=256, height=256, lossy=False)
JPEG_512 = ImageInfo(format="JPEG", width=512, height=512, lossy=True)
JPEG_256 = ImageInfo(format="JPEG", width=256, height=256, lossy=True)
STRICT = Domain(lossy=False, resampled=False)


def verdict(
    logit: float | None,
    info: ImageInfo,
    policy: str = "crop256",
    domain: Domain = STRICT,
    *,
    threshold: float = 0.5,
    flag_unassessable: bool = False,
    truncated: bool = False,
) -> Verdict:
    return judge(
        logit,
        info,
        policy=get_policy(policy),
        domain=domain,
        threshold=threshold,
        flag_unassessable=flag_unassessable,
        truncated=truncated,
    )


@pytest.mark.parametrize(
    ("logit", "score"),
    [(0.0, 0.5), (math.log(3), 0.75), (-math.log(3), 0.25), (1000.0, 1.0), (-1000.0, 0.0), (1e308, 1.0), (-1e308, 0.0)],
)
def test_the_sigmoid_holds_at_both_ends(logit: float, score: float) -> None:
    assert sigmoid(logit) == pytest.approx(score, rel=1e-15, abs=0)


def test_the_sigmoid_stays_precise_far_below_zero() -> None:
    # Computed as 1 / (1 + e^-x) this would have overflowed; as 1 - sigmoid(-x) it would be 0.
    assert sigmoid(-700.0) == pytest.approx(math.exp(-700), rel=1e-12)
    assert sigmoid(-40.0) == pytest.approx(math.exp(-40), rel=1e-12)


@pytest.mark.parametrize("policy", ["crop256", "resize256"])
@pytest.mark.parametrize(("info"), [PNG_512, PNG_256, JPEG_512, JPEG_256])
@pytest.mark.parametrize("domain", [STRICT, Domain(lossy=True), Domain(resampled=True), Domain(True, True)])
def test_the_domain_decides_what_is_assessable(policy: str, info: ImageInfo, domain: Domain) -> None:
    lossy_outside = info.format == "JPEG" and not domain.lossy
    resampled_outside = policy == "resize256" and info.width == 512 and not domain.resampled
    found = verdict(3.0, info, policy, domain)
    assert found.assessable == found.flagged == (not lossy_outside and not resampled_outside)
    expected = Unassessable.LOSSY if lossy_outside else Unassessable.RESAMPLED if resampled_outside else None
    assert found.unassessable_reason == expected
    assert found.score == sigmoid(3.0)


def test_an_unassessable_image_keeps_its_score_and_is_flagged_only_on_request() -> None:
    assert verdict(3.0, JPEG_512) == Verdict(sigmoid(3.0), False, Unassessable.LOSSY, False)
    assert verdict(3.0, JPEG_512, flag_unassessable=True) == Verdict(sigmoid(3.0), False, Unassessable.LOSSY, True)
    assert not verdict(-3.0, JPEG_512, flag_unassessable=True).flagged


@pytest.mark.parametrize("info", [PNG_512, JPEG_512])
@pytest.mark.parametrize("domain", [STRICT, Domain(True, True)])
def test_a_part_of_an_image_is_never_assessable_and_that_comes_before_all_else(info: ImageInfo, domain: Domain) -> None:
    expected = Verdict(sigmoid(3.0), False, Unassessable.TRUNCATED, False)
    assert verdict(3.0, info, "resize256", domain, truncated=True) == expected
    assert verdict(3.0, info, domain=domain, truncated=True, flag_unassessable=True).flagged
    assert verdict(None, info, truncated=True).unassessable_reason == Unassessable.NOT_SCORED


@pytest.mark.parametrize(
    ("logit", "threshold", "flagged"),
    [
        (0.0, 0.5, False),
        (1e-6, 0.5, True),
        (-1e-6, 0.5, False),
        (3.0, 0.99, False),
        (5.0, 0.99, True),
        (50.0, 1.0, False),
    ],
)
def test_a_score_above_the_threshold_is_flagged(logit: float, threshold: float, flagged: bool) -> None:
    assert verdict(logit, PNG_512, threshold=threshold).flagged is flagged


@pytest.mark.parametrize("flag_unassessable", [False, True])
def test_without_a_logit_nothing_is_said(flag_unassessable: bool) -> None:
    expected = Verdict(None, False, Unassessable.NOT_SCORED, False)
    assert verdict(None, ImageInfo(), flag_unassessable=flag_unassessable) == expected


def test_what_the_file_does_not_tell_is_not_held_against_it() -> None:
    assert verdict(3.0, ImageInfo(width=512, height=512, lossy=None)).assessable


def test_every_attribute_of_a_result_is_a_column() -> None:
    assert {field.name for field in dataclasses.fields(ImageResult)} <= set(RESULT_SCHEMA.names)
