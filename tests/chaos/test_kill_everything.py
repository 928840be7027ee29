"""kill -9 of broker, gateway, trainer and agents while a fleet works: nothing twice, nothing lost, nobody helps.

The coordinator's programs are restarted by their own supervisor; the agents by this test, as systemd would.
"""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from coordinator.demonstration.data import Dataset, Partition, deal, load_dataset, write_anchors
from coordinator.demonstration.demo import prepare_coordinator
from coordinator.demonstration.fleet import (
    DemoDevice,
    free_port,
    make_devices,
    prepare_backbones,
    write_coordinator_config,
)
from coordinator.demonstration.observation import Observation, observe
from coordinator.demonstration.processes import Child, end_all
from coordinator.settings import CoordinatorSettings, load_settings
from coordinator.store.engine import Store, open_store
from coordinator.store.errors import StoreUnavailable
from coordinator.store.fleet import fleet_totals
from tests.brokers import needs_mosquitto
from tests.waiting import wait_until

DEVICES = 2
TRAIN_ROWS, TEST_ROWS = 2_400, 400
PRODUCING_SECONDS = 60.0
KILLS_OF_EACH = 3
SEED = 11
PROGRAMS = ("broker", "gateway", "train")  # as `coordinator run` names them


@dataclass
class Fleet:
    settings: CoordinatorSettings
    devices: list[DemoDevice]
    coordinator: Child
    agents: dict[str, Child]
    store: Store

    def seen(self) -> Observation | None:
        try:
            return observe(self.store)
        except StoreUnavailable:
            return None

    def stored(self) -> int:
        try:
            with self.store.read() as session:
                return fleet_totals(session).samples_stored
        except StoreUnavailable:
            return -1

    def program(self, name: str) -> psutil.Process | None:
        """The running process of one of the coordinator's programs."""
        assert self.coordinator.process_id is not None
        for process in psutil.Process(self.coordinator.process_id).children():
            try:
                words = process.cmdline()
            except psutil.NoSuchProcess:
                continue
            if "coordinator.tied_process" in words:
                continue  # about to become the program
            if (name == "broker" and "mosquitto" in words[0]) or ("coordinator.cli" in words and name in words):
                return process
        return None

    def kill(self, victim: str) -> None:
        if victim in PROGRAMS:
            os.kill(wait_until(lambda: self.program(victim), 60, f"{victim} runs").pid, signal.SIGKILL)
        else:
            self.agents[victim].check()
            self.agents[victim].kill()
            self.agents[victim].start()


@pytest.fixture
def fleet(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    whole = load_dataset()
    dataset = Dataset(whole.name, whole.labels, whole.train[:TRAIN_ROWS], whole.test[:TEST_ROWS])
    shares = deal(dataset, Partition.parse("iid"), DEVICES, SEED)
    backbones = prepare_backbones(4, tmp_path_factory.getbasetemp() / "backbones", lambda _: None)[2:]
    devices = make_devices(shares, backbones, tmp_path / "devices", producing_seconds=PRODUCING_SECONDS, seed=SEED)
    anchors_file = tmp_path / "anchors.jsonl"
    write_anchors([row.text for row in whole.train[-100:]], anchors_file)
    config = tmp_path / "coordinator.toml"
    write_coordinator_config(
        config, dataset, data=tmp_path / "coordinator", port=free_port(), seconds=90, seed=SEED, train_samples=TRAIN_ROWS,
        anchors_file=anchors_file,
    )
    settings = load_settings(config)
    prepare_coordinator(settings, devices)
    program = [sys.executable, "-m", "coordinator.cli", "run", "--no-dashboard", "--broker", "mosquitto", "--config", str(config)]
    coordinator = Child("coordinator", program, tmp_path / "coordinator.log")
    agents = {device.name: device.agent() for device in devices}
    store = open_store(settings.database_url, read_only=True)
    running = Fleet(settings, devices, coordinator, agents, store)
    try:
        for child in (coordinator, *agents.values()):
            child.start()
        yield running
    finally:
        end_all([coordinator, *agents.values()])
        store.close()


@pytest.mark.slow
@pytest.mark.broker
@pytest.mark.timeout(600)
@needs_mosquitto
def test_everything_is_killed_several_times_and_every_sample_is_stored_once(fleet: Fleet) -> None:
    """At random moments of the run each program and each device dies without warning; the books balance in the end."""
    chance = random.Random(SEED)
    rows = TRAIN_ROWS + TEST_ROWS
    victims = [*PROGRAMS, *fleet.agents] * KILLS_OF_EACH
    chance.shuffle(victims)
    moments = sorted(chance.randrange(1, int(rows * 0.95)) for _ in victims)

    for victim, moment in zip(victims, moments, strict=True):
        wait_until(lambda moment=moment: fleet.stored() >= moment, 120, f"{moment} of {rows} samples are stored")
        fleet.kill(victim)

    wait_until(lambda: fleet.stored() >= rows, 180, "every sample is stored")
    wait_until(lambda: _settled(fleet), 60, "the ledger is settled and every spool is empty")
    seen = fleet.seen()
    assert seen is not None
    assert seen.totals.samples_stored == rows
    assert seen.totals.frames_rejected == 0
    assert seen.totals.ledger.balanced
    for device in fleet.devices:
        one = seen.devices[device.name]
        assert one.ledger.produced == one.stored_samples == device.samples, device.name
        assert (one.gap_frames, one.ledger.dropped, one.ledger.stored_again) == (0, 0, 0), device.name
        assert len(one.spools) == 1, f"{device.name} lost its spool"
    assert _stored_twice(fleet.settings) == 0

    wait_until(lambda: _learned_and_delivered(fleet), 120, "every device has the checkpoint that has seen every sample")
    fleet.coordinator.check()
    log = fleet.coordinator.log.read_text()
    for program in PROGRAMS:
        assert log.count(f"{program}: ended, killed by SIGKILL") == KILLS_OF_EACH, program


def _settled(fleet: Fleet) -> bool:
    seen = fleet.seen()
    if seen is None:
        return False
    healths = [seen.devices[device.name].health for device in fleet.devices]
    empty = all(health is not None and health.spool is not None and health.spool.spooled == 0 for health in healths)
    return empty and seen.totals.ledger.settled


def _stored_twice(settings: CoordinatorSettings) -> int:
    """Samples and frames that stand in the database more than once, counted past all of our own queries."""
    path = settings.database_url.removeprefix("sqlite:///")
    database = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    try:
        (samples,) = database.execute("select count(*) - count(distinct device_id || '/' || sample_id) from samples").fetchone()
        (frames,) = database.execute("select count(*) - count(distinct spool_id || '/' || sequence) from frames").fetchone()
        (rows,) = database.execute("select count(*) from samples").fetchone()
    finally:
        database.close()
    assert rows == TRAIN_ROWS + TEST_ROWS
    return int(samples) + int(frames)


def _learned_and_delivered(fleet: Fleet) -> bool:
    seen = fleet.seen()
    if seen is None or seen.published is None or seen.published.metrics.get("train_samples") != TRAIN_ROWS:
        return False
    healths = [seen.devices[device.name].health for device in fleet.devices]
    return all(health is not None and health.checkpoint == seen.published.generation for health in healths)
