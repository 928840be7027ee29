"""Frames of small language models in a real store: the agent's own forward pass on random decoders and simple sentences."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from coordinator.backbone_library import keep_artifact
from coordinator.backbones import prepare as prepare_backbone
from coordinator.settings import CoordinatorSettings
from coordinator.store.engine import Store
from coordinator.store.registry import insert_plan, register_backbone
from edge_agent.backbone import Backbone
from edge_agent.forward import tap_samples
from edge_agent.open_frame import OpenFrame
from edge_agent.samples import Sample
from side_tuning.backbone_manifest import BackboneManifest
from side_tuning.wire.frame import Frame, decode_frame
from side_tuning.wire.messages import TapPlan
from tests.backbones.models import save_random_model
from tests.training import small_fleet
from tests.training.small_fleet import AT

WORDS = ("turn", "on", "the", "light", "in", "kitchen", "please", "play", "some", "music", "stop")
PLAN = TapPlan(1, (), 2, mode="sequence", codec="int8", rank=24, max_tokens=24, task="causal-lm", last_rank=64, last_codec="int8")


def texts(count: int, seed: int = 0) -> list[str]:
    """Sentences in which every word says what the next one is, but for the first."""
    generator = np.random.default_rng(seed)
    return [" ".join(WORDS[(start + step) % len(WORDS)] for step in range(8)) for start in generator.integers(0, len(WORDS), count)]


def backbone(folder: Path, name: str, **changes: Any) -> BackboneManifest:
    """A prepared random decoder in `folder`/artifact."""
    return prepare_backbone(save_random_model(name, folder / "model", **changes), folder / "artifact", weights="int8", max_tokens=32)


def register(store: Store, settings: CoordinatorSettings, folders: Sequence[Path], plan: TapPlan | None = None) -> list[BackboneManifest]:
    found = []
    for folder in folders:
        kept = keep_artifact(settings.data_directory, folder / "artifact")
        found.append(Backbone.load(kept).manifest)
    with store.write() as session:
        for manifest in found:
            register_backbone(session, manifest, AT)
        if plan is not None:
            insert_plan(session, plan, at=AT)
    return found


def frames(folder: Path, device: str, sentences: Sequence[str], *, held_out: bool = False, first: int = 1, plan: TapPlan = PLAN) -> list[Frame]:
    """What `device` sends of the sentences, eight to a frame."""
    loaded = Backbone.load(folder / "artifact")
    found = []
    for number, start in enumerate(range(0, len(sentences), 8)):
        samples = [
            Sample(hashlib.sha256(f"{device}/{first + number}/{n}".encode()).hexdigest()[:32], text, None, "held-out" if held_out else "train")
            for n, text in enumerate(sentences[start : start + 8])
        ]
        opened = OpenFrame(plan, AT.timestamp(), 0.0)
        for sample in tap_samples(loaded, samples, plan, lambda *_: None):
            opened.add(sample)
        payloads = opened.payloads((device, "5b00" * 4, first + number), 8 * (first + number), loaded.manifest.fingerprint, 1 << 20)
        found.append(decode_frame(payloads[0]))
    return found


def settings(folder: Path, **training: Any) -> CoordinatorSettings:
    """Those of the task, small and quick to learn."""
    made = small_fleet.settings(folder, **{"warmup_steps": 5, "ema_decay": 0.9, **training})
    language = made.training.language.model_copy(update={"side_width": 32, "min_samples": 16, "learning_rate": 1e-2})
    return made.model_copy(update={"training": made.training.model_copy(update={"language": language}).of_task("causal-lm")})
