"""Devices' first steps in the store: what they report, set right by our clock, and what the coordinator knows itself."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta, timezone

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from coordinator.store.identities import ClaimRow, claims_of, find_identity
from coordinator.store.models import ArrivalMinute, Certificate, Device, FirstStep, FrameRow, Spool
from coordinator.store.timestamps import from_seconds
from coordinator.timeline import CLOCKS_DIFFER_SECONDS, Facts
from side_tuning.wire.messages import DeviceStep

EARLIEST = datetime(2020, 1, 1, tzinfo=timezone.utc)  # before this there was no such device: a clock that was not set
SAME_SECONDS = 2.0  # a report that differs by less is not written anew


def record_first_steps(session: Session, device: Device, steps: Mapping[DeviceStep, float | None], received_at: datetime) -> None:
    """Take in what a device reports of its first boot: all of it, so that a card flashed anew begins anew."""
    known = {row.step: row for row in session.scalars(select(FirstStep).where(FirstStep.device_id == device.id))}
    for step, seconds in steps.items():
        # The card's date is of the computer that wrote it, everything else of the device's clock.
        at = _moment(seconds, 0.0 if step == "flashed" else device.clock_offset_seconds or 0.0, received_at)
        row = known.pop(step, None)
        if row is None:
            session.add(FirstStep(device_id=device.id, step=step, at=at))
        elif at is None or row.at is None or abs((row.at - at).total_seconds()) >= SAME_SECONDS:
            row.at = at
    for row in known.values():
        session.delete(row)


def _moment(seconds: float | None, offset: float, received_at: datetime) -> datetime | None:
    """A device's time by our clock; None for one that cannot be. A time of before its clock went wrong is taken as it is."""
    wrong = abs(offset) > CLOCKS_DIFFER_SECONDS
    for candidate in () if seconds is None else (seconds - offset, seconds) if wrong else (seconds,):
        at = from_seconds(candidate)
        if EARLIEST <= at <= received_at + timedelta(seconds=CLOCKS_DIFFER_SECONDS):
            return min(at, received_at)
    return None


def beginning_of(session: Session, device: str, now: datetime) -> Facts:
    """The newest beginning of a device: from its newest claim that is good or was used, or from its first message."""
    claim = _claim(claims_of(session, device), now)
    since = None if claim is None else claim.created_at
    identity = find_identity(session, device)
    certificate = None
    if claim is not None:
        issued = select(func.min(Certificate.issued_at), func.min(Certificate.seen_at)).where(Certificate.claim == claim.id)
        certificate = session.execute(issued).one()
    row = session.execute(select(Device.id, Device.first_seen_at, Device.last_arrival_at).where(Device.name == device)).first()
    seen_at = stored_at = None
    stored, reported = False, dict[DeviceStep, datetime | None]()
    if row is not None:
        seen_at = row.first_seen_at if since is None or row.first_seen_at >= since else None
        seen_at = seen_at or (None if certificate is None else certificate[1])
        begun = since if certificate is None else certificate[0] or since
        stored = row.last_arrival_at is not None and (begun is None or row.last_arrival_at >= begun)
        stored_at = _first_stored(session, row.id, begun) if stored else None
        reported = _reported(session, row.id, since)
    state = "" if claim is None else claim.state(now)
    return Facts(
        device=device,
        claimed_at=since,
        claim_ended=state if state in ("expired", "withdrawn") else "",
        asked_at=None if claim is None else claim.requested_at,
        approved_at=None if claim is None else claim.approved_at,
        enrolled_at=None if certificate is None else certificate[0],
        seen_at=seen_at,
        stored=stored,
        stored_at=stored_at,
        reported=reported,
        revoked=identity is not None and identity.revoked_at is not None,
    )


def _claim(claims: list[ClaimRow], now: datetime) -> ClaimRow | None:
    """`claims` come newest first; one that ended unused counts only if there is no other."""
    return next((claim for claim in claims if claim.state(now) not in ("expired", "withdrawn")), claims[0] if claims else None)


def _first_stored(session: Session, device_id: int, since: datetime | None) -> datetime | None:
    """To the minute where the device kept the spool that it had before; None where that is too long ago."""
    spools = select(Spool.id).where(Spool.device_id == device_id, Spool.stored_frames > 0)
    spool = session.scalar((spools if since is None else spools.where(Spool.created_at >= since)).order_by(Spool.id).limit(1))
    if spool is not None:
        return session.scalar(select(FrameRow.received_at).where(FrameRow.spool_id == spool).order_by(FrameRow.sequence).limit(1))
    if since is None:
        return None
    arrived = select(func.min(ArrivalMinute.minute)).where(ArrivalMinute.device_id == device_id, ArrivalMinute.frames > 0)
    minute = session.scalar(arrived.where(ArrivalMinute.minute >= since.replace(second=0, microsecond=0)))
    return None if minute is None else max(minute, since)


def _reported(session: Session, device_id: int, since: datetime | None) -> dict[DeviceStep, datetime | None]:
    """The device's own steps, unless they are of an earlier beginning."""
    rows = session.execute(select(FirstStep.step, FirstStep.at).where(FirstStep.device_id == device_id))
    steps: dict[DeviceStep, datetime | None] = {step: at for step, at in rows}  # noqa: C416 - a Row is no pair to mypy
    used = steps.get("enrolled") or steps.get("network")  # nothing before these needs a claim: the board may have run for days
    earlier = since is not None and used is not None and (since - used).total_seconds() > CLOCKS_DIFFER_SECONDS
    return {} if earlier else steps
