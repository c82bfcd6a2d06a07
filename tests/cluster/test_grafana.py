"""The dashboard for Grafana: a valid one, of queries that Prometheus understands, for the metrics that there are."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from typing import Any, Final

import promql_parser
import pytest
from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES
from ray.util.metrics import Histogram

from lfm_scan.distributed.metrics import Metrics
from tests.scanning import REPOSITORY

_PATH: Final = REPOSITORY / "cluster" / "grafana" / "lfm-scan.json"
_DASHBOARD: Final[dict[str, Any]] = json.loads(_PATH.read_text())
_COLUMNS: Final = 24
_OF_A_HISTOGRAM: Final = re.compile("_(bucket|count|sum)$")
_VARIABLES: Final = {"$session": ".*", "$__rate_interval": "1m", "$__range": "1h"}


def _panels() -> list[dict[str, Any]]:
    return [panel for panel in _DASHBOARD["panels"] if panel["type"] != "row"]


def _queries() -> list[str]:
    return [target["expr"] for panel in _panels() for target in panel["targets"]]


def _filled(query: str) -> str:
    for name, value in _VARIABLES.items():
        query = query.replace(name, value)
    return query


def _selectors(query: str) -> Iterator[promql_parser.VectorSelector]:
    """Yield what a query selects, wherever it stands in it."""
    waiting = [promql_parser.parse(_filled(query))]
    while waiting:
        node = waiting.pop()
        match node:
            case promql_parser.VectorSelector():
                yield node
            case promql_parser.MatrixSelector():
                waiting.append(node.vector_selector)
            case promql_parser.Call():
                waiting += node.args
            case promql_parser.BinaryExpr():
                waiting += [node.lhs, node.rhs]
            case promql_parser.AggregateExpr() | promql_parser.ParenExpr() | promql_parser.UnaryExpr():
                waiting.append(node.expr)


def _shown() -> set[str]:
    names = {selector.name for query in _queries() for selector in _selectors(query) if selector.name}
    return {_OF_A_HISTOGRAM.sub("", name) if name.startswith("ray_lfm_scan_") else name for name in names}


def _exported() -> set[str]:
    return {f"ray_{metric.info['name']}" for metric in vars(Metrics()).values()}


def test_every_metric_of_the_program_is_shown_and_every_one_shown_is_exported() -> None:
    ours = {name for name in _shown() if name.startswith("ray_lfm_scan_")}

    assert ours == _exported()


def test_the_page_explains_every_metric() -> None:
    page = (REPOSITORY / "docs" / "observability.md").read_text()

    for name in _exported():
        assert f"`{name}`" in page, name


def test_what_is_shown_of_nodes_is_what_ray_exports() -> None:
    of_ray = {name for name in _shown() if not name.startswith("ray_lfm_scan_")}

    assert of_ray
    assert of_ray <= {f"ray_{name}" for name in METRICS_GAUGES}


def test_histograms_are_asked_for_what_they_have() -> None:
    histograms = {f"ray_{metric.info['name']}" for metric in vars(Metrics()).values() if isinstance(metric, Histogram)}
    asked = {selector.name or "" for query in _queries() for selector in _selectors(query)}

    # Their sums are left alone: Ray only estimates those, by the middles of the buckets.
    assert {name for name in asked if _OF_A_HISTOGRAM.search(name) and name.startswith("ray_lfm_scan_")} <= {
        f"{name}{part}" for name in histograms for part in ("_bucket", "_count")
    }
    assert not asked & histograms


def test_the_parser_notices_a_broken_query() -> None:
    with pytest.raises(ValueError, match="unexpected right parenthesis"):
        promql_parser.parse(_filled(_queries()[0]) + ")")


@pytest.mark.parametrize("query", _queries())
def test_a_query_is_promql_of_one_ray_session(query: str) -> None:
    selectors = list(_selectors(query))

    assert selectors
    for selector in selectors:
        assert 'SessionName=~".*"' in selector.prettify()


def test_counters_are_shown_as_rates() -> None:
    for query in _queries():
        for found in re.finditer(r"ray_lfm_scan_\w+_(?:total|bucket|count)\b", query):
            assert query[: found.start()].endswith(("rate(", "increase(")), query


def test_every_variable_of_a_query_is_one_of_the_dashboard() -> None:
    own = {f"${variable['name']}" for variable in _DASHBOARD["templating"]["list"]}

    for query in _queries():
        assert set(re.findall(r"\$\w+", query)) <= own | {"$__rate_interval", "$__range"}


def test_it_has_the_fields_that_grafana_asks_for() -> None:
    assert (_DASHBOARD["id"], _DASHBOARD["uid"]) == (None, "lfm-scan")  # Grafana gives the id, links keep the uid
    assert _DASHBOARD["schemaVersion"] >= 36
    assert {"title", "time", "templating", "annotations", "panels", "refresh"} <= _DASHBOARD.keys()
    assert len({panel["id"] for panel in _DASHBOARD["panels"]}) == len(_DASHBOARD["panels"])
    for panel in _panels():
        assert panel["type"] in ("timeseries", "stat")
        assert panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        references = [target["refId"] for target in panel["targets"]]
        assert len(set(references)) == len(references) > 0
        for each in (panel, *panel["targets"]):
            assert each["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def test_panels_lie_side_by_side() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in _DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= _COLUMNS
        columns, lines = range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        cells = set(itertools.product(columns, lines))
        assert not cells & taken, panel["title"]
        taken |= cells
