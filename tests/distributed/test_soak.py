"""The long form of the tests of faulty stores and killed drivers: `make soak` prints what was done and what came."""

from __future__ import annotations

import random
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.distributed.target import make_target
from tests.faults import Fault, FaultProxy, Faults, Odds
from tests.servers import S3Server

_FAULTS = Faults(
    reads=Odds(status=0.10, broken_body=0.05, reset=0.03, stall=0.02, flip=0.01),
    writes=Odds(status=0.10, lost_reply=0.15, reset=0.05),
    stall_s=5,
)


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_drivers_killed_at_random_on_a_faulty_store(s3_server: S3Server, s3_bucket: str, tiny_weights: Path) -> None:
    target = make_target(s3_server, s3_bucket, tiny_weights, num_pictures=600, shard_size=8)
    expected = target.expected_logits()
    faults: Counter[Fault | None] = Counter()
    num_kills = lost = doubled = wrong = deletes = 0
    for seed in range(5):
        rng = random.Random(seed)
        output = f"runs/{seed}"
        with FaultProxy(s3_server.endpoint_url, seed, _FAULTS) as proxy:
            for _ in range(3):
                driver = target.start("--read-timeout", 2, endpoint_url=proxy.endpoint_url, output=output)
                target.wait_for_parts(output, driver, target.num_parts(output) + rng.randint(1, 15))
                time.sleep(rng.uniform(0, 1))
                num_kills += driver.poll() is None
                driver.kill()
                driver.communicate(timeout=60)
            target.run("--read-timeout", 2, output=output, endpoint_url=proxy.endpoint_url, timeout_s=900)
            faults += proxy.count()
            deletes += sum(record.method == "DELETE" for record in proxy.journal)
        frame = target.frame(output)
        logits = dict(zip(frame["uri"], frame["logit"], strict=True))
        lost += len(expected.keys() - logits.keys())
        doubled += len(frame) - len(logits)
        wrong += sum(not np.isclose(logits.get(uri, 0), logit, atol=1e-3) for uri, logit in expected.items())
    injected = {str(fault): count for fault, count in faults.items() if fault is not None}
    print(
        f"\n{faults.total():,} requests, faults injected: {injected}, {num_kills} drivers killed; "
        f"rows lost {lost}, doubled {doubled}, wrong scores {wrong}, deletes {deletes} of {5 * len(expected):,} rows"
    )

    assert (lost, doubled, wrong, deletes) == (0, 0, 0, 0)
    assert num_kills >= 10
    assert all(faults[fault] for fault in Fault)
