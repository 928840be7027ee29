"""Finds or makes the `devices` and `spools` rows that a batch touches, and moves a spool's `stored_through` on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Select, Table, func, literal, select, union_all
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from coordinator import arrivals
from coordinator.store.counts import AnyDevice, AnySpool, DeviceCounts, SpoolCounts, read_devices, read_spools
from coordinator.store.models import Device, FramePart, FrameRow, Rejection, Spool

# Rows looked at in one step when a gap closes. Each row beyond a gap is walked over once in its life.
_WALK_ROWS = 1024


def insert_into(session: Session, model: type[Any]) -> Any:
    """An INSERT that knows ON CONFLICT, for whichever database the session is on."""
    table: Table = model.__table__
    return postgresql.insert(table) if session.get_bind().dialect.name == "postgresql" else sqlite.insert(table)


def open_devices(session: Session, names: Iterable[str], seen_at: datetime) -> dict[str, Device]:
    """The rows of these devices; a device that nobody has heard of yet gets one."""
    wanted = set(names)
    rows = session.scalars(select(Device).where(Device.name.in_(wanted)))
    devices = {row.name: row for row in rows}
    for name in sorted(wanted - devices.keys()):
        devices[name] = Device(name=name, first_seen_at=seen_at)
        session.add(devices[name])
    session.flush()
    return devices


def open_spools(session: Session, devices: Mapping[str, AnyDevice], keys: Iterable[tuple[str, str]], seen_at: datetime) -> dict[tuple[str, str], Spool]:
    """The rows of these (device, spool) pairs, made where missing; `devices` holds every device named."""
    wanted = set(keys)
    names = {device.id: name for name, device in devices.items()}
    # By device alone: a device has few spools, and pairs would be looked up as all devices times all spools.
    found = session.scalars(select(Spool).where(Spool.device_id.in_({devices[name].id for name, _ in wanted})))
    spools = {key: row for row in found if (key := (names[row.device_id], row.spool)) in wanted}
    for name, spool in sorted(wanted - spools.keys()):
        spools[name, spool] = Spool(device_id=devices[name].id, spool=spool, created_at=seen_at)
        session.add(spools[name, spool])
    session.flush()
    return spools


def open_counts(
    session: Session, names: Iterable[str], keys: Iterable[tuple[str, str]], seen_at: datetime
) -> tuple[dict[str, DeviceCounts], dict[tuple[str, str], SpoolCounts]]:
    """The same rows as plain columns, made where missing: of these devices, and of these (device, spool) pairs of theirs."""
    session.flush()
    wanted_names, wanted = set(names), set(keys)
    devices = read_devices(session, wanted_names)
    if new := wanted_names - devices.keys():
        open_devices(session, new, seen_at)
        devices |= read_devices(session, new)
    by_id = {device.id: name for name, device in devices.items()}

    def found() -> dict[tuple[str, str], SpoolCounts]:
        some = read_spools(session, {devices[name].id for name, _ in wanted})
        return {key: one for one in some if (key := (by_id[one.device_id], one.spool)) in wanted}

    spools = found()
    if missing := wanted - spools.keys():
        open_spools(session, devices, missing, seen_at)
        spools = found()
    return devices, spools


def spans_beyond(session: Session, spool_id: int, through: int, limit: int) -> Sequence[tuple[int, int]]:
    """(first sequence, how many) of what is stored, rejected or in parts after `through`; the lowest `limit` of them."""

    def lowest(model: type[Any], span: Any) -> Select[Any]:
        rows = (
            select(model.sequence.label("sequence"), span.label("span"))
            .where(model.spool_id == spool_id, model.sequence > through)
            .order_by(model.sequence)
            .limit(limit)
            .subquery()
        )
        return select(rows.c.sequence, rows.c.span)

    spans = union_all(lowest(FrameRow, FrameRow.span), lowest(FramePart, literal(1)), lowest(Rejection, Rejection.span))
    ordered = spans.order_by("sequence").limit(limit)
    return [(sequence, span) for sequence, span in session.execute(ordered)]


def advance_spool(session: Session, spool: AnySpool, fresh: Iterable[tuple[int, int]]) -> None:
    """Move `stored_through` on over `fresh` (the spans that have just come in) and over what lay waiting beyond them.

    Costs nothing while frames come in order. A gap is looked into only when its first sequence comes in, so a spool
    with one frame missing is not scanned again with every batch.
    """
    through = arrivals.advance(spool.stored_through, spool.floor, sorted(fresh))
    moved = through > spool.stored_through
    while moved and through < spool.highest_sequence:
        beyond = spans_beyond(session, spool.id, through, _WALK_ROWS)
        further = arrivals.advance(through, 0, beyond)
        moved = further > through and len(beyond) == _WALK_ROWS
        through = further
    spool.stored_through = through
    spool.highest_sequence = max(spool.highest_sequence, through)


def raise_floor(session: Session, spool: Spool, floor: int) -> None:
    """Take the device's word that nothing below `floor` can still arrive; what is not here was dropped."""
    if floor <= spool.floor:
        return
    spool.floor = floor
    open_from, open_to = spool.stored_through + 1, floor - 1
    if open_to >= open_from:
        here = 0
        for model, span in ((FrameRow, FrameRow.span), (FramePart, literal(1)), (Rejection, Rejection.span)):
            between = (model.spool_id == spool.id, model.sequence >= open_from, model.sequence <= open_to)
            here += int(session.scalar(select(func.coalesce(func.sum(span), 0)).where(*between)) or 0)
        spool.skipped_sequences += max(open_to - open_from + 1 - here, 0)
        spool.highest_sequence = max(spool.highest_sequence, open_to)
    advance_spool(session, spool, ())
