"""Bring-up and revocation as an operator does them: the real commands, the broker as shipped, TLS everywhere."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from datetime import datetime
from pathlib import Path

import pytest
from cryptography import x509

import edge_agent
from coordinator.authority import key_pem, new_key, serial_hex
from coordinator.backbones import prepare
from coordinator.settings import load_settings
from edge_agent import renewal
from edge_agent.first_steps import FirstSteps
from edge_agent.settings import AgentSettings
from edge_agent.trusted_clock import TrustedClock
from side_tuning.broker_connection import BrokerConnection
from side_tuning.broker_settings import BrokerSettings
from side_tuning.bundle import read_bundle
from side_tuning.wire import topics
from side_tuning.wire.messages import Command, Health
from tests.backbones.models import minilm_folder
from tests.brokers import RunningBroker, free_port, mosquitto_program, needs_mosquitto
from tests.coordinator.enrolling import Asker, certificate_of, listed
from tests.flash.images import boot_file, make_image, needs_image_tools
from tests.flash.test_first_boot import SYSTEMS
from tests.tls_broker import BROKER_CONFIG, write_configuration
from tests.waiting import wait_until

pytestmark = [pytest.mark.broker, pytest.mark.slow, needs_mosquitto]

WAIT_SECONDS = 120.0


def coordinator(config, *arguments):
    done = subprocess.run(
        [sys.executable, "-m", "coordinator.cli", *arguments, "--config", str(config)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    """Initialised; the broker, the enrolment program and the gateway running; the configuration file."""
    tmp_path = tmp_path_factory.mktemp("fleet")
    port, claims_port = free_port(), free_port()
    config = tmp_path / "coordinator.toml"
    config.write_text(
        f'data_directory = "{tmp_path / "data"}"\n[broker]\nhost = "127.0.0.1"\nport = {port}\nreconnect_max_seconds = 0.5\n'
        f'[enrolment]\nclaims_port = {claims_port}\n[task]\nlabels = ["a", "b"]\n'
    )
    coordinator(config, "init")
    settings = load_settings(config)
    (tmp_path / "broker").mkdir()
    broker_config = write_configuration(tmp_path / "broker", settings.broker_directory, port=port, claims_port=claims_port)
    environment = {"BROKER_CONFIG": str(broker_config), "MOSQUITTO": mosquitto_program()}
    command = ["env", *(f"{name}={value}" for name, value in environment.items()), "sh", str(BROKER_CONFIG / "start-broker")]
    broker = RunningBroker(command, port, tmp_path / "broker.log")
    broker.start()
    programs = []
    for name in ("enrolment", "gateway"):
        log = tmp_path / f"{name}.log"
        with log.open("wb") as file:
            programs.append(subprocess.Popen([sys.executable, "-m", "coordinator.cli", name, "--config", str(config)], stderr=file))
    try:
        for name in ("enrolment", "gateway"):
            wait_until(lambda name=name: "listening to" in (tmp_path / f"{name}.log").read_text(), WAIT_SECONDS, f"the {name} runs: {tmp_path}")
        yield config
    finally:
        for program in programs:
            program.terminate()
        for program in programs:
            program.wait(60)
        broker.stop()


class Client:
    """A device (or a claim) at the broker with the files that it was given; `lost` has why its connection ended."""

    def __init__(self, folder: Path, bundle, certificate: bytes, key: bytes, *, port, name="kitchen"):
        folder.mkdir()
        for file, content in (("ca.pem", bundle.authorities.encode()), ("client.pem", certificate), ("client.key", key)):
            (folder / file).write_bytes(content)
            os.chmod(folder / file, 0o600)
        self.settings = BrokerSettings(
            host="127.0.0.1", port=port, ca_file=folder / "ca.pem", certificate_file=folder / "client.pem", key_file=folder / "client.key",
            reconnect_max_seconds=0.5,
        )
        self.lost, self.name = [], name

    def connect(self, **more):
        self.connection = BrokerConnection(self.settings, self.name, on_disconnected=self.lost.append, **more)
        self.connection.start()
        return self.connection


def report(connection, certificate):
    device = connection.client_id
    health = Health("online", f"s{connection.epoch}", time.time(), certificate_serial=serial_hex(certificate))
    assert connection.publish(topics.health(device), health.to_bytes(), retain=True).wait(30)


def test_from_a_bundle_to_a_certificate_and_out_again(fleet, tmp_path):
    coordinator(fleet, "enrol", "kitchen", "--out", str(tmp_path / "bundle.json"))
    bundle = read_bundle(tmp_path / "bundle.json")
    claim = Client(tmp_path / "claim", bundle, bundle.claim_certificate.encode(), bundle.claim_key.encode(), port=bundle.claims_port)

    asker = Asker(claim.settings, bundle.claim, "kitchen")
    answer = asker.ask("issued")
    assert asker.ask("issued").certificate == answer.certificate
    asker.stop()
    certificate = certificate_of(answer)
    assert x509.load_pem_x509_certificate(answer.authorities).subject == certificate.issuer
    device = Client(tmp_path / "device", bundle, answer.certificate, key_pem(asker.key), port=bundle.port)
    connection = device.connect()
    wait_until(lambda: connection.connected, WAIT_SECONDS, "the device comes in with its certificate")

    # The gateway notes it from the first health message; from then on the bundle is worthless.
    report(connection, certificate)

    def bundle_is_worthless():
        again = BrokerConnection(claim.settings, bundle.claim)
        again.start()
        try:
            wait_until(lambda: again.connected or again.failures, WAIT_SECONDS)
            return not again.connected
        finally:
            again.stop()

    wait_until(bundle_is_worthless, WAIT_SECONDS, "the claim is on the broker's revocation list")

    renewing = Asker(device.settings, "kitchen", "kitchen", key=new_key())  # takes the device's place: one client a name
    second = renewing.ask("issued")
    assert second.certificate != answer.certificate
    renewing.stop()
    wait_until(lambda: connection.connected, WAIT_SECONDS)
    device.lost.clear()

    coordinator(fleet, "devices", "revoke", "kitchen", "--reason", "stolen")
    wait_until(lambda: device.lost, WAIT_SECONDS, "it is thrown out")
    wait_until(lambda: connection.failures > 3 and not connection.connected, WAIT_SECONDS, "and not let in again")
    assert "revoked" in connection.last_error
    newer = Client(tmp_path / "newer", bundle, second.certificate, key_pem(renewing.key), port=bundle.port)
    other = newer.connect()
    wait_until(lambda: other.failures > 1, WAIT_SECONDS, "its other certificate is revoked with it")
    assert other.epoch == 0
    for one in (connection, other):
        one.stop()
    audit = coordinator(fleet, "audit")
    for words in ("claim issued", "certificate issued", "certificate renewed", "device revoked"):
        assert words in audit
    assert topics.CLAIM_PREFIX in audit


def test_the_agents_own_enrolment_and_renewal_with_the_coordinators(fleet, tmp_path, monkeypatch):
    """`edge-agent enrol`, then `coordinator devices rotate`: order -> new key -> new certificate -> seen -> the old one is revoked."""
    monkeypatch.setattr(renewal, "LOOK_SECONDS", 0.1)
    bundle, state = tmp_path / "bundle.json", tmp_path / "state"
    coordinator(fleet, "enrol", "attic", "--out", str(bundle))
    command = [sys.executable, "-m", "edge_agent.cli", "enrol", "--bundle", str(bundle), "--state", str(state)]
    enrolled = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_SECONDS, check=False)
    assert enrolled.returncode == 0, enrolled.stderr
    assert not bundle.exists()

    orders = []

    def arrived(message):
        if message.topic == topics.command("attic"):
            orders.append(Command.from_bytes(message.payload))
            renewing.ask_now()
        else:
            renewing.offer(message)

    agent = AgentSettings(state_directory=state, backbone={"folder": state})
    connection = BrokerConnection(
        agent.broker, "attic", subscriptions=[topics.command("attic"), topics.certificate_answer("attic")], on_message=arrived
    )
    renewing = renewal.Renewal(connection, state, TrustedClock(state, time.time))
    ending = threading.Event()
    thread = threading.Thread(target=renewing.run, args=(ending,))
    connection.start()
    thread.start()
    try:
        wait_until(lambda: connection.connected, WAIT_SECONDS)
        first = present_certificate(state)
        report(connection, first)
        coordinator(fleet, "devices", "rotate", "attic")
        wait_until(lambda: present_certificate(state) != first and connection.epoch > 1, WAIT_SECONDS, "it comes back with a new certificate")
        assert [order.name for order in orders] == ["renew-certificate"]
        assert present_certificate(state).public_key() != first.public_key()
        wait_until(lambda: connection.connected, WAIT_SECONDS)
        report(connection, present_certificate(state))
        revocations = load_settings(fleet).broker_directory / "fleet-revoked.pem"
        wait_until(lambda: serial_hex(first) in listed(revocations), WAIT_SECONDS, "the old one is revoked")
    finally:
        ending.set()
        thread.join()
        connection.stop()
    assert renewing.error == ""


def present_certificate(state):
    return x509.load_pem_x509_certificate((state / "identity" / "client.pem").read_bytes())


def test_a_flashed_device_shows_its_whole_way_to_the_first_stored_sample(fleet, tmp_path):
    """What `first-boot.sh` leaves, then the real agent with its bundle; everything in order, in `coordinator devices show`."""
    backbone, state, bundle = tmp_path / "backbone", tmp_path / "state", tmp_path / "porch.bundle"
    prepare(minilm_folder(), backbone, layers=1, weights="int8", max_tokens=128)
    coordinator(fleet, "backbone", "register", str(backbone))
    coordinator(fleet, "enrol", "porch", "--out", str(bundle))
    (boot := tmp_path / "boot" / "mobillm").mkdir(parents=True)
    (boot / "flashed.json").write_text(json.dumps({"device": "porch", "flashed_at": time.time()}))
    shutil.copy(Path(edge_agent.__file__).parent / "flash" / "first-boot.sh", boot)
    environment = {**os.environ, "MOBILLM_STATE_DIRECTORY": str(state), "MOBILLM_CONFIGURATION_DIRECTORY": str(tmp_path / "etc")}
    subprocess.run(["sh", str(boot / "first-boot.sh")], env=environment, check=True)
    (tmp_path / "rows.jsonl").write_text('{"text": "light on", "label": "a"}\n{"text": "light off", "label": "b"}\n')
    config = tmp_path / "agent.toml"
    config.write_text(
        f'state_directory = "{state}"\nbundle_file = "{bundle}"\n[backbone]\nfolder = "{backbone}"\n[health]\nevery_seconds = 1\n'
        f'[[sources]]\nkind = "file"\npath = "{tmp_path / "rows.jsonl"}"\n'
    )

    def shown():
        return json.loads(coordinator(fleet, "devices", "show", "porch", "--json"))["first_steps"]

    log = tmp_path / "agent.log"
    with log.open("wb") as file:
        agent = subprocess.Popen([sys.executable, "-m", "edge_agent.cli", "run", "--config", str(config)], stderr=file)
    try:
        wait_until(lambda: agent.poll() is not None or all(step["done"] for step in shown()), WAIT_SECONDS, f"every step: {log}")
        assert agent.poll() is None, log.read_text()
        own = FirstSteps(state)  # as the device keeps them
        wait_until(lambda: "stored" in (FirstSteps(state).times() or ()), WAIT_SECONDS, "its first receipt")
    finally:
        agent.terminate()
        agent.wait(60)
    steps = shown()
    names = [step["step"] for step in steps]
    assert sorted(names) == sorted(["claimed", "flashed", "booted", "configured", "network", "clock", "enrolled", "backbone", "seen", "stored"])
    # This machine was booted long before, so what is said of the boot and the card stands elsewhere than on a board.
    assert [name for name in names if name not in ("booted", "flashed", "clock")] == [
        "claimed", "configured", "network", "enrolled", "backbone", "seen", "stored",
    ]
    times = [step["at"] for step in steps if step["step"] != "flashed"]
    assert None not in times
    assert times == sorted(times)
    assert not any(step["overdue"] for step in steps)
    reported, stored = own.times(), {step["step"]: step["at"] for step in steps}
    assert reported is not None
    assert reported["network"] == pytest.approx(datetime.fromisoformat(stored["network"]).timestamp(), abs=5)


@needs_image_tools
def test_three_cards_are_three_devices_and_a_copied_card_is_refused(fleet, tmp_path):
    """A batch with real bundles: each card's own claim lets one board in, under its own name; a second board with a copy of it is told no."""
    names = ("shelf-one", "shelf-two", "shelf-three")
    (tmp_path / "bundles").mkdir()
    for name in names:
        coordinator(fleet, "enrol", name, "--out", str(tmp_path / "bundles" / f"{name}.bundle.json"))
    (tmp_path / "fleet.csv").write_text("device\n" + "\n".join(names) + "\n")
    image = make_image(tmp_path / "os.img", SYSTEMS["cloud-init"], root_megabytes=1)
    flashed = subprocess.run(
        [
            sys.executable, "-m", "edge_agent.cli", "flash", "--image", str(image), "--fleet", str(tmp_path / "fleet.csv"),
            "--target", str(tmp_path / "card-{device}"), "--bundles", str(tmp_path / "bundles"), "--labels", str(tmp_path / "labels"),
        ],
        capture_output=True, text=True, timeout=120, check=False,
    )
    assert flashed.returncode == 0, flashed.stderr

    subjects = set()
    for number, name in enumerate(names):
        (tmp_path / f"{name}.bundle").write_bytes(boot_file(tmp_path / f"card-{name}", "mobillm/device.bundle"))
        bundle = read_bundle(tmp_path / f"{name}.bundle")
        claim = Client(tmp_path / f"claim-{number}", bundle, bundle.claim_certificate.encode(), bundle.claim_key.encode(), port=bundle.claims_port)
        board = Asker(claim.settings, bundle.claim, name)
        subjects.add(certificate_of(board.ask("issued")).subject.rfc4514_string())
        copy = Asker(claim.settings, bundle.claim, name)  # with a key of its own
        answer = copy.ask()
        assert (answer.status, answer.reason, answer.certificate) == ("refused", "claim-spent", b"")
        board.stop()
        copy.stop()
    assert len(subjects) == 3
    assert coordinator(fleet, "audit").count("certificate refused") >= 3
