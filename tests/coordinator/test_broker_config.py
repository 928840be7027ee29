"""The broker files that ship: mosquitto accepts them, and `start-broker` runs it and keeps it up to date.

What the access rules allow and deny is tests/access/."""

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from coordinator.local_broker import mosquitto_configuration
from side_tuning.broker_connection import BrokerConnection
from tests.brokers import RunningBroker, accepts_connections, free_port, mosquitto_program, needs_mosquitto
from tests.tls_broker import BROKER_CONFIG, TlsBroker, tls_broker, write_broker_files, write_configuration
from tests.waiting import wait_until

START_BROKER = BROKER_CONFIG / "start-broker"
SHELLS = [shell for shell in ("sh", "dash", "bash", "busybox") if shutil.which(shell)]
# What start-broker runs; with busybox all of it is busybox's, as in the public image.
PROGRAMS = ("sh", "awk", "sort", "sha256sum", "sleep", "id")
pytestmark = [pytest.mark.broker, needs_mosquitto]


def directives(text):
    return [line.split("#")[0].split() for line in text.splitlines() if line.strip() and not line.startswith("#")]


def test_the_development_file_and_the_one_that_run_writes_are_the_same():
    assert directives((BROKER_CONFIG / "mosquitto.dev.conf").read_text()) == directives(mosquitto_configuration(1883))


def test_mosquitto_starts_with_the_development_file(tmp_path):
    port = free_port()
    path = tmp_path / "mosquitto.dev.conf"
    path.write_text((BROKER_CONFIG / "mosquitto.dev.conf").read_text().replace("listener 1883 ", f"listener {port} "))
    broker = RunningBroker([mosquitto_program(), "-c", str(path)], port, tmp_path / "log")
    broker.start()
    broker.stop()
    assert "Error" not in (tmp_path / "log").read_text()


def test_mosquitto_starts_with_the_production_file(tmp_path):
    """And says nothing but what the files explain: a pattern without a name, rules that all may read, tests as root."""
    with tls_broker(tmp_path) as broker:
        log = broker.running.log.read_text()
    assert re.findall(r"(?m)^\d+: Error.*", log) == []
    explained = re.compile("does not contain|world readable|as root")
    assert [line for line in re.findall(r"Warning: .*", log) if not explained.search(line)] == []


def test_both_listeners_state_every_rule_of_who_may_connect():
    """A line forgotten on one of them would open it, with `per_listener_settings`."""
    listeners = {}
    for words in directives((BROKER_CONFIG / "mosquitto.conf").read_text()):
        if words[0] == "listener":
            current = listeners.setdefault(words[1], {})
        elif listeners and len(words) == 2:
            current[words[0]] = words[1]
    strict = {
        "tls_version": "tlsv1.2",
        "require_certificate": "true",
        "use_identity_as_username": "true",
        "use_username_as_clientid": "true",
        "allow_anonymous": "false",
    }
    assert set(listeners) == {"8883", "8884"}
    for port, kind, rules in (("8883", "fleet", "devices"), ("8884", "claims", "claims")):
        assert {name: listeners[port].get(name) for name in strict} == strict
        assert listeners[port]["cafile"].endswith(f"/{kind}-authority.pem")
        assert listeners[port]["crlfile"].endswith(f"/{kind}-revoked.pem")
        assert listeners[port]["acl_file"].endswith(f"/{rules}.acl")


@pytest.mark.parametrize("shell", SHELLS)
def test_start_broker_is_plain_shell(shell):
    command = ["busybox", "sh"] if shell == "busybox" else [shell]
    subprocess.run([*command, "-n", str(START_BROKER)], check=True)


class Script:
    """A running start-broker, and what it said."""

    def __init__(self, folder: Path, configuration: Path, shell: str) -> None:
        self.output = folder / "output"
        environment = os.environ | {"BROKER_CONFIG": str(configuration), "MOSQUITTO": mosquitto_program()}
        (folder / "bin").mkdir()
        for program in PROGRAMS if shell == "busybox" else ("sh",):
            (folder / "bin" / program).symlink_to(shutil.which(shell))
        environment["PATH"] = f"{folder / 'bin'}:{environment['PATH']}"
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                ["sh", START_BROKER],
                env=environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
                # Where pytest runs in the background, Ctrl-C is ignored, and so it would be in every child.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - this test has no threads
            )

    def said(self, text):
        return text in self.output.read_text()

    def wait_for(self, text):
        wait_until(lambda: self.said(text), 60, f"start-broker says {text!r}; it said {self.output.read_text()!r}")

    def end(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def wait_until_running(self):
        # Said after mosquitto has set itself up for signals, which is later than its first listener.
        wait_until(lambda: re.search(r"mosquitto version .* running", self.output.read_text()), 60, "mosquitto runs")

    @property
    def mosquitto(self):
        return int(re.findall(r"runs as process (\d+)", self.output.read_text())[-1])


@pytest.fixture(params=[shell for shell in SHELLS if shell != "bash"])
def site(tmp_path, request):
    """Files, configuration and a script that runs with them; not started yet."""
    authorities = write_broker_files(tmp_path)
    port, claims_port = free_port(), free_port()
    configuration = write_configuration(tmp_path, tmp_path / "broker", port=port, claims_port=claims_port)
    scripts = []

    def start():
        scripts.append(Script(tmp_path, configuration, request.param))
        return scripts[-1]

    running = RunningBroker([], port, tmp_path / "output")
    yield start, TlsBroker(tmp_path, port, claims_port, running, tmp_path / "broker", authorities)
    for script in scripts:
        script.end()


def test_start_broker_waits_for_what_is_missing_and_names_it(site):
    start, broker = site
    revoked = broker.broker_directory / "fleet-revoked.pem"
    content = revoked.read_bytes()
    revoked.unlink()
    script = start()
    script.wait_for(f"waiting for {revoked} ")
    assert not accepts_connections(broker.port)
    revoked.write_bytes(content)
    script.wait_for("mosquitto runs as process")
    wait_until(lambda: accepts_connections(broker.port), 60, "mosquitto listens")


def test_start_broker_can_be_stopped_while_it_waits(site):
    start, broker = site
    (broker.broker_directory / "broker.key").unlink()
    script = start()
    script.wait_for("waiting for")
    script.process.terminate()
    assert script.process.wait(60) == 0


def test_a_new_revocation_list_counts_at_once_and_drops_nobody(site):
    start, broker = site
    script = start()
    script.wait_until_running()
    kitchen, garage = (BrokerConnection(broker.client(name), name) for name in ("kitchen", "garage"))
    late = BrokerConnection(broker.client("garage"), "garage")
    try:
        for connection in (kitchen, garage):
            connection.start()
        wait_until(lambda: kitchen.connected and garage.connected, 60, "both connect")
        broker.revoke("garage")
        script.wait_for("files changed")
        script.wait_for("Reloading config")
        broker.knock()
        late.start()
        wait_until(lambda: late.failures, 60, "the revoked device is turned away")
        assert not late.connected
        assert (kitchen.epoch, garage.epoch) == (1, 1)
        assert kitchen.connected
        assert garage.connected, "a connection that is up outlives its revocation; the enrolment program ends it"
    finally:
        for connection in (kitchen, garage, late):
            connection.stop()


def test_start_broker_starts_mosquitto_again_with_a_new_authority(site):
    """mosquitto reads authorities at its start only; with the old one it would refuse every certificate of the new one."""
    start, broker = site
    script = start()
    script.wait_until_running()
    first = script.mosquitto
    old = BrokerConnection(broker.client("kitchen"), "kitchen")
    broker.authorities = write_broker_files(broker.folder)
    broker.issued.clear()
    new = BrokerConnection(broker.client("kitchen"), "kitchen")
    try:
        new.start()
        wait_until(lambda: new.connected, 60, "a device of the new authority connects")
        old.start()
        wait_until(lambda: old.failures, 60, "one of the old authority does not")
    finally:
        new.stop()
        old.stop()
    script.process.terminate()
    assert script.process.wait(60) == 0
    assert script.mosquitto != first


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_start_broker_passes_on_the_signal_and_ends_well(site, sign):
    start, broker = site
    script = start()
    script.wait_until_running()
    script.process.send_signal(sign)
    assert script.process.wait(60) == 0
    assert script.said("mosquitto ended with 0")
    assert (broker.folder / "data" / "mosquitto.db").exists(), "mosquitto saved what it holds"


def test_start_broker_ends_with_mosquittos_exit_code(site):
    start, _ = site
    script = start()
    script.wait_until_running()
    os.kill(script.mosquitto, signal.SIGKILL)
    assert script.process.wait(60) == 128 + signal.SIGKILL


def test_start_broker_ends_when_mosquitto_refuses_its_configuration(site):
    start, broker = site
    with (broker.folder / "mosquitto.conf").open("a") as configuration:
        configuration.write("no_such_option 1\n")
    script = start()
    assert script.process.wait(60) not in (0, None)
    assert script.said("no_such_option")
