"""Parts of frames that were too large for one message: kept as they come, joined when all are here."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from coordinator.store.accounts import insert_into
from coordinator.store.models import Device, FramePart, FrameRow, Rejection, Spool
from coordinator.store.rejections import RejectedMessage, keep_rejected
from side_tuning.wire.bounded import FrameError
from side_tuning.wire.frame import Frame, Part, decode, decode_frame, join_parts


@dataclass(frozen=True)
class WholeFrame:
    """A frame about to be stored: its spool, its payload, and how many sequences it takes."""

    spool: Spool
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


def keep_parts(session: Session, parts: Mapping[int, tuple[Spool, _Received]]) -> KeptParts:
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


def _insert_part(session: Session, spool: Spool, part: Part, item: _Received) -> bool:
    for model in (FrameRow, Rejection):
        whole = select(model.id).where(model.spool_id == spool.id, model.sequence == part.first, model.span > 1)
        if session.scalar(whole) is not None:
            return False
    first_of_its_frame = session.scalar(select(FramePart.id).where(FramePart.spool_id == spool.id, FramePart.first == part.first).limit(1)) is None
    insert = insert_into(session, FramePart).on_conflict_do_nothing(index_elements=["spool_id", "sequence"])
    row = {
        "spool_id": spool.id,
        "sequence": part.sequence,
        "first": part.first,
        "count": part.count,
        "samples": part.samples,
        "received_at": item.received_at,
        "payload": item.payload,
    }
    if session.execute(insert.returning(FramePart.id), [row]).first() is None:
        return False
    spool.known_sequences += 1
    if part.sequence <= spool.stored_through:
        spool.skipped_sequences = max(spool.skipped_sequences - 1, 0)
    spool.highest_sequence = max(spool.highest_sequence, part.sequence)
    spool.produced_seen = max(spool.produced_seen, part.produced)
    spool.newest_frame_at = item.received_at
    if first_of_its_frame:
        spool.assembling_samples += part.samples
    return True


def _join(spool: Spool, payloads: list[bytes], received_at: datetime) -> tuple[WholeFrame | str, bytes]:
    joined = b"".join(payloads)
    try:
        parts = [part for part in map(decode, payloads) if isinstance(part, Part)]
        joined = join_parts(parts)
        frame = decode_frame(joined)
    except FrameError as error:
        return str(error), joined
    return WholeFrame(spool, frame, joined, received_at, span=len(payloads), from_parts=True), joined


def close_incomplete(session: Session, spool: Spool, through: int, reason: str) -> int:
    """Reject every frame whose parts all lie at or below `through` and some of which never came; how many that were."""
    rows = session.execute(
        select(FramePart.id, FramePart.first, FramePart.count, FramePart.sequence, FramePart.samples, FramePart.received_at)
        .where(FramePart.spool_id == spool.id, FramePart.first + FramePart.count - 1 <= through)
        .order_by(FramePart.sequence)
    )
    groups = defaultdict(list)
    for row in rows:
        groups[row.first].append(row)
    if not groups:
        return 0
    device = session.get_one(Device, spool.device_id)
    for first, parts in groups.items():
        session.execute(delete(FramePart).where(FramePart.id.in_([part.id for part in parts])))
        spool.assembling_samples = max(spool.assembling_samples - parts[0].samples, 0)
        spool.known_sequences -= len(parts)
        spool.skipped_sequences += len(parts) - 1
        lowest = parts[0].sequence
        # The device counts a frame's samples with its first part, and so do we: without that part they are its drop.
        samples = parts[0].samples if lowest == first else 0
        reason_here = f"{len(parts)} of {parts[0].count} parts came, then {reason}"
        message = RejectedMessage(device.name, "", b"", reason_here, parts[0].received_at, spool.spool, lowest, 1, samples)
        keep_rejected(session, device, spool, message, was_here=True)
    return len(groups)
