"""A store with something in every figure, a process that serves its metrics, and a real Prometheus that scrapes it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from coordinator.settings import CoordinatorSettings
from coordinator.store.engine import Store, open_store
from coordinator.store.fleet import FleetMemory
from coordinator.store.health import record_health
from coordinator.store.ingest import insert_frames
from coordinator.store.models import Backbone, Certificate, ProgramRow
from coordinator.store.schema import upgrade
from coordinator.store.training import insert_checkpoint, insert_evaluation, insert_run, mark_published
from dashboards.metrics import FleetCollector
from dashboards.snapshot import FleetSnapshot, take_snapshot
from side_tuning.wire.messages import Health
from tests.brokers import accepts_connections, free_port
from tests.coordinator.fleet import settings_file
from tests.dashboards.fleets import dashboard_settings
from tests.store.frames import FINGERPRINT, make_frame, received, report, unreadable
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
PROMETHEUS_FILES = ROOT / "dashboards" / "prometheus"
GRAFANA_FILES = ROOT / "dashboards" / "grafana"

_missing = [name for name in ("prometheus", "promtool") if shutil.which(name) is None]
needs_prometheus = pytest.mark.skipif(
    bool(_missing) and not os.environ.get("CI"), reason=f"{' and '.join(_missing)} not found: install Debian's package prometheus"
)


def promtool(*arguments: str | Path) -> str:
    """What `promtool` says; fails the test where it refuses."""
    done = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def full_report(at: datetime, produced: int = 2, spooled: int = 0, **more: Any) -> Health:
    """A health report with every field that a metric shows."""
    said = report(produced, produced - spooled, spooled, floor=2, at=at)
    assert said.spool is not None
    return replace(
        said,
        spool=replace(said.spool, oldest_age_seconds=12.0 if spooled else 0.0),
        agent_version="1.0",
        checkpoint=1,
        plan_version=1,
        forward_seconds=0.02,
        bytes_sent=1000,
        temperature_celsius=51.5,
        throttled=False,
        load_1m=0.5,
        memory_available_bytes=10**9,
        peak_rss_bytes=3 * 10**8,
        disk_free_bytes=10**10,
        certificate_expires_at=at.timestamp() + 5 * 86_400,
        **more,
    )


def fill(store: Store, now: datetime) -> None:
    """Three devices (one well, one with a loss, one that is gone), a run with a published checkpoint, two programs."""
    with store.write() as session:
        insert_frames(session, [received(make_frame(name), now) for name in ("kitchen", "attic")])
        insert_frames(session, [received(make_frame("kitchen"), now)])  # again
        insert_frames(session, [unreadable("kitchen", 2, now)])
        insert_frames(session, [received(make_frame("cellar"), now - timedelta(hours=2))])
        record_health(session, "kitchen", full_report(now, 3, spooled=1), now)
        record_health(session, "attic", full_report(now, 9, paused=True), now)  # seven samples are nowhere
        session.add(Backbone(fingerprint=FINGERPRINT, manifest={}, registered_at=now))
        insert_run(session, "first", {}, now)
        insert_evaluation(session, "first", 10, "fleet", "fleet", 0.75, 0.5, 40, now)
        insert_evaluation(session, "first", 10, "backbone", FINGERPRINT, 0.75, 0.5, 40, now)
        insert_evaluation(session, "first", 10, "device", "kitchen", 0.8, 0.5, 20, now)
        insert_evaluation(session, "first", 10, "worst-device", "attic", 0.7, 0.5, 20, now)
        mark_published(session, insert_checkpoint(session, "first", 10, "/somewhere", {}, now), now)
        session.add(
            Certificate(
                serial="0a", device="kitchen", key_digest="00", pem=b"", issued_at=now - timedelta(days=1), expires_at=now + timedelta(days=9)
            )
        )
        gateway = {
            "looping": True, "connected": True, "queue_messages": 3, "dropped_messages": 0, "unattributable": 0, "health": 7,
            "oldest_uncommitted_seconds": None, "commit_seconds_last": 0.01, "commit_seconds_average": 0.02,
            "broker_certificate_expires_at": now.timestamp() + 30 * 86_400, "broker": "broker:8883",
            "certificates": {"gateway": now.timestamp() + 20 * 86_400}, "revocation_lists": {},
        }  # fmt: skip
        trainer = {
            "looping": True, "step": 10, "samples": 400, "samples_drawn": 1280, "samples_per_second": 12.5, "samples_pending": 100,
            "waiting_for_samples": False, "loss": 0.5, "replay_ratio": 3.2, "replay_ratio_limit": 20.0, "error": "",
        }  # fmt: skip
        enrolment = {
            "looping": True, "connected": True, "answers_issued": 2, "answers_waiting": 0, "answers_refused": 1, "turned_away": 0,
            "cut_offs_pending": 0,
            "certificates": dict.fromkeys(("broker", "fleet-authority", "claims-authority"), now.timestamp() + 30 * 86_400),
            "revocation_lists": dict.fromkeys(("fleet", "claims"), now.timestamp() + 30 * 86_400),
        }  # fmt: skip
        for name, status in (("gateway", gateway), ("trainer", trainer), ("enrolment", enrolment)):
            session.add(ProgramRow(name=name, started_at=now, at=now, status=status))


@contextmanager
def filled_store(folder: Path, now: datetime | None = None) -> Iterator[tuple[CoordinatorSettings, Store]]:
    settings = dashboard_settings(folder)
    settings.data_directory.mkdir(parents=True, exist_ok=True)
    upgrade(settings.database_url)
    store = open_store(settings.database_url)
    fill(store, now or datetime.now(timezone.utc))
    yield settings, store
    store.close()


def snapshot_of(store: Store, now: datetime) -> FleetSnapshot:
    return take_snapshot(store, now, 30.0, FleetMemory())


def scraped(settings: CoordinatorSettings, store: Store) -> str:
    """What one scrape gives, without a web server."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(FleetCollector(lambda: snapshot_of(store, datetime.now(timezone.utc)), lambda: store, settings))
    return generate_latest(registry).decode("utf-8")


@contextmanager
def served(folder: Path, port: int) -> Iterator[str]:
    """The address of `dashboards serve`, a process of its own over the store in `folder`."""
    config = settings_file(folder, 1883)
    log = folder / "dashboard.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "dashboards", "serve", "--config", str(config), "--port", str(port)], stdout=output, stderr=output
        )
    try:
        wait_until(lambda: process.poll() is not None or accepts_connections(port), 120, f"the dashboard listens; see {log}")
        assert process.poll() is None, log.read_text(errors="replace")
        yield f"127.0.0.1:{port}"
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(10)


class Prometheus:
    """A running Prometheus, asked over its own interface."""

    def __init__(self, address: str) -> None:
        self.address = address

    def get(self, path: str, **parameters: str) -> Any:
        url = f"http://{self.address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=60) as answer:
            body = json.load(answer)
        assert body["status"] == "success", body
        return body["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series that `expression` gives now, each with its labels (`metric`) and value."""
        return list(self.get("query", query=expression)["result"])

    def ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{self.address}/-/ready", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


@contextmanager
def prometheus_scraping(target: str, folder: Path) -> Iterator[Prometheus]:
    """Prometheus with the project's own configuration and rules, but quicker, and `target` in place of the dashboard."""
    folder.mkdir(parents=True, exist_ok=True)
    config = (PROMETHEUS_FILES / "prometheus.yml").read_text(encoding="utf-8")
    for ours, quick in (("scrape_interval: 15s", "scrape_interval: 3s"), ("evaluation_interval: 15s", "evaluation_interval: 1s"), ("dashboard:8080", target)):
        assert ours in config, f"prometheus.yml has no {ours!r} any more"
        config = config.replace(ours, quick)
    (folder / "prometheus.yml").write_text(config, encoding="utf-8")
    shutil.copy(PROMETHEUS_FILES / "alerts.yml", folder)
    address = f"127.0.0.1:{free_port()}"
    log = folder / "prometheus.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data", f"--web.listen-address={address}"],
            stdout=output, stderr=output,
        )  # fmt: skip
    try:
        server = Prometheus(address)
        wait_until(lambda: process.poll() is not None or server.ready(), 120, f"Prometheus is ready; see {log}")
        assert process.poll() is None, log.read_text(errors="replace")
        yield server
    finally:
        end(process)


def wait_for(server: Prometheus, condition: str) -> None:
    """Until Prometheus finds `condition` true, an expression that gives nothing while it is not."""
    wait_until(lambda: server.query(condition), 120, f"Prometheus finds {condition}")
