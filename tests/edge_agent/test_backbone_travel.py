"""From `coordinator backbone assign` to the first stored sample: real gateway, real agent, real broker, and kill -9 in between."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from sqlalchemy import select

from coordinator.outbox import ensure_signing_key
from coordinator.settings import load_settings
from coordinator.store.engine import open_store
from coordinator.store.fleet import device_overview
from coordinator.store.models import SampleRow
from edge_agent.backbone_files import IncomingBackbone
from side_tuning.backbone_manifest import CONFIG, MANIFEST, check_artifact, fingerprint_of, read_manifest
from side_tuning.broker_connection import BrokerConnection
from side_tuning.wire import topics
from tests.brokers import mosquitto, needs_mosquitto
from tests.coordinator.fleet import now, settings_file
from tests.edge_agent.travelling import make_backbone
from tests.waiting import wait_until

pytestmark = [pytest.mark.broker, pytest.mark.slow, needs_mosquitto]


def coordinator(config: Path, *arguments: str, code: int = 0) -> str:
    command = [sys.executable, "-m", "coordinator.cli", *arguments, "--config", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


class Program:
    """`edge-agent run` or `coordinator gateway`, as a process."""

    def __init__(self, log: Path, *command: str, **environment: str) -> None:
        self.command, self.log = [sys.executable, "-m", *command], log
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        self.start()

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, env=self.environment)

    def says(self, words: str) -> bool:
        text = self.log.read_text(errors="replace")
        assert self.process.poll() is None, text
        return words in text

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


class Site:
    """A broker, a coordinator with one backbone, and a device with nothing but its settings."""

    def __init__(self, folder: Path, broker, artifact: Path) -> None:
        self.folder, self.broker = folder, broker
        self.config = settings_file(folder, broker.port)
        coordinator(self.config, "database", "upgrade")
        coordinator(self.config, "backbone", "register", str(artifact))
        self.fingerprint = read_manifest(artifact).fingerprint
        self.settings = load_settings(self.config)
        ensure_signing_key(self.settings)
        self.store = open_store(self.settings.database_url)
        self.published: Counter[int] = Counter()
        self.watcher = BrokerConnection(
            broker.settings, "watcher", subscriptions=[topics.fleet_plan().replace("plan", "+")], on_message=self._watch
        )
        self.watcher.start()
        self.state = folder / "state"
        (folder / "rows.jsonl").write_text("".join(json.dumps({"text": f"lamp {n}", "label": "red"}) + "\n" for n in range(8)))

    def _watch(self, message) -> None:
        topic = topics.parse_topic(message.topic)
        if topic.channel == "backbone-part":
            self.published[int(topic.arguments[1])] += 1

    def gateway(self, bytes_per_second: int = 8_000_000) -> Program:
        return Program(
            self.folder / "gateway.log", "coordinator.cli", "gateway", "--config", str(self.config),
            COORDINATOR_PUBLISHING__BACKBONE_BYTES_PER_SECOND=str(bytes_per_second),
        )

    def agent_config(self) -> Path:
        path = self.folder / "agent.toml"
        path.write_text(
            f'device = "kitchen"\nstate_directory = "{self.state}"\n[broker]\nhost = "127.0.0.1"\nport = {self.broker.port}\ntls = false\n'
            f'reconnect_max_seconds = 0.5\n[checkpoint]\npublic_key_file = "{self.settings.public_key_file}"\n[health]\nevery_seconds = 0.5\n'
            f'[[sources]]\nkind = "file"\npath = "{self.folder / "rows.jsonl"}"\n'
        )
        return path

    def agent(self) -> Program:
        return Program(self.folder / "agent.log", "edge_agent.cli", "run", "--config", str(self.agent_config()))

    def seen(self):
        """The device as people at the coordinator see it."""
        with self.store.read() as session:
            found = device_overview(session, now())
        return found[0] if found else None

    def reason(self) -> str:
        seen = self.seen()
        return seen.health.reason if seen and seen.health else ""

    def stored(self) -> int:
        with self.store.read() as session:
            return len(session.scalars(select(SampleRow.id)).all())

    def close(self) -> None:
        self.watcher.stop()
        self.store.close()


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return make_backbone(tmp_path_factory.mktemp("artifact"))


@pytest.fixture
def site(tmp_path, artifact):
    with mosquitto(tmp_path / "broker") as broker:
        made = Site(tmp_path, broker, artifact)
        yield made
        made.close()


def ended(*programs: Program) -> None:
    for program in programs:
        if program.process.poll() is None:
            program.end()


def doctor(site: Site) -> dict[str, dict[str, str]]:
    done = subprocess.run(
        [sys.executable, "-m", "edge_agent.cli", "doctor", "--json", "--config", str(site.agent_config())],
        capture_output=True, text=True, timeout=120, check=False,
    )
    return {finding["check"]: finding for finding in json.loads(done.stdout)}


def test_from_nothing_to_the_first_stored_sample_with_a_kill_in_between(site):
    gateway, agent = site.gateway(150_000), site.agent()
    try:
        wait_until(lambda: "the coordinator offers none" in site.reason(), 60, "the device waits, and says for what")
        assert site.fingerprint in coordinator(site.config, "backbone", "assign", site.fingerprint[:8])
        assert "sent to the fleet" in coordinator(site.config, "backbone", "list")
        wait_until(lambda: "parts, " in site.reason() and "left" in site.reason(), 60, "progress is in the health message")
        wait_until(lambda: len(site.published) > 8, 60, "some parts")
        agent.kill()
        here, total = IncomingBackbone(site.state / "backbone").progress()
        assert 0 < here < total
        finding = doctor(site)["backbone"]
        assert finding["level"] == "warning"
        assert f"{here} of {total} parts are here" in finding["detail"]
        incoming = IncomingBackbone(site.state / "backbone")
        incoming.progress()
        kept = [n for n, is_here in enumerate(incoming._look()) if is_here]
        before = Counter(site.published)
        agent.start()
        wait_until(lambda: site.stored() == 8, 120, "it fetches the rest, begins by itself, and its samples are stored")
        assert all(site.published[n] == before[n] for n in kept), "nothing that was here is sent again"
        assert check_artifact(site.state / "backbone").fingerprint == site.fingerprint
        assert wait_until(lambda: site.seen().health.backbone, 30).fingerprint == site.fingerprint
        assert not (site.state / "backbone.incoming").exists()
        assert agent.end() == 0
        assert doctor(site)["backbone"]["level"] == "ok"
    finally:
        ended(agent, gateway)
    assert agent.process.returncode == 0
    assert gateway.process.returncode == 0


def test_a_gateway_that_is_killed_in_between_costs_a_moment(site):
    gateway, agent = site.gateway(150_000), site.agent()
    try:
        coordinator(site.config, "backbone", "assign", site.fingerprint, "--device", "kitchen")
        wait_until(lambda: len(site.published) > 8, 60, "some parts")
        gateway.kill()
        gateway.start()
        wait_until((site.state / "backbone").exists, 120, "fetched")
        assert check_artifact(site.state / "backbone").fingerprint == site.fingerprint
    finally:
        ended(agent, gateway)


def test_a_damaged_backbone_on_the_card_is_fetched_anew(site, artifact):
    import shutil

    shutil.copytree(artifact, site.state / "backbone")
    with (site.state / "backbone" / "model.safetensors").open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        file.write(b"\0\1\2\3")
    coordinator(site.config, "backbone", "assign", site.fingerprint)
    gateway, agent = site.gateway(), site.agent()
    try:
        wait_until(lambda: site.stored() == 8, 120, "fetched, and in use")
        assert agent.says("is damaged")
        assert check_artifact(site.state / "backbone").fingerprint == site.fingerprint
    finally:
        ended(agent, gateway)


def test_a_backbone_that_this_torch_cannot_run_is_named_on_both_sides_and_another_one_helps(site, artifact, tmp_path):
    """Whole and signed, and yet no model: the agent says why and waits, and begins once it is given one that works."""
    strange = tmp_path / "strange"
    strange.mkdir()
    for file in artifact.iterdir():
        (strange / file.name).write_bytes(file.read_bytes())
    config = json.loads((strange / CONFIG).read_text())
    (strange / CONFIG).write_text(json.dumps({**config, "model_type": "from-the-future"}))
    manifest = json.loads((strange / MANIFEST).read_text())
    (strange / MANIFEST).write_text(json.dumps({**manifest, "fingerprint": fingerprint_of(strange)}))
    coordinator(site.config, "backbone", "register", str(strange))
    coordinator(site.config, "backbone", "assign", fingerprint_of(strange))
    gateway, agent = site.gateway(), site.agent()
    try:
        wait_until(lambda: "cannot be loaded with the installed libraries" in site.reason(), 120, "told at the coordinator")
        assert agent.says("cannot be loaded with the installed libraries")
        coordinator(site.config, "backbone", "assign", site.fingerprint, "--device", "kitchen")
        wait_until(lambda: site.stored() == 8, 120, "the other one is fetched and used")
    finally:
        ended(agent, gateway)


def test_an_assignment_of_what_is_not_there_is_refused_at_once(site):
    assert "no registered backbone begins" in coordinator(site.config, "backbone", "assign", "ff00ff", code=78)
    for kept in (site.settings.data_directory / "backbones").iterdir():
        kept.rename(site.folder / "away")
    assert "its files are not kept here" in coordinator(site.config, "backbone", "assign", site.fingerprint, code=1)
