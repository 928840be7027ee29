"""Grafana's files: complete, current, and every query answered by a Prometheus that scraped the real thing."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from coordinator.store.health import record_health
from coordinator.store.ingest import insert_frames
from tests.brokers import free_port
from tests.dashboards.monitored import (
    GRAFANA_FILES,
    Prometheus,
    filled_store,
    full_report,
    needs_prometheus,
    prometheus_scraping,
    scraped,
    served,
    wait_for,
)
from tests.store.frames import make_frame, received
from tests.waiting import wait_until

SCHEMA_VERSION = 42  # of Grafana 12.2 and later
DASHBOARDS: dict[str, dict[str, Any]] = {
    path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted((GRAFANA_FILES / "dashboards").glob("*.json"))
}
DATA_SOURCE = yaml.safe_load((GRAFANA_FILES / "provisioning" / "datasources" / "prometheus.yml").read_text(encoding="utf-8"))["datasources"][0]


def queries(dashboard: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(panel, expression) of everything that a dashboard asks Prometheus."""
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]


def filled_in(expression: str, device: str) -> str:
    return expression.replace("$device", device).replace("$__rate_interval", "1m")


@pytest.mark.parametrize("name", DASHBOARDS)
def test_a_dashboard_is_of_the_current_schema_and_hangs_together(name: str):
    dashboard = DASHBOARDS[name]
    assert dashboard["schemaVersion"] == SCHEMA_VERSION
    assert dashboard["uid"] == f"mobillm-{name}"
    assert dashboard["id"] is None, "Grafana gives the number"
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["title"]
        assert panel["type"] == "row" or panel["targets"]
        for source in (panel, *panel.get("targets", ())):
            assert source.get("datasource", {"uid": DATA_SOURCE["uid"]})["uid"] == DATA_SOURCE["uid"]
    places = [(p["title"], p["gridPos"]) for p in panels]
    assert all(g["x"] >= 0 and g["x"] + g["w"] <= 24 for _, g in places)
    for (one, a), (other, b) in itertools.combinations(places, 2):
        apart = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"] or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert apart, f"{one} lies over {other}"


def test_the_two_dashboards_lead_to_each_other():
    assert set(DASHBOARDS) == {"fleet", "device"}
    assert {link["url"] for board in DASHBOARDS.values() for link in board["links"]} == {f"/d/mobillm-{name}" for name in DASHBOARDS}
    (device,) = DASHBOARDS["device"]["templating"]["list"]
    assert (device["name"], device["datasource"]["uid"]) == ("device", DATA_SOURCE["uid"])
    assert all("$device" in expression for _, expression in queries(DASHBOARDS["device"]))


def test_queries_name_metrics_that_exist(tmp_path: Path):
    with filled_store(tmp_path) as (settings, store):
        text = scraped(settings, store)
    exposed = {sample.name for family in text_string_to_metric_families(text) for sample in family.samples}
    asked = {name for board in DASHBOARDS.values() for name in re.findall(r"\bmobillm_\w+", json.dumps(board))}
    assert asked <= exposed
    per_device = {name for name in exposed if name.startswith("mobillm_device_")} - {"mobillm_device_series_left_out"}
    assert per_device - asked <= {"mobillm_device_certificate_lifetime_seconds"}, "a figure that no dashboard shows"


def ask(server: Prometheus, device: str) -> dict[tuple[str, str, str], int]:
    """How many series each query of each dashboard gives."""
    return {
        (name, panel, expression): len(server.query(filled_in(expression, device)))
        for name, board in DASHBOARDS.items()
        for panel, expression in queries(board)
    }


@pytest.mark.slow
@needs_prometheus
def test_every_query_gives_series(tmp_path: Path):
    now = datetime.now(timezone.utc)
    with (
        filled_store(tmp_path, now) as (_, store),
        served(tmp_path, free_port()) as address,
        prometheus_scraping(address, tmp_path / "prometheus") as server,
    ):
        wait_for(server, "count_over_time(mobillm_store_up[10m]) >= 2")
        with store.write() as session:  # something must move for rates
            insert_frames(session, [received(make_frame("kitchen", 3, ("c", "d", "e")), datetime.now(timezone.utc))])

        left: list[tuple[str, str, str]] = []

        def all_answered() -> bool:
            with store.write() as session:  # a device that falls silent loses figures
                at = datetime.now(timezone.utc)
                record_health(session, "kitchen", full_report(at, 7, spooled=1), at)
            left[:] = [asked for asked, series in ask(server, "kitchen").items() if series == 0]
            return not left

        with suppress(AssertionError):
            wait_until(all_answered, 120)
        assert left == []
        checkpoints = DASHBOARDS["fleet"]["annotations"]["list"][1]["expr"]
        server.query(filled_in(checkpoints, ""))  # parses; a checkpoint may or may not have come meanwhile
