"""`/metrics` shows what the store holds, to a real Prometheus, whatever devices call themselves."""

# ruff: noqa: F811 - fixtures

from __future__ import annotations

import re
import subprocess
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from coordinator.settings import CoordinatorSettings
from coordinator.store.engine import Store
from coordinator.store.health import record_health
from coordinator.store.ingest import insert_frames
from coordinator.store.models import Identity, ProgramRow
from dashboards.app import make_app
from dashboards.measures import Measures, take_measures
from dashboards.metrics import CONTENT_TYPE, PROGRAM_FIGURES, clean, metric_families
from tests.brokers import free_port
from tests.dashboards.fleets import dashboard_settings
from tests.dashboards.monitored import (
    ROOT,
    fill,
    filled_store,
    full_report,
    needs_prometheus,
    prometheus_scraping,
    scraped,
    served,
    snapshot_of,
    wait_for,
)
from tests.store.conftest import postgres, postgres_url, sqlite_store, store, url  # noqa: F401 - fixtures
from tests.store.frames import START, after, make_frame, received


@pytest.fixture
def settings(tmp_path: Path) -> CoordinatorSettings:
    return dashboard_settings(tmp_path)


def families_of(settings: CoordinatorSettings, store: Store, now: datetime = START, shown: int = 1000) -> list[Metric]:
    snapshot = snapshot_of(store, now)
    return list(metric_families(snapshot, take_measures(store, snapshot, settings), shown))


def values(families: list[Metric]) -> dict[tuple[str, ...], float]:
    """(name, label values ...) -> value."""
    return {(sample.name, *sample.labels.values()): sample.value for family in families for sample in family.samples}


def test_an_empty_store_has_metrics_too(settings: CoordinatorSettings, store: Store):
    found = values(families_of(settings, store))
    assert found["mobillm_devices", "on-time"] == 0
    assert found["mobillm_samples_stored_total",] == 0
    assert ("mobillm_score", "accuracy") not in found


def test_every_figure_of_a_fleet(settings: CoordinatorSettings, store: Store):
    fill(store, START)
    found = values(families_of(settings, store, after(1)))
    expected = {
        ("mobillm_devices", "on-time"): 2,
        ("mobillm_devices", "lost"): 1,
        ("mobillm_devices_unbalanced",): 1,
        ("mobillm_frames_stored_total",): 3,
        ("mobillm_samples_stored_total",): 6,
        ("mobillm_frames_rejected",): 1,
        ("mobillm_frames_duplicate_total",): 1,
        ("mobillm_backbones",): 1,
        ("mobillm_score", "accuracy"): 0.75,
        ("mobillm_worst_device_score", "attic", "accuracy"): 0.7,
        ("mobillm_gateway_connected",): 1,
        ("mobillm_gateway_oldest_uncommitted_seconds",): 0,
        ("mobillm_program_last_beat_timestamp_seconds", "gateway"): START.timestamp(),
        ("mobillm_trainer_steps_total",): 10,
        ("mobillm_certificate_expiry_timestamp_seconds", "gateway"): START.timestamp() + 20 * 86_400,
        ("mobillm_certificate_expiry_timestamp_seconds", "broker"): START.timestamp() + 30 * 86_400,
        ("mobillm_revocation_list_next_update_timestamp_seconds", "claims"): START.timestamp() + 30 * 86_400,
        ("mobillm_device_ledger_balanced", "attic"): 0,
        ("mobillm_device_ledger_balanced", "kitchen"): 1,
        ("mobillm_device_samples_missing", "attic"): 7,
        ("mobillm_device_spool_samples", "kitchen"): 1,
        ("mobillm_device_paused", "attic"): 1,
        ("mobillm_device_state", "cellar", "lost"): 1,
        ("mobillm_device_state", "cellar", "on-time"): 0,
        ("mobillm_device_score", "kitchen", "accuracy"): 0.8,
        ("mobillm_device_temperature_celsius", "kitchen"): 51.5,
        ("mobillm_device_certificate_lifetime_seconds", "kitchen"): 10 * 86_400,
    }
    assert {key: found.get(key) for key in expected} == expected
    assert found["mobillm_checkpoint_published_generation",] >= 1
    assert found["mobillm_database_bytes",] > 0
    assert ("mobillm_device_temperature_celsius", "cellar") not in found, "a device that has not said it has no figure"


def test_names_follow_the_conventions(tmp_path: Path):
    """Unique, a help text each, counters end in _total; and promtool's linter has nothing to say."""
    with filled_store(tmp_path) as (settings, store):
        text = scraped(settings, store)
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families) > 80
    assert all(family.name.startswith("mobillm_") and family.documentation.endswith(".") for family in families)
    assert all(sample.name.endswith("_total") for family in families if family.type == "counter" for sample in family.samples)


@needs_prometheus
def test_promtool_finds_nothing_to_say_against_the_names(tmp_path: Path):
    with filled_store(tmp_path) as (settings, store):
        text = scraped(settings, store)
    linted = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, timeout=60)
    assert (linted.returncode, linted.stdout, linted.stderr) == (0, "", "")


def test_beyond_the_limit_the_worst_devices_stay(settings: CoordinatorSettings, store: Store):
    fill(store, START)
    found = families_of(settings, store, after(1), shown=2)
    devices = {sample.labels["device"] for family in found for sample in family.samples if family.name == "mobillm_device_state"}
    assert devices == {"attic", "cellar"}, "the one that loses samples and the lost one; the one that is well is left out"
    assert values(found)["mobillm_device_series_left_out",] == 1
    assert values(found)["mobillm_frames_stored_total",] == 3, "sums are over all"


def test_a_revoked_device_is_waited_for_by_no_alert(settings: CoordinatorSettings, store: Store):
    fill(store, START)
    with store.write() as session:
        session.add(Identity(device="cellar", created_at=START, enrolled_at=START, revoked_at=START))
        record_health(session, "cellar", full_report(after(-7000)), after(-7000))
    found = values(families_of(settings, store, after(1)))
    assert (found["mobillm_devices", "lost"], found["mobillm_devices", "revoked"]) == (0, 1)
    assert (found["mobillm_device_state", "cellar", "lost"], found["mobillm_device_state", "cellar", "revoked"]) == (0, 1)
    assert ("mobillm_device_certificate_expiry_timestamp_seconds", "cellar") not in found
    assert ("mobillm_device_temperature_celsius", "cellar") not in found


def test_the_board_of_a_device_that_is_gone_has_no_figures(settings: CoordinatorSettings, store: Store):
    """What it reported last must raise no alarm for ever; what waits in its spool is still there."""
    fill(store, START)
    found = values(families_of(settings, store, after(3600)))
    assert found["mobillm_device_state", "kitchen", "lost"] == 1
    assert ("mobillm_device_temperature_celsius", "kitchen") not in found
    assert ("mobillm_device_clock_offset_seconds", "kitchen") not in found
    assert found["mobillm_device_spool_samples", "kitchen"] == 1


HOSTILE = 'x"} 1\nmobillm_store_up 0\n# <script>\ud800\x00\\"'


def test_labels_cannot_break_out(settings: CoordinatorSettings, store: Store):
    """An agent's version is any text; a lone surrogate would end the scrape."""
    fill(store, START)
    snapshot = snapshot_of(store, after(1))
    hostile = [replace(d, health=replace(d.health, agent_version=HOSTILE)) if d.health else d for d in snapshot.devices]
    hostile = [replace(d, device=HOSTILE + "z" * 500) if d.device == "cellar" else d for d in hostile]

    class Given(Collector):
        def collect(self) -> Iterator[Metric]:
            return metric_families(replace(snapshot, devices=tuple(hostile)), Measures(), 1000)

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Given())
    text = generate_latest(registry).decode("utf-8")
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert "mobillm_store_up" not in families
    assert {s.labels["agent_version"] for s in families["mobillm_device_info"].samples} == {"", clean(HOSTILE)}
    assert max(len(value) for family in families.values() for s in family.samples for value in s.labels.values()) <= 64
    assert all(line.startswith(("mobillm_", "# HELP mobillm_", "# TYPE mobillm_")) for line in text.splitlines())


def test_programs_say_what_metrics_look_for():
    """A key that is renamed in a heartbeat would quietly end a metric, and its alerts with it."""
    sources = {"gateway": "counters.py", "enrolment": "enrolment.py", "trainer": "training/figures.py"}
    texts = {program: (ROOT / "coordinator" / path).read_text(encoding="utf-8") for program, path in sources.items()}
    assert not [(program, key) for program, key in PROGRAM_FIGURES if not re.search(rf'"{key}": |^    {key}: ', texts[program], re.MULTILINE)]


def test_a_status_from_another_version_is_passed_over(settings: CoordinatorSettings, store: Store):
    with store.write() as session:
        odd = {"connected": "yes", "queue_messages": [1], "commit_seconds_last": None, "looping": {}, "error": ["x"], "health": 10**400, "certificates": {"broker": "soon"}}
        session.add(ProgramRow(name="gateway", started_at=START, at=START, status=odd))
    found = values(families_of(settings, store))
    assert not [key for key in found if key[0].startswith(("mobillm_gateway", "mobillm_certificate"))]
    assert found["mobillm_program_last_beat_timestamp_seconds", "gateway"] == START.timestamp()


def test_a_store_that_is_not_there_is_told_as_a_figure(settings: CoordinatorSettings):
    with TestClient(make_app(settings), base_url="http://127.0.0.1") as client:
        answer = client.get("/metrics")
    assert answer.status_code == 200
    assert [line for line in answer.text.splitlines() if line[0] != "#"] == ["mobillm_store_up 0.0"]


@pytest.mark.slow
@needs_prometheus
def test_a_real_prometheus_scrapes_it(tmp_path: Path):
    """The values in Prometheus are those of the store, and follow it; the project's own configuration and rules are loaded."""
    now = datetime.now(timezone.utc)
    with filled_store(tmp_path, now) as (_, store), served(tmp_path, free_port()) as address:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=60) as answer:
            assert answer.headers["Content-Type"] == CONTENT_TYPE
        with prometheus_scraping(address, tmp_path / "prometheus") as server:
            wait_for(server, 'up{job="mobillm"} == 1')
            wait_for(server, "mobillm_samples_stored_total == 6")
            wait_for(server, 'mobillm_device_samples_missing{device="attic"} == 7')
            with store.write() as session:
                insert_frames(session, [received(make_frame("kitchen", 3, ("c", "d", "e")), datetime.now(timezone.utc))])
                record_health(session, "kitchen", full_report(datetime.now(timezone.utc), 6), datetime.now(timezone.utc))
            wait_for(server, "mobillm_samples_stored_total == 9")
            rules = [rule for group in server.get("rules")["groups"] for rule in group["rules"]]
            assert len(rules) > 30
            assert {rule["health"] for rule in rules} <= {"ok", "unknown"}
            wait_for(server, 'ALERTS{alertname="LedgerUnbalanced", device="attic"}')
            wait_for(server, 'ALERTS{alertname="DeviceLost", device="cellar"}')
            at_rest = {"StoreUnavailable", "DeviceCertificateExpiring", "BrokerShowsOldCertificate", "CheckpointNotPublished"}
            assert not at_rest & {alert["labels"]["alertname"] for alert in server.get("alerts")["alerts"]}
