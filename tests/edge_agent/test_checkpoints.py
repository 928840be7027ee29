"""Checkpoints over a real broker: fetched in parts, verified, swapped; whatever is wrong leaves the last good one in use."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest

from coordinator.backbones import prepare
from edge_agent.backbone import read_manifest
from edge_agent.checkpoint_store import INCOMING, CheckpointError, CheckpointStore, load_checkpoint
from edge_agent.checkpoints import CheckpointReceiver
from side_tuning.broker_connection import BrokerConnection, Message
from side_tuning.signatures import load_public_key, load_signing_key, make_key, sign_manifest
from side_tuning.wire import topics
from tests.backbones.models import save_random_model
from tests.brokers import mosquitto, needs_mosquitto
from tests.edge_agent.artifacts import Checkpoint
from tests.edge_agent.test_language_model import LanguageCheckpoint
from tests.waiting import wait_until

pytestmark = [pytest.mark.broker, needs_mosquitto]


@pytest.fixture
def broker(tmp_path):
    with mosquitto(tmp_path / "broker") as running:
        yield running


@pytest.fixture
def coordinator(broker):
    connection = BrokerConnection(broker.settings, "coordinator", reconnect_min_seconds=0.05)
    connection.start()
    wait_until(lambda: connection.connected, 10, "connected")
    yield connection
    connection.stop()


class Device:
    def __init__(self, settings, backbone, state, key_file):
        self.store = CheckpointStore(state)
        self.parts = []
        manifest = read_manifest(backbone)
        self.connection = BrokerConnection(
            settings,
            "device",
            subscriptions=[topics.checkpoint(manifest.fingerprint)],
            on_message=self.receive,
            reconnect_min_seconds=0.05,
        )
        self.changes = []
        key = load_public_key(key_file) if key_file else None
        self.receiver = CheckpointReceiver(
            self.connection, self.store, manifest, key, on_change=lambda: self.changes.append(self.receiver.generation)
        )
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.receiver.run, args=(self.stop,))

    def receive(self, message: Message):
        if "checkpoint-part" in message.topic:
            self.parts.append(message.topic)
        self.receiver.offer(message)

    def __enter__(self):
        self.connection.start()
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join()
        self.connection.stop()


@pytest.fixture
def device(broker, minilm, tmp_path, public_key_file):
    with Device(broker.settings, minilm, tmp_path / "state", public_key_file) as running:
        yield running


def test_a_checkpoint_is_fetched_in_parts_and_put_in_use(device, coordinator, minilm, signing_key):
    checkpoint = Checkpoint(minilm, signing_key, 4)
    assert checkpoint.manifest.alignment.parts > 8
    checkpoint.publish(coordinator)
    wait_until(lambda: device.receiver.generation == 4, 20, "in use")
    stored = device.store.current()
    assert stored.manifest == checkpoint.manifest
    assert stored.ladder.read_bytes() == checkpoint.files["ladder"]
    assert len(device.parts) == len(set(device.parts)) == len(checkpoint.parts()), "each part once"
    assert not (device.store.folder / INCOMING).exists()
    assert device.receiver.error == ""
    assert device.changes == [4]


def test_only_what_changed_is_fetched_and_the_previous_one_stays(device, coordinator, minilm, signing_key):
    Checkpoint(minilm, signing_key, 1, seed=1).publish(coordinator)
    wait_until(lambda: device.receiver.generation == 1, 20, "first")
    device.parts.clear()
    second = Checkpoint(minilm, signing_key, 2, seed=2, ladder_seed=1)  # the same ladder, another alignment
    second.publish(coordinator)
    wait_until(lambda: device.receiver.generation == 2, 20, "second")
    assert len(device.parts) == second.manifest.alignment.parts
    Checkpoint(minilm, signing_key, 3, seed=3).publish(coordinator)
    wait_until(lambda: device.receiver.generation == 3, 20, "third")
    assert sorted(path.name for path in device.store.folder.iterdir()) == ["2", "3", "current"]


def test_a_foreign_signature_is_refused_and_told(device, coordinator, minilm, signing_key, tmp_path):
    Checkpoint(minilm, signing_key, 1).publish(coordinator)
    wait_until(lambda: device.receiver.generation == 1, 20, "the good one")
    make_key(tmp_path / "thief.key")
    Checkpoint(minilm, load_signing_key(tmp_path / "thief.key"), 2, seed=5).publish(coordinator)
    wait_until(lambda: device.receiver.error, 10, "refused")
    assert "not signed by the configured key" in device.receiver.error
    assert device.receiver.refused == 1
    assert device.store.current().manifest.generation == 1


def test_an_older_generation_is_not_followed(device, coordinator, minilm, signing_key):
    Checkpoint(minilm, signing_key, 5, seed=5).publish(coordinator)
    wait_until(lambda: device.receiver.generation == 5, 20, "in use")
    Checkpoint(minilm, signing_key, 4, seed=4).publish(coordinator)
    wait_until(lambda: "older than 5" in device.receiver.error, 10, "replay refused")
    assert device.store.generation() == 5


def test_a_wrong_part_is_found_by_its_hash_and_the_next_checkpoint_works(device, coordinator, minilm, signing_key):
    bad = Checkpoint(minilm, signing_key, 1, seed=1)
    parts = bad.parts()
    topic = next(iter(parts))
    parts[topic] = bytes(len(parts[topic]))
    bad.publish(coordinator, parts=parts)
    wait_until(lambda: "has the hash" in device.receiver.error, 20, "refused")
    assert device.store.current() is None
    Checkpoint(minilm, signing_key, 2, seed=2).publish(coordinator)
    wait_until(lambda: device.receiver.generation == 2, 20, "the next one")
    assert device.receiver.error == ""


def test_a_network_that_contradicts_its_manifest_never_comes_into_use(device, coordinator, minilm, signing_key):
    """Signed and whole, but of three blocks where the plan says two: the self-test before the swap finds it."""
    checkpoint = Checkpoint(minilm, signing_key, 1, blocks=1)
    manifest = replace(checkpoint.manifest, plan=replace(checkpoint.manifest.plan, blocks=2))
    checkpoint.signed = sign_manifest(manifest, signing_key).to_bytes()
    checkpoint.publish(coordinator)
    wait_until(lambda: "contradicts itself" in device.receiver.error, 20, "refused")
    assert device.store.generation() == 0


def test_a_broken_link_costs_only_the_parts_under_way(  # noqa: PLR0917 - fixtures
    broker, minilm, tmp_path, signing_key, public_key_file, coordinator
):
    checkpoint = Checkpoint(minilm, signing_key, 1, part_bytes=1024)
    parts = checkpoint.parts()
    withheld = list(parts)[-1]
    checkpoint.publish(coordinator, parts={topic: payload for topic, payload in parts.items() if topic != withheld})
    with Device(broker.settings, minilm, tmp_path / "state", public_key_file) as device:
        wait_until(lambda: device.store.missing_parts(checkpoint.manifest.alignment) == [checkpoint.manifest.alignment.parts - 1], 20, "all but one")
        wait_until(lambda: device.store.missing_parts(checkpoint.manifest.ladder) == [], 20, "the ladder")
    coordinator.publish(withheld, parts[withheld], retain=True).wait(5)
    with Device(broker.settings, minilm, tmp_path / "state", public_key_file) as device:
        wait_until(lambda: device.receiver.generation == 1, 20, "in use after the restart")
        assert device.parts == [withheld]


def test_a_part_that_comes_late_is_taken_when_it_comes(device, coordinator, minilm, signing_key):
    checkpoint = Checkpoint(minilm, signing_key, 1)
    coordinator.publish(topics.checkpoint(checkpoint.manifest.fingerprint), checkpoint.signed, retain=True).wait(5)
    wait_until(lambda: device.receiver._asked, 10, "asked for")
    for topic, payload in checkpoint.parts().items():
        coordinator.publish(topic, payload, retain=True)
    wait_until(lambda: device.receiver.generation == 1, 20, "in use")


def test_a_newer_manifest_takes_over_a_download(device, coordinator, minilm, signing_key):
    first = Checkpoint(minilm, signing_key, 1, seed=1)
    coordinator.publish(topics.checkpoint(first.manifest.fingerprint), first.signed, retain=True).wait(5)
    wait_until(lambda: device.receiver._asked, 10, "asked for")
    Checkpoint(minilm, signing_key, 2, seed=2).publish(coordinator)
    wait_until(lambda: device.receiver.generation == 2, 20, "in use")
    assert not device.store.parts_folder(first.manifest.ladder).exists()


def test_without_a_key_nothing_is_accepted_and_the_setting_is_named(broker, coordinator, minilm, tmp_path, signing_key):
    Checkpoint(minilm, signing_key, 1).publish(coordinator)
    with Device(broker.settings, minilm, tmp_path / "state", None) as device:
        wait_until(lambda: "checkpoint.public_key_file" in device.receiver.error, 10, "told")
        assert not device.parts


def test_half_a_swap_leaves_the_last_good_one(minilm, signing_key, tmp_path):
    """A crash between writing the files, the rename and the marker, at each point."""
    store = CheckpointStore(tmp_path)
    first, second = (Checkpoint(minilm, signing_key, n, seed=n) for n in (1, 2))
    store.activate(store.stage(first.signed, first.manifest, first.files["ladder"], first.files["alignment"]), 1)
    staged = store.stage(second.signed, second.manifest, second.files["ladder"], second.files["alignment"])
    assert CheckpointStore(tmp_path).current().manifest.generation == 1
    staged.rename(store.folder / "2")
    assert CheckpointStore(tmp_path).current().manifest.generation == 1
    staged = store.stage(second.signed, second.manifest, second.files["ladder"], second.files["alignment"])
    store.activate(staged, 2)
    assert CheckpointStore(tmp_path).current().manifest.generation == 2
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(store.folder / "3")


def test_a_language_models_checkpoint_is_put_in_use_and_a_misfit_refused(broker, coordinator, tmp_path, signing_key, public_key_file):
    backbone = tmp_path / "backbone"
    prepare(save_random_model("llama", tmp_path / "model"), backbone, weights="int8", max_tokens=48)
    with Device(broker.settings, backbone, tmp_path / "state", public_key_file) as device:
        LanguageCheckpoint(backbone, signing_key, 1).publish(coordinator)
        wait_until(lambda: device.receiver.generation == 1 or device.receiver.error, 20, "in use")
        assert device.receiver.error == ""
        LanguageCheckpoint(backbone, signing_key, 2, width=8).publish(coordinator)
        wait_until(lambda: device.receiver.error, 20, "refused")
        assert "width of the backbone" in device.receiver.error
        assert device.store.current().manifest.generation == 1
