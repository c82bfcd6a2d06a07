from __future__ import annotations

import re
from pathlib import Path

import pytest

from lfm_scan.schema import RESULT_SCHEMA
from lfm_scan.status import LossyEvidence, Status, Unassessable
from tests.scanning import REPOSITORY

_LINK = re.compile(r"(?<!\!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
_PAGES = sorted(
    page for page in REPOSITORY.rglob("*.md") if not {".venv", "node_modules"} & set(page.relative_to(REPOSITORY).parts)
)


@pytest.mark.parametrize("page", _PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_every_local_link_leads_somewhere(page: Path) -> None:
    for match in _LINK.finditer(page.read_text()):
        target = match.group(1) or match.group(2)
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        destination = page if not name else (page.parent / name)
        assert destination.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in _anchors(destination), f"{page.name}: {target}"


def test_results_page_explains_every_column_and_value() -> None:
    page = (REPOSITORY / "docs" / "results.md").read_text()

    for name in [*RESULT_SCHEMA.names, *Status, *Unassessable, *LossyEvidence]:
        assert f"`{name}`" in page, name


def test_ci_runs_the_readmes_test_command() -> None:
    command = next(line for line in (REPOSITORY / "README.md").read_text().splitlines() if " -m pytest" in line)

    assert command in (REPOSITORY / ".ci" / "run").read_text()


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
