"""Frames as a device would send them, small and real."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone

import numpy as np

from coordinator.store.ingest import ReceivedFrame
from side_tuning.wire import topics
from side_tuning.wire.codecs import encode_vectors
from side_tuning.wire.frame import Frame, Part, SampleInfo, Tap, decode, encode_frame
from side_tuning.wire.messages import Health, SpoolCount

START = datetime(2026, 8, 1, 12, 0, tzinfo=timezone.utc)
FINGERPRINT = "ab" * 16
SPOOL = "5b00" * 4


def after(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def sample_id(name: object) -> str:
    return hashlib.sha256(str(name).encode()).hexdigest()[:32]


def make_frame(  # noqa: PLR0917 - test data
    device: str = "kitchen",
    sequence: int = 1,
    names: Sequence[object] = ("a", "b"),
    produced: int | None = None,
    spool: str = SPOOL,
    width: int = 4,
) -> Frame:
    data = encode_vectors(np.random.default_rng(0).normal(size=(len(names), width)).astype(np.float32), "fp16", 0)
    return Frame(
        device=device,
        spool=spool,
        sequence=sequence,
        captured_at=START.timestamp(),
        backbone=FINGERPRINT,
        plan_version=1,
        mode="pooled",
        pooling="mean",
        produced=len(names) * sequence if produced is None else produced,
        samples=tuple(SampleInfo(sample_id(name), 1, "train", 7) for name in names),
        taps=(Tap(2, len(names), width, "fp16", 0, None, data),),
    )


def received(frame: Frame | Part | bytes, at: datetime = START, reason: str | None = None) -> ReceivedFrame:
    """`frame` as the gateway hands it to the store."""
    if isinstance(frame, bytes):
        payload, decoded = frame, decode(frame)
    else:
        assert isinstance(frame, Frame)
        payload, decoded = encode_frame(frame), frame
    return ReceivedFrame(
        decoded.device, topics.activations(decoded.device), payload, at, decoded, reason, decoded.spool, decoded.sequence
    )


def unreadable(device: str, sequence: int | None, at: datetime = START, spool: str | None = SPOOL, payload: bytes = b"junk") -> ReceivedFrame:
    return ReceivedFrame(device, topics.activations(device), payload, at, None, "frame: damaged", spool, sequence)


def report(  # noqa: PLR0917 - test data
    produced: int,
    receipted: int,
    spooled: int,
    floor: int,
    at: datetime = START,
    dropped: int = 0,
    spool: str = SPOOL,
    session: str = "one",
) -> Health:
    count = SpoolCount(
        spool=spool,
        produced=produced,
        receipted=receipted,
        spooled=spooled,
        dropped=dropped,
        spooled_frames=1 if spooled else 0,
        spooled_bytes=100 * spooled,
        oldest_age_seconds=0.0,
        floor=floor,
        next_sequence=floor + (1 if spooled else 0),
    )
    return Health("online", session, at.timestamp(), spool=count)
