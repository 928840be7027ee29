"""A backbone over a real broker: in parts, checked, resumed; what is wrong is refused with the reason."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest

from coordinator.backbone_library import keep_artifact
from coordinator.backbone_offers import BackboneShelf
from edge_agent import backbone_fetch
from edge_agent.backbone_fetch import FIRST_WINDOW, LARGEST_WINDOW, Pace
from edge_agent.backbone_files import IncomingBackbone
from side_tuning.backbone_manifest import BackboneError, check_artifact, read_manifest
from side_tuning.signatures import load_signing_key, make_key
from side_tuning.wire import topics
from tests.brokers import mosquitto, needs_mosquitto
from tests.edge_agent.travelling import FetchingDevice, ScriptedCoordinator, make_backbone
from tests.waiting import wait_until

pytestmark = [pytest.mark.broker, needs_mosquitto]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return make_backbone(tmp_path_factory.mktemp("artifact"))


@pytest.fixture
def broker(tmp_path):
    with mosquitto(tmp_path / "broker") as running:
        yield running


@pytest.fixture
def coordinator(broker, signing_key, artifact, tmp_path):
    running = ScriptedCoordinator(broker.settings, signing_key, artifact, tmp_path / "data")
    yield running
    running.stop()


@pytest.fixture
def device(broker, signing_key, tmp_path):
    with FetchingDevice(broker.settings, tmp_path / "state" / "backbone", signing_key.public_key()) as running:
        yield running


def same_files(one, other) -> bool:
    return {p.name: p.read_bytes() for p in one.iterdir()} == {p.name: p.read_bytes() for p in other.iterdir()}


def test_a_backbone_is_fetched_part_by_part_and_appears_whole(device, coordinator, artifact):
    assert "coordinator backbone assign" in wait_until(lambda: device.connection.connected and device.fetcher.words, 10)
    coordinator.offer()
    wait_until(lambda: device.done, 30, "fetched")
    assert same_files(device.place, artifact)
    assert check_artifact(device.place).fingerprint == coordinator.fingerprint
    assert set(coordinator.sent.values()) == {1}, "each part once"
    assert len(coordinator.sent) == len(coordinator.backbone.parts) > 20
    assert not device.fetcher._files.folder.exists()


def test_a_flipped_bit_is_found_and_only_that_part_comes_again(device, coordinator, artifact):
    def spoil(index, content):
        if index == 7 and coordinator.sent[7] == 1:
            return bytes([content[0] ^ 1]) + content[1:]
        return content[:-1] if index == 9 and coordinator.sent[9] == 1 else content

    coordinator.spoil = spoil
    coordinator.offer()
    wait_until(lambda: device.done, 30, "fetched")
    assert same_files(device.place, artifact)
    assert device.fetcher.bad_parts == 2
    assert coordinator.sent[7] >= 2 <= coordinator.sent[9]
    assert sum(coordinator.sent.values()) <= len(coordinator.backbone.parts) + 2 * LARGEST_WINDOW


def test_what_is_here_is_never_fetched_again(broker, coordinator, signing_key, tmp_path, artifact):
    """An agent that died, at any point: nothing but the content of the files says what is here."""
    place = tmp_path / "state" / "backbone"
    total = len(coordinator.backbone.parts)
    coordinator.withheld = set(range(10, total))
    coordinator.offer()
    with FetchingDevice(broker.settings, place, signing_key.public_key()) as device:
        wait_until(lambda: len(device.fetcher._files.missing) == total - 10, 20, "ten parts")
    weights = IncomingBackbone(place).folder / coordinator.backbone.parts[4].file
    with weights.open("r+b") as file:  # a page that the power loss took
        file.seek(coordinator.backbone.parts[4].offset)
        file.write(bytes(100))
    assert IncomingBackbone(place).progress() == (9, total)
    coordinator.withheld, coordinator.sent = set(), type(coordinator.sent)()
    with FetchingDevice(broker.settings, place, signing_key.public_key()) as device:
        wait_until(lambda: device.done, 30, "fetched")
    assert set(coordinator.sent) == {4, *range(10, total)}
    assert same_files(place, artifact)


def test_a_broker_that_is_killed_in_between_costs_the_parts_under_way(broker, coordinator, device, artifact):
    total = len(coordinator.backbone.parts)
    coordinator.withheld = set(range(total // 2, total))
    coordinator.offer()
    wait_until(lambda: len(device.fetcher._files.missing) == total - total // 2 > 0, 20, "half")
    broker.kill()
    wait_until(lambda: "waiting for the broker" in device.fetcher.words, 20, "told")
    coordinator.withheld = set()
    broker.start()
    wait_until(lambda: coordinator.connection.connected, 20, "the coordinator is back")
    wait_until(lambda: device.done, 60, "fetched")
    assert same_files(device.place, artifact)
    assert all(coordinator.sent[n] == 1 for n in range(total // 2))


def test_a_forged_offer_is_refused_and_told(device, coordinator, tmp_path):
    make_key(tmp_path / "thief")
    coordinator.offer(key=load_signing_key(tmp_path / "thief"))
    wait_until(lambda: "the backbone offer was not signed by the configured key" in device.fetcher.words, 10, "refused")
    assert not coordinator.requests


def test_an_offer_for_another_device_is_not_followed(device, coordinator):
    coordinator.offer(owner="garage")
    wait_until(lambda: "an offer for 'garage' came on the topic of 'kitchen'" in device.fetcher.words, 10, "refused")
    assert not coordinator.requests


def test_a_checkpoint_signature_is_none_for_an_offer(device, coordinator, signing_key):
    from side_tuning.wire.backbone_messages import BackboneOffer
    from side_tuning.wire.messages import SignedManifest

    body = BackboneOffer("kitchen", coordinator.fingerprint, "0" * 64, 10).to_bytes()
    signed = SignedManifest(body, signing_key.sign(SignedManifest.SIGNATURE_DOMAIN + body))
    coordinator.publish(topics.device_backbone("kitchen"), signed.to_bytes())
    wait_until(lambda: "not signed" in device.fetcher.words, 10, "refused")


def test_a_listing_that_was_not_signed_is_not_followed(device, coordinator):
    coordinator.offer(listing_sha256=hashlib.sha256(b"another").hexdigest())
    wait_until(lambda: "not the one that was signed" in device.fetcher.words, 10, "refused")
    assert not coordinator.requests
    coordinator.offer()
    wait_until(lambda: device.done, 30, "the right one is fetched")


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/b.json", ".config.json", "config.json\0"])
def test_names_that_lead_out_of_the_folder_are_refused(device, coordinator, name):
    files = tuple((name if file == "config.json" else file, size) for file, size in coordinator.backbone.listing.files)
    coordinator.offer(payload=replace(coordinator.backbone.listing, files=files).to_bytes())
    wait_until(lambda: "is no name and size of a file" in device.fetcher.words, 10, "refused")
    assert not device.fetcher._files.folder.exists()


def test_files_that_no_backbone_has_are_refused(device, coordinator):
    files = tuple(("setup.py" if file == "config.json" else file, size) for file, size in coordinator.backbone.listing.files)
    coordinator.offer(payload=replace(coordinator.backbone.listing, files=files).to_bytes())
    wait_until(lambda: "consists of other files" in device.fetcher.words, 10, "refused")
    assert not device.fetcher._files.folder.exists()


def test_a_format_of_the_future_is_refused_before_anything_is_fetched(device, coordinator):
    manifest = coordinator.backbone.listing.manifest.replace('"format": 1', '"format": 2')
    coordinator.offer(payload=replace(coordinator.backbone.listing, manifest=manifest).to_bytes())
    wait_until(lambda: "format 2 is unknown" in device.fetcher.words, 10, "refused")
    assert not coordinator.requests


def test_a_disk_without_room_is_told_and_looked_at_again(device, coordinator, monkeypatch):
    monkeypatch.setattr(backbone_fetch, "TRY_AGAIN_SECONDS", 0.2)
    monkeypatch.setattr(backbone_fetch, "disk_free_bytes", lambda _: backbone_fetch.DISK_RESERVE_BYTES + 1000)
    coordinator.offer()
    wait_until(lambda: "are free; make room, or assign a smaller one" in device.fetcher.words, 10, "told")
    assert not coordinator.requests
    monkeypatch.setattr(backbone_fetch, "disk_free_bytes", lambda _: 10**9)
    wait_until(lambda: device.done, 30, "fetched, once there is room")


def test_without_a_key_nothing_is_fetched_and_the_setting_is_named(broker, coordinator, tmp_path):
    coordinator.offer()
    with FetchingDevice(broker.settings, tmp_path / "backbone", None) as device:
        wait_until(lambda: "checkpoint.public_key_file" in device.fetcher.words, 10, "told")


def test_the_coordinators_reason_reaches_the_device(device, coordinator):
    coordinator.offer(refusal="it is not kept here")
    wait_until(lambda: f"cannot send backbone {coordinator.fingerprint}: it is not kept here" in device.fetcher.words, 10, "told")


def test_a_backbone_that_cannot_be_loaded_is_not_fetched_again_but_another_is(broker, coordinator, signing_key, tmp_path):
    kept = keep_artifact(tmp_path / "data", make_backbone(tmp_path / "other", seed=1))
    other = BackboneShelf(tmp_path / "data").find(kept.name)
    coordinator.offer()
    unusable = {coordinator.fingerprint: "this torch cannot run it"}
    with FetchingDevice(broker.settings, tmp_path / "state" / "backbone", signing_key.public_key(), unusable=unusable) as device:
        wait_until(lambda: device.fetcher.words == "this torch cannot run it", 10, "told")
        assert not coordinator.requests
        coordinator.backbone, coordinator.fingerprint = other, kept.name
        coordinator.offer()
        wait_until(lambda: device.done, 30, "the other one is fetched")
    assert read_manifest(device.place).fingerprint == kept.name


def test_the_fleets_offer_serves_who_has_none_and_the_own_goes_before_it(device, coordinator):
    coordinator.offer(None, refusal="the fleet's")
    wait_until(lambda: "the fleet's" in device.fetcher.words, 10, "followed")
    coordinator.offer("kitchen", refusal="its own")
    wait_until(lambda: "its own" in device.fetcher.words, 10, "followed")
    coordinator.publish(topics.device_backbone("kitchen"), b"")
    wait_until(lambda: "the fleet's" in device.fetcher.words, 10, "taken back")


def test_files_that_contradict_their_fingerprint_never_take_its_place(tmp_path, coordinator):
    """Every part right, and yet another backbone: the last check is the one that counts."""
    listing = replace(coordinator.backbone.listing, fingerprint="ab" * 16)
    listing = replace(listing, manifest=listing.manifest.replace(coordinator.fingerprint, "ab" * 16))
    incoming = IncomingBackbone(tmp_path / "backbone")
    incoming.begin(listing, listing.to_bytes())
    assert all(incoming.keep(n, coordinator.backbone.read(n)) for n in list(incoming.missing))
    with pytest.raises(BackboneError, match="its files hash to"):
        incoming.install()
    assert not (tmp_path / "backbone").exists()
    assert not incoming.folder.exists()


def test_the_window_follows_the_link():
    slow, fast = Pace(), Pace()
    assert slow.window(32_768) == FIRST_WINDOW
    for n in range(5):
        slow.arrived(32_768, n * 3.0)
        fast.arrived(32_768, n * 0.01)
    assert slow.window(32_768) == 1
    assert fast.window(32_768) == LARGEST_WINDOW
    assert slow.bytes_per_second == pytest.approx(32_768 / 3)


def test_what_a_person_reads(device, coordinator):
    coordinator.withheld = set(range(12, 1000))
    coordinator.offer()
    words = wait_until(lambda: len(device.fetcher._files.missing) == len(coordinator.backbone.parts) - 12 and device.fetcher.words, 20)
    assert words.startswith(f"fetching backbone {coordinator.fingerprint[:8]}: 12 of {len(coordinator.backbone.parts)} parts, ")
    assert words.endswith(" left")
