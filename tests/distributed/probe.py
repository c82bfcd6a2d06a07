"""A driver whose stages write down where they run, for clusters whose nodes are processes of this machine.

    python -m tests.distributed.probe NOTES SETTINGS scan SOURCE --output ...

Does what `lfm-scan scan` does. What is defined here reaches Ray's workers by value, because it is the main module.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
from ray.data._internal.cluster_autoscaler import get_or_create_autoscaling_coordinator

from lfm_scan.cli.main import main
from lfm_scan.distributed import pipeline, resources, scan
from lfm_scan.distributed.resources import Claim, Node, PipelineShape
from lfm_scan.distributed.tasks import ToDo, commit
from lfm_scan.options import ComputeConfig
from lfm_scan.runs.shard import ShardJob
from tests.waiting import wait_until

_GO_ON = "go-on"


@dataclass(frozen=True)
class Settings:
    """What the driver does besides.

    Attributes:
        gpus_score: Lay the pipeline out as where GPUs score; the network runs on a CPU all the same.
        actors: All shards but the first few are held until so many actors have one.
        last_shard: Is held until there is one actor less.
        halfway: This shard and those after it are held until `Notes.go_on`.
    """

    gpus_score: bool = False
    actors: int = 1
    last_shard: int = -1
    halfway: int = sys.maxsize


@dataclass(frozen=True)
class Note:
    """That something ran.

    Attributes:
        what: A stage, or the start of one of its actors.
        node: Its id.
        pid: Of the process.
    """

    what: str
    node: str
    pid: int


class Notes:
    """What the processes of a scan wrote down.

    Args:
        folder: Where; each process has a file of its own.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def add(self, what: str) -> None:
        """Write down that this process does something."""
        note = Note(what, ray.get_runtime_context().get_node_id(), os.getpid())
        with (self._folder / f"{note.pid}.jsonl").open("a") as file:
            file.write(json.dumps(asdict(note)) + "\n")

    def go_on(self) -> None:
        """Let those go on that are held halfway."""
        (self._folder / _GO_ON).touch()

    @property
    def may_go_on(self) -> bool:
        """Whether they may."""
        return (self._folder / _GO_ON).exists()

    def __iter__(self) -> Iterator[Note]:
        for path in self._folder.glob("*.jsonl"):
            for line in path.read_text().splitlines(keepends=True):
                if line.endswith("\n"):  # else it is being written
                    yield Note(**json.loads(line))

    def nodes_of(self, what: str) -> set[str]:
        """Return the ids of the nodes on which something ran."""
        return {note.node for note in self if note.what == what}

    def pids_of(self, what: str) -> set[int]:
        """Return the processes that did something."""
        return {note.pid for note in self if note.what == what}

    def pool_sizes(self, what: str, actors: Mapping[str, Mapping[str, Any]]) -> list[int]:
        """Return how many of them were actors at a time, one number after the other, by Ray's table of actors."""
        ours = [each for each in actors.values() if each["Pid"] in self.pids_of(what)]
        changes = [(each["StartTime"], 1) for each in ours] + [(each["EndTime"], -1) for each in ours]
        return list(accumulate(change for at, change in sorted(changes) if at))

    def num_alive(self, what: str, actors: Mapping[str, Mapping[str, Any]]) -> int:
        """Return how many of them Ray's table of actors calls alive.

        An actor that was given up is not, though its process may outlive the start of the next one's.
        """
        return len({each["Pid"] for each in actors.values() if each["State"] == "ALIVE"} & self.pids_of(what))


def _run(notes: Notes, settings: Settings, arguments: Sequence[str]) -> int:
    def hold(shard: int, what: str) -> None:
        waits_for: list[Callable[[], bool]] = []
        if shard >= 4:
            waits_for.append(lambda: len(notes.pids_of(what)) >= settings.actors)
        if shard >= settings.halfway:
            waits_for.append(lambda: notes.may_go_on)
        if shard == settings.last_shard:
            waits_for.append(lambda: notes.num_alive(what, ray._private.state.actors()) < settings.actors)
        for is_so in waits_for:
            wait_until(is_so, every_s=0.1)
            assert is_so(), shard

    class NotedScan(pipeline.ScanShard):
        def __call__(self, item: pa.Table) -> pa.Table:
            notes.add("scan")
            hold(item.column("item")[0].as_py(), "scan")
            return super().__call__(item)

    class NotedScore(pipeline.ScoreShard):
        def __init__(self, work: pipeline.Work) -> None:
            super().__init__(work)
            notes.add("score actor")

        def __call__(self, row: pa.Table) -> pa.Table:
            notes.add("score")
            hold(pipeline.from_row(row).column("shard")[0].as_py(), "score")
            return super().__call__(row)

    prepare_row = pipeline.prepare_row

    def noted_prepare(item: pa.Table, to_do: ToDo) -> pa.Table:
        notes.add("prepare")
        return prepare_row(item, to_do)

    def noted_commit(results: pa.Table, job: ShardJob) -> pa.Table:
        notes.add("commit")
        return commit(results, job)

    patched: Any = pipeline
    patched.ScanShard, patched.ScoreShard = NotedScan, NotedScore
    patched.prepare_row, patched.commit = noted_prepare, noted_commit
    patched_resources: Any = resources
    patched_resources._ROWS_WORTH_AN_ACTOR = {"cpu": 1}
    if settings.gpus_score:
        patched_scan: Any = scan
        patched_scan.shape_pipeline = _as_where_gpus_score
    threading.Thread(target=_look_for_nodes, daemon=True).start()
    return main(arguments)


def _as_where_gpus_score(compute: ComputeConfig, nodes: Sequence[Node], *, may_grow: bool) -> PipelineShape:
    return PipelineShape(
        is_fused=False,
        device="cpu",
        min_actors=compute.min_actors,
        start_actors=1,
        max_actors=compute.max_actors,
        actor=Claim(gpus=1),
        decode=Claim(cpus=1),
        num_workers=1,
    )


def _look_for_nodes() -> None:
    """Have Ray Data look for new nodes every second; by itself it does every 20 s, and tests have not the time."""
    while True:
        time.sleep(1)
        if ray.is_initialized():
            coordinator = get_or_create_autoscaling_coordinator()  # type: ignore[no-untyped-call]
            coordinator.get_reserved_resources.remote("", recompute=True)


if __name__ == "__main__":
    sys.exit(_run(Notes(Path(sys.argv[1])), Settings(**json.loads(sys.argv[2])), sys.argv[3:]))
