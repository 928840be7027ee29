"""What the dashboards read beyond the fleet's overview: access, series for plots, orders.

Rules: nothing here writes, every query is bounded, and times are taken as they lie in the store.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import get_args

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from coordinator.store.models import (
    ArrivalMinute,
    Certificate,
    Claim,
    CommandRow,
    Device,
    Evaluation,
    Identity,
    Rejection,
    Run,
    TapPlanRow,
)
from side_tuning.wire.messages import TapPlan, Task
from side_tuning.wire.topics import FLEET


@dataclass(frozen=True)
class DeviceAccess:
    """Whether a device may come in: its identity, and the newest claim and certificate."""

    device: str
    group: str
    created_at: datetime
    enrolled_at: datetime | None
    revoked_at: datetime | None
    revoked_reason: str
    waits_since: datetime | None  # a certificate request that waits for approval
    certificate_expires_at: datetime | None  # of the newest certificate that is not revoked
    claimed_at: datetime | None  # of the newest claim that was neither used nor withdrawn
    claim_expires_at: datetime | None


@dataclass(frozen=True)
class Measured:
    """One held-out measurement."""

    step: int
    name: str
    score: float
    loss: float
    samples: int
    at: datetime


@dataclass(frozen=True)
class Minute:
    """What arrived from a device within one minute."""

    minute: datetime
    frames: int
    samples: int
    payload_bytes: int
    duplicates: int
    rejected: int


@dataclass(frozen=True)
class Order:
    """A command to a device and whether the gateway has sent it."""

    name: str
    created_at: datetime
    created_by: str
    sent_at: datetime | None
    expires_at: datetime


@dataclass(frozen=True)
class RejectedPayload:
    device: str
    received_at: datetime
    payload: bytes | None  # None once retention has dropped it


def device_access(session: Session, device: str | None = None) -> dict[str, DeviceAccess]:
    """Every device that a claim was ever made for, or just one."""
    expiry = select(Certificate.device, func.max(Certificate.expires_at)).where(Certificate.revoked_at.is_(None)).group_by(Certificate.device)
    held = (Claim.approved_at.is_(None), Claim.spent_at.is_(None), Claim.withdrawn_at.is_(None))
    requests = select(Claim.device, func.min(Claim.requested_at)).where(Claim.requested_at.is_not(None), *held).group_by(Claim.device)
    unused = (Claim.spent_at.is_(None), Claim.withdrawn_at.is_(None))
    claims = select(Claim.device, func.max(Claim.created_at), func.max(Claim.expires_at)).where(*unused).group_by(Claim.device)
    wanted = select(*Identity.__table__.columns).order_by(Identity.device)
    if device is not None:
        expiry, requests = expiry.where(Certificate.device == device), requests.where(Claim.device == device)
        claims, wanted = claims.where(Claim.device == device), wanted.where(Identity.device == device)
    expires = {name: at for name, at in session.execute(expiry)}  # noqa: C416 - a Row is no pair to mypy
    waiting = {name: at for name, at in session.execute(requests)}  # noqa: C416
    claimed = {name: (made, until) for name, made, until in session.execute(claims)}
    rows = session.execute(wanted)
    return {
        row.device: DeviceAccess(
            row.device,
            row.group,
            row.created_at,
            row.enrolled_at,
            row.revoked_at,
            row.revoked_reason,
            waiting.get(row.device),
            expires.get(row.device),
            *claimed.get(row.device, (None, None)),
        )
        for row in rows
    }


def newest_run(session: Session) -> str | None:
    """The run that was measured last; before any measurement, the one that began last."""
    measured = session.scalar(select(Evaluation.run_id).order_by(Evaluation.id.desc()).limit(1))
    wanted = select(Run.name).order_by(Run.id.desc()) if measured is None else select(Run.name).where(Run.id == measured)
    return session.scalar(wanted.limit(1))


def task_of_run(session: Session, run: str | None) -> Task:
    """What a run learns, and with that what its scores are; runs of before there were others classify."""
    learns = (session.scalar(select(Run.settings).where(Run.name == run)) or {}).get("learns") or {}
    return next((task for task in get_args(Task) if task == learns.get("task")), "classification")


def score_series(session: Session, run: str, scope: str, *, name: str | None = None, limit: int = 500) -> list[Measured]:
    """The newest measurements of a run in one scope (and of one device or backbone), oldest first."""
    run_id = select(Run.id).where(Run.name == run).scalar_subquery()
    wanted = select(
        Evaluation.step, Evaluation.name, Evaluation.score, Evaluation.loss, Evaluation.samples, Evaluation.at
    ).where(Evaluation.run_id == run_id, Evaluation.scope == scope)
    if name is not None:
        wanted = wanted.where(Evaluation.name == name)
    rows = session.execute(wanted.order_by(Evaluation.step.desc(), Evaluation.id.desc()).limit(limit)).all()
    return [Measured(*row) for row in reversed(rows)]


def arrival_minutes(session: Session, device: str, since: datetime) -> list[Minute]:
    """What arrived from a device in each minute from `since` on, oldest first; minutes without arrivals are left out."""
    rows = session.execute(
        select(
            ArrivalMinute.minute,
            ArrivalMinute.frames,
            ArrivalMinute.samples,
            ArrivalMinute.payload_bytes,
            ArrivalMinute.duplicates,
            ArrivalMinute.rejected,
        )
        .join(Device, Device.id == ArrivalMinute.device_id)
        .where(Device.name == device, ArrivalMinute.minute >= since)
        .order_by(ArrivalMinute.minute)
    )
    return [Minute(*row) for row in rows]


def arrivals_by_device(session: Session, since: datetime) -> dict[str, int]:
    """Samples that arrived from each device from the minute `since` on."""
    rows = session.execute(
        select(Device.name, func.sum(ArrivalMinute.samples))
        .join(Device, Device.id == ArrivalMinute.device_id)
        .where(ArrivalMinute.minute >= since)
        .group_by(Device.name)
    )
    return {name: int(samples) for name, samples in rows}


def usual_interval(session: Session, device: str) -> float | None:
    """Seconds between a device's arrivals, as its pace has settled."""
    return session.scalar(select(Device.interval_seconds).where(Device.name == device))


def orders(session: Session, device: str, limit: int = 5) -> list[Order]:
    """The newest commands to a device, newest first."""
    rows = session.execute(
        select(CommandRow.name, CommandRow.created_at, CommandRow.created_by, CommandRow.sent_at, CommandRow.expires_at)
        .where(CommandRow.device == device)
        .order_by(CommandRow.id.desc())
        .limit(limit)
    )
    return [Order(*row) for row in rows]


def assigned_plan(session: Session, device: str) -> tuple[TapPlan, bool] | None:
    """The tap plan that a device should follow, and whether it is its own rather than the fleet's."""
    for owner in (device, FLEET):
        payload = session.scalar(select(TapPlanRow.plan).where(TapPlanRow.owner == owner).order_by(TapPlanRow.version.desc()).limit(1))
        if payload is not None:
            return TapPlan.from_bytes(payload), owner == device
    return None


def rejected_payload(session: Session, rejection_id: int) -> RejectedPayload | None:
    """The bytes of a rejected message as they came; None if there is no such rejection."""
    row = session.execute(
        select(Device.name, Rejection.received_at, Rejection.payload)
        .join(Device, Device.id == Rejection.device_id)
        .where(Rejection.id == rejection_id)
    ).first()
    return None if row is None else RejectedPayload(*row)


def log_bytes(session: Session) -> int | None:
    """The size of SQLite's write-ahead log in bytes; None on PostgreSQL."""
    url = session.get_bind().engine.url
    if url.get_backend_name() != "sqlite" or url.database is None:
        return None
    path = Path(f"{url.database}-wal")
    return path.stat().st_size if path.exists() else 0
