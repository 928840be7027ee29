"""The broker connection against real brokers: what a caller may rely on when the network and the broker do not behave."""

from __future__ import annotations

import datetime as dt
import ipaddress
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from pydantic import ValidationError

from side_tuning.broker_connection import (
    BrokerConnection,
    BrokerFilesError,
    BrokerSettings,
    Connected,
    Message,
    PayloadTooLarge,
)
from tests.brokers import amqtt, free_port, mosquitto, needs_mosquitto
from tests.waiting import wait_until

pytestmark = pytest.mark.broker


class Client:
    """A connection under test with what it received."""

    def __init__(self, settings, name="device", **options):
        self.messages: list[Message] = []
        self.connects: list[Connected] = []
        options.setdefault("on_message", self.messages.append)
        self.connection = BrokerConnection(
            settings, name, on_connected=self.connects.append, reconnect_min_seconds=0.05, **options
        )
        self.connection.start()

    def __enter__(self):
        wait_until(lambda: self.connection.connected, 15, "connected")
        return self

    def __exit__(self, *_):
        self.connection.stop()

    def payloads(self):
        return [message.payload for message in self.messages]


@pytest.fixture
def broker(tmp_path):
    with mosquitto(tmp_path) as running:
        yield running


@needs_mosquitto
def test_properties_travel_with_mqtt_5(broker):
    with Client(broker.settings, subscriptions=["a/b"]) as client:
        assert client.connection.protocol == "5"
        handle = client.connection.publish("a/b", b"x", properties={"spool": "s", "sequence": "7"})
        assert handle.wait(5)
        wait_until(lambda: client.messages, 5, "the message comes back")
        assert client.messages[0].properties == {"spool": "s", "sequence": "7"}


def test_falls_back_to_3_1_1_for_a_broker_that_knows_no_mqtt_5(tmp_path):
    with amqtt(tmp_path) as broker, Client(broker.settings, subscriptions=["a/b"]) as client:
        assert client.connection.protocol == "3.1.1"
        assert client.connection.publish("a/b", b"x", properties={"spool": "s"}).wait(5)
        wait_until(lambda: client.payloads() == [b"x"], 5, "the message comes back")


@needs_mosquitto
def test_subscriptions_are_declared_again_after_kill_minus_9(broker):
    with Client(broker.settings, subscriptions=["first"]) as client:
        client.connection.subscribe("second")
        for turn in (b"1", b"2", b"3"):
            broker.kill()
            wait_until(lambda: not client.connection.connected, 5, "the loss is noticed")
            assert client.connection.publish("first", b"lost").rc == "not connected"
            assert "lost" in client.connection.last_error
            broker.start()
            wait_until(lambda: client.connection.connected, 10, "connected again")
            client.messages.clear()
            client.connection.publish("first", turn)
            client.connection.publish("second", turn)
            wait_until(lambda t=turn: client.payloads() == [t, t], 5, "both subscriptions work")
        assert [c.epoch for c in client.connects] == [1, 2, 3, 4]
        assert client.connection.last_error == ""


@needs_mosquitto
def test_a_publish_in_flight_when_the_connection_breaks_fails_and_is_not_sent_again(broker):
    """Resending is the caller's business: the handle says that the message may or may not have arrived."""
    with Client(broker.settings) as client:
        done = []
        broker.suspend()
        handle = client.connection.publish("a", b"x" * 1000, on_done=done.append)
        assert not handle.failed
        broker.kill()
        wait_until(lambda: handle.failed, 10, "the handle fails")
        assert handle.rc == "connection lost"
        assert done == [handle]


@needs_mosquitto
def test_an_acknowledgement_of_an_older_connection_is_dropped(broker):
    settings = broker.settings
    options = {"manual_ack": True, "clean_start": False, "session_expiry_seconds": 60}
    with Client(settings, "gateway", subscriptions=["up"], **options) as gateway, Client(settings, "device") as device:
        device.connection.publish("up", b"1").wait(5)
        wait_until(lambda: gateway.messages, 5, "first delivery")
        early = gateway.messages[0]
        gateway.connection.reconnect()
        wait_until(lambda: len(gateway.messages) == 2, 10, "the unacknowledged message comes again")
        assert gateway.connection.acknowledge(early) is False
        again = gateway.messages[1]
        assert (again.payload, again.epoch) == (b"1", 2)
        assert gateway.connection.acknowledge(again) is True
        gateway.connection.reconnect()
        wait_until(lambda: gateway.connection.epoch == 3 and gateway.connection.connected, 10, "third connection")
        device.connection.publish("up", b"2").wait(5)
        wait_until(lambda: len(gateway.messages) == 3, 5, "only the new one arrives")
        assert gateway.messages[2].payload == b"2"


@pytest.mark.parametrize("kind", [pytest.param(mosquitto, marks=needs_mosquitto), amqtt])
def test_messages_published_together_arrive_in_order_and_are_kept(tmp_path, kind):
    sizes = [1, 113, 126, 127, 128, 300, 16_383, 20_000]  # on both sides of MQTT's length steps
    told = [(f"a/{n}", bytes([n]) * size) for n, size in enumerate(sizes)]
    with kind(tmp_path) as broker, Client(broker.settings, subscriptions=["a/+"]) as client:
        client.connection.publish_all(told, retain=True)
        wait_until(lambda: len(client.messages) == len(told), 10, "all came")
        assert [(message.topic, message.payload) for message in client.messages] == told
        with Client(broker.settings, "later", subscriptions=["a/+"]) as later:
            wait_until(lambda: {(message.topic, message.payload) for message in later.messages} == set(told), 10, "the kept ones")


@needs_mosquitto
def test_messages_acknowledged_together_make_room_and_do_not_come_again(broker):
    options = {"subscriptions": ["a/b"], "manual_ack": True, "clean_start": False, "session_expiry_seconds": 60, "receive_maximum": 4}
    with Client(broker.settings, "reader", **options) as reader, Client(broker.settings, "sender") as sender:
        for n in range(10):
            sender.connection.publish("a/b", bytes([n]))
        done = 0
        while done < 9:  # only what is acknowledged makes room for more
            wait_until(lambda: len(reader.messages) > done, 5, "more came")  # noqa: B023 - used at once
            batch = reader.messages[done:9]
            reader.connection.acknowledge_all(batch)
            done += len(batch)
        wait_until(lambda: len(reader.messages) == 10, 5, "the last one came")
    old = reader.messages
    with Client(broker.settings, "reader", **options) as again:
        wait_until(lambda: again.messages, 5, "what was not acknowledged")
        assert again.payloads() == [b"\x09"]
        again.connection.acknowledge_all(old)  # of the connection before: not counted for this one
        again.connection.acknowledge_all(again.messages)


@needs_mosquitto
def test_the_will_speaks_after_a_crash_and_the_goodbye_after_a_clean_stop(broker, tmp_path):
    program = (
        "import sys, time\n"
        "from side_tuning.broker_connection import *\n"
        "c = BrokerConnection(BrokerSettings(host='127.0.0.1', port=int(sys.argv[1]), tls=False), 'dying',\n"
        "    will=lambda: ('state', b'lost'), on_connected=lambda _: c.publish('state', b'online', retain=True))\n"
        "c.start()\n"
        "time.sleep(60)\n"
    )
    with Client(broker.settings, "watcher", subscriptions=["state"]) as watcher:
        with Client(broker.settings, "polite", will=("state", b"lost")) as polite:
            polite.connection.publish("state", b"online", retain=True).wait(5)
            polite.connection.stop(goodbye=("state", b"offline"))
        process = subprocess.Popen([sys.executable, "-c", program, str(broker.port)])
        try:
            wait_until(lambda: watcher.payloads() == [b"online", b"offline", b"online"], 20, "clean goodbye, no will")
        finally:
            process.kill()
            process.wait()
        wait_until(lambda: watcher.payloads()[-1] == b"lost", 10, "the will")
    with Client(broker.settings, "late", subscriptions=["state"]) as late:
        wait_until(lambda: late.payloads() == [b"lost"], 5, "the will is retained")


@needs_mosquitto
def test_refused_credentials_say_what_to_check(tmp_path):
    passwords = tmp_path / "passwords"
    passwords.write_text("")
    secret = tmp_path / "secret"
    secret.write_text("wrong\n")
    with mosquitto(tmp_path, f"password_file {passwords}", anonymous=False) as broker:
        settings = broker.settings.model_copy(update={"username": "kitchen", "password_file": secret})
        client = Client(settings)
        wait_until(lambda: client.connection.failures >= 2, 10, "two refusals")
        assert "refuses the credentials" in client.connection.last_error
        assert "'kitchen'" in client.connection.last_error
        assert "password_file" in client.connection.last_error
        assert "wrong" not in client.connection.last_error
        client.connection.stop()


@needs_mosquitto
def test_a_broker_that_comes_up_and_refuses_is_told_too(tmp_path, caplog):
    """Each reason once, also one that follows on another."""
    passwords = tmp_path / "passwords"
    passwords.write_text("")
    port = free_port()
    client = Client(BrokerSettings(host="127.0.0.1", port=port, tls=False, reconnect_max_seconds=0.1))

    def told(words):
        return [record for record in caplog.records if record.levelname == "ERROR" and words in record.message]

    try:
        wait_until(lambda: client.connection.failures > 2, 15, "unreachable")
        with mosquitto(tmp_path, f"password_file {passwords}", port=port, anonymous=False):
            wait_until(lambda: told("refuses the credentials"), 15, "told")
            failures = client.connection.failures
            wait_until(lambda: client.connection.failures > failures + 3, 15, "tried again")
    finally:
        client.connection.stop()
    assert (len(told("cannot be reached")), len(told("refuses the credentials"))) == (1, 1)


def test_an_unreachable_broker_is_named_with_its_port():
    port = free_port()
    client = Client(BrokerSettings(host="127.0.0.1", port=port, tls=False))
    wait_until(lambda: client.connection.last_error, 5, "a failure")
    assert f"127.0.0.1:{port} cannot be reached: Connection refused" in client.connection.last_error
    client.connection.stop()
    assert not client.connection.thread_alive


@needs_mosquitto
def test_a_payload_over_the_stated_limit_is_refused_here(tmp_path):
    """Sent, it would end the connection, and again after every reconnect."""
    with mosquitto(tmp_path, "max_packet_size 20000") as broker, Client(broker.settings) as client:
        assert client.connection.max_packet_bytes == 20_000
        with pytest.raises(PayloadTooLarge, match="20000"):
            client.connection.publish("a", b"x" * 20_000)
        assert client.connection.publish("a", b"x" * 19_900).wait(5)
        assert client.connection.epoch == 1


@needs_mosquitto
def test_a_publish_that_the_access_rules_refuse_is_told(tmp_path):
    rules = tmp_path / "acl"
    rules.write_text("topic readwrite open/#\n")
    with mosquitto(tmp_path, f"acl_file {rules}") as broker, Client(broker.settings) as client:
        handle = client.connection.publish("closed/a", b"x")
        wait_until(lambda: handle.failed, 5, "the refusal")
        assert "Not authorized" in handle.rc
        assert client.connection.publish("open/a", b"x").wait(5)


@needs_mosquitto
def test_two_clients_of_the_same_name_are_explained(broker, caplog):
    """They throw each other out for ever; nothing else says why."""
    first, second = (Client(broker.settings, "twin") for _ in range(2))
    wait_until(lambda: "the name 'twin'" in first.connection.last_error + second.connection.last_error, 20, "the cause is named")
    wait_until(lambda: first.connection.failures + second.connection.failures > 12, 30, "more rounds")
    first.connection.stop()
    second.connection.stop()
    assert 1 <= sum("the name 'twin'" in record.message for record in caplog.records if record.levelname == "ERROR") <= 2
    assert sum("connected" in record.message for record in caplog.records if record.levelname == "INFO") <= 8


@needs_mosquitto
def test_a_callback_that_raises_ends_neither_the_loop_nor_the_flow(broker):
    """More poison than the broker's in-flight limit of 20: all must be acknowledged for the good one to come."""
    good = []

    def handle(message: Message) -> None:
        if message.payload == b"poison":
            raise ValueError("poison")
        good.append(message)

    poisoned = Client(broker.settings, "gateway", subscriptions=["up"], manual_ack=True, on_message=handle)
    with poisoned as gateway:
        with Client(broker.settings, "device") as device:
            for _ in range(60):
                device.connection.publish("up", b"poison")
            device.connection.publish("up", b"good")
            wait_until(lambda: good, 10, "the good message gets past 60 bad ones")
        assert gateway.connection.callback_errors == 60


@needs_mosquitto
def test_many_threads_publish_large_payloads_unharmed(broker):
    """Only the loop writes to the socket: two writers would mix their packets."""
    with Client(broker.settings, "reader", subscriptions=["up"]) as reader, Client(broker.settings, "writer") as writer:

        def send(n: int) -> None:
            for _ in range(10):
                writer.connection.publish("up", bytes([n]) * 200_000)

        threads = [threading.Thread(target=send, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wait_until(lambda: len(reader.messages) == 40, 30, "all arrive")
        assert all(len(p) == 200_000 and len(set(p)) == 1 for p in reader.payloads())


def test_settings_that_contradict_each_other_are_refused(tmp_path):
    with pytest.raises(ValidationError, match="go together"):
        BrokerSettings(host="h", certificate_file=tmp_path / "c")
    with pytest.raises(ValidationError, match="tls is false"):
        BrokerSettings(host="h", tls=False, ca_file=tmp_path / "c")
    with pytest.raises(BrokerFilesError, match=r"nowhere\.pem"):
        BrokerConnection(BrokerSettings(host="h", ca_file=tmp_path / "nowhere.pem"), "x")
    with pytest.raises(BrokerFilesError, match="password_file"):
        BrokerConnection(BrokerSettings(host="h", tls=False, username="u", password_file=tmp_path / "nothing"), "x")


def make_certificates(folder: Path) -> None:
    """A throw-away authority and a server certificate for 127.0.0.1."""
    now = dt.datetime.now(dt.timezone.utc)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test authority")])
    authority = ec.generate_private_key(ec.SECP256R1())
    ca = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(authority.public_key())
        .serial_number(1).not_valid_before(now - dt.timedelta(days=1)).not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(authority.public_key()), critical=False)
        .sign(authority, hashes.SHA256())
    )
    key = ec.generate_private_key(ec.SECP256R1())
    server = (
        x509.CertificateBuilder().subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "broker")])).issuer_name(name)
        .public_key(key.public_key()).serial_number(2)
        .not_valid_before(now - dt.timedelta(days=1)).not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(authority, hashes.SHA256())
    )
    (folder / "ca.pem").write_bytes(ca.public_bytes(serialization.Encoding.PEM))
    (folder / "server.pem").write_bytes(server.public_bytes(serialization.Encoding.PEM))
    (folder / "server.key").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )


@needs_mosquitto
def test_tls_is_verified(tmp_path):
    make_certificates(tmp_path)
    (tmp_path / "server.key").chmod(0o644)
    tls = f"certfile {tmp_path}/server.pem\nkeyfile {tmp_path}/server.key"
    with mosquitto(tmp_path, listener_extra=tls) as broker:
        trusted = BrokerSettings(host="127.0.0.1", port=broker.port, ca_file=tmp_path / "ca.pem")
        with Client(trusted, subscriptions=["a"]) as client:
            client.connection.publish("a", b"x" * 300_000)
            wait_until(lambda: client.messages, 5, "works over TLS")
        stranger = Client(BrokerSettings(host="127.0.0.1", port=broker.port))
        wait_until(lambda: stranger.connection.last_error, 5, "refusal")
        assert "cannot be trusted" in stranger.connection.last_error
        assert "ca_file" in stranger.connection.last_error
        stranger.connection.stop()
