"""The switch for files without their end is thrown for one decode, and no other decode sees it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import ImageFile

from lfm_scan.errors import ImageError
from lfm_scan.imaging import ImageLimits, decode_bytes
from lfm_scan.imaging.leniency import Leniency
from lfm_scan.status import Status
from tests.awkward import encode, scene, without_end


def test_the_switch_is_put_back_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        with Leniency().lenient():
            during.append(ImageFile.LOAD_TRUNCATED_IMAGES)
            raise ValueError("failed")

    during: list[bool] = []
    for before in (False, True):
        monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", before)
        with pytest.raises(ValueError, match="failed"):
            fails()
        assert before == ImageFile.LOAD_TRUNCATED_IMAGES
    assert during == [True, True]


def test_a_lenient_decode_waits_for_the_strict_ones_and_they_for_it() -> None:
    leniency, order = Leniency(), []
    is_lenient, may_end = threading.Event(), threading.Event()

    def lenient() -> None:
        with leniency.lenient():
            order.append("lenient")
            is_lenient.set()
            may_end.wait(10)
            order.append("lenient ends")

    def strict() -> None:
        with leniency.strict():
            order.append("strict")

    with ThreadPoolExecutor(2) as pool:
        with leniency.strict(), leniency.strict():
            futures = [pool.submit(lenient)]
            assert not is_lenient.wait(0.2)
            order.append("first two end")
        assert is_lenient.wait(10)
        futures.append(pool.submit(strict))
        assert not futures[1].done()
        may_end.set()
        for future in futures:
            future.result(10)
    assert order == ["first two end", "lenient", "lenient ends", "strict"]


def test_threads_that_refuse_and_threads_that_score_do_not_disturb_each_other() -> None:
    cut = without_end(encode(scene(), "PNG"), 0.5)

    def refuses(_: int) -> bool:
        with pytest.raises(ImageError) as caught:
            decode_bytes(cut)
        return caught.value.status == Status.TRUNCATED

    def scores(_: int) -> bool:
        return decode_bytes(cut, ImageLimits(score_truncated=True)).truncated

    with ThreadPoolExecutor(4) as pool:
        outcomes = [pool.submit(work, number) for number in range(100) for work in (refuses, scores)]
        assert all(outcome.result(60) for outcome in outcomes)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
