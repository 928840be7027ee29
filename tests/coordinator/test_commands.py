"""Orders that people write reach their device, once, while they are worth anything."""

from datetime import timedelta

import pytest

from coordinator.commands import send_commands
from coordinator.store.commands import KEPT, add_command, commands_to_send, mark_commands_sent
from coordinator.store.health import record_health
from coordinator.store.models import CommandRow
from side_tuning.broker_connection import BrokerConnection
from side_tuning.wire import topics
from side_tuning.wire.messages import Command, Health
from tests.brokers import mosquitto, needs_mosquitto
from tests.coordinator.fleet import make_store, now, settings_for
from tests.waiting import wait_until


@pytest.fixture
def store(tmp_path):
    opened = make_store(settings_for(tmp_path))
    yield opened
    opened.close()


def waiting(store, at):
    with store.read() as session:
        return [(row.device, row.name) for row in commands_to_send(session, at)]


def test_an_order_waits_until_it_is_sent_or_has_expired(store):
    start = now()
    with store.write() as session:
        first = add_command(session, "kitchen", "pause", by="operator", now=start)
        add_command(session, "attic", "resume", by="dashboard", now=start, lifetime=timedelta(seconds=10))
    assert waiting(store, start) == [("kitchen", "pause"), ("attic", "resume")]
    assert waiting(store, start + timedelta(seconds=11)) == [("kitchen", "pause")]
    with store.write() as session:
        mark_commands_sent(session, [first.id], start)
    assert waiting(store, start) == [("attic", "resume")]
    with store.write() as session:
        mark_commands_sent(session, [], start + KEPT + timedelta(days=2))
        assert session.get(CommandRow, first.id) is None, "old orders go"


def test_an_order_waits_for_a_device_that_is_away(store):
    start = now()
    with store.write() as session:
        record_health(session, "kitchen", Health("offline", "s1", start.timestamp()), start)
        add_command(session, "kitchen", "pause", by="operator", now=start)
    assert waiting(store, start) == []
    with store.write() as session:
        record_health(session, "kitchen", Health("online", "s2", start.timestamp() + 1), start + timedelta(seconds=1))
    assert waiting(store, start) == [("kitchen", "pause")]


@pytest.mark.broker
@needs_mosquitto
def test_orders_go_out_over_a_real_broker_and_wait_while_there_is_none(store, tmp_path):
    start = now()
    with store.write() as session:
        row = add_command(session, "kitchen", "renew-certificate", by="operator", now=start)
        add_command(session, "no/device", "pause", by="operator", now=start)
    got = []
    with mosquitto(tmp_path / "broker") as broker:
        device = BrokerConnection(broker.settings, "kitchen", subscriptions=[topics.command("kitchen")], on_message=got.append)
        gateway = BrokerConnection(broker.settings, "gateway")
        assert send_commands(store, gateway, start) == 0, "not connected"
        device.start()
        gateway.start()
        wait_until(lambda: device.connected and gateway.connected, 30)
        # Not retained: the subscription must be in place, so publish until the device has something else first.
        probe = topics.command("kitchen")
        wait_until(lambda: gateway.publish(probe, b"").wait(5) and got, 30, "the subscription is in place")
        assert send_commands(store, gateway, start) == 1
        wait_until(lambda: any(message.payload for message in got), 30)
        command = Command.from_bytes(next(message.payload for message in got if message.payload))
        assert (command.id, command.name) == (str(row.id), "renew-certificate")
        assert abs(command.expires_at - row.expires_at.timestamp()) < 1e-3
        assert send_commands(store, gateway, start) == 0, "sent once"
        device.stop()
        gateway.stop()
