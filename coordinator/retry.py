"""Rejected frames, tried again: after a backbone was registered, or a limit raised, they may be good."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from coordinator.gateway import load_registry
from coordinator.ingest import Registry, decode_payload, refusal
from coordinator.store.engine import Store
from coordinator.store.ingest import accept_rejected
from coordinator.store.models import Rejection
from coordinator.store.rejections import rejections
from side_tuning.wire.frame import Frame

EVERYTHING = 1_000_000


@dataclass
class RetryResult:
    """What became of the rejected messages; `reasons` counts why the rest stay rejected."""

    stored: int = 0
    samples: int = 0
    still_rejected: int = 0
    reasons: Counter[str] = field(default_factory=Counter)


def retry_rejections(store: Store, device: str | None = None, *, max_body_bytes: int) -> RetryResult:
    """Decode and check every kept message again; store what passes. Receipts need nothing: it was receipted before."""
    registry = load_registry(store)
    result = RetryResult()
    with store.read() as session:
        waiting = rejections(session, device, EVERYTHING)
    for row in reversed(waiting):  # oldest first, as they came
        with store.write() as session:  # one at a time: the gateway writes in between
            kept = session.get(Rejection, row.id)
            if kept is None:
                continue  # somebody else retried it
            frame = _examine(row.device, kept.payload, registry, max_body_bytes)
            if isinstance(frame, str):
                result.still_rejected += 1
                result.reasons[frame] += 1
                continue
            outcome = accept_rejected(session, row.id, frame)
            result.stored += 1
            result.samples += outcome.samples
    return result


def _examine(device: str, payload: bytes | None, registry: Registry, max_body_bytes: int) -> Frame | str:
    """The frame, if it is good now; else why not."""
    if payload is None:
        return "its payload is gone (retention)"
    found = decode_payload(device, payload, {}, max_body_bytes=max_body_bytes)
    if not isinstance(found.frame, Frame):
        return found.reason or "it is only a part of a frame"
    return refusal(found.frame, registry) or found.frame
