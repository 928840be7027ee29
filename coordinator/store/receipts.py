"""The coordinator's word to the devices: which of their frames are safe."""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import Row, select, tuple_
from sqlalchemy.orm import Session

from coordinator.store.accounts import spans_beyond
from coordinator.store.models import Device, Rejection, Spool
from side_tuning.wire.messages import Receipt

# A receipt travels with every batch: 32 reasons must stay small beside the frames.
_REASON_CHARACTERS = 200


def receipts_for(session: Session, spools: Iterable[tuple[str, str]]) -> dict[tuple[str, str], Receipt]:
    """The receipt of each (device, spool) as of this transaction. A spool that nobody has seen has none."""
    wanted = set(spools)
    if not wanted:
        return {}
    # The columns of a receipt alone: making whole rows of a batch's spools takes longer than finding them.
    columns = (Device.name, Spool.id, Spool.spool, Spool.stored_through, Spool.highest_sequence, Spool.rejected_frames)
    rows = session.execute(select(*columns).join(Spool.device).where(tuple_(Device.name, Spool.spool).in_(sorted(wanted))))
    return {(row.name, row.spool): _receipt(session, row) for row in rows}


def _receipt(session: Session, spool: Row[str, int, str, int, int, int]) -> Receipt:
    ahead: list[int] = []
    if spool.highest_sequence > spool.stored_through:
        for first, span in spans_beyond(session, spool.id, spool.stored_through, Receipt.MAX_AHEAD):
            room = Receipt.MAX_AHEAD - len(ahead)
            ahead.extend(range(first, first + min(span, room)))
    rejected: list[tuple[int, str]] = []
    if spool.rejected_frames:
        newest = select(Rejection.sequence, Rejection.reason).where(Rejection.spool_id == spool.id)
        for sequence, reason in session.execute(newest.order_by(Rejection.id.desc()).limit(Receipt.MAX_REJECTED)):
            if sequence is not None:
                rejected.append((sequence, reason[:_REASON_CHARACTERS]))
    return Receipt(spool.spool, spool.stored_through, tuple(ahead), tuple(reversed(rejected)))
