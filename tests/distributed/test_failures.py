from __future__ import annotations

import os
import re
from typing import Any

import pytest
import ray

from lfm_scan.distributed.failures import dying
from tests.waiting import wait_until


class _Mortal:
    def live(self) -> bool:
        return True

    def die(self) -> None:
        os._exit(1)


def _num_deaths() -> int:
    """Return how many are told; other tests share this Ray."""
    told = dying()
    if told is None:
        return 0
    found = re.fullmatch(
        r"something that has killed actors (\d+) times since the start, too little memory perhaps", told
    )
    assert found is not None, told
    return int(found[1])


@pytest.mark.usefixtures("local_ray")
def test_actors_that_die_again_and_again_are_counted() -> None:
    mortal: Any = ray.remote(num_cpus=0, max_restarts=-1)(_Mortal).remote()
    before = _num_deaths()

    def lives() -> bool:
        try:
            return bool(ray.get(mortal.live.remote()))
        except ray.exceptions.RayActorError:  # it is being started again
            return False

    for number in (1, 2):
        wait_until(lives)  # a call in between ends as one that killed it would
        with pytest.raises(ray.exceptions.RayActorError):
            ray.get(mortal.die.remote())
        wait_until(lambda: _num_deaths() >= before + number, every_s=0.05)  # noqa: B023 - called at once
        assert _num_deaths() == before + number
