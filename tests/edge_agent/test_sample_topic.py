"""Samples from a local topic: on the disk before they are acknowledged, each once, through restarts of either side."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_agent.sample_topic import TopicSource
from edge_agent.samples import Refusal, Sample
from edge_agent.settings import MqttSourceSettings
from edge_agent.spool import Spool
from side_tuning.broker_connection import BrokerConnection
from tests.brokers import RunningBroker, amqtt, mosquitto, needs_mosquitto
from tests.waiting import wait_until

pytestmark = [pytest.mark.broker, needs_mosquitto]


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[RunningBroker]:
    with mosquitto(tmp_path / "broker") as running:
        yield running


def open_source(broker: RunningBroker, folder: Path, seen: Any = lambda _: False, **options: Any) -> TopicSource:
    settings = MqttSourceSettings(kind="mqtt", topic="home/rows", host="127.0.0.1", port=broker.port, **options)
    source = TopicSource(settings, "home/rows", seen, folder / "inbox")
    wait_until(lambda: source._connection.connected, 20, "the source is connected")
    return source


class Publisher:
    def __init__(self, broker: RunningBroker) -> None:
        self.connection = BrokerConnection(broker.settings, "home")
        self.connection.start()
        wait_until(lambda: self.connection.connected, 20, "the publisher is connected")

    def say(self, *payloads: str | bytes) -> None:
        for payload in payloads:
            body = payload if isinstance(payload, bytes) else payload.encode()
            assert self.connection.publish("home/rows", body).wait(20)


@pytest.fixture
def home(broker: RunningBroker) -> Iterator[Publisher]:
    publisher = Publisher(broker)
    yield publisher
    publisher.connection.stop()


def collect(source: TopicSource, count: int) -> list[Any]:
    found: list[Any] = []
    wait_until(lambda: found.extend(source.poll(16)) or len(found) >= count, 20, f"{count} items")
    return found


def test_messages_become_samples_or_refusals(broker: RunningBroker, home: Publisher, tmp_path: Path) -> None:
    source = open_source(broker, tmp_path)
    try:
        home.say('{"text": "as json", "label": "a"}', "as plain text", "as plain text", '{"broken', b"\xff\xfe", "", '{"text": "x", "split": "held-out"}')
        found = collect(source, 7)
        assert [(s.text, s.label, s.split) for s in found if isinstance(s, Sample)] == [
            ("as json", "a", "train"), ("as plain text", None, "train"), ("as plain text", None, "train"), ("x", None, "held-out"),
        ]
        assert [r.reason for r in found if isinstance(r, Refusal)] == ["broken row", "not UTF-8", "no text"]
        assert len({item.id for item in found}) == 7
        assert not source.exhausted
        assert source.poll(16) == []
    finally:
        source.close()


def test_messages_survive_a_restart_of_the_agent_and_come_once(broker: RunningBroker, home: Publisher, tmp_path: Path) -> None:
    with Spool.open(tmp_path / "spool.db", max_bytes=10**6, policy="pause", clock=lambda: 0.0) as spool:
        source = open_source(broker, tmp_path, spool.seen)
        home.say(*[f"message {n}" for n in range(30)])
        found = collect(source, 30)
        spool.append([sample.id for sample in found[:20]], lambda _s, _p: [b"frame"])
        source.close()  # ten were given and never spooled
        home.say("while the agent was away")
        source = open_source(broker, tmp_path, spool.seen)
        rest = collect(source, 11)
        assert [sample.text for sample in rest] == [*(f"message {n}" for n in range(20, 30)), "while the agent was away"]
        assert [sample.id for sample in rest[:10]] == [sample.id for sample in found[20:]]
        spool.append([sample.id for sample in rest], lambda _s, _p: [b"frame"])
        assert source.poll(16) == []
        assert source._database.execute("SELECT count(*) FROM inbox").fetchone()[0] == 0
        source.close()


def test_a_message_that_comes_twice_with_an_id_counts_once(broker: RunningBroker, home: Publisher, tmp_path: Path) -> None:
    source = open_source(broker, tmp_path)
    try:
        home.say('{"id": 7, "text": "x"}', '{"id": 7, "text": "x"}', "last")
        assert [sample.text for sample in collect(source, 2)] == ["x", "last"]
    finally:
        source.close()


def test_a_full_inbox_leaves_the_rest_with_the_broker(broker: RunningBroker, home: Publisher, tmp_path: Path) -> None:
    taken: set[str] = set()
    source = open_source(broker, tmp_path, taken.__contains__, inbox_bytes=20_000)
    try:
        home.say(*[f"{n:03d} " + "x" * 1000 for n in range(300)])
        found: list[Any] = []

        def all_there() -> bool:
            assert source._bytes < 20_000 + 64 * 1100
            batch = source.poll(16)
            taken.update(sample.id for sample in batch)
            found.extend(batch)
            return len(found) >= 300

        wait_until(all_there, 60, "all messages came through the small inbox")
        assert [int(sample.text[:3]) for sample in found] == list(range(300))
    finally:
        source.close()


def test_it_works_with_an_old_broker(tmp_path: Path) -> None:
    with amqtt(tmp_path / "amqtt") as broker:
        publisher = Publisher(broker)
        source = open_source(broker, tmp_path)
        try:
            wait_until(lambda: publisher.say("hello") or source.poll(4), 20, "a message arrives")
        finally:
            source.close()
            publisher.connection.stop()


def test_a_damaged_inbox_is_moved_aside(broker: RunningBroker, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    open_source(broker, tmp_path).close()
    [inbox] = (tmp_path / "inbox").glob("*.db")
    inbox.write_text("not a database any more " * 100)
    open_source(broker, tmp_path).close()
    assert "is damaged" in caplog.text
    assert len(list((tmp_path / "inbox").glob("*.aside-*"))) >= 1
