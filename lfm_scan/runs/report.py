"""`run.json` and its like: what became of the images, where the time went, and what it cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from lfm_scan.options import Prices
from lfm_scan.runs.error_histogram import ErrorHistogram
from lfm_scan.runs.heartbeat import Beat, Phase
from lfm_scan.runs.summary import Summary
from lfm_scan.runs.usage import Usage

_HOUR_S: Final = 3600
_GB: Final = 10**9


def run_report(
    *,
    run_id: str,
    run_dir: str,
    state: Phase,
    summary: Summary,
    errors: ErrorHistogram,
    starts: Sequence[Beat],
    prices: Prices,
    versions: Mapping[str, str],
    error: str | None = None,
) -> dict[str, Any]:
    """Return what there is to say of a run, or of one start of it, as JSON values.

    Args:
        run_id: Of the run.
        run_dir: Where it lives.
        state: Finished, stopped or failed.
        summary: Counts over the rows.
        errors: Of the rows without a score.
        starts: What is known of the drivers that worked on it: all resources are sums over these.
        prices: What the user pays.
        versions: Of the program and what it runs on, by name.
        error: Why it failed.
    """
    usage = sum((each.usage for each in starts), Usage())
    phase_s: Counter[str] = Counter()
    for each in starts:
        phase_s.update(each.phase_s)
    wall_s = sum(each.elapsed_s for each in starts)
    num_rows = sum(each.num_rows for each in starts)
    held_core_s, held_gpu_s = sum(each.held_core_s for each in starts), sum(each.held_gpu_s for each in starts)
    return {
        "run_id": run_id,
        "run_dir": run_dir,
        "state": str(state),
        "error": error,
        "written_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "summary": {**summary.to_json(), "num_scored": summary.num_scored, "num_failed": summary.num_failed},
        "errors": errors.to_json(),
        "num_rows_known": num_rows,
        "wall_s": round(wall_s, 3),
        "rows_per_s": round(num_rows / wall_s, 3) if wall_s > 0 else None,
        "phase_s": {phase: round(seconds, 3) for phase, seconds in phase_s.items()},
        "held_core_s": round(held_core_s, 3),
        "held_gpu_s": round(held_gpu_s, 3),
        **usage.to_json(),
        "cost": cost_of(prices, usage, held_core_s, held_gpu_s),
        "starts": [_describe(each) for each in starts],
        "versions": dict(versions),
    }


def cost_of(prices: Prices, usage: Usage, held_core_s: float, held_gpu_s: float) -> dict[str, Any]:
    """Return what was used at the user's prices, as `lfm-scan estimate` prices it before.

    Args:
        prices: What the user pays; what has no price is named as missing.
        usage: Requests and bytes.
        held_core_s: Seconds of cores that the cluster had, used or not.
        held_gpu_s: The same of GPUs.
    """
    asked = usage.requests
    used = [
        ("cores", prices.price_per_core_hour, held_core_s / _HOUR_S),
        ("gpus", prices.price_per_gpu_hour, held_gpu_s / _HOUR_S),
        ("gets", prices.price_per_1000_gets, (asked.get("GET", 0) + asked.get("HEAD", 0)) / 1000),
        ("puts", prices.price_per_1000_puts, (asked.get("PUT", 0) + asked.get("LIST", 0)) / 1000),
        ("bytes", prices.price_per_gb, usage.fetched_bytes / _GB),
    ]
    parts = {name: round(price * amount, 6) for name, price, amount in used if price is not None}
    return {
        "parts": parts,
        "total": round(sum(parts.values()), 6) if parts else None,
        "missing": [name for name, price, amount in used if price is None and amount],
    }


def _describe(start: Beat) -> dict[str, Any]:
    """Return what a driver did; of one that was killed, what it said last."""
    return {
        "driver_id": start.driver_id,
        "host": start.host,
        "lfm_scan_version": start.lfm_scan_version,
        "started_at": start.started_at.isoformat(timespec="seconds"),
        "ended_at": start.beat_at.isoformat(timespec="seconds"),
        "phase": str(start.phase),
        "is_complete": start.phase.is_over,
        "num_rows": start.num_rows,
        "error": start.error,
    }
