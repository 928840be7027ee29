"""The gateway sends backbones in its spare time: once for all who wait, in turn, and never before frames are stored."""

from __future__ import annotations

import threading
from collections import Counter

import pytest
from sqlalchemy import select

from coordinator.backbone_desk import BackboneDesk, Wishes
from coordinator.backbone_library import keep_artifact
from coordinator.backbone_offers import BackboneOffers, BackboneShelf
from coordinator.gateway import Gateway
from coordinator.outbox import ensure_signing_key
from coordinator.store.assignments import assign_backbone, assignments, find_backbone
from coordinator.store.audit import audit_entries
from coordinator.store.errors import StoreError
from coordinator.store.models import FrameRow
from coordinator.store.registry import register_backbone
from side_tuning.backbone_manifest import FINGERPRINTED, BackboneError, check_artifact, read_manifest
from side_tuning.broker_connection import BrokerConnection, Message
from side_tuning.signatures import verify_offer
from side_tuning.wire import topics
from side_tuning.wire.backbone_messages import MAX_PARTS_ASKED, BackboneListing, PartRequest
from side_tuning.wire.messages import SignedManifest
from tests.brokers import mosquitto, needs_mosquitto
from tests.coordinator.fleet import MANIFEST, ScriptedDevice, make_payload, make_store, now, settings_for
from tests.edge_agent.travelling import FetchingDevice, make_backbone
from tests.slow_link import slow_downlink
from tests.waiting import wait_until


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return make_backbone(tmp_path_factory.mktemp("artifact"))


def taken(wishes: Wishes) -> list[int]:
    found = []
    while (wish := wishes.take()) is not None:
        found.append(wish[1])
    return found


def wish_for(*parts: int) -> list[tuple[str, int]]:
    return [("ab" * 16, n) for n in parts]


def test_a_part_that_several_wait_for_is_sent_once():
    wishes = Wishes()
    for device in ("kitchen", "garage", "attic"):
        wishes.ask(device, wish_for(*range(8)), afresh=True)
    assert taken(wishes) == list(range(8))


def test_devices_take_turns_and_none_has_more_than_a_few_wishes_open():
    wishes = Wishes()
    wishes.ask("greedy", wish_for(*range(60)), afresh=False)
    wishes.ask("greedy", wish_for(*range(60, 120)), afresh=False)
    wishes.ask("late", wish_for(500, 501), afresh=False)
    order = taken(wishes)
    assert order[:4] == [0, 500, 1, 501]
    assert len(order) == MAX_PARTS_ASKED + 2


def test_asking_afresh_replaces_what_was_asked_before():
    wishes = Wishes()
    wishes.ask("kitchen", wish_for(1, 2, 3), afresh=False)
    wishes.ask("kitchen", wish_for(3, 4), afresh=True)
    assert taken(wishes) == [3, 4]
    wishes.ask("kitchen", wish_for(1), afresh=False)
    wishes.ask("kitchen", [], afresh=True)
    assert taken(wishes) == []


class Sent:
    """In place of a connection, for what a broker would not show."""

    def __init__(self):
        self.topics = []

    def publish(self, topic, payload):
        self.topics.append(topic)

        class Done:
            def wait(self, _seconds):
                return True

        return Done()


def request(device, fingerprint, *parts):
    body = PartRequest(fingerprint, parts, afresh=True).to_bytes()
    return Message(topics.backbone_request(device), body, False, 1, 1, 0)


def test_senseless_requests_are_told_once_and_forgotten(tmp_path, artifact, caplog):
    keep_artifact(tmp_path, artifact)
    fingerprint = read_manifest(artifact).fingerprint
    sent, stop = Sent(), threading.Event()
    desk = BackboneDesk(BackboneShelf(tmp_path), sent, 1e9, busy=lambda: False)
    for message in (
        Message(topics.backbone_request("kitchen"), b"\xc1", False, 1, 1, 0),
        request("kitchen", "ab" * 16, 1),
        request("garage", fingerprint, 8000),
        request("attic", fingerprint, 2),
    ):
        desk.offer(message)
    thread = threading.Thread(target=desk.run, args=(stop,))
    thread.start()
    wait_until(lambda: sent.topics, 10, "the good one is answered")
    stop.set()
    thread.join(10)
    assert sent.topics == [topics.backbone_part(fingerprint, 2)]
    for words in ("was not understood", "is not kept on the coordinator", "part 8000 of backbone"):
        assert words in caplog.text


def test_an_artifact_that_was_damaged_is_not_sent_but_named(tmp_path, artifact):
    kept = keep_artifact(tmp_path, artifact)
    shelf = BackboneShelf(tmp_path)
    backbone = shelf.find(kept.name)
    last = next(part for part in backbone.parts if part.file == backbone.parts[-1].file)
    with (kept / last.file).open("r+b") as file:
        file.write(b"\0\1\2")
    with pytest.raises(BackboneError, match="changed or is damaged"):
        backbone.read(last.index)
    shelf.drop(kept.name)
    with pytest.raises(BackboneError, match="is damaged"):
        shelf.find(kept.name)


@pytest.mark.parametrize("limit", [None, 20_000])
def test_a_listing_covers_every_byte_and_fits_the_brokers_packets(tmp_path, artifact, limit):
    kept = keep_artifact(tmp_path, artifact)
    shelf = BackboneShelf(tmp_path)
    shelf.max_packet_bytes = limit
    backbone = shelf.find(kept.name)
    assert BackboneListing.from_bytes(backbone.payload) == backbone.listing
    content = dict.fromkeys(FINGERPRINTED, b"")
    for part in backbone.parts:
        assert limit is None or part.size < limit
        content[part.file] += backbone.read(part.index)
    assert content == {name: (artifact / name).read_bytes() for name in FINGERPRINTED}


def test_a_broker_that_takes_too_little_is_named(tmp_path, artifact):
    shelf = BackboneShelf(tmp_path)
    shelf.max_packet_bytes = 2048
    with pytest.raises(BackboneError, match="raise max_packet_size"):
        shelf.find(keep_artifact(tmp_path, artifact).name)


# Assignments.


@pytest.fixture
def settings(tmp_path):
    return settings_for(tmp_path)


@pytest.fixture
def store(settings):
    made = make_store(settings)
    yield made
    made.close()


def test_assignments_are_found_by_their_beginning_and_audited(store):
    with store.write() as session:
        fingerprint = find_backbone(session, MANIFEST.fingerprint[:6])
        assign_backbone(session, fingerprint, "kitchen", at=now(), actor="ann")
        assign_backbone(session, fingerprint, None, at=now(), actor="ann")
        assign_backbone(session, "", None, at=now(), actor="bob")
        assign_backbone(session, fingerprint, "kitchen", at=now(), actor="bob")  # nothing new
    with store.read() as session:
        assert assignments(session) == {"kitchen": MANIFEST.fingerprint, None: ""}
        assert [(e.actor, e.device, e.detail) for e in reversed(audit_entries(session, None, 10))] == [
            ("ann", "kitchen", MANIFEST.fingerprint), ("ann", None, f"{MANIFEST.fingerprint} to the fleet"), ("bob", None, "none to the fleet"),
        ]
        for wrong in ("ff", ""):
            with pytest.raises(StoreError, match="no registered backbone begins"):
                find_backbone(session, wrong)


def test_an_offer_says_why_a_backbone_cannot_be_sent(store, settings, tmp_path, artifact, caplog):
    key = ensure_signing_key(settings)
    offers = BackboneOffers(store, BackboneShelf(settings.data_directory), key)
    with store.write() as session:
        assign_backbone(session, MANIFEST.fingerprint, "kitchen", at=now(), actor="ann")  # registered, its files were not kept
        assign_backbone(session, "", "garage", at=now(), actor="ann")
    first, second = offers.messages(None), offers.messages(None)
    assert first == second
    assert dict(first)[topics.device_backbone("garage")] == b""
    offer = verify_offer(SignedManifest.from_bytes(dict(first)[topics.device_backbone("kitchen")]), key.public_key())
    assert "is not kept on the coordinator" in offer.refusal
    assert caplog.text.count("is not kept on the coordinator") == 1


# With a broker.


class RunningGateway:
    def __init__(self, settings, store):
        self.gateway = Gateway(settings, store)
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.gateway.run, args=(self.stop,), daemon=True)

    def __enter__(self):
        self.thread.start()
        wait_until(lambda: self.gateway.connection.connected, 10, "the gateway connects")
        return self

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join(30)


@pytest.fixture
def broker(tmp_path):
    with mosquitto(tmp_path / "broker") as running:
        yield running


@pytest.fixture
def published(broker):
    """How often each part was published."""
    counts = Counter()
    connection = BrokerConnection(
        broker.settings, "observer", subscriptions=[topics.fleet_plan().replace("plan", "+")],
        on_message=lambda m: counts.update([m.topic]) if "backbone-part" in m.topic else None,
    )
    connection.start()
    wait_until(lambda: connection.connected, 10, "the observer connects")
    yield counts
    connection.stop()


def gateway_for(tmp_path, broker, artifact, devices=("kitchen",), **publishing):
    """A gateway that offers `artifact` to `devices`."""
    settings = settings_for(tmp_path, broker.settings, publishing={"poll_seconds": 0.1, **publishing})
    store = make_store(settings)
    keep_artifact(settings.data_directory, artifact)
    with store.write() as session:
        register_backbone(session, read_manifest(artifact))
        for device in devices:
            assign_backbone(session, read_manifest(artifact).fingerprint, device, at=now(), actor="test")
    return RunningGateway(settings, store), store, ensure_signing_key(settings).public_key()


@pytest.mark.broker
@needs_mosquitto
def test_devices_that_fetch_at_once_share_the_work(tmp_path, broker, artifact, published):
    gateway, store, key = gateway_for(tmp_path, broker, artifact, [None], backbone_bytes_per_second=300_000)
    names = ("kitchen", "garage", "attic", "cellar")
    with gateway:
        devices = [FetchingDevice(broker.settings, tmp_path / name / "backbone", key, device=name) for name in names]
        for device in devices:
            device.__enter__()
        for device in devices:
            wait_until(lambda device=device: device.done, 60, "fetched")
            device.__exit__()
            assert check_artifact(device.place).fingerprint == read_manifest(artifact).fingerprint
        total = len(BackboneShelf(gateway.gateway._settings.data_directory).find(read_manifest(artifact).fingerprint).parts)
        assert len(published) == total
        assert sum(published.values()) < 2 * total, "four devices cost less than two"
    store.close()


@pytest.mark.broker
@needs_mosquitto
@pytest.mark.slow
def test_a_slow_link_is_not_flooded(tmp_path, broker, artifact, published):
    gateway, store, key = gateway_for(tmp_path, broker, artifact)
    ahead = []
    with gateway, slow_downlink(broker.port, 150_000) as port:
        slow = broker.settings.model_copy(update={"port": port})
        with FetchingDevice(slow, tmp_path / "backbone", key) as device:
            def fetched():
                ahead.append(sum(published.values()) - sum(device.received.values()))
                return device.done
            wait_until(fetched, 120, "fetched")
            total = len(device.fetcher._files.parts) or len(published)
    assert max(ahead) <= 8, "what waits for the link is about a second's worth"
    assert sum(published.values()) <= total * 1.2
    store.close()


@pytest.mark.broker
@needs_mosquitto
def test_frames_are_stored_while_a_backbone_travels(tmp_path, broker, artifact):
    gateway, store, key = gateway_for(tmp_path, broker, artifact, backbone_bytes_per_second=40_000)
    sender = ScriptedDevice("garage", broker.settings, {n: make_payload("garage", n) for n in range(1, 51)})
    with gateway, FetchingDevice(broker.settings, tmp_path / "backbone", key) as device:
        wait_until(lambda: device.received, 30, "the first part")
        sender.start()
        wait_until(lambda: sender.done, 60, "all receipted")
        assert not device.done, "long before the backbone is there"
        sender.stop()
    with store.read() as session:
        assert len(session.scalars(select(FrameRow.id)).all()) == 50
    store.close()
