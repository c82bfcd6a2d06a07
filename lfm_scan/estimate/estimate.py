"""From a survey and a measured sample to what a scan of all inputs will take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Final

import torch

from lfm_scan.errors import ConfigError, RunError
from lfm_scan.estimate.config import EstimateConfig
from lfm_scan.estimate.machine import usable_cores
from lfm_scan.estimate.measure import Measured, Sample, measure_sample
from lfm_scan.estimate.requests import RunRequests, requests_of_run
from lfm_scan.estimate.statistics import LEVEL, Interval, mean_of, share_of
from lfm_scan.estimate.survey import Survey, survey
from lfm_scan.imaging import get_policy
from lfm_scan.options import Prices
from lfm_scan.runs.summary import is_failure
from lfm_scan.scoring.weights import read_weights
from lfm_scan.status import Status, Unassessable
from lfm_scan.version import __version__

_HOUR_S: Final = 3600
_GB: Final = 10**9


class Listener:
    """Wants to know how an estimate goes. This one does nothing."""

    def listing(self, num_inputs: int) -> None:
        """So many inputs have been listed."""

    def measuring(self, num_done: int, num_sampled: int) -> None:
        """So many inputs of the sample have been fetched and decoded."""


@dataclass(frozen=True, kw_only=True)
class Shares:
    """What becomes of the inputs, each as a share of all.

    Attributes:
        by_status: By status, those that the sample has.
        unassessable: Scored, but the score means nothing, by reason.
        assessable: Scored, and the score means something.
        failing: Should have a score and have none.
    """

    by_status: dict[str, Interval]
    unassessable: dict[str, Interval]
    assessable: Interval
    failing: Interval


@dataclass(frozen=True, kw_only=True)
class Machines:
    """What the scan will run on.

    Attributes:
        cores: In all.
        gpus: In all; 0 where cores score.
        gpu_images_per_s: That one of them scores, or None if nobody knows.
        gpu_rate_is_measured: Whether that was measured here, and not given by the user.
    """

    cores: int
    gpus: int
    gpu_images_per_s: float | None
    gpu_rate_is_measured: bool


@dataclass(frozen=True, kw_only=True)
class Work:
    """What the scan has to do, and how long it takes.

    Attributes:
        fetch_ms: Milliseconds of a core an input, mean over the sample.
        decode_ms: The same for hashing, decoding and preprocessing.
        score_ms: The same for scoring; None where GPUs score.
        core_hours: Of work for cores; where they wait for GPUs or the store, they are there for longer.
        gpu_hours: Of work for GPUs; None without GPUs, or if their rate is not known.
        wall_s: From the first input to the last, without starting Ray; None if a GPU's rate is not known.
        feed_wall_s: Where GPUs score, what `wall_s` is if they are fast enough; else None.
        limited_by: "cores", "gpus" or "store"; of those whose rate is known.
        gpu_images_per_s_needed: What each GPU must score to keep up with the cores; None without GPUs.
    """

    fetch_ms: float
    decode_ms: float
    score_ms: float | None
    core_hours: Interval
    gpu_hours: Interval | None
    wall_s: Interval | None
    feed_wall_s: Interval | None
    limited_by: str
    gpu_images_per_s_needed: float | None


@dataclass(frozen=True, kw_only=True)
class Requests:
    """What the scan asks of stores.

    Attributes:
        listing: Of the sources by LIST, HEAD and GET, as they were counted while they were listed for the estimate.
        image_gets: GET requests for the images.
        num_by_ranges: Inputs whose requests are not predicted: rows of Parquet files, members of compressed archives.
        run: Of the run directory, where it lies in a store.
    """

    listing: dict[str, int]
    image_gets: int
    num_by_ranges: int
    run: RunRequests

    @property
    def num_gets(self) -> int:
        """GET and HEAD requests in all."""
        return self.listing.get("GET", 0) + self.listing.get("HEAD", 0) + self.image_gets + self.run.num_gets

    @property
    def num_puts(self) -> int:
        """PUT and LIST requests in all, which stores price alike."""
        return self.listing.get("LIST", 0) + self.run.num_lists + self.run.num_puts


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What the scan costs at the user's prices.

    Attributes:
        parts: By what is paid for: cores, gpus, gets, puts, bytes.
        total: Of the parts; None if there are none.
        missing: What is used and has no price, or whose price cannot be applied yet.
    """

    parts: dict[str, Interval]
    total: Interval | None
    missing: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a scan will take.

    Attributes:
        sources: As the user named them.
        num_inputs: Images, counted.
        num_sampled: Of them, fetched and decoded.
        seed: That chose them.
        size_bytes: Of all inputs: exact where the listing tells every size.
        num_unsized: Inputs whose size it does not tell.
        listing_s: Seconds that listing took, as it will for the scan.
        shares: What becomes of the inputs.
        machines: What the scan will run on.
        work: What it has to do.
        requests: What it asks of stores.
        cost: What it costs.
    """

    sources: tuple[str, ...]
    num_inputs: int
    num_sampled: int
    seed: int
    size_bytes: Interval
    num_unsized: int
    listing_s: float
    shares: Shares
    machines: Machines
    work: Work
    requests: Requests
    cost: Cost

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values; an interval is its value, low and high, at the level given."""
        return {
            "lfm_scan_version": __version__,
            "estimated_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "interval_level": LEVEL,
            **asdict(self),
        }


def estimate(config: EstimateConfig, listener: Listener | None = None) -> Estimate:
    """List the sources, measure a sample, and predict what a scan of all of it will take.

    Args:
        config: Sources, machines, prices and the scan's own settings.
        listener: Is told how it goes.

    Raises:
        ConfigError: If a setting is wrong.
        CheckpointError: If the weights cannot be used.
        RunError: If the sources hold no input.
        StorageError: If a source cannot be listed.
    """
    listener = listener or Listener()
    _, checkpoint = read_weights(config.weights, config.storage)
    policy = get_policy(config.preprocess or checkpoint.metadata.preprocess)
    cores, gpus = machines_of(config)
    found = survey(config, listener.listing)
    if not found.sample:
        raise RunError("nothing to scan: the sources hold no files, or the filters leave none")
    device = "cpu" if not gpus else "cuda" if torch.cuda.is_available() else None
    sample = measure_sample(
        found.sample,
        config,
        checkpoint,
        policy,
        device=device,
        on_progress=lambda num_done: listener.measuring(num_done, len(found.sample)),
    )
    return predict(config, found, sample, cores=cores, gpus=gpus)


def machines_of(config: EstimateConfig) -> tuple[int, int]:
    """Return how many cores and how many GPUs the scan will have; without GPUs, cores score.

    Raises:
        ConfigError: If the settings contradict each other.
    """
    cores = config.cores or usable_cores()
    device, gpus = config.compute.device, config.gpus
    if device == "cpu":
        if gpus:
            raise ConfigError(f"--device cpu and --gpus {gpus} contradict each other: give one")
        return cores, 0
    if gpus is None:
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cuda" and not gpus:
        raise ConfigError("--device cuda: this machine has no usable GPU; say with --gpus how many the scan will have")
    return cores, gpus


def predict(config: EstimateConfig, found: Survey, sample: Sample, *, cores: int, gpus: int) -> Estimate:
    """Return what a scan will take, by what was counted and what was measured.

    Args:
        config: The user's settings.
        found: All inputs.
        sample: Some of them, measured; scored on a core where there are no GPUs.
        cores: That the scan will have.
        gpus: That the scan will have; without any, cores score.
    """
    machines = _machines(config, sample, cores, gpus)
    size_bytes = _size_bytes(found, sample, config.seed)
    work = _work(found, sample, machines, config.seed)
    num_workers = max(machines.cores, machines.gpus)
    requests = Requests(
        listing=dict(found.requests),
        image_gets=found.num_gets,
        num_by_ranges=found.num_by_ranges,
        run=requests_of_run(found.num_inputs, num_workers, config.compute.shard_size),
    )
    fetch_bytes = size_bytes + Interval.exactly(found.fetch_bytes - found.size_bytes)
    return Estimate(
        sources=config.sources,
        num_inputs=found.num_inputs,
        num_sampled=len(sample.images),
        seed=config.seed,
        size_bytes=size_bytes,
        num_unsized=found.num_unsized,
        listing_s=found.seconds,
        shares=_shares(sample.images, found.num_inputs),
        machines=machines,
        work=work,
        requests=requests,
        cost=_cost(config.prices, machines, work, requests, fetch_bytes),
    )


def _machines(config: EstimateConfig, sample: Sample, cores: int, gpus: int) -> Machines:
    rate = config.gpu_images_per_s if gpus else None
    scored_s = [image.score_s for image in sample.images if image.score_s]
    is_measured = gpus > 0 and rate is None and sample.device == "cuda" and bool(scored_s)
    return Machines(
        cores=cores,
        gpus=gpus,
        gpu_images_per_s=len(scored_s) / sum(scored_s) if is_measured else rate,
        gpu_rate_is_measured=is_measured,
    )


def _size_bytes(found: Survey, sample: Sample, seed: int) -> Interval:
    """Return the bytes of all inputs: those that the listing tells, and the mean of the sample for the others."""
    known = Interval.exactly(found.size_bytes)
    if not found.num_unsized:
        return known
    sizes = [float(image.size_bytes or 0) for image in sample.images if not image.was_sized]
    if not sizes:
        return known + Interval(0.0, 0.0, None)
    return known + mean_of(sizes, found.num_unsized, seed).scaled(found.num_unsized)


def _shares(images: Sequence[Measured], num_inputs: int) -> Shares:
    def share(count: int) -> Interval:
        return share_of(count, len(images), num_inputs)

    statuses = Counter(image.status for image in images)
    reasons = Counter(image.unassessable for image in images)
    return Shares(
        by_status={str(status): share(statuses[status]) for status in Status if statuses[status]},
        unassessable={
            str(reason): share(reasons[reason])
            for reason in Unassessable
            if reasons[reason] and reason is not Unassessable.NOT_SCORED
        },
        assessable=share(reasons[None]),
        failing=share(sum(count for status, count in statuses.items() if is_failure(status))),
    )


def _work(found: Survey, sample: Sample, machines: Machines, seed: int) -> Work:
    images, num_inputs = sample.images, found.num_inputs
    on_gpus = machines.gpus > 0
    core_s = [sample.fetch_cpu_s + image.decode_s + (0.0 if on_gpus else image.score_s) for image in images]
    all_core_s = mean_of(core_s, num_inputs, seed).scaled(num_inputs)
    listing = Interval.exactly(found.seconds)
    # Every process that fetches is taken to be served as this one was.
    store_s = Interval.exactly(sample.fetch_s * num_inputs / machines.cores)
    cores_s = all_core_s.scaled(1 / machines.cores)
    feed_s = cores_s.at_least(store_s)
    limited_by = "store" if store_s.value > cores_s.value else "cores"
    gpu_s, wall_s, needed = None, None, None
    if not on_gpus:
        wall_s = feed_s
    else:
        scored = share_of(sum(image.status == Status.OK for image in images), len(images), num_inputs)
        num_scored = scored.scaled(num_inputs)
        needed = num_scored.value / max(feed_s.value, 1e-9) / machines.gpus
        if machines.gpu_images_per_s is not None:
            gpu_s = num_scored.scaled(1 / machines.gpu_images_per_s)
            gpus_s = gpu_s.scaled(1 / machines.gpus)
            wall_s = feed_s.at_least(gpus_s)
            limited_by = "gpus" if gpus_s.value > feed_s.value else limited_by
    return Work(
        fetch_ms=1000 * sample.fetch_cpu_s,
        decode_ms=1000 * sum(image.decode_s for image in images) / len(images),
        score_ms=None if on_gpus else 1000 * sum(image.score_s for image in images) / len(images),
        core_hours=(all_core_s + listing).scaled(1 / _HOUR_S),
        gpu_hours=None if gpu_s is None else gpu_s.scaled(1 / _HOUR_S),
        wall_s=None if wall_s is None else wall_s + listing,
        feed_wall_s=feed_s + listing if on_gpus else None,
        limited_by=limited_by,
        gpu_images_per_s_needed=needed,
    )


def _cost(prices: Prices, machines: Machines, work: Work, requests: Requests, fetch_bytes: Interval) -> Cost:
    hours = None if work.wall_s is None else work.wall_s.scaled(1 / _HOUR_S)
    used: list[tuple[str, float | None, Interval | None]] = [
        ("cores", prices.price_per_core_hour, None if hours is None else hours.scaled(machines.cores)),
        ("gets", prices.price_per_1000_gets, Interval.exactly(requests.num_gets / 1000)),
        ("puts", prices.price_per_1000_puts, Interval.exactly(requests.num_puts / 1000)),
        ("bytes", prices.price_per_gb, fetch_bytes.scaled(1 / _GB)),
    ]
    if machines.gpus:
        used.insert(1, ("gpus", prices.price_per_gpu_hour, None if hours is None else hours.scaled(machines.gpus)))
    parts = {name: amount.scaled(price) for name, price, amount in used if price is not None and amount is not None}
    return Cost(
        parts=parts,
        total=sum(parts.values(), Interval.exactly(0.0)) if parts else None,
        missing=tuple(name for name, *_ in used if name not in parts),
    )
