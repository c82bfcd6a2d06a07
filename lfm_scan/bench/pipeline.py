"""The whole pipeline: how long it takes to start, and how fast it is then."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ScanTimes:
    """When a scan had done how much.

    Attributes:
        elapsed_s: From its call to its return.
        marks: Seconds since its call, and images committed by then, in the order of time; one for each shard.
    """

    elapsed_s: float
    marks: tuple[tuple[float, int], ...]


@dataclass(frozen=True)
class PipelineTimes:
    """How fast the pipeline is.

    Attributes:
        group: Of the images it was measured with.
        num_images: It scanned.
        elapsed_s: From call to return.
        images_per_s: Once it runs; None if it ended before that could be told.
        start_up_s: What it takes besides: to start Ray, to plan, to load the network, to merge and to end.
        share_of_stages: Its rate beside what the stages alone allow on these cores; None where GPUs score.
    """

    group: str
    num_images: int
    elapsed_s: float
    images_per_s: float | None
    start_up_s: float | None
    share_of_stages: float | None


def pipeline_times(group: str, scan: ScanTimes, num_workers: int, stages_images_per_s: float | None) -> PipelineTimes:
    """Return start-up and steady rate of a scan.

    The rate is that after the first shard of every worker: they begin together, so their first shards come together.

    Args:
        group: Name of the images.
        scan: When it had done how much.
        num_workers: Processes that work on shards of their own.
        stages_images_per_s: What the stages alone allow, or None.
    """
    num_images = scan.marks[-1][1] if scan.marks else 0
    rate = start_up_s = share = None
    if len(scan.marks) > num_workers:
        (first_s, num_before), (last_s, _) = scan.marks[num_workers - 1], scan.marks[-1]
        if last_s > first_s:
            rate = (num_images - num_before) / (last_s - first_s)
            start_up_s = max(0.0, scan.elapsed_s - num_images / rate)
            share = None if stages_images_per_s is None else rate / stages_images_per_s
    return PipelineTimes(group, num_images, scan.elapsed_s, rate, start_up_s, share)
