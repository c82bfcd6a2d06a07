from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from lfm_scan.domain import Domain
from lfm_scan.imaging import ImageLimits, get_policy
from lfm_scan.options import InputConfig, StorageConfig
from lfm_scan.runs.reuse import SCORE_COLUMNS, KnownScores, index_scores
from lfm_scan.runs.rundir import RunDirectory
from lfm_scan.runs.shard import ShardJob, commit_shard, finish_rows, pixels_of, prepare_shard
from lfm_scan.schema import RESULT_SCHEMA
from lfm_scan.scoring.isolated import EncodedImage
from lfm_scan.scoring.prepare import Prepared, prepare_bytes
from lfm_scan.sources.inputs import Input, input_schema, to_table
from lfm_scan.status import Status
from tests.images import encoded


class DecoderInProcess:
    """Counts what it is given."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def prepare_all(self, images: Iterable[EncodedImage]) -> Iterator[Prepared]:
        for image in images:
            self.names.append(image.name)
            prepared = prepare_bytes(image.data, get_policy("crop256"), ImageLimits())
            if image.out is not None and prepared.pixels is not None:
                image.out[:] = prepared.pixels
            yield prepared


@pytest.fixture
def job(tmp_path: Path) -> ShardJob:
    return ShardJob(
        run_id="run-1",
        directory=RunDirectory(str(tmp_path / "run"), StorageConfig()),
        preprocess="crop256",
        limits=ImageLimits(),
        inputs=InputConfig(),
        storage=StorageConfig(),
        fetch_threads=2,
        threshold=0.5,
        flag_unassessable=False,
        model_id="m",
        weights_sha256="0",
        domain=Domain(lossy=False, resampled=False),
    )


def _planned(folder: Path, contents: Sequence[bytes | None], **carried: list[object]) -> pa.Table:
    """Write files, leaving out those without bytes, and return the plan of them all."""
    inputs = []
    for index, data in enumerate(contents):
        path = folder / f"{index:02}"
        if data is not None:
            path.write_bytes(data)
        values = {name: column[index] for name, column in carried.items()}
        inputs.append(Input(uri=str(path), size_bytes=None if data is None else len(data), carried=values))
    types = {name: pa.array(column).type for name, column in carried.items()}
    return to_table(inputs, input_schema(types))


def test_each_row_keeps_its_own_pixels_and_logit(job: ShardJob, tmp_path: Path) -> None:
    files = [encoded(seed=0), b"text", encoded(seed=1), None, encoded("JPEG", seed=2)]

    prepared = prepare_shard(job, 3, _planned(tmp_path, files), DecoderInProcess())
    pixels = pixels_of(prepared)
    results = finish_rows(job, prepared, [1.0, 2.0, 3.0]).to_pylist()

    for index, position in enumerate((0, 2, 4)):
        expected = prepare_bytes(files[position] or b"", get_policy("crop256"), ImageLimits()).pixels
        assert expected is not None
        assert np.array_equal(pixels[index], expected)
    assert [row["logit"] for row in results] == [1.0, None, 2.0, None, 3.0]
    assert [row["status"] for row in results] == ["ok", "unsupported", "ok", "missing", "ok"]
    assert [row["uri"] for row in results] == [f"{tmp_path}/{index:02}" for index in range(5)]
    assert {row["shard"] for row in results} == {3}


def test_identical_bytes_are_decoded_and_scored_once(job: ShardJob, tmp_path: Path) -> None:
    good, bad = encoded(seed=0), b"\x89PNG\r\n\x1a\nbroken"
    decoder = DecoderInProcess()

    prepared = prepare_shard(job, 0, _planned(tmp_path, [good, bad, good, encoded(seed=1), bad, good]), decoder)

    assert decoder.names == [f"{tmp_path}/{index:02}" for index in (0, 1, 3)]
    assert len(pixels_of(prepared)) == 2
    results = finish_rows(job, prepared, [0.25, 0.75]).to_pylist()
    assert [row["logit"] for row in results] == [0.25, None, 0.25, 0.75, None, 0.25]
    assert [row["width"] for row in results] == [260, None, 260, 260, None, 260]
    assert results[1]["error"] == results[4]["error"]


def test_known_bytes_are_not_decoded(job: ShardJob, tmp_path: Path) -> None:
    planned = _planned(tmp_path, [encoded(seed=index) for index in range(3)])
    fresh = finish_rows(job, prepare_shard(job, 0, planned, DecoderInProcess()), [1.0, 2.0, 3.0])
    known = KnownScores(index_scores(fresh.select(SCORE_COLUMNS).slice(0, 2)))
    decoder = DecoderInProcess()

    prepared = prepare_shard(job, 0, planned, decoder, known=known)
    again = finish_rows(job, prepared, [3.0])

    assert decoder.names == [f"{tmp_path}/02"]
    assert again.drop_columns("scored_at").to_pylist() == fresh.drop_columns("scored_at").to_pylist()


def test_carried_columns_may_have_any_name(job: ShardJob, tmp_path: Path) -> None:
    carried: dict[str, list[object]] = {"pixels": ["a", None], "same_as": [1, 2], "carried:x": [0.5, 1.5]}

    prepared = prepare_shard(job, 0, _planned(tmp_path, [encoded(), b""], **carried), DecoderInProcess())
    results = finish_rows(job, prepared, [1.0])

    assert results.select(list(carried)).to_pydict() == carried
    assert results.schema.names == [*RESULT_SCHEMA.names, *carried]


def test_a_part_that_is_there_already_counts_as_it_is(job: ShardJob, tmp_path: Path) -> None:
    prepared = prepare_shard(job, 7, _planned(tmp_path, [encoded(), None]), DecoderInProcess())

    first = commit_shard(job, finish_rows(job, prepared, [1.0]))
    second = commit_shard(job, finish_rows(job, prepared, [-1.0]))

    assert (first.created, second.created) == (True, False)
    assert first.summary == second.summary
    assert second.summary.by_status == {Status.OK: 1, Status.MISSING: 1}
    assert [failure.uri for failure in first.failures] == [f"{tmp_path}/01"]
