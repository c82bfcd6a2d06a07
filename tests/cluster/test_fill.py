from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.fill import FillError, fill, parse_values
from tests.cluster.filled import CLUSTER, VALUES


def test_values_take_the_places_of_their_names_and_shell_variables_stay() -> None:
    values = parse_values("# a comment\n\nREGION=eu-west-1\nINPUT_PREFIX = a b/ \n")

    assert (
        fill("in ${REGION}: $RAY_HEAD_IP ${INPUT_PREFIX}${lower}", values) == "in eu-west-1: $RAY_HEAD_IP a b/${lower}"
    )


def test_all_missing_values_are_named() -> None:
    with pytest.raises(FillError, match=r"^no value for A_B, C$"):
        fill("${C} ${A_B} ${C}", {"D": "d"})


@pytest.mark.parametrize("line", ["REGION", "region=x", "REGION=", 'REGION="x"', "REGION=x\\ny", "REGION={a: b}", "=x"])
def test_a_line_that_is_no_value_is_refused(line: str) -> None:
    with pytest.raises(FillError, match="line 2"):
        parse_values(f"A=b\n{line}")


def test_the_example_has_a_value_for_every_placeholder_and_no_other() -> None:
    names = {
        name
        for path in CLUSTER.rglob("*")
        if path.suffix in {".yaml", ".json"} and "grafana" not in path.parts
        for name in re.findall(r"\$\{(\w+)\}", path.read_text())
    }

    assert names == set(VALUES)


def test_the_command_prints_the_file_or_says_what_is_missing(tmp_path: Path) -> None:
    values, template = tmp_path / "values.env", tmp_path / "template.yaml"
    values.write_text("REGION=eu-west-1\n")
    template.write_text("region: ${REGION}\n")
    command = [sys.executable, str(CLUSTER / "fill.py"), str(values), str(template)]

    done = subprocess.run(command, capture_output=True, text=True, check=False)
    template.write_text("${ZONE}")
    failed = subprocess.run(command, capture_output=True, text=True, check=False)

    assert (done.returncode, done.stdout, done.stderr) == (0, "region: eu-west-1\n", "")
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr == f"error: {template} with {values}: no value for ZONE\n"
