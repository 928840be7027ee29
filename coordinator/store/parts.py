"""Parts of frames that were too large for one message: kept as they come, joined when all are here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from coordinator.store.counts import AnyDevice, AnySpool
from coordinator.store.models import FramePart
from coordinator.store.rejections import RejectedMessage, is_here, keep_rejected
from side_tuning.wire.bounded import FrameError
from side_tuning.wire.frame import Frame, Part, decode, decode_frame, join_parts


@dataclass(frozen=True)
class WholeFrame:
    """A frame about to be stored: its spool, its payload, and how many sequences it takes."""

    spool: AnySpool
    frame: Frame
    payload: bytes
    received_at: datetime
    span: int = 1
    from_parts: bool = False


class _Received(Protocol):
    @property
    def payload(self) -> bytes: ...
    @property
    def received_at(self) -> datetime: ...
    @property
    def frame(self) -> Frame | Part | None: ...


@dataclass
class KeptParts:
    """What became of a batch's parts, by their place in it."""

    duplicates: set[int] = field(default_factory=set)
    complete: dict[int, WholeFrame | str] = field(default_factory=dict)  # the frame, or why its parts make none
    payloads: dict[int, bytes] = field(default_factory=dict)  # of `complete`


def keep_parts(session: Session, parts: Mapping[int, tuple[AnySpool, _Received]]) -> KeptParts:
    """Store new parts; a frame whose last part has come is taken out and handed back whole."""
    kept = KeptParts()
    groups: dict[tuple[int, int], int] = {}  # (spool id, first sequence) -> place of its newest part
    for place, (spool, item) in parts.items():
        part = item.frame
        assert isinstance(part, Part)
        if not _insert_part(session, spool, part, item):
            kept.duplicates.add(place)
        else:
            groups[spool.id, part.first] = place
    for (spool_id, first), place in groups.items():
        spool, item = parts[place]
        part = item.frame
        assert isinstance(part, Part)
        group = (FramePart.spool_id == spool_id, FramePart.first == first)
        here = session.scalar(select(func.count()).select_from(FramePart).where(*group)) or 0
        if here < part.count:
            continue
        payloads = list(session.scalars(select(FramePart.payload).where(*group).order_by(FramePart.sequence)))
        session.execute(delete(FramePart).where(*group))
        spool.assembling_samples = max(spool.assembling_samples - part.samples, 0)
        kept.complete[place], kept.payloads[place] = _join(spool, payloads, item.received_at)
        if isinstance(kept.complete[place], str):
            spool.known_sequences -= here  # they are counted again as a rejection
    return kept


def _insert_part(session: Session, spool: AnySpool, part: Part, item: _Received) -> bool:
    if is_here(session, spool.id, part.sequence):
        return False
    others = select(FramePart.id).where(FramePart.spool_id == spool.id, FramePart.first == part.first).limit(1)
    first_of_its_frame = session.scalar(others) is None
    session.add(
        FramePart(
            spool_id=spool.id,
            sequence=part.sequence,
            first=part.first,
            count=part.count,
            samples=part.samples,
            received_at=item.received_at,
            payload=item.payload,
        )
    )
    session.flush()
    spool.known_sequences += 1
    if part.sequence <= spool.stored_through:
        spool.skipped_sequences = max(spool.skipped_sequences - 1, 0)
    spool.highest_sequence = max(spool.highest_sequence, part.sequence)
    spool.produced_seen = max(spool.produced_seen, part.produced)
    spool.newest_frame_at = item.received_at
    if first_of_its_frame:
        spool.assembling_samples += part.samples
    return True


def _join(spool: AnySpool, payloads: list[bytes], received_at: datetime) -> tuple[WholeFrame | str, bytes]:
    joined = b"".join(payloads)
    try:
        parts = [part for part in map(decode, payloads) if isinstance(part, Part)]
        joined = join_parts(parts)
        frame = decode_frame(joined)
    except FrameError as error:
        return str(error), joined
    return WholeFrame(spool, frame, joined, received_at, span=len(payloads), from_parts=True), joined


def close_incomplete(session: Session, device: AnyDevice, spool: AnySpool, reason: str) -> int:
    """Reject every frame whose parts all lie below the floor and some of which never came; how many that were."""
    firsts = session.scalars(
        select(FramePart.first).distinct().where(FramePart.spool_id == spool.id, FramePart.first + FramePart.count <= spool.floor)
    ).all()
    for first in firsts:
        reject_incomplete(session, device, spool, first, reason)
    return len(firsts)


def reject_incomplete(session: Session, device: AnyDevice, spool: AnySpool, first: int, reason: str) -> None:
    """Turn the parts that came of one frame into rejections: one that counts its samples, and its parts with it."""
    group = (FramePart.spool_id == spool.id, FramePart.first == first)
    parts = session.scalars(select(FramePart).where(*group).order_by(FramePart.sequence)).all()
    session.execute(delete(FramePart).where(*group))
    spool.assembling_samples = max(spool.assembling_samples - parts[0].samples, 0)
    for part in parts:
        spool.known_sequences -= 1
        # The device counts a frame's samples with its first part, and so do we: without that part they are its drop.
        samples = part.samples if part.sequence == first else 0
        told = f"part of a frame of {part.count} parts of which {len(parts)} came; {reason}"
        message = RejectedMessage(device.name, "", part.payload, told, part.received_at, spool.spool, part.sequence, 1, samples)
        keep_rejected(session, device, spool, message, was_here=True)
