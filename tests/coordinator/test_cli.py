"""The command line as a person uses it: real processes, clear words, exit code 78 for what a restart cannot cure."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from datetime import datetime, timezone

import pytest

from coordinator.files import held
from coordinator.store.engine import open_store
from coordinator.store.rejections import insert_rejection
from side_tuning.wire import topics
from tests.brokers import free_port, mosquitto, needs_mosquitto
from tests.coordinator.fleet import MANIFEST, PLAN, ScriptedDevice, make_payload, settings_file
from tests.waiting import wait_until


def coordinator(*arguments, config=None, **environment):
    command = [sys.executable, "-m", "coordinator.cli", *arguments]
    if config is not None:
        command += ["--config", str(config)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, **environment})


@pytest.fixture
def config(tmp_path):
    return settings_file(tmp_path, free_port())


@pytest.fixture
def artifact(tmp_path):
    folder = tmp_path / "backbone"
    folder.mkdir()
    (folder / "manifest.json").write_text(MANIFEST.to_json())
    return folder


def test_check_config_shows_effective_settings_with_secrets_masked(config):
    result = coordinator(
        "check-config", config=config, COORDINATOR_DATABASE_URL="postgresql://me:secret@db/fleet", COORDINATOR_BROKER__PORT="2000"
    )
    assert result.returncode == 0, result.stderr
    assert "broker.port = 2000" in result.stdout
    assert "me:***@db/fleet" in result.stdout
    assert "secret" not in result.stdout + result.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("data_directory = [", "no valid TOML"),
        ('data_directory = "x"', "broker: is missing"),
        ('data_directory = "x"\nspeed = 3\n[broker]\nhost = "h"\n[task]\nlabels = ["a", "b"]', "speed: is unknown"),
        ('data_directory = "x"\n[broker]\nhost = "h"\n[task]\nlabels = ["a", "a"]', "listed twice"),
        ('data_directory = "x"\n[broker]\nhost = "h"\n[task]\n', "task.labels: Value error, classification takes two labels or more"),
        ('data_directory = "x"\n[broker]\nhost = "h"\n[task]\nkind = "regression"\nlabels = ["a", "b"]', "take task.labels out"),
        ('data_directory = "x"\n[broker]\nhost = "h"\n[task]\nkind = "causal-lm"\n[plan]\nmode = "pooled"', "take plan.mode out"),
        ('data_directory = "x"\n[broker]\nhost = "h"\nport = 99999\n[task]\nlabels = ["a", "b"]', "broker.port"),
    ],
)
def test_settings_that_cannot_work_are_named_and_exit_with_78(tmp_path, text, words):
    path = tmp_path / "c.toml"
    path.write_text(text)
    result = coordinator("gateway", config=path)
    assert result.returncode == 78
    assert words in result.stderr
    assert "Traceback" not in result.stderr


def test_a_missing_file_and_a_missing_database_say_the_cure(tmp_path, config):
    missing = coordinator("check-config", config=tmp_path / "nowhere.toml")
    assert (missing.returncode, "--config" in missing.stderr) == (78, True)
    unmade = coordinator("gateway", config=config)
    assert unmade.returncode == 78
    assert "coordinator database upgrade" in unmade.stderr


def test_a_data_directory_that_cannot_be_made_is_told_plainly(tmp_path, config):
    (tmp_path / "file").write_text("")
    for program in ("run", "gateway"):
        result = coordinator(program, config=config, COORDINATOR_DATA_DIRECTORY=str(tmp_path / "file" / "data"))
        assert result.returncode == 1
        assert "a file stands where a folder should be" in result.stderr
        assert "Traceback" not in result.stderr


def test_a_port_that_is_taken_is_named_before_anything_starts(config, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = coordinator("run", "--broker", "embedded", config=config, COORDINATOR_BROKER__PORT=str(taken.getsockname()[1]))
    assert result.returncode == 78
    assert "--broker external" in result.stderr
    assert "started, process" not in result.stderr


def test_a_second_gateway_on_the_same_data_is_refused(config, tmp_path):
    coordinator("database", "upgrade", config=config)
    with held(tmp_path / "data" / "gateway.lock", AssertionError("nobody holds it")):
        result = coordinator("gateway", config=config)
    assert result.returncode == 1
    assert "another gateway runs" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_plan_that_a_backbone_cannot_carry_out_is_given_out_with_a_warning(config, artifact):
    coordinator("database", "upgrade", config=config)
    coordinator("backbone", "register", str(artifact), config=config)
    made = coordinator("plan", "set", "--mode", "sequence", "--rank", "64", "--max-tokens", "64", config=config)
    assert made.returncode == 0
    assert "WARNING" in made.stderr
    assert "lower the plan's rank to 16" in made.stderr
    assert "WARNING" not in coordinator("plan", "set", "--rank", "16", config=config).stderr


def test_backbones_and_plans_by_hand(config, artifact):
    assert coordinator("database", "upgrade", config=config).returncode == 0
    assert coordinator("database", "check", config=config).returncode == 0
    assert MANIFEST.fingerprint in coordinator("backbone", "register", str(artifact), config=config).stdout
    assert MANIFEST.fingerprint in coordinator("backbone", "list", config=config).stdout
    first = coordinator("plan", "set", "--codec", "int8", config=config).stdout
    assert ": 2 blocks" in first
    assert "int8" in coordinator("plan", "show", config=config).stdout
    own = coordinator("plan", "set", "--device", "kitchen", "--rank", "8", config=config).stdout
    assert _version(own) > _version(first) > 1_700_000_000_000, "versions come from the clock"
    wrong = coordinator("plan", "set", "--codec", "int3", config=config)
    assert wrong.returncode == 78
    assert "int3" in wrong.stderr
    assert "no device" in coordinator("devices", config=config).stdout
    nowhere = coordinator("backbone", "register", str(artifact / "x"), config=config)
    assert nowhere.returncode == 1
    assert "coordinator backbone prepare" in nowhere.stderr


def _version(said: str) -> int:
    return int(re.search(r"version (\d+)", said).group(1))


def test_rejections_are_listed_and_retried(config, artifact, tmp_path):
    coordinator("database", "upgrade", config=config)
    plan = replace(PLAN, codec="rot4", version=_version(coordinator("plan", "set", config=config).stdout))  # what the settings ask for
    store = open_store(f"sqlite:///{tmp_path / 'data' / 'coordinator.db'}")
    with store.write() as session:
        for sequence in (1, 2):
            insert_rejection(
                session, device="d", topic=topics.activations("d"), payload=make_payload("d", sequence, plan=plan), spool="5b001", sequence=sequence,
                reason="backbone is not registered", received_at=datetime.now(timezone.utc), samples=2,
            )
    store.close()
    assert "not registered" in coordinator("rejections", "list", config=config).stdout
    still = coordinator("rejections", "retry", config=config)
    assert "2 are still rejected" in still.stdout, still.stderr
    coordinator("backbone", "register", str(artifact), config=config)
    assert "2 frames stored with 4 samples, 0 are still rejected" in coordinator("rejections", "retry", config=config).stdout
    devices = json.loads(coordinator("devices", "--json", config=config).stdout)
    assert devices[0]["stored_samples"] == 4


def test_a_gateway_says_what_it_listens_to_and_ends_cleanly(config, artifact, tmp_path):
    """Unreachable broker: said once, with the cure; then it comes up and everything works; SIGTERM is exit 0."""
    coordinator("database", "upgrade", config=config)
    coordinator("backbone", "register", str(artifact), config=config)
    process = subprocess.Popen([sys.executable, "-m", "coordinator.cli", "gateway", "--config", str(config)], stderr=subprocess.PIPE, text=True)
    try:
        line = _read_until(process, "cannot be reached")
        assert "is it running?" in line
        port = int(re.search(r"127\.0\.0\.1:(\d+)", line).group(1))
        if needs_mosquitto.args[0]:
            return
        with mosquitto(tmp_path / "m", port=port):
            assert "mobillm/v1/+/up/activations" in _read_until(process, "listening to")
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
    finally:
        process.kill()


def _read_until(process, words):
    for line in process.stderr:
        if words in line:
            return line
    raise AssertionError(f"the process ended without saying {words!r}")


@pytest.mark.broker
@needs_mosquitto
def test_refused_credentials_are_said_with_the_cure(config, artifact, tmp_path):
    coordinator("database", "upgrade", config=config)
    port = int(re.search(r"port = (\d+)", config.read_text()).group(1))
    with mosquitto(tmp_path / "m", port=port, anonymous=False):
        process = subprocess.Popen([sys.executable, "-m", "coordinator.cli", "gateway", "--config", str(config)], stderr=subprocess.PIPE, text=True)
        try:
            assert "check username" in _read_until(process, "refuses the credentials")
        finally:
            process.kill()


@pytest.mark.parametrize("choice", ["embedded", pytest.param("mosquitto", marks=needs_mosquitto)])
@pytest.mark.broker
def test_run_starts_everything_and_ends_it(config, artifact, tmp_path, choice):
    """One command: database made, broker, gateway and trainer up, a device's frames stored; one SIGTERM ends all."""
    port = int(re.search(r"port = (\d+)", config.read_text()).group(1))
    log = (tmp_path / "run.log").open("w+")
    process = subprocess.Popen(
        [sys.executable, "-m", "coordinator.cli", "run", "--broker", choice, "--config", str(config)], stderr=log, stdout=log
    )
    try:
        database = tmp_path / "data" / "coordinator.db"
        wait_until(lambda: "listening to" in (tmp_path / "run.log").read_text(), 40, "the gateway listens")
        assert coordinator("backbone", "register", str(artifact), config=config).returncode == 0
        store = open_store(f"sqlite:///{database}", read_only=True)
        from coordinator.store.registry import newest_plan

        def plan():
            with store.read() as session:
                return newest_plan(session)

        wait_until(plan, 20, "the gateway gives out a plan")
        from side_tuning.broker_settings import BrokerSettings

        one = ScriptedDevice("d", BrokerSettings(host="127.0.0.1", port=port, tls=False), {s: make_payload("d", s) for s in range(1, 21)})
        one.start()
        wait_until(lambda: one.done, 30, "all frames are receipted")
        one.stop()
        assert "all accounted for" in coordinator("devices", config=config).stdout
        pids = [int(pid) for pid in re.findall(r"started, process (\d+)", (tmp_path / "run.log").read_text())]
        assert len(pids) >= 3
        process.send_signal(signal.SIGTERM)
        assert process.wait(40) == 0
        for pid in pids:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)
    finally:
        process.kill()
        log.close()


def test_run_refuses_a_local_broker_for_another_machine(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text(f'data_directory = "{tmp_path}/d"\n[broker]\nhost = "broker.example"\n[task]\nlabels = ["a", "b"]\n')
    result = coordinator("run", "--broker", "embedded", config=path)
    assert result.returncode == 78
    assert "broker.tls = false" in result.stderr
