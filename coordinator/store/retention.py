"""Gives disk space back: the oldest frame bodies go, by age and by bytes, in steps that never hold up the gateway.

Rule: only payloads are dropped. The rows that name frames, samples and rejections stay, so nothing that was dropped
can be stored a second time, and every counter of the loss ledger stays true.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, delete, func, select, text, update
from sqlalchemy.orm import Session

from coordinator.store.models import ArrivalMinute, Device, FrameBody, FramePart, FrameRow, Rejection, Spool
from coordinator.store.parts import reject_incomplete

# Frames in one step: about 100 ms of the write lock.
STEP_FRAMES = 1000
# Rejected payloads are for people to look at; they must not push out what trains.
REJECTED_SHARE = 0.1
MINUTES_KEPT = timedelta(days=30)
# Freed pages are used again; give them back to the file system only when they are a fair part of the file.
_FREE_SHARE = 0.25
_VACUUM_PAGES = 4000


@dataclass(frozen=True)
class RetentionStep:
    """What one step dropped; `more` if another step is due at once."""

    frames: int
    rejections: int
    incomplete: int
    payload_bytes: int
    more: bool


@dataclass(frozen=True)
class StoredBytes:
    """Payload bytes that the store holds."""

    frames: int
    rejections: int


def stored_bytes(session: Session) -> StoredBytes:
    frames = session.scalar(select(func.coalesce(func.sum(FrameRow.payload_bytes), 0)).where(FrameRow.has_body))
    rejected = session.scalar(select(func.coalesce(func.sum(Rejection.payload_bytes), 0)).where(Rejection.payload.is_not(None)))
    return StoredBytes(int(frames or 0), int(rejected or 0))


def apply_retention(session: Session, max_age: timedelta | None, max_bytes: int | None, now: datetime) -> RetentionStep:
    """Drop one step's worth of payloads that are too old or too many; call again while `more`.

    Frames whose parts have not all come within `max_age` are rejected.
    """
    before = stored_bytes(session)
    frames, frame_bytes, more_frames = _drop_frames(session, before.frames, max_age, max_bytes, now)
    rejections, rejected_bytes = _drop_rejections(session, before.rejections, max_age, max_bytes, now)
    incomplete = 0 if max_age is None else _give_up_parts(session, now - max_age)
    session.execute(delete(ArrivalMinute).where(ArrivalMinute.minute < now - MINUTES_KEPT))
    session.flush()
    _shrink(session)
    return RetentionStep(frames, rejections, incomplete, frame_bytes + rejected_bytes, more_frames or rejections == STEP_FRAMES)


def _drop_frames(
    session: Session, held: int, max_age: timedelta | None, max_bytes: int | None, now: datetime
) -> tuple[int, int, bool]:
    excess = 0 if max_bytes is None else max(held - max_bytes, 0)
    oldest = session.execute(
        select(FrameRow.id, FrameRow.received_at, FrameRow.payload_bytes)
        .where(FrameRow.has_body)
        .order_by(FrameRow.received_at)
        .limit(STEP_FRAMES)
    ).all()
    doomed: list[int] = []
    freed = 0
    for frame_id, received_at, size in oldest:
        too_old = max_age is not None and received_at < now - max_age
        if not too_old and freed >= excess:
            break
        doomed.append(frame_id)
        freed += size
    if doomed:
        session.execute(delete(FrameBody).where(FrameBody.frame_id.in_(doomed)))
        session.execute(update(FrameRow).where(FrameRow.id.in_(doomed)).values(has_body=False))
    return len(doomed), freed, len(doomed) == STEP_FRAMES


def _drop_rejections(
    session: Session, held: int, max_age: timedelta | None, max_bytes: int | None, now: datetime
) -> tuple[int, int]:
    excess = 0 if max_bytes is None else max(held - int(max_bytes * REJECTED_SHARE), 0)
    has_payload: ColumnElement[bool] = Rejection.payload.is_not(None)
    oldest = session.execute(
        select(Rejection.id, Rejection.received_at, Rejection.payload_bytes)
        .where(has_payload)
        .order_by(Rejection.received_at)
        .limit(STEP_FRAMES)
    ).all()
    doomed: list[int] = []
    freed = 0
    for rejection_id, received_at, size in oldest:
        too_old = max_age is not None and received_at < now - max_age
        if not too_old and freed >= excess:
            break
        doomed.append(rejection_id)
        freed += size
    if doomed:
        session.execute(update(Rejection).where(Rejection.id.in_(doomed)).values(payload=None))
    return len(doomed), freed


def _give_up_parts(session: Session, before: datetime) -> int:
    """Reject frames of which no part has come since `before`."""
    stale = session.execute(
        select(FramePart.spool_id, FramePart.first)
        .group_by(FramePart.spool_id, FramePart.first)
        .having(func.max(FramePart.received_at) < before)
        .limit(STEP_FRAMES)
    ).all()
    for spool_id, first in stale:
        spool = session.get_one(Spool, spool_id)
        device = session.get_one(Device, spool.device_id)
        reject_incomplete(session, device, spool, first, "the rest did not come in time")
    return len(stale)


def _shrink(session: Session) -> None:
    if session.get_bind().dialect.name != "sqlite":
        return  # PostgreSQL's autovacuum does this
    free = session.scalar(text("PRAGMA freelist_count")) or 0
    pages = session.scalar(text("PRAGMA page_count")) or 1
    if free > _FREE_SHARE * pages:
        # Python's driver takes one step of this statement and each step frees one page, so it is asked page by page.
        connection = session.connection()
        for _ in range(min(free, _VACUUM_PAGES)):
            connection.exec_driver_sql("PRAGMA incremental_vacuum(1)")
