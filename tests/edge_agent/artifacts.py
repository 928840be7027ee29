"""A small real backbone (two layers of MiniLM in int8) and signed checkpoints for it."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import torch

from edge_agent.backbone import read_manifest
from side_tuning.network.alignment import Alignment
from side_tuning.network.files import save_alignment, save_ladder
from side_tuning.network.side_network import SideNetwork, SideNetworkConfig
from side_tuning.signatures import sign_manifest
from side_tuning.wire import topics
from side_tuning.wire.messages import Blob, CheckpointManifest, TapPlan

LABELS = ("light", "music", "weather")


def plan(**changes) -> TapPlan:
    values = {"version": 1, "labels": LABELS, "blocks": 2, "codec": "int4", "max_tokens": 40, "linger_seconds": 0.1, "rank": 8}
    return TapPlan(**{**values, **changes})


class Checkpoint:
    """A side network with random weights, cut into parts and signed."""

    def __init__(self, backbone_folder: Path, key, generation: int, *, seed=0, ladder_seed=None, part_bytes=4096, **changes):
        backbone = read_manifest(backbone_folder)
        self.plan = plan(**changes)
        torch.manual_seed(seed if ladder_seed is None else ladder_seed)
        self.ladder = SideNetwork(
            SideNetworkConfig(32, self.plan.blocks, len(self.plan.labels) or 1, self.plan.mode, summary=self.plan.summary)
        )
        torch.manual_seed(seed)
        width = backbone.width if self.plan.mode == "pooled" else min(self.plan.rank, backbone.width)
        self.alignment = Alignment(width, 32, self.plan.blocks, *((backbone.width, 32) if self.plan.summary else ()))
        self.alignment.project.data += torch.randn_like(self.alignment.project)
        self.files = {"ladder": save_ladder(self.ladder), "alignment": save_alignment(self.alignment)}
        blobs = {
            name: Blob(name, hashlib.sha256(content).hexdigest(), len(content), part_bytes) for name, content in self.files.items()
        }
        self.manifest = CheckpointManifest(
            generation, "run", 7, time.time(), backbone.fingerprint, self.plan, 32, blobs["ladder"], blobs["alignment"]
        )
        self.signed = sign_manifest(self.manifest, key).to_bytes()

    def parts(self) -> dict[str, bytes]:
        """Payload by topic."""
        found = {}
        for blob, content in ((self.manifest.ladder, self.files["ladder"]), (self.manifest.alignment, self.files["alignment"])):
            for n in range(blob.parts):
                found[topics.checkpoint_part(blob.sha256, n)] = content[n * blob.part_bytes : (n + 1) * blob.part_bytes]
        return found

    def publish(self, connection, *, parts=None) -> None:
        for topic, payload in (self.parts() if parts is None else parts).items():
            assert connection.publish(topic, payload, retain=True).wait(10)
        assert connection.publish(topics.checkpoint(self.manifest.fingerprint), self.signed, retain=True).wait(10)
