from __future__ import annotations

import pyarrow as pa

from lfm_scan.errors import ImageError
from lfm_scan.scoring.prepare import Prepared
from lfm_scan.status import Status


def test_what_a_decoder_quotes_from_a_file_can_always_be_stored() -> None:
    failed = Prepared.failed(ImageError(Status.CORRUPT, "bad chunk '\udcff'"))

    assert pa.array([failed.error], pa.string()).to_pylist() == ["bad chunk '\\udcff'"]
