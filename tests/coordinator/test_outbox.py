"""Plans and checkpoints reach the broker as retained messages, also one that forgot everything."""

import hashlib
import json
from dataclasses import asdict, replace
from datetime import datetime, timezone

import pytest

from coordinator.backbone_offers import BackboneOffers, BackboneShelf
from coordinator.outbox import Outbox, ensure_signing_key
from coordinator.planning import change_plan, describe, follow_settings, next_version, plan_from_settings
from coordinator.settings import ConfigError, PlanSettings, TaskSettings
from coordinator.store.registry import insert_plan, newest_plan, plans, register_backbone
from coordinator.store.training import (
    checkpoints_to_publish,
    insert_checkpoint,
    insert_run,
    republish_checkpoint,
)
from side_tuning.broker_connection import BrokerConnection
from side_tuning.signatures import load_public_key, verify_manifest
from side_tuning.wire import topics
from side_tuning.wire.codecs import encoded_bytes
from side_tuning.wire.messages import SignedManifest, TapPlan
from tests.brokers import mosquitto, needs_mosquitto
from tests.coordinator.fleet import LABELS, MANIFEST, PLAN, make_store, now, settings_for
from tests.waiting import wait_until

OTHER = "cd" * 16
PART = 4096


@pytest.fixture
def settings(tmp_path):
    return settings_for(tmp_path)


@pytest.fixture
def store(settings):
    opened = make_store(settings)
    yield opened
    opened.close()


def write_checkpoint(settings, store, step, *, ladder_bytes=10_000):
    """A folder as the trainer leaves it (contents do not matter to the outbox), offered in the store."""
    folder = settings.checkpoints_directory / "run-1" / f"{step:08d}"
    folder.mkdir(parents=True)
    files = {
        "ladder.safetensors": bytes([step]) * ladder_bytes,
        f"alignment-{MANIFEST.fingerprint}.safetensors": b"a" * 5000 + bytes([step]),
        f"alignment-{OTHER}.safetensors": b"b" * 5000 + bytes([step]),
        "trainer.safetensors": b"not for devices",
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    description = {
        "plan": asdict(PLAN),
        "side_width": 16,
        "metrics": {"accuracy": 0.5},
        "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
    }
    (folder / "checkpoint.json").write_text(json.dumps(description))
    with store.write() as session:
        insert_run(session, "run-1", {}, now())
        return insert_checkpoint(session, "run-1", step, str(folder), {"accuracy": 0.5}, now()), files


class Watcher:
    """Holds what the broker would give a device that subscribes: retained messages by topic."""

    def __init__(self, broker, name="watcher"):
        self.held = {}
        self.connection = BrokerConnection(broker.settings, name, subscriptions=["mobillm/v1/fleet/down/+", "mobillm/v1/+/down/plan"], on_message=self._take)
        self.connection.start()
        wait_until(lambda: self.connection.connected, 10, "the watcher connects")

    def _take(self, message):
        if message.payload:
            self.held[message.topic] = message.payload
        else:
            self.held.pop(message.topic, None)

    def manifest(self, fingerprint, public_key):
        payload = self.held.get(topics.checkpoint(fingerprint))
        return None if payload is None else verify_manifest(SignedManifest.from_bytes(payload), public_key)

    def blob(self, blob):
        return b"".join(self.held[topics.checkpoint_part(blob.sha256, n)] for n in range(blob.parts))

    def parts(self):
        return {topic for topic in self.held if "checkpoint-part" in topic}


@pytest.fixture
def link(tmp_path, settings, store):
    """mosquitto, a connection, an outbox on it, and a watcher."""
    with mosquitto(tmp_path / "broker") as broker:
        connection = BrokerConnection(broker.settings, "outbox")
        connection.start()
        wait_until(lambda: connection.connected, 10, "the outbox connects")
        small = settings.model_copy(update={"publishing": settings.publishing.model_copy(update={"part_bytes": PART})})
        key = ensure_signing_key(settings)
        watcher = Watcher(broker)
        backbones = BackboneOffers(store, BackboneShelf(settings.data_directory), key)
        yield broker, connection, lambda: Outbox(small, store, connection, key, lambda: datetime.now(timezone.utc), backbones=backbones), watcher
        watcher.connection.stop()
        connection.stop()


@pytest.mark.broker
@needs_mosquitto
def test_a_checkpoint_goes_out_in_parts_and_signed_for_each_backbone(settings, store, link):
    _, _, make_outbox, watcher = link
    generation, files = write_checkpoint(settings, store, 1)
    make_outbox().run_once()
    public = load_public_key(settings.public_key_file)
    wait_until(lambda: watcher.manifest(OTHER, public), 10, "the last manifest arrives")
    for fingerprint in (MANIFEST.fingerprint, OTHER):
        manifest = watcher.manifest(fingerprint, public)
        assert (manifest.generation, manifest.step, manifest.plan) == (generation, 1, PLAN)
        assert watcher.blob(manifest.ladder) == files["ladder.safetensors"]
        assert watcher.blob(manifest.alignment) == files[f"alignment-{fingerprint}.safetensors"]
    assert TapPlan.from_bytes(watcher.held[topics.fleet_plan()]) == PLAN
    with store.read() as session:
        assert checkpoints_to_publish(session) == []


@pytest.mark.broker
@needs_mosquitto
def test_parts_of_old_generations_are_cleared_except_the_previous_ones(settings, store, link):
    """Also by an outbox that was started in between and only knows from its file what the broker holds."""
    _, _, make_outbox, watcher = link
    public = load_public_key(settings.public_key_file)
    seen = []
    outbox = make_outbox()
    for step in (1, 2, 3, 4):
        generation, _ = write_checkpoint(settings, store, step)
        if step == 3:
            outbox = make_outbox()
        outbox.run_once()
        wait_until(lambda g=generation: (m := watcher.manifest(OTHER, public)) and m.generation == g, 10, f"generation {generation} arrives")
        manifests = [watcher.manifest(name, public) for name in (MANIFEST.fingerprint, OTHER)]
        seen.append({topics.checkpoint_part(b.sha256, n) for m in manifests for b in (m.ladder, m.alignment) for n in range(b.parts)})
    wait_until(lambda: watcher.parts() == seen[2] | seen[3], 10, "only the parts of the last two are left")


@pytest.mark.broker
@needs_mosquitto
def test_a_broker_that_forgot_everything_is_filled_again(settings, store, link):
    broker, connection, make_outbox, _ = link
    write_checkpoint(settings, store, 1)
    outbox = make_outbox()
    outbox.run_once()
    before = connection.epoch
    broker.kill()
    broker.start()
    wait_until(lambda: connection.epoch > before and connection.connected, 20, "the outbox is back")
    outbox.run_once()
    fresh = Watcher(broker, "fresh")
    public = load_public_key(settings.public_key_file)
    wait_until(lambda: fresh.manifest(OTHER, public) and topics.fleet_plan() in fresh.held, 10, "all is retained again")
    assert len(fresh.blob(fresh.manifest(OTHER, public).ladder)) == 10_000
    fresh.connection.stop()


@pytest.mark.broker
@needs_mosquitto
def test_a_damaged_checkpoint_is_not_published_and_the_last_good_one_stays(settings, store, link, caplog):
    _, _, make_outbox, watcher = link
    outbox = make_outbox()
    good, _ = write_checkpoint(settings, store, 1)
    outbox.run_once()
    write_checkpoint(settings, store, 2)
    (settings.checkpoints_directory / "run-1" / "00000002" / "ladder.safetensors").write_bytes(b"damaged")
    outbox.run_once()
    assert "ladder.safetensors is damaged" in caplog.text
    public = load_public_key(settings.public_key_file)
    wait_until(lambda: watcher.manifest(OTHER, public), 10, "the good one is there")
    assert watcher.manifest(OTHER, public).generation == good
    with store.write() as session:
        again = republish_checkpoint(session, good, now())
    outbox.run_once()
    wait_until(lambda: watcher.manifest(OTHER, public).generation == again, 10, "a roll-back goes out as a new generation")


def test_the_plan_follows_the_settings_and_the_shallowest_backbone(tmp_path):
    settings = settings_for(tmp_path, plan={"max_blocks": 3})
    store = make_store(settings)

    def newest():
        with store.read() as session:
            return newest_plan(session)

    assert follow_settings(settings, store).blocks == 3  # 4 layers, capped
    assert follow_settings(settings, store) is None
    shallow = replace(MANIFEST, fingerprint=OTHER, layers=2, maps={1: "1" * 32, 2: "2" * 32})
    with store.write() as session:
        register_backbone(session, shallow)
    assert follow_settings(settings, store).blocks == 2
    more_labels = settings.model_copy(update={"task": TaskSettings(labels=(*LABELS, "grey"))})
    assert follow_settings(more_labels, store).labels == (*LABELS, "grey")

    by_hand = change_plan(more_labels, store, None, {"codec": "int8"})
    assert follow_settings(more_labels, store) is None
    assert newest() == by_hand
    changed = more_labels.model_copy(update={"plan": PlanSettings(max_blocks=3, codec="fp16")})
    assert follow_settings(changed, store).codec == "fp16"
    change_plan(changed, store, "kitchen", {"rank": 8})
    with store.read() as session:
        versions = [row.version for row in plans(session)]
    assert versions == sorted(set(versions))
    store.close()


def test_the_plan_carries_the_task_and_what_a_language_model_needs(tmp_path):
    """Mode, ranks and codecs of the task's own kind by themselves, or as asked; nothing of a language model in other plans."""

    def plan(task: dict[str, object], **wanted: object) -> TapPlan:
        made = plan_from_settings(settings_for(tmp_path, task=task, plan={"blocks": 2, **wanted}), [])
        assert made is not None
        assert TapPlan.from_bytes(made.to_bytes()) == made, "one that the devices take"
        return made

    language = plan({"kind": "causal-lm"})
    assert (language.task, language.labels, language.mode) == ("causal-lm", (), "sequence")
    assert encoded_bytes(1, language.width_at(2, 4, 768), language.codec_at(2, 4), language.group) <= 96
    assert encoded_bytes(1, language.width_at(4, 4, 768), language.codec_at(4, 4), language.group) <= 96
    asked = plan({"kind": "causal-lm"}, rank=16, last_rank=64, last_codec="int8", context_every=4)
    assert (asked.rank, asked.last_rank, asked.last_codec, asked.context_every) == (16, 64, "int8", 4)
    assert "last layer: rank 64, int8; one token in 4 of a prompt" in describe(asked)

    assert language.codec == "int4"
    number = plan({"kind": "regression"}, last_rank=64, context_every=4)
    assert number.codec == "rot4"
    assert plan({"kind": "regression"}, codec="int8").codec == "int8"
    assert (number.task, number.labels, number.mode, number.last_rank) == ("regression", (), "pooled", 0)
    assert number == plan({"kind": "regression"}), "what only language models have makes no new version"
    assert describe(number).endswith("regression")
    assert plan({"labels": ["a", "b"]}).task == "classification"


def test_sequence_mode_has_a_summary_where_it_can_and_nobody_said_otherwise(tmp_path):
    def plan(task: dict[str, object], **wanted: object) -> TapPlan:
        made = plan_from_settings(settings_for(tmp_path, task=task, plan={"blocks": 2, **wanted}), [])
        assert made is not None
        assert TapPlan.from_bytes(made.to_bytes()) == made
        return made

    labels = {"labels": ["a", "b"]}
    assert plan(labels, mode="sequence").summary
    assert describe(plan(labels, mode="sequence")).startswith("2 blocks, sequence (rank 64, at most 128 tokens, mean summary)")
    assert plan({"kind": "regression"}, mode="sequence").summary
    assert not plan(labels, mode="sequence", summary=False).summary
    assert not plan(labels).summary
    assert not plan(labels, summary=True).summary, "pooled"
    assert not plan({"kind": "causal-lm"}, summary=True).summary
    assert plan(labels, mode="sequence").summary_rows(384) == 6
    assert plan(labels, mode="sequence", rank=100).summary_rows(48) == 1


def test_a_fleet_that_began_without_summaries_goes_on_without(tmp_path):
    settings = settings_for(tmp_path, task={"labels": ["a", "b"]}, plan={"mode": "sequence", "blocks": 2})
    store = make_store(settings)
    before = replace(plan_from_settings(settings, []), summary=False, version=2)
    with store.write() as session:
        insert_plan(session, before)  # as a release that knew of none left it
    (settings.data_directory / "tap-plan-of-settings").write_bytes(replace(before, version=1).to_bytes())
    assert follow_settings(settings, store) is None
    by_hand = change_plan(settings, store, None, {"rank": 16})
    assert not by_hand.summary
    assert follow_settings(settings, store) is None, "a plan by hand stays"
    asked = settings.model_copy(update={"plan": settings.plan.model_copy(update={"summary": True})})
    assert follow_settings(asked, store).summary
    assert not change_plan(asked, store, None, {"summary": False}).summary
    assert change_plan(asked, store, None, {"rank": 16}).summary is False, "not switched on by another change"
    assert change_plan(asked, store, None, {"mode": "pooled"}).summary is False
    assert change_plan(asked, store, None, {"mode": "sequence"}).summary
    assert change_plan(asked, store, None, {"mode": "pooled"}).summary is False
    with pytest.raises(ConfigError, match="a summary in mode pooled of classification"):
        change_plan(asked, store, None, {"summary": True})
    store.close()


def test_plan_versions_come_from_the_clock_and_only_grow():
    moment = datetime(2026, 5, 1, tzinfo=timezone.utc)
    assert next_version(0, moment) == next_version(1, moment) == 1_777_593_600_000
    assert next_version(1_777_593_600_000, moment) == 1_777_593_600_001, "two within a millisecond"
    assert next_version(1_777_593_600_000, datetime(1970, 1, 1, tzinfo=timezone.utc)) == 1_777_593_600_001, "the clock went back"
    assert next_version(0, datetime(1970, 1, 1, tzinfo=timezone.utc)) == 1


def test_without_backbones_or_blocks_there_is_no_plan_yet(tmp_path):
    from coordinator.store.engine import open_store
    from coordinator.store.schema import upgrade

    settings = settings_for(tmp_path, plan={})
    settings.data_directory.mkdir(parents=True)
    upgrade(settings.database_url)
    store = open_store(settings.database_url)
    assert follow_settings(settings, store) is None
    store.close()


