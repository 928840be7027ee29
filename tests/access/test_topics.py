"""Every client against every topic on both ports, and attacks by name, with the shipped rules and real mosquitto.

Denied: nothing arrives, nothing is retained. "Nothing arrives" is seen by a later message on the same way that is allowed and
does arrive; the broker keeps the order.
"""

from contextlib import contextmanager

import pytest
from paho.mqtt.client import topic_matches_sub

from tests.access.conftest import WAIT_SECONDS, Client, confirm, retained, token
from tests.access.rules import (
    CLAIM,
    EVERY_TOPIC,
    OTHER_CLAIM,
    READS,
    WRITES,
    may_read,
    may_write,
    settings_of,
)
from tests.brokers import needs_mosquitto
from tests.waiting import wait_until

pytestmark = [pytest.mark.broker, needs_mosquitto]

@pytest.fixture(scope="module")
def clients(broker):
    """A connection for each client, for the whole module, that reads a topic which it may read."""
    clients = {name: Client(settings_of(broker, name), name, [may_read(name)]).start() for name in WRITES}
    assert all(client.connected for client in clients.values())
    yield clients
    for client in clients.values():
        client.stop()


@contextmanager
def subscribed(client, filter_, observer):
    """The client also has this subscription: what it publishes after asking for it has come through."""
    client.connection.subscribe(filter_)
    sentinel = token("subscribed")
    client.publish(may_write(client.connection.client_id), sentinel)
    observer.wait_for(sentinel)
    yield client
    if filter_ != may_read(client.connection.client_id):
        client.connection.unsubscribe(filter_)


# Every client against every topic.


@pytest.mark.parametrize("topic", EVERY_TOPIC)
@pytest.mark.parametrize("name", WRITES)
def test_writing(clients, observer, name, topic):
    payload, sentinel = token(), token("sentinel")
    outcome = clients[name].publish(topic, payload)
    clients[name].publish(may_write(name), sentinel)
    observer.wait_for(sentinel)
    arrived = payload in observer.payloads()
    assert arrived == (topic in WRITES[name])
    if arrived:
        assert outcome == "success"
    else:
        assert "Not authorized" in outcome
        assert "access rules" in outcome


FILTERS = (
    "#", "+/#", "+/+/+/+/+", "mobillm/#", "mobillm/v1/#", "mobillm/v1/+/#", "mobillm/v1/+/+/+", "mobillm/v1/+/up/#", "mobillm/v1/+/down/#",
    "mobillm/v1/+/up/activations", "mobillm/v1/+/up/health", "mobillm/v1/+/up/certificate-request", "mobillm/v1/+/down/certificate",
    "mobillm/v1/+/down/command", "+/v1/garage/up/activations", "mobillm/+/garage/up/activations", "mobillm/v1/garage/#", "mobillm/v1/garage/+/+",
    "mobillm/v1/garage/up/+", "mobillm/v1/garage/down/receipt", "mobillm/v1/garage/down/certificate", "mobillm/v1/kitchen/#",
    "mobillm/v1/gateway/#", "mobillm/v1/enrolment/#", f"mobillm/v1/{OTHER_CLAIM}/#", f"mobillm/v1/{OTHER_CLAIM}/down/certificate",
    "mobillm/v1/fleet/#", "mobillm/v1/fleet/down/+", "$share/group/#", "$share/group/mobillm/v1/garage/down/#", "$share/group/mobillm/v1/+/up/+",
)


@pytest.mark.parametrize("filter_", FILTERS)
@pytest.mark.parametrize("name", READS)
def test_reading(clients, observer, name, filter_):
    """A subscription brings what the client may read of it and nothing else, however it is worded."""
    with subscribed(clients[name], filter_, observer) as reader:
        world = {topic: token() for topic in EVERY_TOPIC}
        for topic, payload in world.items():
            observer.connection.publish(topic, payload)
        confirm(observer, reader, may_read(name))
    received = {message.topic for message in reader.messages() if message.payload in world.values()}
    plain = filter_.removeprefix("$share/group/")
    assert received == {topic for topic in READS[name] if topic_matches_sub(plain, topic)} | {may_read(name)}


# Attacks by name.


@pytest.mark.parametrize("name", READS)
@pytest.mark.parametrize("filter_", ["$SYS/#", "$SYS/broker/version", "$SYS/broker/clients/+", "$share/group/$SYS/#", "$CONTROL/#"])
def test_nobody_sees_the_brokers_own_figures(clients, observer, name, filter_):
    with subscribed(clients[name], filter_, observer) as reader:
        confirm(observer, reader, may_read(name))
    assert [message.topic for message in reader.messages() if message.topic.startswith("$")] == []


def test_the_observer_sees_the_brokers_own_figures(site, make_client):
    """So that the test above could fail."""
    reader = make_client(site[1], "figures", ["$SYS/#"])
    wait_until(lambda: any(message.topic == "$SYS/broker/version" for message in reader.messages()), WAIT_SECONDS, "the version arrives")


RETAINED_ATTACKS = [
    ("kitchen", "mobillm/v1/garage/up/health", "another's health"),
    ("kitchen", "mobillm/v1/garage/down/receipt", "another's receipt"),
    ("kitchen", "mobillm/v1/garage/down/command", "a command to another"),
    ("kitchen", "mobillm/v1/kitchen/down/receipt", "a receipt to itself"),
    ("kitchen", "mobillm/v1/kitchen/down/plan", "a plan for itself"),
    ("kitchen", "mobillm/v1/kitchen/down/certificate", "a certificate for itself"),
    ("kitchen", "mobillm/v1/fleet/down/plan", "a plan for all"),
    ("kitchen", "mobillm/v1/fleet/down/checkpoint.0f", "a checkpoint for all"),
    ("kitchen", f"mobillm/v1/{CLAIM}/up/certificate-request", "a claim's request"),
    (CLAIM, "mobillm/v1/kitchen/up/health", "a device's health"),
    (CLAIM, "mobillm/v1/kitchen/up/certificate-request", "a device's request"),
    (CLAIM, f"mobillm/v1/{OTHER_CLAIM}/up/certificate-request", "another claim's request"),
    (CLAIM, f"mobillm/v1/{CLAIM}/down/certificate", "its own answer"),
    (CLAIM, f"mobillm/v1/{CLAIM}/up/activations", "frames of its own"),
    (CLAIM, "mobillm/v1/fleet/down/plan", "a plan for all"),
    ("gateway", "mobillm/v1/kitchen/down/certificate", "a certificate"),
    ("gateway", "mobillm/v1/kitchen/up/activations", "frames of a device"),
    ("enrolment", "mobillm/v1/kitchen/down/command", "a command"),
    ("enrolment", "mobillm/v1/fleet/down/plan", "a plan for all"),
    ("doctor", "mobillm/v1/kitchen/up/probe", "another's probe"),
    ("doctor", "mobillm/v1/fleet/down/plan", "a plan for all"),
]


@pytest.mark.parametrize(("name", "topic"), [case[:2] for case in RETAINED_ATTACKS], ids=[f"{case[0]}: {case[2]}" for case in RETAINED_ATTACKS])
def test_nothing_forged_is_retained_and_nothing_retained_is_wiped_out(clients, observer, name, topic):
    genuine, forged = token("genuine"), token("forged")
    observer.publish(topic, genuine, retain=True)
    for payload in (forged, b""):  # an empty one would clear the topic
        assert "Not authorized" in clients[name].publish(topic, payload, retain=True)
    assert retained(observer, topic) == [genuine]
    assert forged not in observer.payloads()
    observer.publish(topic, b"", retain=True)


def test_what_is_allowed_is_retained_and_wiped_out(clients, observer):
    """So that the test above could fail."""
    for name, topic in (("kitchen", "mobillm/v1/kitchen/up/health"), ("gateway", "mobillm/v1/fleet/down/plan"), ("gateway", "mobillm/v1/kitchen/down/receipt")):
        payload = token()
        assert clients[name].publish(topic, payload, retain=True) == "success"
        assert retained(observer, topic) == [payload]
        assert clients[name].publish(topic, b"", retain=True) == "success"
        assert retained(observer, topic) == []


@pytest.mark.parametrize("topic", ["$SYS/broker/version", "$SYS/kitchen", "$CONTROL/dynamic-security/v1", "$share/group/mobillm/v1/garage/up/health"])
def test_nobody_writes_to_the_brokers_own_topics(clients, observer, topic):
    sentinel, forged = token("sentinel"), token("forged")
    observer.connection.subscribe("$SYS/#")
    for name in ("kitchen", "gateway"):
        clients[name].connection.publish(topic, forged, retain=True)
        wait_until(lambda name=name: clients[name].connected, WAIT_SECONDS, "connected, after the broker has thrown it out or not")
        wait_until(lambda name=name: clients[name].publish(may_write(name), sentinel) == "success", WAIT_SECONDS, "the sentinel goes out")
    observer.wait_for(sentinel)
    observer.connection.unsubscribe("$SYS/#")
    assert forged not in observer.payloads()
