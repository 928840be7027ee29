"""One device: what it is doing and why, its arrivals against what is expected, its ledger, its way into the fleet."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from urllib.parse import quote

from fastapi import APIRouter, Request, Response
from starlette.exceptions import HTTPException

from coordinator.planning import describe
from coordinator.store.audit import AuditRow, audit_entries
from coordinator.store.engine import Store
from coordinator.store.first_steps import beginning_of
from coordinator.store.fleet import DeviceOverview
from coordinator.store.identities import CertificateRow, certificates_of
from coordinator.store.registry import backbones
from coordinator.store.rejections import RejectionRow, rejections
from coordinator.store.timestamps import from_seconds
from coordinator.store.views import (
    DeviceAccess,
    Measured,
    Minute,
    Order,
    arrival_minutes,
    assigned_plan,
    device_access,
    orders,
    score_series,
    usual_interval,
)
from coordinator.timeline import Timeline, timeline, why_nothing_stored
from dashboards.rows import troubles_of
from dashboards.snapshot import FleetSnapshot
from dashboards.view import View, view_of
from side_tuning.backbone_manifest import BackboneManifest
from side_tuning.wire.messages import TapPlan

router = APIRouter()

PLOT_MINUTES = 60
SCORE_POINTS = 100
FEW = 5
FLEET_SECONDS = 15.0


@dataclass(frozen=True)
class DeviceDetail:
    """What one device's page shows beyond the fleet's snapshot."""

    minutes: tuple[tuple[datetime, Minute | None], ...]  # the last hour's, complete ones, oldest first; None: nothing came
    expected_per_minute: float | None  # samples
    timeline: Timeline
    plan: TapPlan | None
    plan_words: str
    plan_is_own: bool
    backbone: BackboneManifest | None  # as registered
    scores: tuple[Measured, ...]
    rejections: tuple[RejectionRow, ...]
    certificates: tuple[CertificateRow, ...]
    orders: tuple[Order, ...]
    audit: tuple[AuditRow, ...]


@router.get("/devices/{device}")
def device_page(request: Request, device: str, done: str = "") -> Response:
    view = view_of(request)
    # The device itself is read anew; of the fleet an older look does, so that this page need not wait for 2,000 others.
    values = device_values(view, view.live.snapshot(FLEET_SECONDS), device, anew=True)
    if values is None:
        raise HTTPException(404, f"no device {device!r} has been heard of, and no claim was made for it")
    return view.respond(request, "device.html", title=device, live=f"/live/device/{quote(device, safe='')}", message=done[:200], device=device, **values)


@router.get("/live/device/{device}")
async def device_updates(request: Request, device: str) -> Response:
    view = view_of(request)

    def render(snapshot: FleetSnapshot) -> dict[str, str]:
        values = device_values(view, snapshot, device)
        return {} if values is None else dict(view.fragments("device_parts.html", {"device": device, **values}))

    return await view.stream(f"device {device}", render)


def device_values(view: View, snapshot: FleetSnapshot, device: str, *, anew: bool = False) -> dict[str, Any] | None:
    """What the device's templates show; None for a name that stands for nothing."""
    one, access = snapshot.device(device), snapshot.access.get(device)
    if anew:
        with view.access.reader().read() as session:
            one, access = view.live.device(session, device), device_access(session, device).get(device)
    if one is None and access is None:
        return None
    detail = read_detail(view.access.reader(), device, snapshot, one)
    return {
        "one": one,
        "access": access,
        "detail": detail,
        "snapshot": snapshot,
        "metric": snapshot.metric,
        "troubles": () if one is None else troubles_of(one, access, snapshot.at),
        "sent_per_sample": _sent_per_sample(one),
        "certificate_expires_at": _expiry(one, access),
    }


def read_detail(store: Store, device: str, snapshot: FleetSnapshot, one: DeviceOverview | None) -> DeviceDetail:
    """One short transaction."""
    first = snapshot.at.replace(second=0, microsecond=0) - timedelta(minutes=PLOT_MINUTES)
    with store.read() as session:
        arrived = {minute.minute: minute for minute in arrival_minutes(session, device, first)}
        interval = usual_interval(session, device)
        plan = assigned_plan(session, device)
        known = backbones(session)
        return DeviceDetail(
            minutes=_every_minute(arrived, first, snapshot.at, None if one is None else one.first_seen_at),
            expected_per_minute=_expected(one, interval),
            timeline=timeline(beginning_of(session, device, snapshot.at), snapshot.at, "" if one is None else why_nothing_stored(one)),
            plan=None if plan is None else plan[0],
            plan_words="" if plan is None else describe(plan[0]),
            plan_is_own=plan is not None and plan[1],
            backbone=known[one.backbone].manifest if one is not None and one.backbone in known else None,
            scores=()
            if snapshot.run is None
            else tuple(score_series(session, snapshot.run, "device", name=device, limit=SCORE_POINTS)),
            rejections=tuple(rejections(session, device, FEW)),
            certificates=tuple(certificates_of(session, device)[:FEW]),
            orders=tuple(orders(session, device, FEW)),
            audit=tuple(audit_entries(session, device, FEW)),
        )


def _every_minute(
    arrived: dict[datetime, Minute], first: datetime, now: datetime, since: datetime | None
) -> tuple[tuple[datetime, Minute | None], ...]:
    """Minutes in which nothing came are shown as nothing, not left out. The minute that is under way only if it is all there is."""
    if not arrived:
        return ()
    start = max(first, since.replace(second=0, microsecond=0)) if since is not None else first
    minutes = [start + timedelta(minutes=n) for n in range(PLOT_MINUTES + 1)]
    complete = [minute for minute in minutes if minute + timedelta(minutes=1) <= now]
    return tuple((minute, arrived.get(minute)) for minute in complete or minutes[:1])


def _expected(one: DeviceOverview | None, interval: float | None) -> float | None:
    """Samples per minute at the device's usual pace: its mean frame, as often as its frames usually come."""
    if one is None or not one.stored_frames or not interval:
        return None
    return one.stored_samples / one.stored_frames / interval * 60


def _sent_per_sample(one: DeviceOverview | None) -> float | None:
    """Bytes handed to the broker, resends included, for each sample that is receipted."""
    if one is None or one.health is None or one.health.spool is None or not one.health.spool.receipted:
        return None
    return one.health.bytes_sent / one.health.spool.receipted


def _expiry(one: DeviceOverview | None, access: DeviceAccess | None) -> datetime | None:
    """Of the certificate that the device says it uses; else of the newest that it was given."""
    if one is not None and one.health is not None and one.health.certificate_expires_at is not None:
        return from_seconds(one.health.certificate_expires_at)
    return None if access is None else access.certificate_expires_at
