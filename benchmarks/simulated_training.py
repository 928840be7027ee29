"""What the coordinator learns, and when: devices' frames arrive in simulated time, the product's own trainer works on them.

The frames go into a real store and through `take_in`; drawing, stepping and evaluating are the trainer's own functions.
Only the clock is another: an arrival's time comes from `benchmarks.time_model`, a step takes what it took.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

from benchmarks.tapped_fleet import MadeFrame, TappedDevice
from benchmarks.time_model import DeviceProfile, stream_arrivals
from coordinator.settings import CoordinatorSettings
from coordinator.store.engine import Store, open_store
from coordinator.store.ingest import ReceivedFrame, insert_frames
from coordinator.store.registry import insert_plan, register_backbone
from coordinator.store.schema import upgrade
from coordinator.training.evaluation import evaluate
from coordinator.training.settings import TrainingSettings
from coordinator.training.take_in import take_in
from coordinator.training.trainer import Training, may_step, open_training, take_step, take_up
from side_tuning.backbone_manifest import BackboneManifest
from side_tuning.wire import topics
from side_tuning.wire.frame import decode
from side_tuning.wire.messages import TapPlan

EVALUATE_EVERY_STEPS = 10
EVALUATED_SAMPLES = 20_000


@dataclass(frozen=True)
class Point:
    """Accuracy at one moment of simulated time."""

    seconds: float
    step: int
    accuracy: float
    by_device: dict[str, float]
    frames_arrived: dict[str, int]  # of train rows, by device


@dataclass(frozen=True)
class Learned:
    curve: list[Point]
    server_seconds: float  # spent on steps
    checkpoint_bytes: int  # what a device fetches: ladder and alignment

    @property
    def final(self) -> Point:
        return self.curve[-1]


def learn(  # noqa: PLR0917 - who sends, how fast, under what, learned how
    devices: Sequence[TappedDevice],
    profile: Sequence[DeviceProfile],
    plan: TapPlan,
    manifest: BackboneManifest,
    training_settings: TrainingSettings,
    folder: Path,
    overhead: float = 0.0,
) -> Learned:
    """Train until every draw that the samples pay for is made.

    Args:
        devices: their frames.
        profile: how slow each is.
        plan: under which the frames were made.
        manifest: of the one backbone.
        training_settings: the trainer's.
        folder: for the store and the tap cache.
        overhead: bytes on the wire per byte of payload, beyond the payload itself.

    """
    settings = CoordinatorSettings(
        data_directory=folder,
        broker={"host": "127.0.0.1", "port": 1, "tls": False},
        task={"labels": list(plan.labels)},
        training=training_settings,
    )
    folder.mkdir(parents=True, exist_ok=True)
    upgrade(settings.database_url)
    store = open_store(settings.database_url)
    try:
        with store.write() as session:
            insert_plan(session, plan)
            register_backbone(session, manifest)
        training = open_training(store, settings, plan)
        try:
            return _learn(training, store, settings, devices, profile, overhead)
        finally:
            training.cache.close()
    finally:
        store.close()


def _learn(  # noqa: PLR0917 - as above
    training: Training,
    store: Store,
    settings: CoordinatorSettings,
    devices: Sequence[TappedDevice],
    profile: Sequence[DeviceProfile],
    overhead: float,
) -> Learned:
    arrivals: list[tuple[float, str, MadeFrame]] = []
    for device, speed in zip(devices, profile, strict=True):
        _store(store, device.name, device.held_out)
        times = stream_arrivals(speed, [(frame.seconds, frame.payload_bytes * (1 + overhead)) for frame in device.train])
        arrivals += [(at, device.name, frame) for at, frame in zip(times, device.train, strict=True)]
    arrivals.sort(key=lambda one: one[0])
    arrived = dict.fromkeys((device.name for device in devices), 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.training.threads)
    now = spent = quiet_at = 0.0
    curve: list[Point] = []
    _look(training, store)
    while True:
        due = [one for one in arrivals if one[0] <= now]
        for _, name, frame in due:
            _store(store, name, (frame,))
            arrived[name] += 1
        if due:
            quiet_at = due[-1][0] + settings.training.settle_seconds
            del arrivals[: len(due)]
            _look(training, store)
        arriving = now < quiet_at
        if may_step(training, settings, arriving=arriving):
            began = time.perf_counter()
            take_step(training, settings)
            took = time.perf_counter() - began
            now, spent = now + took, spent + took
            if training.step % EVALUATE_EVERY_STEPS == 0:
                curve.append(_measure(training, now, arrived))
        elif arriving:
            now = min(quiet_at, arrivals[0][0] if arrivals else math.inf)
        elif arrivals:
            now = arrivals[0][0]
        else:
            break
    if not curve or curve[-1].step != training.step:
        curve.append(_measure(training, now, arrived))
    torch.set_num_threads(threads)
    published = training.learner.published()
    size = len(published.ladder_file) + max(map(len, published.alignment_files.values()))
    return Learned(curve, spent, size)


def _store(store: Store, device: str, frames: Sequence[MadeFrame]) -> None:
    at = datetime.now(timezone.utc)
    batch = [
        ReceivedFrame(device, topics.activations(device), payload, at, decode(payload)) for frame in frames for payload in frame.payloads
    ]
    with store.write() as session:
        outcomes = insert_frames(session, batch)
    for outcome in outcomes:
        if outcome.outcome not in ("stored", "part"):
            raise RuntimeError(f"a frame of {device} was not stored: {outcome.outcome} {outcome.reason}")


def _look(training: Training, store: Store) -> None:
    while take_in(store, training.cache, training.plan):
        pass
    take_up(training)
    if training.cache.skipped:
        raise RuntimeError(f"samples that cannot be used: {dict(training.cache.skipped)}")


def _measure(training: Training, now: float, arrived: dict[str, int]) -> Point:
    found = evaluate(training.cache, training.learner, EVALUATED_SAMPLES)
    fleet = next(one.score for one in found if one.scope == "fleet")
    by_device = {one.name: one.score for one in found if one.scope == "device"}
    return Point(now, training.step, fleet, by_device, dict(arrived))
