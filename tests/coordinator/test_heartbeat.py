"""Programs say that they are alive: a row with figures, a file for health checks; a store out of reach hurts nobody."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

from coordinator.heartbeat import Heartbeat
from coordinator.store.engine import open_store
from coordinator.store.programs import program_states
from coordinator.training.figures import MAX_SHARES, device_shares
from side_tuning.alive import alive_trouble, touch_alive
from tests.brokers import free_port, mosquitto, needs_mosquitto
from tests.coordinator.fleet import ScriptedDevice, make_payload, make_store, settings_file, settings_for
from tests.coordinator.test_gateway import RunningGateway
from tests.waiting import wait_until


def states(store):
    with store.read() as session:
        return program_states(session)


@pytest.fixture
def store(tmp_path):
    opened = make_store(settings_for(tmp_path))
    yield opened
    opened.close()


def beating(store, folder, **more):
    options = {"figures": lambda: {"queue": 3}, "every_seconds": 0.02, **more}
    return Heartbeat("gateway", store=store, alive_file=folder / "alive" / "gateway", **options)


def test_the_row_is_replaced_and_the_file_goes_with_an_orderly_end(store, tmp_path):
    file = tmp_path / "alive" / "gateway"
    with beating(store, tmp_path):
        wait_until(lambda: file.exists() and "gateway" in states(store), 20, "it beats")
        first = states(store)["gateway"]
        wait_until(lambda: states(store)["gateway"].at > first.at, 20, "it beats again")
        assert states(store)["gateway"].started_at == first.started_at
        assert first.status == {"looping": True, "queue": 3}
        assert alive_trouble(file, 30) == ""
    assert not file.exists()


def test_a_program_that_does_not_go_round_lets_its_file_grow_old(store, tmp_path):
    file = tmp_path / "alive" / "gateway"
    touch_alive(file)
    os.utime(file, (time.time() - 100,) * 2)
    with beating(store, tmp_path, looping=lambda: False):
        wait_until(lambda: "gateway" in states(store), 20, "it beats")
        assert states(store)["gateway"].status["looping"] is False
        assert "more than 30 s" in alive_trouble(file, 30)


def test_figures_that_fail_and_values_that_json_cannot_hold_are_survived(store, tmp_path):
    answers = iter([ZeroDivisionError("no"), {"loss": math.nan, "shares": {"d": math.inf}, "steps": [1, 2.5]}])

    def figures():
        answer = next(answers, {})
        if isinstance(answer, Exception):
            raise answer
        return answer

    seen = []
    with beating(store, tmp_path, figures=figures, every_seconds=0.2):
        wait_until(lambda: (found := states(store).get("gateway")) and seen.append(found.status) is None, 20, "the second beat is stored")
    assert seen[0] == {"looping": True, "loss": None, "shares": {"d": None}, "steps": [1, 2.5]}


def test_a_database_that_is_locked_delays_neither_the_file_nor_the_end(store, tmp_path):
    file = tmp_path / "alive" / "gateway"
    heartbeat = beating(store, tmp_path)
    with store.write():  # the one writing connection is taken
        heartbeat.start()
        wait_until(file.exists, 20, "the file is touched")
        os.utime(file, (0, 0))
        wait_until(lambda: alive_trouble(file, 30) == "", 20, "it goes on being touched")
    heartbeat.stop()
    assert not file.exists()


def alive(config, name="gateway", **environment):
    command = [sys.executable, "-m", "coordinator.cli", "alive", name, "--config", str(config)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, **environment})


def test_the_health_check_says_why_and_exits_with_0_or_1(tmp_path):
    config = settings_file(tmp_path, free_port())
    assert "does not exist" in (missing := alive(config)).stdout
    touch_alive(tmp_path / "elsewhere" / "gateway")
    fresh = alive(config, COORDINATOR_ALIVE_DIRECTORY=str(tmp_path / "elsewhere"))
    assert (missing.returncode, fresh.returncode, fresh.stdout) == (1, 0, "gateway: alive\n")


def test_the_health_check_is_cheap():
    code = "import side_tuning.alive, coordinator.settings, coordinator.cli, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True).stdout.split()
    assert not {"torch", "sqlalchemy", "numpy", "paho"} & set(loaded)


@pytest.mark.broker
@needs_mosquitto
def test_the_gateways_figures_follow_what_it_stores(tmp_path):
    with mosquitto(tmp_path / "broker") as broker:
        settings = settings_for(tmp_path, broker.settings)
        store = make_store(settings)
        running = RunningGateway(settings, store)
        one = ScriptedDevice("d", broker.settings, {s: make_payload("d", s) for s in range(1, 11)})
        one.start()
        try:
            wait_until(lambda: one.done, 60, "every frame is receipted")
            wait_until(lambda: states(store).get("gateway") and states(store)["gateway"].status["frames"] == 10, 60, "the row says so")
        finally:
            one.stop()
            running.end()
    status = states(store)["gateway"].status
    store.close()
    assert (status["connected"], status["samples"], status["queue_messages"]) == (True, 20, 0)
    assert status["commit_seconds_last"] > 0 < status["commit_seconds_average"]
    assert status["oldest_uncommitted_seconds"] is None
    assert status["wal_bytes"] >= 0
    assert not settings.alive_file("gateway").exists()
    json.dumps(status, allow_nan=False)


def test_a_trainer_without_a_plan_is_alive_and_ends_on_sigterm(tmp_path):
    config = settings_file(tmp_path, free_port())
    settings = settings_for(tmp_path)
    make_store(settings).close()
    process = subprocess.Popen([sys.executable, "-m", "coordinator.cli", "train", "--config", str(config)])
    store = open_store(settings.database_url, read_only=True)
    try:
        wait_until(lambda: "trainer" in states(store) and alive(config, "trainer").returncode == 0, 120, "the trainer beats")
        assert {"run", "looping", "error"} <= set(states(store)["trainer"].status)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert alive(config, "trainer").returncode == 1
    finally:
        process.kill()
        store.close()


def test_shares_of_recent_batches_are_bounded():
    count = MAX_SHARES + 50
    # Sample n is of device n.
    cache = SimpleNamespace(devices=[f"d{number}" for number in range(count)], records=np.array([(n,) for n in range(count)], [("device", "<i4")]))
    found = device_shares(SimpleNamespace(cache=cache, recent=[np.zeros(50, np.int64), np.arange(count)]))
    assert len(found["shares"]) == MAX_SHARES
    assert found["other_devices"] == 50
    assert sum(found["shares"].values()) + found["other_share"] == pytest.approx(1.0)
    assert found["shares"]["d0"] == pytest.approx(51 / 300)
