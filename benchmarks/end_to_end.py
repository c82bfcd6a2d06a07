"""The same JPEG files from disk to scores: a plain loop, Ray's documented way, Daft, and lfm-scan.

    python -m benchmarks.end_to_end [--images 2000] [--rounds 3] [FOLDER ...]

loop   what a user writes first: Pillow, torch in batches of 32, one CSV; torch uses all cores.
ray    as Ray's documentation has it: read_images -> map_batches with the same model -> write_parquet.
daft   Daft with the same model in a class UDF; left out if Daft is not installed.
bare   lfm-scan's own work in one process a core, without Ray: what the pipeline could reach.
scan   lfm-scan scan, as users run it.

Sides run by turns, each in processes of its own, and medians count. "whole" is the wall time of the command, start-up
included; "steady" is the rate from the first results to the last, which is what large scans run at. The sides must
agree on scores, which is checked; Daft, which resizes in its own way, is only compared. FOLDER defaults to the examples
and, if it is there, ../shared/data/dev; files are repeated with a comment of their own each, as equal bytes are scored
only once.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.images import FOLDERS, write_jpegs
from benchmarks.report import RESULTS, machine, versions, write
from benchmarks.steady import cumulated, rate, scan_steadily

_ROOT: Final = Path(__file__).resolve().parents[1]
_SIDES: Final = ("loop", "ray", "daft", "bare", "scan")
_POLICY: Final = "resize256"
_BATCH: Final = 32
_AGREE: Final = 1e-2
_MEAN: Final = np.array([0.485, 0.456, 0.406], dtype=np.float32)
_STD: Final = np.array([0.229, 0.224, 0.225], dtype=np.float32)
_PACKAGES: Final = ("lfm-scan", "torch", "ray", "pillow", "numpy", "pyarrow", "openvino", "daft")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path, default=FOLDERS)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sides", nargs="+", choices=_SIDES, default=list(_SIDES))
    parser.add_argument("--smoke", action="store_true", help="a few images, one round: does it still run?")
    parser.add_argument("--out", type=Path, default=RESULTS / "end_to_end.json")
    parser.add_argument("--one", nargs=2, metavar=("SIDE", "OUTPUT"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        side, output = options.one
        print(json.dumps(_RUN[side](options.folders[0], Path(output))))
        return
    num_images, rounds = (12, 1) if options.smoke else (options.images, options.rounds)
    sides = [side for side in options.sides if side != "daft" or "daft" in versions(_PACKAGES)]
    with tempfile.TemporaryDirectory() as scratch:
        images = Path(scratch) / "images"
        write_jpegs(images, options.folders, num_images)
        runs: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
        for number in range(rounds):
            for side in sides[number % len(sides) :] + sides[: number % len(sides)]:
                output = Path(scratch) / f"{side}-{number}"
                runs[side].append(_measured(side, images, output, num_images))
                print(f"round {number + 1}: {side:5} {runs[side][-1]['whole_s']:7.1f} s", flush=True)
        differences = _differences(Path(scratch), sides)
    report = {
        "machine": machine(),
        "versions": versions(_PACKAGES),
        "configuration": {"images": num_images, "rounds": rounds, "policy": _POLICY, "batch": _BATCH},
        "sides": {side: _summary(num_images, runs[side], runs[sides[0]]) for side in sides},
        "largest_score_difference_to_first": differences,
    }
    _print(report)
    write(options.out, report)
    if max(difference for side, difference in differences.items() if side != "daft") > _AGREE:
        raise SystemExit(f"the sides do not agree: {differences}")


# --- the sides; each writes name and logit as `scores.csv` or Parquet, and returns its steady rate ---


def _loop(images: Path, output: Path) -> dict[str, float]:
    import torch  # noqa: PLC0415 - a side pays for its own imports

    model = _plain_model()
    paths = sorted(images.iterdir())
    marks: list[tuple[int, float]] = []
    with output.open("w", newline="") as file, torch.inference_mode():
        writer = csv.writer(file)
        writer.writerow(("name", "logit"))
        for start in range(0, len(paths), _BATCH):
            batch = paths[start : start + _BATCH]
            logits = model(torch.from_numpy(np.stack([_pixels(path) for path in batch])))
            writer.writerows((path.name, float(logit)) for path, logit in zip(batch, logits, strict=True))
            marks.append((start + len(batch), time.monotonic()))
    return {"steady": rate(marks)}


def _ray(images: Path, output: Path) -> dict[str, float]:
    import ray  # noqa: PLC0415

    class Classify:
        def __init__(self) -> None:
            import torch  # noqa: PLC0415

            torch.set_num_threads(1)
            self._model = _plain_model()

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            import torch  # noqa: PLC0415

            pixels = (batch["image"].astype(np.float32) / 255 - _MEAN) / _STD
            with torch.inference_mode():
                logits = self._model(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()))
            names = [os.path.basename(path) for path in batch["path"]]
            return {"name": names, "logit": logits.numpy(), "at": [time.time()] * len(names)}

    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    cores = int(ray.cluster_resources()["CPU"])  # type: ignore[no-untyped-call]
    dataset = ray.data.read_images(str(images), size=(256, 256), mode="RGB", include_paths=True)
    pool = ray.data.ActorPoolStrategy(size=cores)
    # Half a CPU each: with actors that claim all, Ray's readers would wait for ever.
    dataset = dataset.map_batches(Classify, batch_size=_BATCH, compute=pool, num_cpus=0.5)
    dataset.write_parquet(str(output))
    return {"steady": _rate_of_column(output)}


def _daft(images: Path, output: Path) -> dict[str, float]:
    import daft  # noqa: PLC0415

    @daft.udf(
        return_dtype=daft.DataType.struct({"logit": daft.DataType.float32(), "at": daft.DataType.float64()}),
        batch_size=_BATCH,
    )
    class Classify:
        def __init__(self) -> None:
            self._model = _plain_model()

        def __call__(self, image: Any) -> list[dict[str, float]]:  # noqa: ANN401 - a Daft series
            import torch  # noqa: PLC0415

            pixels = np.stack([np.asarray(each, dtype=np.float32) for each in image.to_pylist()])
            normalised = ((pixels / 255 - _MEAN) / _STD).transpose(0, 3, 1, 2)
            with torch.inference_mode():
                logits = self._model(torch.from_numpy(normalised.copy()))
            now = time.time()
            return [{"logit": float(logit), "at": now} for logit in logits]

    frame = daft.from_glob_path(f"{images}/*")
    image = daft.functions.decode_image(daft.functions.download(frame["path"]), mode="RGB")
    classify: Any = Classify  # the decorator's type is the class's, which is not what it makes of it
    frame = frame.select(
        frame["path"].alias("name"), classify(daft.functions.resize(image, w=256, h=256)).alias("result")
    )
    frame.write_parquet(str(output))
    return {"steady": _rate_of_column(output)}


def _bare(images: Path, output: Path) -> dict[str, float]:
    from lfm_scan.runs.run import ensure_plan, open_run, todo  # noqa: PLC0415

    cores = len(os.sched_getaffinity(0))
    run = open_run(_scan_config(images, output))
    plan = ensure_plan(run, cores)
    context = multiprocessing.get_context("spawn")
    shards: Any = context.Queue()
    marks: Any = context.Queue()
    for shard in [*todo(run, plan), *[None] * cores]:
        shards.put(shard)
    workers = [context.Process(target=_work_bare, args=(images, output, shards, marks)) for _ in range(cores)]
    for worker in workers:
        worker.start()
    done = [marks.get() for _ in range(plan.num_shards)]
    for worker in workers:
        worker.join()
    return {"steady": rate(cumulated(done))}


def _work_bare(images: Path, output: Path, shards: Any, marks: Any) -> None:  # noqa: ANN401 - queues
    """One bare process: takes shard after shard."""
    from lfm_scan.runs.plan import read_shard  # noqa: PLC0415
    from lfm_scan.runs.run import ensure_plan, open_run  # noqa: PLC0415
    from lfm_scan.runs.shard import commit_shard, score_shard  # noqa: PLC0415
    from lfm_scan.scoring.backend import open_backend  # noqa: PLC0415
    from lfm_scan.scoring.isolated import IsolatedDecoder  # noqa: PLC0415

    run = open_run(_scan_config(images, output))
    plan = ensure_plan(run, 1)
    scorer = open_backend(run.checkpoint, "cpu", num_threads=1)
    with IsolatedDecoder(_POLICY, run.job.limits) as decoder:
        while (shard := shards.get()) is not None:
            planned = read_shard(run.directory, plan, shard)
            receipt = commit_shard(run.job, score_shard(run.job, shard, planned, decoder, scorer))
            marks.put((receipt.summary.num_rows, time.monotonic()))


def _scan(images: Path, output: Path) -> dict[str, float]:
    return {"steady": scan_steadily(_scan_config(images, output))}


_RUN: Final = {"loop": _loop, "ray": _ray, "daft": _daft, "bare": _bare, "scan": _scan}


def _scan_config(images: Path, output: Path) -> Any:  # noqa: ANN401 - imported late
    from lfm_scan.config import ScanConfig  # noqa: PLC0415

    return ScanConfig((str(images),), output=str(output), preprocess=_POLICY)


def _plain_model() -> Any:  # noqa: ANN401 - imported late
    """Return the network as it was published: fp32, BatchNorm of its own, the layout torch has by default."""
    from lfm_scan.scoring.weights import read_weights  # noqa: PLC0415

    return read_weights("bundled")[1].model.eval()


def _pixels(path: Path) -> np.ndarray:
    from PIL import Image  # noqa: PLC0415

    image = Image.open(path).convert("RGB").resize((256, 256), Image.Resampling.BILINEAR)
    pixels = (np.asarray(image, dtype=np.float32) / 255 - _MEAN) / _STD
    return pixels.transpose(2, 0, 1)


# --- measuring ---


def _measured(side: str, images: Path, output: Path, num_images: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.end_to_end", str(images), "--one", side, str(output)]
    began = time.monotonic()
    done = subprocess.run(command, cwd=_ROOT, stdout=subprocess.PIPE, check=True, text=True)  # noqa: S603
    whole_s = time.monotonic() - began
    scores = _scores(output)
    if len(scores) != num_images:
        raise SystemExit(f"{side} wrote {len(scores)} scores of {num_images} images")
    return {"whole_s": whole_s, **json.loads(done.stdout.splitlines()[-1])}


def _rate_of_column(output: Path) -> float:
    """Return the rate from the moments at which rows were scored."""
    import pandas as pd  # noqa: PLC0415

    frame = pd.read_parquet(output)
    moments = [row["at"] for row in frame["result"]] if "result" in frame else frame["at"].tolist()
    rows_at = sorted((moment, moments.count(moment)) for moment in set(moments))
    return rate(cumulated([(rows, moment) for moment, rows in rows_at]))


def _scores(output: Path) -> dict[str, float]:
    """Return the logit of each file by its name."""
    import pandas as pd  # noqa: PLC0415

    if output.is_file():
        frame = pd.read_csv(output)
    elif (output / "results").is_dir():
        frame = pd.read_parquet(output / "results", columns=["uri", "logit"]).rename(columns={"uri": "name"})
    else:
        frame = pd.read_parquet(output) if (output).is_dir() and not (output / "parts").is_dir() else _parts(output)
        if "result" in frame:
            frame["logit"] = [row["logit"] for row in frame["result"]]
    return {os.path.basename(name): float(logit) for name, logit in zip(frame["name"], frame["logit"], strict=True)}


def _parts(output: Path) -> Any:  # noqa: ANN401 - a data frame
    import pandas as pd  # noqa: PLC0415

    frames = [pd.read_parquet(path, columns=["uri", "logit"]) for path in sorted((output / "parts").iterdir())]
    return pd.concat(frames).rename(columns={"uri": "name"})


def _differences(scratch: Path, sides: Sequence[str]) -> dict[str, float]:
    """Return each side's largest difference in score to the first's. Ray and Daft resize in their own way."""
    first = _scores(scratch / f"{sides[0]}-0")
    found = {}
    for side in sides:
        mine = _scores(scratch / f"{side}-0")
        found[side] = max(abs(_sigmoid(mine[name]) - _sigmoid(logit)) for name, logit in first.items())
    return found


def _sigmoid(logit: float) -> float:
    return float(1 / (1 + np.exp(-logit)))


def _summary(num_images: int, runs: Sequence[dict[str, float]], first: Sequence[dict[str, float]]) -> dict[str, Any]:
    whole = statistics.median(num_images / run["whole_s"] for run in runs)
    ratios = [other["whole_s"] / run["whole_s"] for run, other in zip(runs, first, strict=True)]
    return {
        "whole_images_per_s": round(whole, 2),
        "steady_images_per_s": round(statistics.median(run["steady"] for run in runs), 2),
        "times_first": round(statistics.median(ratios), 2),
        "runs": [{key: round(value, 2) for key, value in run.items()} for run in runs],
    }


def _print(report: dict[str, Any]) -> None:
    rows: Iterator[tuple[str, dict[str, Any]]] = iter(report["sides"].items())
    print(f"\n{'side':6} {'whole, images/s':>16} {'steady, images/s':>17} {'times first':>12}")
    for side, row in rows:
        print(
            f"{side:6} {row['whole_images_per_s']:16.1f} {row['steady_images_per_s']:17.1f} {row['times_first']:12.2f}"
        )


if __name__ == "__main__":
    main()
