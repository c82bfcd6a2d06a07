"""Reading the results of a run with pandas."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from lfm_scan.errors import RunError
from lfm_scan.options import StorageConfig
from lfm_scan.runs import rundir
from lfm_scan.runs.rundir import RunDirectory
from lfm_scan.schema import RESULT_SCHEMA
from lfm_scan.storage import ObjectInfo, open_object

_READ_THREADS: Final = 8
_CHUNK_BYTES: Final = 2**20


def read_results(
    run_dir: str | os.PathLike[str],
    columns: Sequence[str] | None = None,
    filters: Any = None,  # noqa: ANN401 - what pyarrow takes: lists of tuples or an expression
    *,
    allow_incomplete: bool = False,
    storage: StorageConfig | None = None,
) -> pd.DataFrame:
    """Return the rows of a run, sorted by uri; one for every input.

    Args:
        run_dir: Run directory, local or in any store.
        columns: Which columns to read. Default: all, see `docs/results.md`.
        filters: Rows to read, as pyarrow takes them: [("score", ">", 0.9)].
        allow_incomplete: Read the rows of a run that has not finished.
        storage: How to reach the store.

    Raises:
        RunError: If it is not a run directory, or the run has not finished.
        StorageError: If it cannot be read.
    """
    storage = storage or StorageConfig()
    directory = RunDirectory.at(os.fspath(run_dir), storage)
    success = directory.read_json(rundir.SUCCESS)
    if success is not None:
        uris = [directory.path(entry["name"]) for entry in success["results"]]
    elif directory.read_json(rundir.CONFIG) is None:
        raise RunError(f"{run_dir}: not a run directory: it has no {rundir.CONFIG}")
    elif allow_incomplete:
        uris = [part.uri for _, part in sorted(directory.list_parts().items())]
    else:
        raise RunError(f"{run_dir}: the run has not finished; repeat its command, or pass allow_incomplete=True")
    if not uris and success is None:
        raise RunError(f"{run_dir}: the run has no rows yet")
    if not uris:
        empty: pd.DataFrame = RESULT_SCHEMA.empty_table().select(columns or RESULT_SCHEMA.names).to_pandas()
        return empty

    def read(uri: str) -> pa.Table:
        # Through our own stores: pandas' know nothing of roles, profiles and who pays.
        with open_object(directory.store, ObjectInfo(uri, None, None, None), chunk_bytes=_CHUNK_BYTES) as file:
            return pq.read_table(file, columns=columns and list(columns), filters=filters)

    with ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="results") as pool:
        frame: pd.DataFrame = pa.concat_tables(list(pool.map(read, uris))).to_pandas()
    return frame
