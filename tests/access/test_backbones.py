"""A backbone under the production rules: it gets through over TLS, and no other device can meddle with it."""

from __future__ import annotations

import pytest

from coordinator.backbone_library import keep_artifact
from side_tuning.backbone_manifest import check_artifact
from side_tuning.signatures import load_signing_key, make_key
from side_tuning.wire import topics
from side_tuning.wire.backbone_messages import PartRequest
from tests.brokers import needs_mosquitto
from tests.edge_agent.travelling import FetchingDevice, ScriptedCoordinator, make_backbone
from tests.waiting import wait_until

pytestmark = [pytest.mark.broker, needs_mosquitto]


def test_it_is_fetched_over_tls_and_neighbours_cannot_interfere(broker, make_client, tmp_path):
    make_key(tmp_path / "key")
    key = load_signing_key(tmp_path / "key")
    artifact = make_backbone(tmp_path)
    keep_artifact(tmp_path / "data", artifact)
    coordinator = ScriptedCoordinator(broker.client("gateway"), key, artifact, tmp_path / "data")
    coordinator.withheld = {5}
    coordinator.offer("kitchen")
    neighbour = make_client(broker.client("garage"), "garage")
    with FetchingDevice(broker.client("kitchen"), tmp_path / "state" / "backbone", key.public_key()) as device:
        wait_until(lambda: device.fetcher._files.parts and device.fetcher._files.missing == [5], 60, "all but one")
        for topic in (topics.backbone_part(coordinator.fingerprint, 5), topics.backbone_listing(coordinator.fingerprint), topics.device_backbone("kitchen")):
            assert "Not authorized" in neighbour.publish(topic, b"forged")
        asked = PartRequest(coordinator.fingerprint, (), afresh=True).to_bytes()
        assert "Not authorized" in neighbour.publish(topics.backbone_request("kitchen"), asked)
        coordinator.withheld = set()
        wait_until(lambda: device.done, 60, "fetched")
    coordinator.stop()
    assert device.fetcher.bad_parts == 0
    assert check_artifact(device.place) == check_artifact(artifact)
