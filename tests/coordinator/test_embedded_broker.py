"""The embedded broker does, through paho, everything that the demonstration needs of a broker."""

import os
import queue
import signal
import socket
import subprocess
import sys

import pytest

from side_tuning.broker_connection import BrokerConnection, BrokerSettings, Message
from tests.brokers import RunningBroker, free_port
from tests.waiting import wait_until

PROGRAM = "import sys; from coordinator.embedded_broker import run; run(int(sys.argv[1]))"


@pytest.fixture
def broker(tmp_path):
    port = free_port()
    running = RunningBroker([sys.executable, "-c", PROGRAM, str(port)], port, tmp_path / "broker.log")
    running.start()
    yield running
    running.stop()


@pytest.fixture
def connect(broker):
    """Make connections that are closed in the end."""
    made = []

    def make(name, **options) -> BrokerConnection:
        connection = BrokerConnection(broker.settings, name, **options)
        connection.start()
        made.append(connection)
        wait_until(lambda: connection.connected, 10, f"{name} connects")
        return connection

    yield make
    for connection in made:
        connection.stop()


def test_large_messages_arrive_whole_and_are_acknowledged_by_hand(connect):
    """300 messages of 160 KiB, acknowledged only after they were taken in, in order, each exactly once."""
    received: queue.Queue[Message] = queue.Queue()
    reader = connect("reader", subscriptions=["t/+/x"], on_message=received.put, manual_ack=True)
    assert reader.protocol == "3.1.1"
    writer = connect("writer")
    payloads = [bytes([n % 256]) * (160 * 1024) for n in range(300)]
    handles = [writer.publish(f"t/{n}/x", payload) for n, payload in enumerate(payloads)]
    for payload in payloads:
        message = received.get(timeout=30)
        assert message.payload == payload
        assert reader.acknowledge(message)
    assert all(handle.wait(10) for handle in handles)
    assert received.empty()


def test_retained_messages_are_replayed_to_each_new_subscriber_and_only_to_it(connect):
    """100 retained messages of 128 KiB come back on subscribe; a client that did not ask for them gets none."""
    writer = connect("writer")
    for n in range(100):
        assert writer.publish(f"kept/{n}", bytes([n]) * 131_072, retain=True).wait(10)
    first: queue.Queue[Message] = queue.Queue()
    connect("first", subscriptions=[f"kept/{n}" for n in range(100)], on_message=first.put)
    assert sorted(first.get(timeout=10).topic for _ in range(100)) == sorted(f"kept/{n}" for n in range(100))

    other: queue.Queue[Message] = queue.Queue()
    stranger = connect("stranger", subscriptions=["echo"], on_message=other.put)
    stranger.publish("echo", b"end")
    assert other.get(timeout=10).topic == "echo"

    assert writer.publish("kept/3", b"", retain=True).wait(10)
    late: queue.Queue[Message] = queue.Queue()
    connect("late", subscriptions=["kept/+"], on_message=late.put)
    assert {late.get(timeout=10).topic for _ in range(99)} == {f"kept/{n}" for n in range(100)} - {"kept/3"}


def test_a_last_will_is_published_when_the_socket_breaks_and_not_after_a_goodbye(connect):
    seen: queue.Queue[Message] = queue.Queue()
    connect("watcher", subscriptions=["state/+"], on_message=seen.put)
    polite = connect("polite", will=("state/polite", b"lost"))
    polite.stop(("state/polite", b"offline"))
    assert seen.get(timeout=10).payload == b"offline"

    program = (
        "import sys, time; from side_tuning.broker_connection import *;"
        "c = BrokerConnection(BrokerSettings(host='127.0.0.1', port=int(sys.argv[1]), tls=False), 'rude', will=('state/rude', b'lost'));"
        "c.start()\nwhile not c.connected: pass\nprint('up', flush=True); time.sleep(60)"
    )
    rude = subprocess.Popen([sys.executable, "-c", program, str(polite.settings.port)], stdout=subprocess.PIPE)
    assert rude.stdout is not None
    assert rude.stdout.readline() == b"up\n"
    rude.kill()
    rude.wait()
    message = seen.get(timeout=10)
    assert (message.topic, message.payload) == ("state/rude", b"lost")
    late: queue.Queue[Message] = queue.Queue()
    connect("late", subscriptions=["state/+"], on_message=late.put)
    assert {late.get(timeout=10).payload for _ in range(2)} == {b"offline", b"lost"}


def test_clients_that_subscribe_and_leave_all_at_once_do_not_cut_off_the_others(connect, broker):
    """Many subscriptions while others connect: plain amqtt changed the table under an iteration and stopped serving."""
    received: queue.Queue[Message] = queue.Queue()
    connect("steady", subscriptions=["steady"], on_message=received.put)
    churn = [connect(f"churn-{n}", subscriptions=[f"c/{n}/{m}" for m in range(60)]) for n in range(10)]
    writer = connect("writer")
    for round_number in range(10):
        for n, connection in enumerate(churn):
            connection.subscribe(f"extra/{n}/{round_number}")
            connection.reconnect()
        writer.publish("steady", str(round_number).encode())
        assert received.get(timeout=10).payload == str(round_number).encode()
    wait_until(lambda: all(connection.connected for connection in churn), 20, "all clients are back")
    for n, connection in enumerate(churn):
        got: queue.Queue[Message] = queue.Queue()
        connection._on_message = got.put
        assert writer.publish(f"extra/{n}/9", b"hello").wait(10)
        assert got.get(timeout=10).payload == b"hello"


def test_it_listens_on_the_loopback_only_and_ends_on_sigterm(broker):
    assert broker.process is not None
    broker.process.send_signal(signal.SIGTERM)
    assert broker.process.wait(10) == 0


def test_a_port_in_use_is_named_with_the_cure(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(port)], capture_output=True, text=True, timeout=30, env=dict(os.environ)
        )
    assert result.returncode != 0
    assert f"cannot listen on 127.0.0.1:{port}" in result.stderr
    assert "another port" in result.stderr


def test_settings_for_it_have_no_tls(broker):
    assert BrokerSettings(host="127.0.0.1", port=broker.port, tls=False).tls is False
