"""The broker files that ship: mosquitto accepts them, and the rules do what they say."""

import re
import subprocess
from pathlib import Path

import pytest

from coordinator.local_broker import mosquitto_configuration
from side_tuning.broker_connection import BrokerConnection
from side_tuning.broker_settings import BrokerSettings
from tests.brokers import RunningBroker, free_port, mosquitto_program, needs_mosquitto
from tests.waiting import wait_until

FOLDER = Path(__file__).parents[2] / "broker_config"
pytestmark = [pytest.mark.broker, needs_mosquitto]


def directives(text):
    return [line.split("#")[0].split() for line in text.splitlines() if line.strip() and not line.startswith("#")]


def test_the_development_file_and_the_one_that_run_writes_are_the_same():
    assert directives((FOLDER / "mosquitto.dev.conf").read_text()) == directives(mosquitto_configuration(1883))


def test_mosquitto_starts_with_the_development_file(tmp_path):
    port = free_port()
    path = tmp_path / "mosquitto.dev.conf"
    path.write_text((FOLDER / "mosquitto.dev.conf").read_text().replace("listener 1883 ", f"listener {port} "))
    broker = RunningBroker([mosquitto_program(), "-c", str(path)], port, tmp_path / "log")
    broker.start()
    broker.stop()
    assert "Error" not in (tmp_path / "log").read_text()


def test_the_production_file_holds_with_its_access_rules(tmp_path):
    """As shipped but for TLS (passwords stand in for certificates): a device reaches its own topics and no others."""
    port = free_port()
    passwords = tmp_path / "passwords"
    passwords.write_text("")
    for name in ("kitchen", "garage", "coordinator"):
        subprocess.run([_passwd(), "-b", str(passwords), name, "secret"], check=True, capture_output=True)
    passwords.chmod(0o644)
    secret = tmp_path / "secret"
    secret.write_text("secret")
    rules = tmp_path / "rules"
    rules.write_text((FOLDER / "mosquitto.acl").read_text())
    text = (FOLDER / "mosquitto.conf").read_text()
    text = re.sub(r"(?m)^(cafile|certfile|keyfile|tls_version|require_certificate|use_identity_as_username).*$", "", text)
    text = text.replace("listener 8883", f"listener {port} 127.0.0.1\npassword_file {passwords}")
    text = text.replace("/etc/mosquitto/mosquitto.acl", str(rules)).replace("/var/lib/mosquitto/", f"{tmp_path}/")
    (tmp_path / "m.conf").write_text(text + "\nuser root\n")
    broker = RunningBroker([mosquitto_program(), "-c", str(tmp_path / "m.conf")], port, tmp_path / "log")
    broker.start()
    seen = []
    login = {"host": "127.0.0.1", "port": port, "tls": False, "password_file": secret}
    clients = {
        name: BrokerConnection(
            BrokerSettings(username=name, **login), name, subscriptions=filters, on_message=lambda m, name=name: seen.append((name, m.topic))
        )
        for name, filters in {
            "coordinator": ["mobillm/v1/+/up/activations"],
            "kitchen": ["mobillm/v1/kitchen/down/receipt", "mobillm/v1/garage/down/receipt", "mobillm/v1/fleet/down/plan"],
            "garage": ["#"],
        }.items()
    }
    try:
        for client in clients.values():
            client.start()
        wait_until(lambda: all(client.connected for client in clients.values()), 10, "all connect")
        kitchen, coordinator = clients["kitchen"], clients["coordinator"]
        kitchen.publish("mobillm/v1/garage/up/activations", b"forged", retain=True)
        kitchen.publish("mobillm/v1/kitchen/up/activations", b"own", retain=True)
        for topic in ("garage/down/receipt", "kitchen/down/receipt", "fleet/down/plan"):
            coordinator.publish(f"mobillm/v1/{topic}", b"x", retain=True)
        wait_until(lambda: ("kitchen", "mobillm/v1/fleet/down/plan") in seen, 10, "the fleet's plan arrives")
        wait_until(lambda: ("coordinator", "mobillm/v1/kitchen/up/activations") in seen, 10, "the device's own frame arrives")
        assert ("coordinator", "mobillm/v1/garage/up/activations") not in seen
        assert ("kitchen", "mobillm/v1/kitchen/down/receipt") in seen
        assert ("kitchen", "mobillm/v1/garage/down/receipt") not in seen
        assert all(topic.startswith(("mobillm/v1/garage/", "mobillm/v1/fleet/down/")) for name, topic in seen if name == "garage")
    finally:
        for client in clients.values():
            client.stop()
        broker.stop()


def _passwd():
    return str(Path(mosquitto_program()).parent.parent / "bin" / "mosquitto_passwd")
