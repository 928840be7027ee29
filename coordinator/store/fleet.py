"""What people look at: every device with its state, rates and loss ledger, and the sums over the fleet."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from coordinator import arrivals
from coordinator.store.ingest import pace_of, rate_of
from coordinator.store.models import ArrivalMinute, Checkpoint, Device, Evaluation, Run, Spool
from coordinator.store.timestamps import from_seconds, to_seconds
from side_tuning.wire.bounded import FrameError
from side_tuning.wire.messages import Health


@dataclass(frozen=True)
class SpoolOverview:
    """One spool of a device; a device that was flashed anew has several."""

    spool: str
    created_at: datetime
    superseded_at: datetime | None
    stored_through: int
    highest_sequence: int
    gap_frames: int
    ledger: arrivals.Ledger


@dataclass(frozen=True)
class DeviceOverview:
    """A device at one moment; counts are over its whole life, rates in samples per second."""

    device: str
    state: arrivals.State
    reason: str
    since: datetime
    backbone: str | None
    first_seen_at: datetime
    last_arrival_at: datetime | None
    expected_by: datetime | None
    rate_1m: float
    rate_5m: float
    rate_60m: float
    stored_frames: int
    stored_samples: int
    stored_bytes: int
    rejected_frames: int
    duplicate_frames: int
    duplicate_samples: int
    gap_frames: int
    ledger: arrivals.Ledger
    spools: tuple[SpoolOverview, ...]
    health: Health | None
    heartbeat_at: datetime | None
    clock_offset_seconds: float | None
    accuracy: float | None  # held-out, by the newest evaluation that has this device


@dataclass(frozen=True)
class FleetTotals:
    """Sums over all devices and their whole life."""

    devices: int
    frames_stored: int
    samples_stored: int
    bytes_stored: int
    frames_rejected: int
    duplicate_frames: int
    duplicate_samples: int
    checkpoints: int
    checkpoints_published: int
    ledger: arrivals.Ledger


def device_overview(session: Session, now: datetime, heartbeat_seconds: float = arrivals.HEARTBEAT_SECONDS) -> list[DeviceOverview]:
    """Every device by name. Three queries, whatever the size of the fleet."""
    spools: dict[int, list[Spool]] = defaultdict(list)
    for spool in session.scalars(select(Spool).order_by(Spool.id)):
        spools[spool.device_id].append(spool)
    accuracy = _newest_accuracy(session)
    devices = session.scalars(select(Device).order_by(Device.name))
    return [_overview(row, spools[row.id], accuracy.get(row.name), now, heartbeat_seconds) for row in devices]


def fleet_totals(session: Session) -> FleetTotals:
    """The sums, from the counters of every spool."""
    spools = list(session.scalars(select(Spool)))
    devices, unattributed = session.execute(
        select(func.count(), func.coalesce(func.sum(Device.unattributed_rejections), 0)).select_from(Device)
    ).one()
    offered, published = session.execute(select(func.count(Checkpoint.generation), func.count(Checkpoint.published_at))).one()
    return FleetTotals(
        devices=devices,
        frames_stored=sum(spool.stored_frames for spool in spools),
        samples_stored=sum(spool.stored_samples for spool in spools),
        bytes_stored=sum(spool.stored_bytes for spool in spools),
        frames_rejected=sum(spool.rejected_frames for spool in spools) + int(unattributed),
        duplicate_frames=sum(spool.duplicate_frames for spool in spools),
        duplicate_samples=sum(spool.duplicate_samples for spool in spools),
        checkpoints=offered,
        checkpoints_published=published,
        ledger=arrivals.combine(spool_ledger(spool) for spool in spools),
    )


def arrivals_per_minute(session: Session, since: datetime, device: str | None = None) -> list[tuple[datetime, int, int, int]]:
    """(minute, frames, samples, bytes) from `since` on, of one device or the fleet, oldest first."""
    query = (
        select(
            ArrivalMinute.minute,
            func.sum(ArrivalMinute.frames),
            func.sum(ArrivalMinute.samples),
            func.sum(ArrivalMinute.payload_bytes),
        )
        .where(ArrivalMinute.minute >= since)
        .group_by(ArrivalMinute.minute)
        .order_by(ArrivalMinute.minute)
    )
    if device is not None:
        query = query.join(Device, Device.id == ArrivalMinute.device_id).where(Device.name == device)
    return [(minute, int(frames), int(samples), int(size)) for minute, frames, samples, size in session.execute(query)]


def spool_gaps(spool: Spool) -> int:
    """Frames of this spool that are still on their way, by their sequences."""
    return arrivals.gaps(spool.highest_sequence, spool.known_sequences, spool.skipped_sequences)


def spool_ledger(spool: Spool) -> arrivals.Ledger:
    """Both sides' counts of one spool, weighed against each other."""
    newest, report = spool.newest_frame_at, spool.report_at
    return arrivals.ledger(
        arrivals.SpoolAccount(
            stored=spool.stored_samples,
            stored_again=spool.duplicate_samples,
            rejected=spool.rejected_samples,
            unreadable_frames=spool.unreadable_frames,
            assembling=spool.assembling_samples,
            gap_frames=spool_gaps(spool),
            produced_seen=spool.produced_seen,
            produced=spool.reported_produced,
            receipted=spool.reported_receipted,
            spooled=spool.reported_spooled,
            dropped=spool.reported_dropped,
            report_is_stale=report is None or (newest is not None and newest >= report),
            superseded=spool.superseded_at is not None,
        )
    )


def _overview(row: Device, spools: Sequence[Spool], accuracy: float | None, now: datetime, heartbeat_seconds: float) -> DeviceOverview:
    seconds = to_seconds(now)
    expected = arrivals.expected_by(pace_of(row))
    health = _health(row)
    fresh = row.heartbeat_at is not None and (row.last_arrival_at is None or row.heartbeat_at >= row.last_arrival_at)
    state = arrivals.state(
        arrivals.Signals(
            first_seen_at=to_seconds(row.first_seen_at),
            presence=row.presence,
            presence_at=_seconds(row.presence_at),
            presence_reason=row.presence_reason,
            heartbeat_at=_seconds(row.heartbeat_at),
            last_arrival_at=_seconds(row.last_arrival_at),
            expected_by=expected,
            paused=health is not None and health.paused,
            spooled=health.spool.spooled if fresh and health is not None and health.spool is not None else None,
        ),
        seconds,
        heartbeat_seconds,
    )
    rates = rate_of(row).rates(seconds)
    views = tuple(
        SpoolOverview(s.spool, s.created_at, s.superseded_at, s.stored_through, s.highest_sequence, spool_gaps(s), spool_ledger(s))
        for s in spools
    )
    return DeviceOverview(
        device=row.name,
        state=state.state,
        reason=state.reason,
        since=from_seconds(state.since),
        backbone=row.backbone,
        first_seen_at=row.first_seen_at,
        last_arrival_at=row.last_arrival_at,
        expected_by=None if expected is None else from_seconds(expected),
        rate_1m=rates[0],
        rate_5m=rates[1],
        rate_60m=rates[2],
        stored_frames=sum(spool.stored_frames for spool in spools),
        stored_samples=sum(spool.stored_samples for spool in spools),
        stored_bytes=sum(spool.stored_bytes for spool in spools),
        rejected_frames=sum(spool.rejected_frames for spool in spools) + row.unattributed_rejections,
        duplicate_frames=sum(spool.duplicate_frames for spool in spools),
        duplicate_samples=sum(spool.duplicate_samples for spool in spools),
        gap_frames=sum(view.gap_frames for view in views if view.superseded_at is None),
        ledger=arrivals.combine(view.ledger for view in views),
        spools=views,
        health=health,
        heartbeat_at=row.heartbeat_at,
        clock_offset_seconds=row.clock_offset_seconds,
        accuracy=accuracy,
    )


def _health(row: Device) -> Health | None:
    if row.health is None:
        return None
    try:
        return Health.from_bytes(row.health)
    except FrameError:  # written by a newer version of this program
        return None


def _seconds(moment: datetime | None) -> float | None:
    return None if moment is None else to_seconds(moment)


def _newest_accuracy(session: Session) -> dict[str, float]:
    """Held-out accuracy by device, from the newest evaluation of the newest run that has any."""
    run = select(func.max(Run.id)).join(Evaluation, Evaluation.run_id == Run.id).where(Evaluation.scope == "device").scalar_subquery()
    newest = (
        select(Evaluation.name, func.max(Evaluation.step).label("step"))
        .where(Evaluation.run_id == run, Evaluation.scope == "device")
        .group_by(Evaluation.name)
        .subquery()
    )
    rows = session.execute(
        select(Evaluation.name, Evaluation.accuracy)
        .join(newest, (Evaluation.name == newest.c.name) & (Evaluation.step == newest.c.step))
        .where(Evaluation.run_id == run, Evaluation.scope == "device")
        .order_by(Evaluation.id)
    )
    return {name: accuracy for name, accuracy in rows}  # noqa: C416 - a Row is no pair to mypy
