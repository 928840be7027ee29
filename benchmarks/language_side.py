"""Our side of benchmarks.language: texts become frames by the agent's own code, and the coordinator's own trainer learns from them.

The frames go into a real store and through `take_in`; only broker and clock are left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from benchmarks.language_lora import TokenRow
from benchmarks.tapped_fleet import MadeFrame, make_frames
from coordinator.backbone_library import keep_artifact
from coordinator.demonstration.data import Row, Text
from coordinator.settings import CoordinatorSettings
from coordinator.store.engine import Store, open_store
from coordinator.store.ingest import ReceivedFrame, insert_frames
from coordinator.store.registry import insert_plan, register_backbone
from coordinator.store.schema import upgrade
from coordinator.training.language_evaluation import evaluate_language
from coordinator.training.language_learner import LanguageLearner
from coordinator.training.settings import TrainingSettings
from coordinator.training.take_in import take_in
from coordinator.training.trainer import Training, open_training, take_step, take_up
from edge_agent.backbone import Backbone
from side_tuning.backbone_manifest import read_manifest
from side_tuning.wire import topics
from side_tuning.wire.frame import Frame, Split, decode
from side_tuning.wire.messages import TapPlan

EVERY_SAMPLE = 1_000_000


@dataclass(frozen=True)
class Device:
    """Who sends what: texts or (prompt, response) pairs, run through the backbone in the folder `artifact`."""

    name: str
    artifact: Path
    train: Sequence[Text]
    held_out: Sequence[Text]


@dataclass(frozen=True)
class Bits:
    """Held-out bits per byte."""

    untuned: float  # of the backbone alone, through the same codec
    tuned: float


class LanguageFleet:
    """One run of the trainer, to which devices are added."""

    def __init__(self, training: Training, store: Store, settings: CoordinatorSettings) -> None:
        self._training, self._store, self._settings = training, store, settings
        self.payload_bytes = self.tokens = 0  # of all train frames

    def add(self, device: Device) -> None:
        """Store everything that `device` sends, register its backbone, and let the trainer know it."""
        loaded = Backbone.load(self.register(device.artifact))
        train = text_frames(loaded, self._training.plan, device.name, device.train, "train")
        self.payload_bytes += sum(frame.payload_bytes for frame in train)
        self.tokens += sum(sample.tokens for frame in whole_frames(train) for sample in frame.samples)
        first = 1 + sum(len(frame.payloads) for frame in train)
        held_out = text_frames(loaded, self._training.plan, device.name, device.held_out, "held-out", first=first)
        self.receive(device.name, [payload for frame in (*train, *held_out) for payload in frame.payloads])

    def register(self, artifact: Path) -> Path:
        """As `coordinator backbone register` does; returns the coordinator's own copy."""
        kept = keep_artifact(self._settings.data_directory, artifact)
        with self._store.write() as session:
            register_backbone(session, read_manifest(kept))
        return kept

    def receive(self, device: str, payloads: Sequence[bytes]) -> None:
        """Store what a device sent, and let the trainer know it; its backbone has been registered."""
        at = datetime.now(timezone.utc)
        batch = [ReceivedFrame(device, topics.activations(device), payload, at, decode(payload)) for payload in payloads]
        with self._store.write() as session:
            outcomes = insert_frames(session, batch)
        for outcome in outcomes:
            if outcome.outcome not in ("stored", "part"):
                raise RuntimeError(f"a frame of {device} was not stored: {outcome.outcome} {outcome.reason}")
        while take_in(self._store, self._training.cache, self._training.plan):
            pass
        take_up(self._training)
        if self._training.cache.skipped:
            raise RuntimeError(f"samples that cannot be used: {dict(self._training.cache.skipped)}")

    def train(self, steps: int) -> None:
        for _ in range(steps):
            take_step(self._training, self._settings)

    def bits_per_byte(self) -> dict[str, Bits]:
        """Of each device and of the whole fleet (""), with the weights that devices get."""
        assert isinstance(self._training.learner, LanguageLearner)
        found = evaluate_language(self._training.cache, self._training.learner, EVERY_SAMPLE)
        scores = {(one.scope, one.name): one.score for one in found}
        names = [name for scope, name in scores if scope == "device"]
        bits = {name: Bits(scores["untuned", name], scores["device", name]) for name in names}
        return {"": Bits(scores["untuned", "fleet"], scores["fleet", "fleet"]), **bits}


@contextmanager
def language_fleet(folder: Path, plan: TapPlan, knobs: TrainingSettings) -> Iterator[LanguageFleet]:
    """A coordinator's store and trainer in `folder`; `knobs` are settings for every task, the task's own are taken from them."""
    settings = CoordinatorSettings(
        data_directory=folder, broker={"host": "127.0.0.1", "port": 1, "tls": False}, task={"kind": "causal-lm"}, training=knobs.of_task("causal-lm")
    )
    folder.mkdir(parents=True, exist_ok=True)
    upgrade(settings.database_url)
    store = open_store(settings.database_url)
    try:
        with store.write() as session:
            insert_plan(session, plan)
        training = open_training(store, settings, plan)
        try:
            yield LanguageFleet(training, store, settings)
        finally:
            training.cache.close()
    finally:
        store.close()


def text_frames(backbone: Backbone, plan: TapPlan, device: str, texts: Sequence[Text], split: Split, *, first: int = 1) -> tuple[MadeFrame, ...]:
    return make_frames(backbone, plan, device, [Row(text, "") for text in texts], split, first=first)


def whole_frames(made: Sequence[MadeFrame]) -> Iterator[Frame]:
    """Decoded; a frame in parts would come back as parts, so plans here have room for a sample of the longest kind."""
    for one in made:
        for payload in one.payloads:
            frame = decode(payload)
            if not isinstance(frame, Frame):
                raise TypeError("a frame travels in parts: give the plan more frame_bytes")
            yield frame


def token_rows(made: Sequence[MadeFrame]) -> list[TokenRow]:
    """What LoRA and the untouched model are given: the ids as the frames hold them."""
    rows = []
    for frame in whole_frames(made):
        assert frame.token_ids is not None
        sequences = frame.token_ids.sequences([sample.tokens for sample in frame.samples])
        rows += [TokenRow(ids, sample.supervised_from) for ids, sample in zip(sequences, frame.samples, strict=True)]
    return rows


def gain_share(base: float, lora: float, ours: float) -> float:
    """How much of LoRA's gain in bits per byte is ours; not a number where LoRA gains nothing."""
    return (base - ours) / (base - lora) if base > lora else math.nan
