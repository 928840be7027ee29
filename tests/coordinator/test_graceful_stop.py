"""Every server program ends in order on SIGTERM, with exit code 0 and no traceback, also while its broker is away."""

import signal
import subprocess
import sys

import pytest

from coordinator.identities import make_identities
from side_tuning.broker_settings import BrokerSettings
from tests.brokers import free_port
from tests.coordinator.fleet import make_store, now, settings_file, settings_for
from tests.waiting import wait_until

# What each says once it is up, and in front of a broker that is not there.
PROGRAMS = {
    "gateway": (["coordinator.cli", "gateway"], "cannot be reached"),
    "train": (["coordinator.cli", "train"], "waiting for"),
    "enrolment": (["coordinator.cli", "enrolment"], "cannot be reached"),
    "dashboard": (["dashboards", "serve"], "http://"),
    "run": (["coordinator.cli", "run"], "cannot be reached"),
}


@pytest.mark.parametrize("program", [*list(PROGRAMS)[:-1], pytest.param("run", marks=pytest.mark.slow)])
def test_sigterm_ends_it_in_order(tmp_path, program):
    config = settings_file(tmp_path, free_port())
    made = settings_for(tmp_path, BrokerSettings(host="localhost", port=free_port()))
    make_store(made).close()
    make_identities(made, now())
    words, up = PROGRAMS[program]
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, "-m", *words, "--config", str(config)], stdout=file, stderr=file)
    try:
        wait_until(lambda: up in log.read_text(), 180, f"{program} is up")
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0, log.read_text()
        assert "Traceback" not in log.read_text()
        assert not made.alive_file(program).exists()
    finally:
        process.kill()


def test_the_embedded_broker_too(tmp_path):
    log = tmp_path / "log"
    port = free_port()
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, "-m", "coordinator.cli", "broker", "--port", str(port)], stdout=file, stderr=file)
    try:
        wait_until(lambda: str(port) in log.read_text(), 180, "it is up")
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0, log.read_text()
    finally:
        process.kill()
