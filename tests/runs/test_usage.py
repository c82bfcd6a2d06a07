from __future__ import annotations

import json

import pytest

from lfm_scan.runs.usage import Usage
from lfm_scan.storage.traffic import Traffic

_ONE = Usage(
    seconds={"fetch": 1.5, "score": 2.0},
    core_s=3.0,
    gpu_s=0.5,
    fetched_bytes=100,
    batches={1: 4, 8: 1},
    requests={"GET": 3},
    num_retries=1,
    peak_worker_bytes=10,
    peak_decoder_bytes=7,
    peak_gpu_bytes=0,
    node_s={"a": 3.5},
)
_OTHER = Usage(
    seconds={"fetch": 0.5, "commit": 1.0},
    core_s=1.0,
    fetched_bytes=11,
    batches={8: 2},
    requests={"GET": 1, "PUT": 1},
    num_throttles=2,
    peak_worker_bytes=8,
    peak_decoder_bytes=9,
    peak_gpu_bytes=5,
    node_s={"b": 1.5},
)


def test_amounts_add_up_and_peaks_are_the_highest() -> None:
    assert (
        Usage(
            seconds={"fetch": 2.0, "score": 2.0, "commit": 1.0},
            core_s=4.0,
            gpu_s=0.5,
            fetched_bytes=111,
            batches={1: 4, 8: 3},
            requests={"GET": 4, "PUT": 1},
            num_retries=1,
            num_throttles=2,
            peak_worker_bytes=10,
            peak_decoder_bytes=9,
            peak_gpu_bytes=5,
            node_s={"a": 3.5, "b": 1.5},
        )
        == _ONE + _OTHER
    )


def test_nothing_changes_a_sum() -> None:
    assert _ONE + Usage() == Usage() + _ONE == _ONE


def test_a_usage_survives_json() -> None:
    assert Usage.from_json(json.loads(json.dumps(_ONE.to_json()))) == _ONE


def test_the_busiest_nodes_are_named_and_the_others_summed_up() -> None:
    usage = Usage(node_s={"a": 1.0, "b": 3.0, "c": 2.0, "d": 0.5})

    assert usage.with_nodes(2).node_s == {"b": 3.0, "c": 2.0, "others": 1.5}
    assert usage.with_nodes(4) is usage


@pytest.mark.parametrize("value", [{}, {**_ONE.to_json(), "seconds": 3}, {**_ONE.to_json(), "core_s": "much"}])
def test_what_is_no_usage_is_refused(value: dict[str, object]) -> None:
    with pytest.raises((AttributeError, KeyError, TypeError, ValueError)):
        Usage.from_json(value)


def test_traffic_is_what_was_asked_between_two_moments() -> None:
    before, after = Traffic({"GET": 2, "PUT": 1}, 1, 0), Traffic({"GET": 5, "PUT": 1, "LIST": 1}, 4, 2)

    assert after - before == Traffic({"GET": 3, "LIST": 1}, 3, 2)
    assert Usage.of_traffic(after - before) == Usage(requests={"GET": 3, "LIST": 1}, num_retries=3, num_throttles=2)
