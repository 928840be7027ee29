"""A backbone to send: small, real, two layers; and a coordinator's side of the wire that can be made to err."""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from coordinator.backbone_library import keep_artifact
from coordinator.backbone_offers import BackboneShelf
from coordinator.backbones import prepare
from edge_agent.backbone_fetch import BackboneFetcher
from side_tuning.backbone_manifest import read_manifest
from side_tuning.broker_connection import BrokerConnection
from side_tuning.signatures import sign_offer
from side_tuning.wire import topics
from side_tuning.wire.backbone_messages import BackboneOffer, PartRequest
from tests.backbones.models import save_random_model
from tests.waiting import wait_until


def make_backbone(folder: Path, *, seed: int = 0) -> Path:
    """About a megabyte: some forty parts."""
    model = save_random_model(
        "bert", folder / f"model-{seed}", seed=seed, hidden_size=128, intermediate_size=320, num_hidden_layers=2, max_position_embeddings=128
    )
    out = folder / f"backbone-{seed}"
    prepare(model, out, layers=2, weights="float", max_tokens=128)
    return out


class ScriptedCoordinator:
    """Offers a backbone and sends the parts that are asked for; `spoil` may change a part on its way."""

    def __init__(self, settings, key, artifact: Path, folder: Path) -> None:
        self.key = key
        self.fingerprint = read_manifest(artifact).fingerprint
        keep_artifact(folder, artifact)
        self.backbone = BackboneShelf(folder).find(self.fingerprint)
        self.spoil: Callable[[int, bytes], bytes] = lambda _index, content: content
        self.withheld: set[int] = set()
        self.sent: Counter[int] = Counter()
        self.requests: list[PartRequest] = []
        self.connection = BrokerConnection(
            settings,
            "coordinator",
            subscriptions=[topics.all_devices_up("backbone-request")],
            on_message=self._asked,
            reconnect_min_seconds=0.05,
        )
        self.connection.start()
        wait_until(lambda: self.connection.connected, 10, "the coordinator connects")

    def offer(self, device: str | None = "kitchen", *, key=None, payload: bytes | None = None, **changes) -> None:
        body = self.backbone.payload if payload is None else payload
        offer = BackboneOffer(device or topics.FLEET, self.fingerprint, hashlib.sha256(body).hexdigest(), self.backbone.listing.size)
        topic = topics.fleet_backbone() if device is None else topics.device_backbone(device)
        self.publish(topics.backbone_listing(self.fingerprint), body)
        self.publish(topic, sign_offer(replace(offer, **changes), key or self.key).to_bytes())

    def publish(self, topic: str, payload: bytes) -> None:
        assert self.connection.publish(topic, payload, retain=True).wait(10)

    def _asked(self, message) -> None:
        request = PartRequest.from_bytes(message.payload)
        self.requests.append(request)
        for index in request.parts:
            if index not in self.withheld:
                self.sent[index] += 1
                content = self.spoil(index, self.backbone.read(index))
                self.connection.publish(topics.backbone_part(self.fingerprint, index), content)

    def stop(self) -> None:
        self.connection.stop()


class FetchingDevice:
    """The fetcher as the agent runs it, in a thread."""

    def __init__(self, settings, place: Path, public_key, *, device: str = "kitchen", unusable=None) -> None:
        self.place = place
        self.done = False
        self.received: Counter[str] = Counter()
        self.connection = BrokerConnection(
            settings, device, subscriptions=BackboneFetcher.subscriptions(device), on_message=self._receive, reconnect_min_seconds=0.05
        )
        self.fetcher = BackboneFetcher(self.connection, device, place, public_key, unusable=unusable if unusable is not None else {})
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _receive(self, message) -> None:
        if "backbone-part" in message.topic:
            self.received[message.topic] += 1
        self.fetcher.receive(message)

    def _run(self) -> None:
        while not self._stop.is_set() and not self.done:
            self.done = self.fetcher.step(0.05)

    def __enter__(self):
        self.connection.start()
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join(10)
        self.connection.stop()
