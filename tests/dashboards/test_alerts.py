"""Alert rules: valid, unit-tested one by one, and on metrics that exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.dashboards.monitored import (
    PROMETHEUS_FILES,
    filled_store,
    needs_prometheus,
    promtool,
    scraped,
)

RULES: list[dict[str, Any]] = [
    rule for group in yaml.safe_load((PROMETHEUS_FILES / "alerts.yml").read_text(encoding="utf-8"))["groups"] for rule in group["rules"]
]


@needs_prometheus
def test_the_configuration_and_the_rules_are_valid():
    assert "SUCCESS" in promtool("check", "config", PROMETHEUS_FILES / "prometheus.yml")
    assert "SUCCESS" in promtool("check", "rules", PROMETHEUS_FILES / "alerts.yml")


@needs_prometheus
def test_every_alert_fires_where_it_should_and_not_where_it_should_not():
    assert "SUCCESS" in promtool("test", "rules", PROMETHEUS_FILES / "alerts_test.yml")


def test_no_alert_is_without_both_tests():
    tested = yaml.safe_load((PROMETHEUS_FILES / "alerts_test.yml").read_text(encoding="utf-8"))["tests"]
    outcomes = {(case["alertname"], bool(case["exp_alerts"])) for test in tested for case in test["alert_rule_test"]}
    assert outcomes == {(rule["alert"], fires) for rule in RULES for fires in (True, False)}


@pytest.mark.parametrize("rule", RULES, ids=[rule["alert"] for rule in RULES])
def test_an_alert_says_how_grave_it_is_what_it_means_and_where_to_read_on(rule: dict[str, Any]):
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    assert rule["annotations"]["summary"]
    assert rule["annotations"]["description"].endswith(".")
    assert rule["annotations"]["runbook_url"] == f"docs/monitoring.md#{rule['alert'].lower()}"


def test_alerts_look_at_metrics_that_exist(tmp_path: Path):
    with filled_store(tmp_path) as (settings, store):
        text = scraped(settings, store)
    exposed = {sample.name for family in text_string_to_metric_families(text) for sample in family.samples}
    wanted = {name for rule in RULES for name in re.findall(r"\bmobillm_\w+", rule["expr"])}
    assert wanted <= exposed
