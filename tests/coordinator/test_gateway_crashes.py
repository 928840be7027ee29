"""The gateway as a process that is killed at random moments, and one that was away: every frame stored exactly once."""

import random
import signal
import subprocess
import sys
import threading

import pytest

from tests.brokers import mosquitto, needs_mosquitto
from tests.coordinator.fleet import (
    ScriptedDevice,
    make_payload,
    make_store,
    settings_file,
    settings_for,
    stored_frames,
)
from tests.waiting import wait_until

pytestmark = [pytest.mark.broker, needs_mosquitto]


class GatewayProcess:
    def __init__(self, config, log):
        self._config = config
        self._log = log
        self.starts = 0

    def start(self):
        self.starts += 1
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "coordinator.cli", "gateway", "--config", str(self._config)], stderr=log, stdout=log
            )

    def says(self, words):
        return self._log.read_text().count(words) if self._log.exists() else 0

    def end(self, number=signal.SIGKILL):
        self.process.send_signal(number)
        return self.process.wait(30)


@pytest.fixture
def gateway(tmp_path):
    made = []

    def maker(port):
        made.append(GatewayProcess(settings_file(tmp_path, port), tmp_path / "gateway.log"))
        return made[0]

    yield maker
    for one in made:
        if one.process.poll() is None:
            one.end()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_kill_minus_nine_at_random_moments_loses_nothing_and_stores_nothing_twice(tmp_path, gateway, seed):
    """300 frames of one device, in a window of 16, while the gateway is killed five times between two receipts."""
    chance = random.Random(seed)
    with mosquitto(tmp_path / "broker") as broker:
        store = make_store(settings_for(tmp_path, broker.settings))
        process = gateway(broker.port)
        process.start()
        wait_until(lambda: process.says("listening to") == 1, 30, "the gateway listens")
        payloads = {s: make_payload("d", s, samples=16) for s in range(1, 301)}
        device = ScriptedDevice("d", broker.settings, payloads, resend_seconds=0.5)
        device.start()
        for kill in range(5):
            left = len(device.pending)
            target = left - chance.randrange(5, 50)
            wait_until(lambda target=target: len(device.pending) <= target, 30, "some more frames are receipted")
            # Anywhere between two receipts: while receiving, inserting, committing, acknowledging.
            threading.Event().wait(chance.uniform(0, 0.08))
            process.end()
            process.start()
            wait_until(lambda kill=kill: process.says("listening to") == kill + 2, 30, "the gateway is back")
        wait_until(lambda: device.done, 60, "all 300 are receipted")
        device.stop()
        assert sorted(stored_frames(store)) == [("5b001", s) for s in range(1, 301)]
        assert process.end(signal.SIGTERM) == 0
        store.close()


@pytest.mark.slow
def test_a_coordinator_away_for_3000_frames_gets_them_all(tmp_path, gateway):
    """The broker keeps 5 messages for it and says success to all; the device's spool holds the rest until it is back."""
    with mosquitto(tmp_path / "broker", "max_queued_messages 5\nmax_inflight_messages 20") as broker:
        store = make_store(settings_for(tmp_path, broker.settings))
        process = gateway(broker.port)
        process.start()
        wait_until(lambda: process.says("listening to") == 1, 30, "the gateway has a session at the broker")
        process.end()

        payloads = {s: make_payload("d", s, samples=1) for s in range(1, 3001)}
        device = ScriptedDevice("d", broker.settings, payloads, window=3000, resend_seconds=5.0)
        device.start()
        wait_until(lambda: device.sent >= 3000, 60, "all 3000 are published")
        assert device.receipts == []
        device.window = 256
        process.start()
        wait_until(lambda: device.done, 120, "all 3000 are receipted")
        device.stop()
        assert sorted(stored_frames(store)) == [("5b001", s) for s in range(1, 3001)]
        store.close()
