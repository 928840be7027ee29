"""What people look at: every device with its state, rates and loss ledger, and the sums over the fleet."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from coordinator import arrivals
from coordinator.store.ingest import pace_of, rate_of
from coordinator.store.models import ArrivalMinute, Checkpoint, Device, Evaluation, Spool
from coordinator.store.timestamps import from_seconds, to_seconds
from side_tuning.wire.bounded import FrameError
from side_tuning.wire.messages import Health

_RECENT_EVALUATIONS = 3


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
    score: float | None  # held-out, by the newest evaluation that has this device


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


@dataclass
class FleetMemory:
    """What one look at the fleet has worked out and the next can use: only what changed is decoded and added up again."""

    health: dict[str, tuple[bytes, Health | None]] = field(default_factory=dict)
    spools: dict[str, tuple[list[Any], SpoolSums]] = field(default_factory=dict)
    evaluation: int | None = None  # the newest that `scores` takes in
    scores: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class SpoolSums:
    """All spools of one device together."""

    views: tuple[SpoolOverview, ...]
    stored_frames: int
    stored_samples: int
    stored_bytes: int
    rejected_frames: int
    duplicate_frames: int
    duplicate_samples: int
    gap_frames: int
    ledger: arrivals.Ledger


def device_overview(
    session: Session,
    now: datetime,
    heartbeat_seconds: float = arrivals.HEARTBEAT_SECONDS,
    *,
    device: str | None = None,
    memory: FleetMemory | None = None,
) -> list[DeviceOverview]:
    """Every device by name, or just one. Few queries, whatever the size of the fleet."""
    memory = memory or FleetMemory()
    newest = session.scalar(select(func.max(Evaluation.id)))
    if newest != memory.evaluation:
        memory.evaluation, memory.scores = newest, newest_scores(session)
    scores = memory.scores
    # Plain rows: with thousands of devices, making mapped objects of them takes longer than reading them.
    wanted = select(*Device.__table__.columns).order_by(Device.name)
    of_spools = select(*Spool.__table__.columns).order_by(Spool.id)
    if device is not None:
        wanted = wanted.where(Device.name == device)
        of_spools = of_spools.where(Spool.device_id == select(Device.id).where(Device.name == device).scalar_subquery())
    spools: dict[int, list[Any]] = defaultdict(list)
    for spool in session.execute(of_spools):
        spools[spool.device_id].append(spool)
    devices = session.execute(wanted).all()
    return [_overview(row, spools[row.id], scores.get(row.name), now, heartbeat_seconds, memory) for row in devices]


def heard_devices(session: Session) -> set[str]:
    """The names of all devices that ever sent something."""
    return set(session.scalars(select(Device.name)))


def fleet_totals(session: Session, devices: Sequence[DeviceOverview] | None = None) -> FleetTotals:
    """The sums over `devices`, which are read if not given."""
    if devices is None:
        devices = device_overview(session, from_seconds(0))  # no sum depends on the time
    offered, published = session.execute(select(func.count(Checkpoint.generation), func.count(Checkpoint.published_at))).one()
    return FleetTotals(
        devices=len(devices),
        frames_stored=sum(one.stored_frames for one in devices),
        samples_stored=sum(one.stored_samples for one in devices),
        bytes_stored=sum(one.stored_bytes for one in devices),
        frames_rejected=sum(one.rejected_frames for one in devices),
        duplicate_frames=sum(one.duplicate_frames for one in devices),
        duplicate_samples=sum(one.duplicate_samples for one in devices),
        checkpoints=offered,
        checkpoints_published=published,
        ledger=arrivals.combine(one.ledger for one in devices),
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


def _overview(  # noqa: PLR0917 - a row and what goes with it
    row: Any, spools: list[Any], score: float | None, now: datetime, heartbeat_seconds: float, memory: FleetMemory
) -> DeviceOverview:
    seconds = to_seconds(now)
    expected = arrivals.expected_by(pace_of(row))
    health = _health(row, memory)
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
    before = memory.spools.get(row.name)
    if before is None or before[0] != spools:
        before = memory.spools[row.name] = (spools, _sums(spools))
    sums = before[1]
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
        stored_frames=sums.stored_frames,
        stored_samples=sums.stored_samples,
        stored_bytes=sums.stored_bytes,
        rejected_frames=sums.rejected_frames + row.unattributed_rejections,
        duplicate_frames=sums.duplicate_frames,
        duplicate_samples=sums.duplicate_samples,
        gap_frames=sums.gap_frames,
        ledger=sums.ledger,
        spools=sums.views,
        health=health,
        heartbeat_at=row.heartbeat_at,
        clock_offset_seconds=row.clock_offset_seconds,
        score=score,
    )


def _sums(spools: Sequence[Any]) -> SpoolSums:
    views = tuple(
        SpoolOverview(s.spool, s.created_at, s.superseded_at, s.stored_through, s.highest_sequence, spool_gaps(s), spool_ledger(s))
        for s in spools
    )
    return SpoolSums(
        views=views,
        stored_frames=sum(spool.stored_frames for spool in spools),
        stored_samples=sum(spool.stored_samples for spool in spools),
        stored_bytes=sum(spool.stored_bytes for spool in spools),
        rejected_frames=sum(spool.rejected_frames for spool in spools),
        duplicate_frames=sum(spool.duplicate_frames for spool in spools),
        duplicate_samples=sum(spool.duplicate_samples for spool in spools),
        gap_frames=sum(view.gap_frames for view in views if view.superseded_at is None),
        ledger=arrivals.combine(view.ledger for view in views),
    )


def _health(row: Any, memory: FleetMemory) -> Health | None:
    if row.health is None:
        return None
    before = memory.health.get(row.name)
    if before is not None and before[0] == row.health:
        return before[1]
    try:
        health = Health.from_bytes(row.health)
    except FrameError:  # written by a newer version of this program
        health = None
    memory.health[row.name] = (row.health, health)
    return health


def _seconds(moment: datetime | None) -> float | None:
    return None if moment is None else to_seconds(moment)


def newest_scores(session: Session) -> dict[str, float]:
    """Held-out score by device, from the newest evaluations of the newest run that has any."""
    newest = select(Evaluation.run_id).where(Evaluation.scope == "device").order_by(Evaluation.id.desc()).limit(1)
    run = session.scalar(newest)
    if run is None:
        return {}
    # A long run has measured every device thousands of times: look at its last few evaluations only.
    steps = select(Evaluation.step).where(Evaluation.run_id == run, Evaluation.scope == "fleet").distinct()
    lately = session.scalars(steps.order_by(Evaluation.step.desc()).limit(_RECENT_EVALUATIONS)).all()
    rows = session.execute(
        select(Evaluation.name, Evaluation.score)
        .where(Evaluation.run_id == run, Evaluation.scope == "device", Evaluation.step >= min(lately, default=0))
        .order_by(Evaluation.step, Evaluation.id)
    )
    return {name: score for name, score in rows}  # noqa: C416 - a Row is no pair to mypy
