"""What is denied besides topics: forged last wills, others' client ids, user names that a client makes up."""

import pytest

from tests.access.conftest import WAIT_SECONDS, Client, confirm, retained, token
from tests.access.rules import CLAIM, may_read, may_write, settings_of
from tests.brokers import needs_mosquitto
from tests.waiting import wait_until

pytestmark = [pytest.mark.broker, needs_mosquitto]

WILLS = [
    ("kitchen", "mobillm/v1/garage/up/health", False),
    ("kitchen", "mobillm/v1/garage/down/receipt", False),
    ("kitchen", "mobillm/v1/kitchen/down/plan", False),
    ("kitchen", "mobillm/v1/fleet/down/plan", False),
    ("kitchen", "$SYS/broker/version", False),
    (CLAIM, "mobillm/v1/kitchen/up/health", False),
    (CLAIM, f"mobillm/v1/{CLAIM}/up/health", False),
    (CLAIM, "mobillm/v1/fleet/down/plan", False),
    ("doctor", "mobillm/v1/kitchen/up/health", False),
    ("kitchen", "mobillm/v1/kitchen/up/health", True),
]


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
@pytest.mark.parametrize("case", WILLS, ids=[f"{name}: {topic}" for name, topic, _ in WILLS])
def test_last_wills(broker, observer, case, protocol):
    """mosquitto accepts the connection and drops the will when it would go out; should it refuse, that is as good."""
    name, topic, allowed = case
    will = token("will")
    client = Client(settings_of(broker, name).model_copy(update={"protocol": protocol}), name, will=(topic, will)).start()
    if client.connected:
        client.break_off()
        wait_until(lambda: f"Client {name} " in broker.log().rsplit(f" as {name} ", 1)[-1], WAIT_SECONDS, "the broker notices")
    client.stop()
    # The name's next connection comes after the will.
    again = Client(settings_of(broker, name), name).start()
    sentinel = token("sentinel")
    again.publish(may_write(name), sentinel)
    observer.wait_for(sentinel)
    again.stop()
    assert (will in observer.payloads()) == allowed
    assert (will in retained(observer, topic)) == allowed
    observer.publish(topic, b"", retain=True)


@pytest.mark.parametrize(("name", "taken"), [("garage", "kitchen"), ("garage", "gateway"), ("garage", "enrolment"), (CLAIM, "kitchen"), (CLAIM, "gateway"), ("doctor", "gateway")])
def test_nobody_takes_anothers_client_id(broker, observer, make_client, name, taken):
    """Neither throws the other out nor gets, or destroys, what is queued for it."""
    victim = make_client(settings_of(broker, taken), taken, [may_read(taken)], clean_start=False, session_expiry_seconds=600)
    confirm(observer, victim, may_read(taken))
    thief = make_client(settings_of(broker, name), taken, [may_read(name)], clean_start=True)
    confirm(observer, thief, may_read(name))
    confirm(observer, victim, may_read(taken))
    assert victim.connection.epoch == 1
    victim.stop()
    queued = token("queued")
    observer.publish(may_read(taken), queued)
    robber = make_client(settings_of(broker, name), taken, clean_start=False, session_expiry_seconds=600)
    robber.stop()
    back = make_client(settings_of(broker, taken), taken, [may_read(taken)], clean_start=False)
    back.wait_for(queued)
    assert queued not in thief.payloads() + robber.payloads()


def test_the_same_name_does_take_over(broker, observer, make_client):
    """So that the test above could fail; and how the enrolment program ends a revoked device's connection."""
    first = make_client(settings_of(broker, "kitchen"), "kitchen", [may_read("kitchen")])
    confirm(observer, first, may_read("kitchen"))
    make_client(settings_of(broker, "kitchen"), "another id")
    wait_until(lambda: not first.connected or first.connection.epoch > 1, WAIT_SECONDS, "the first one is thrown out")


@pytest.mark.parametrize("name", ["kitchen", CLAIM])
@pytest.mark.parametrize("pretended", ["gateway", "enrolment", "garage", "#", ""])
def test_a_user_name_in_the_connection_counts_for_nothing(broker, observer, make_client, name, pretended):
    """The certificate's name alone says who it is."""
    password = broker.folder / "password"
    password.write_text("secret")
    settings = settings_of(broker, name).model_copy(update={"username": pretended, "password_file": password})
    client = make_client(settings, pretended or "x", ["mobillm/v1/+/up/activations", may_read(name)])
    confirm(observer, client, may_read(name))
    foreign = token()
    observer.publish("mobillm/v1/garage/up/activations", foreign)
    confirm(observer, client, may_read(name))
    assert foreign not in client.payloads()
    assert "Not authorized" in client.publish("mobillm/v1/fleet/down/plan", token())
    assert client.publish(may_write(name), token()) == "success"


@pytest.mark.parametrize("topic", ["mobillm/v1/garage/up/activations", "mobillm/v1/fleet/down/plan", "mobillm/v1/kitchen/down/command"])
def test_an_older_protocol_is_denied_the_same(broker, observer, make_client, topic):
    """MQTT 3.1.1 cannot say so: the publish looks successful and goes nowhere."""
    client = make_client(broker.client("kitchen").model_copy(update={"protocol": "3.1.1"}), "kitchen")
    forged, sentinel = token("forged"), token("sentinel")
    client.publish(topic, forged)
    client.publish(may_write("kitchen"), sentinel)
    observer.wait_for(sentinel)
    assert client.connection.protocol == "3.1.1"
    assert forged not in observer.payloads()
