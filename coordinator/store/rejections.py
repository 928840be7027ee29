"""Messages that were not accepted: kept with their reason, counted once, and open to another try."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import select
from sqlalchemy.orm import Session, contains_eager

from coordinator.store.accounts import advance_spool, open_devices, open_spools
from coordinator.store.counts import AnyDevice, AnySpool
from coordinator.store.models import Device, FramePart, FrameRow, Rejection

MAX_REASON_CHARACTERS = 500
_MAX_SEQUENCE = 2**53


@dataclass(frozen=True)
class RejectedMessage:
    """A message that the gateway turned down. `samples` and `produced` where the header could be read."""

    device: str
    topic: str
    payload: bytes
    reason: str
    received_at: datetime
    spool: str | None = None
    sequence: int | None = None
    span: int = 1
    samples: int | None = None
    produced: int = 0


@dataclass(frozen=True)
class RejectionRow:
    """A rejected message as people see it; `payload` is None once retention has dropped it."""

    id: int
    device: str
    spool: str | None
    sequence: int | None
    topic: str
    reason: str
    samples: int | None
    times: int
    received_at: datetime
    payload_bytes: int
    payload: bytes | None


def has_identity(spool: str | None, sequence: int | None) -> bool:
    """Whether a receipt can name the message."""
    return spool is not None and 0 < len(spool) <= 64 and sequence is not None and 1 <= sequence <= _MAX_SEQUENCE


def insert_rejection(
    session: Session,
    *,
    device: str,
    topic: str,
    payload: bytes,
    reason: str,
    received_at: datetime,
    spool: str | None = None,
    sequence: int | None = None,
    samples: int | None = None,
) -> bool:
    """Keep one rejected message that is not part of a batch; False if it was known already."""
    devices = open_devices(session, [device], received_at)
    row = None
    if has_identity(spool, sequence):
        row = open_spools(session, devices, [(device, str(spool))], received_at)[device, str(spool)]
    message = RejectedMessage(device, topic, payload, reason, received_at, spool, sequence, samples=samples)
    fresh = keep_rejected(session, devices[device], row, message)
    if fresh and row is not None and sequence is not None:
        advance_spool(session, row, [(sequence, 1)])
    return fresh


def keep_rejected(session: Session, device: AnyDevice, spool: AnySpool | None, message: RejectedMessage, *, was_here: bool = False) -> bool:
    """Store and count a rejected message; False if what it names is stored or rejected already.

    The caller moves `stored_through` on. `was_here` says that it was stored as a part, and perhaps receipted, until now.
    """
    digest = hashlib.sha256(message.payload).hexdigest()[:32]
    if spool is None or message.sequence is None:
        known = session.scalars(
            select(Rejection).where(Rejection.device_id == device.id, Rejection.digest == digest, Rejection.spool_id.is_(None))
        ).first()
        if known is not None:  # no receipt can stop the device from sending it again: one row is enough
            known.times += 1
            known.received_at = message.received_at
            return False
        device.unattributed_rejections += 1
    else:
        receipted = message.sequence <= spool.stored_through and not was_here
        if receipted or is_here(session, spool.id, message.sequence):
            return False
        spool.rejected_frames += 1
        spool.known_sequences += message.span
        spool.highest_sequence = max(spool.highest_sequence, message.sequence + message.span - 1)
        spool.produced_seen = max(spool.produced_seen, message.produced)
        spool.newest_frame_at = message.received_at
        if message.samples is None:
            spool.unreadable_frames += 1
        else:
            spool.rejected_samples += message.samples
    session.add(
        Rejection(
            device_id=device.id,
            spool_id=None if spool is None else spool.id,
            sequence=None if spool is None else message.sequence,
            span=message.span,
            topic=message.topic[:300],
            reason=message.reason[:MAX_REASON_CHARACTERS],
            samples=message.samples,
            digest=digest,
            received_at=message.received_at,
            payload_bytes=len(message.payload),
            payload=message.payload,
        )
    )
    session.flush()
    return True


def is_here(session: Session, spool_id: int, sequence: int) -> bool:
    """Whether this sequence is stored, rejected, or a part that waits for its frame."""
    for model in (FrameRow, Rejection):
        nearest = session.execute(
            select(model.sequence, model.span)
            .where(model.spool_id == spool_id, model.sequence <= sequence)
            .order_by(model.sequence.desc())
            .limit(1)
        ).first()
        if nearest is not None and (nearest[0] or 0) + nearest[1] > sequence:
            return True
    return session.scalar(select(FramePart.id).where(FramePart.spool_id == spool_id, FramePart.sequence == sequence)) is not None


def rejections(session: Session, device: str | None = None, limit: int = 100, *, with_payload: bool = False) -> list[RejectionRow]:
    """The newest rejected messages, newest first."""
    wanted = (
        select(Rejection)
        .join(Rejection.device)
        .outerjoin(Rejection.spool)
        .options(contains_eager(Rejection.device), contains_eager(Rejection.spool))
        .order_by(Rejection.id.desc())
        .limit(limit)
    )
    if device is not None:
        wanted = wanted.where(Device.name == device)
    return [
        RejectionRow(
            id=row.id,
            device=row.device.name,
            spool=None if row.spool is None else row.spool.spool,
            sequence=row.sequence,
            topic=row.topic,
            reason=row.reason,
            samples=row.samples,
            times=row.times,
            received_at=row.received_at,
            payload_bytes=row.payload_bytes,
            payload=row.payload if with_payload else None,
        )
        for row in session.scalars(wanted)
    ]
