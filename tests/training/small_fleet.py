"""A small fleet's frames in a real store: class means plus noise, seen through a different random map per backbone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from coordinator.settings import CoordinatorSettings, TaskSettings
from coordinator.store.engine import Store
from coordinator.store.ingest import ReceivedFrame, insert_frames
from coordinator.store.registry import insert_plan, register_backbone
from coordinator.training.settings import TrainingSettings
from side_tuning.backbone_manifest import BackboneManifest
from side_tuning.broker_connection import BrokerSettings
from side_tuning.wire import topics
from side_tuning.wire.codecs import encode_vectors
from side_tuning.wire.frame import Frame, SampleInfo, Tap, encode_frame
from side_tuning.wire.messages import TapPlan

AT = datetime(2026, 8, 1, tzinfo=timezone.utc)
LABELS = ("light", "music", "door")
SHALLOW, DEEP = "aa" * 16, "bb" * 16
DEPTHS = {SHALLOW: 2, DEEP: 4}
WIDTHS = {SHALLOW: 12, DEEP: 20}
MEANING = 8  # dimensions that the classes live in


def plan(version: int = 1, **changes: Any) -> TapPlan:
    return TapPlan(**{"version": version, "labels": LABELS, "blocks": 2, "codec": "int8", "group": 0, **changes})


def settings(folder: Path, **training: Any) -> CoordinatorSettings:
    small = {
        "side_width": 16, "input_dropout": 0.1, "min_samples": 32, "batch_size": 32, "replay_ratio": 40, "replay_cap": 200,
        "poll_seconds": 0.05, "settle_seconds": 0.1, "evaluate_every_seconds": 0.5, "checkpoint_every_seconds": 0.5, "checkpoint_growth": 0.0,
    }  # fmt: skip
    return CoordinatorSettings(
        data_directory=folder / "data",
        database_url=f"sqlite:///{folder}/store.db",
        broker=BrokerSettings(host="localhost"),
        task=TaskSettings(labels=LABELS),
        training=TrainingSettings(**{**small, **training}),
    )


def manifest(fingerprint: str) -> BackboneManifest:
    return BackboneManifest(
        fingerprint=fingerprint, source="test", family="bert", kind="encoder", layers=DEPTHS[fingerprint], layers_total=6,
        width=WIDTHS[fingerprint], weights="float", max_tokens=128, vocabulary=100,
        maps=dict.fromkeys(range(1, DEPTHS[fingerprint] + 1), "cd" * 16), map_rank=8,
    )  # fmt: skip


def prepare(store: Store, tap_plan: TapPlan | None = None) -> None:
    with store.write() as session:
        for fingerprint in DEPTHS:
            register_backbone(session, manifest(fingerprint), AT)
        insert_plan(session, tap_plan or plan(), at=AT)


def frame(
    device: str,
    sequence: int,
    labels: Sequence[int | None],
    *,
    fingerprint: str = SHALLOW,
    split: str = "train",
    tap_plan: TapPlan | None = None,
    layers: Sequence[int] | None = None,
    seed: int = 0,
) -> Frame:
    tap_plan = tap_plan or plan()
    generator = np.random.default_rng([seed, sequence, *device.encode()])
    classes = np.random.default_rng(99).normal(size=(len(LABELS), MEANING))
    tokens = generator.integers(2, 6, len(labels)).tolist()
    repeats = tokens if tap_plan.mode == "sequence" else [1] * len(labels)
    meaning = np.stack([classes[label or 0] for label in labels]) + 0.5 * generator.normal(size=(len(labels), MEANING))
    taps = []
    for layer in layers or tap_plan.taps(DEPTHS[fingerprint]):
        width = WIDTHS[fingerprint] if tap_plan.mode == "pooled" else min(tap_plan.rank, WIDTHS[fingerprint])
        view = np.random.default_rng([int(fingerprint[:2], 16), layer]).normal(size=(MEANING, width))
        values = np.repeat(meaning @ view, repeats, axis=0).astype(np.float32)
        if tap_plan.summary:
            whole = np.random.default_rng([int(fingerprint[:2], 16), layer, 1]).normal(size=(MEANING, WIDTHS[fingerprint]))
            values = with_summaries((meaning @ whole).astype(np.float32), values, tokens)
        data = encode_vectors(values, tap_plan.codec, tap_plan.group)
        map_hash = "cd" * 16 if tap_plan.mode == "sequence" else None
        taps.append(Tap(layer, len(values), width, tap_plan.codec, tap_plan.group, map_hash, data))
    ids = [hashlib.sha256(f"{device}/{sequence}/{n}".encode()).hexdigest()[:32] for n in range(len(labels))]
    samples = tuple(SampleInfo(i, label, split, t) for i, label, t in zip(ids, labels, tokens, strict=True))
    return Frame(
        device=device, spool="5b00" * 4, sequence=sequence, captured_at=AT.timestamp(), backbone=fingerprint,
        plan_version=tap_plan.version, mode=tap_plan.mode, pooling=tap_plan.pooling, produced=len(labels) * sequence,
        samples=samples, taps=tuple(taps), summary_rows=tap_plan.summary_rows(WIDTHS[fingerprint]),
    )  # fmt: skip


def with_summaries(summaries: np.ndarray, rows: np.ndarray, tokens: Sequence[int]) -> np.ndarray:
    """By hand: the folded summary of each sample, filled up with zeros, then its token rows."""
    rank, found, at = rows.shape[1], [], 0
    for summary, count in zip(summaries, tokens, strict=True):
        for start in range(0, len(summary), rank):
            line = np.zeros(rank, np.float32)
            line[: len(summary[start : start + rank])] = summary[start : start + rank]
            found.append(line)
        found += list(rows[at : at + count])
        at += count
    return np.stack(found)


def arrive(store: Store, frames: Sequence[Frame]) -> None:
    received = [
        ReceivedFrame(f.device, topics.activations(f.device), encode_frame(f), AT, f, None, f.spool, f.sequence) for f in frames
    ]
    with store.write() as session:
        outcomes = insert_frames(session, received)
    assert all(outcome.outcome == "stored" for outcome in outcomes), outcomes


def mixed_fleet(samples: int = 240, tap_plan: TapPlan | None = None) -> list[Frame]:
    """Two devices per backbone, a quarter of the frames held out."""
    devices = {"attic": SHALLOW, "barn": DEEP, "cellar": SHALLOW, "den": DEEP}
    frames = []
    for k, (device, fingerprint) in enumerate(devices.items()):
        for sequence in range(1, samples // 4 // 10 + 1):
            labels = np.random.default_rng([k, sequence]).integers(0, len(LABELS), 10).tolist()
            split = "held-out" if sequence % 4 == 0 else "train"
            frames.append(frame(device, sequence, labels, fingerprint=fingerprint, split=split, tap_plan=tap_plan))
    return frames
