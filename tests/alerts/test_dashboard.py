"""The dashboard as a file: importable anywhere, and asking only for what the contract has."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.alerts.contract import EXPORTER, REMEDIATOR, selectors, strangers

DASHBOARD = Path(__file__).resolve().parents[2] / "grafana/upkeep.json"
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


def dashboard() -> dict[str, Any]:
    """The shipped file."""
    loaded: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return loaded


def queries() -> Iterator[tuple[str, str]]:
    """(where it stands, PromQL) for every query of the dashboard, annotations included."""
    shown = dashboard()
    for panel in shown["panels"]:
        for target in panel.get("targets", ()):
            yield f"{panel['title']} {target['refId']}", target["expr"]
    for annotation in shown["annotations"]["list"]:
        if "expr" in annotation:
            yield f"annotation {annotation['name']}", annotation["expr"]


def filled(query: str) -> str:
    """The query as Grafana sends it, with every node chosen."""
    return query.replace("$node", ".*").replace("$__rate_interval", "1m")


QUERIES = dict(queries())


@pytest.mark.parametrize("where", QUERIES)
def test_a_query_names_only_what_the_contract_has(where: str) -> None:
    query = filled(QUERIES[where])
    assert strangers(query) == []
    assert "$" not in query


def test_every_metric_of_the_contract_is_shown() -> None:
    """A metric nobody looks at is one nobody misses when it breaks. The instants behind the days
    are for rules."""
    shown = {metric for query in QUERIES.values() for metric, _ in selectors(filled(query))}
    not_shown = {
        "upkeep_certificate_not_after_timestamp_seconds",
        "upkeep_certificate_not_before_timestamp_seconds",
        "upkeep_build_info",
        "upkeep_remediation_duration_seconds_sum",
        "upkeep_remediation_duration_seconds_count",
    }
    assert {*EXPORTER, *REMEDIATOR} - shown == not_shown


def test_it_can_be_imported_on_any_grafana() -> None:
    """No id of somebody's database, no data source of somebody's: a variable asks for it."""
    shown = dashboard()
    assert "id" not in shown
    assert shown["uid"] == "upkeep"
    assert shown["schemaVersion"] >= 36
    (chosen,) = [v for v in shown["templating"]["list"] if v["type"] == "datasource"]
    assert (chosen["name"], chosen["query"]) == ("datasource", "prometheus")
    panels = [panel for panel in shown["panels"] if panel["type"] != "row"]
    assert all(panel["datasource"] == DATASOURCE for panel in panels)
    assert all(t["datasource"] == DATASOURCE for panel in panels for t in panel["targets"])


def test_panels_have_their_own_place() -> None:
    taken: dict[tuple[int, int], str] = {}
    ids = [panel["id"] for panel in dashboard()["panels"]]
    assert len(ids) == len(set(ids))
    for panel in dashboard()["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert taken.setdefault((x, y), panel["title"]) == panel["title"]
