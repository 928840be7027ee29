"""What a device (or, in its name, the broker) says of itself: presence, clock, and its half of the loss ledger."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import select
from sqlalchemy.orm import Session

from coordinator import arrivals
from coordinator.store.accounts import open_devices, raise_floor
from coordinator.store.first_steps import record_first_steps
from coordinator.store.models import Device, Spool
from coordinator.store.parts import close_incomplete
from coordinator.store.timestamps import from_seconds, to_seconds
from side_tuning.wire.messages import Health, SpoolCount


def record_health(session: Session, device: str, health: Health, received_at: datetime, *, retained: bool = False) -> None:
    """Take in one health message.

    `retained` says that the broker kept it for us: it may be old and must not make a dead device look alive.
    """
    row = open_devices(session, [device], received_at)[device]
    if health.presence == "lost":
        _record_will(row, health, received_at)
        return
    repeated = row.session == health.session and row.reported_at == from_seconds(health.at) and row.presence == health.presence
    if repeated:  # the broker's retained copy of what we know
        return
    sent_at = received_at
    if retained and row.clock_offset_seconds is not None:
        said = from_seconds(health.at - row.clock_offset_seconds)
        sent_at = min(received_at, max(said, row.heartbeat_at or said))
    if not retained:
        offset = arrivals.clock_offset(row.clock_offset_seconds, health.at, to_seconds(received_at))
        row.clock_offset_seconds = offset
    if row.presence != health.presence or row.session != health.session:
        row.presence_at = sent_at
    row.presence, row.presence_reason = health.presence, health.reason
    row.heartbeat_at = sent_at
    row.session, row.reported_at = health.session, from_seconds(health.at)
    row.health = health.to_bytes()
    if health.backbone is not None:
        row.backbone = health.backbone.fingerprint
    if health.spool is not None:
        _record_spool(session, row, health.spool, sent_at, received_at)
    session.flush()
    if health.first_steps is not None:
        record_first_steps(session, row, health.first_steps, received_at)


def _record_will(row: Device, health: Health, received_at: datetime) -> None:
    """A last will counts for the connection that left it, and for one that we never heard of if it is younger."""
    same = row.session == health.session
    younger = row.reported_at is None or from_seconds(health.at) > row.reported_at
    already = row.presence == "lost" and same
    said_goodbye = same and row.presence == "offline"
    if already or said_goodbye or not (same or younger):
        return
    row.presence, row.presence_at = "lost", received_at
    row.presence_reason = health.reason
    row.session = health.session


def _record_spool(session: Session, device: Device, count: SpoolCount, sent_at: datetime, received_at: datetime) -> None:
    spools = {row.spool: row for row in session.scalars(select(Spool).where(Spool.device_id == device.id))}
    spool = spools.pop(count.spool, None)
    if spool is None:
        spool = Spool(device_id=device.id, spool=count.spool, created_at=received_at)
        session.add(spool)
        session.flush()
    elif count.produced < spool.reported_produced:
        return  # an older report; the counts only grow
    spool.report_at = max(sent_at, spool.report_at or sent_at)
    spool.reported_produced = count.produced
    spool.reported_receipted = count.receipted
    spool.reported_spooled = count.spooled
    spool.reported_dropped = count.dropped
    spool.superseded_at = None
    # A device has one spool: any other went with a card that was flashed anew or a file that was damaged.
    for other in spools.values():
        other.superseded_at = other.superseded_at or received_at
    raise_floor(session, spool, count.floor)
    if spool.assembling_samples:
        close_incomplete(session, device, spool, "the device gave up the rest")


