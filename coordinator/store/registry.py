"""What is known to be allowed: registered backbones and the tap plans given out."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime, timezone

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from coordinator.store.errors import StoreError
from coordinator.store.models import Backbone, TapPlanRow
from side_tuning.backbone_manifest import BackboneManifest
from side_tuning.wire.messages import TapPlan
from side_tuning.wire.topics import FLEET


@dataclass(frozen=True)
class BackboneRow:
    """A registered backbone."""

    fingerprint: str
    manifest: BackboneManifest
    registered_at: datetime


@dataclass(frozen=True)
class PlanRow:
    """A tap plan and whose it is; `device` is None for the fleet's."""

    version: int
    device: str | None
    plan: TapPlan
    created_at: datetime


def register_backbone(session: Session, manifest: BackboneManifest, at: datetime | None = None) -> bool:
    """Allow frames of this backbone; False if they were allowed already."""
    if session.get(Backbone, manifest.fingerprint) is not None:
        return False
    body = json.loads(manifest.to_json())
    session.add(Backbone(fingerprint=manifest.fingerprint, manifest=body, registered_at=at or datetime.now(timezone.utc)))
    session.flush()
    return True


def backbones(session: Session) -> dict[str, BackboneRow]:
    """Every registered backbone by fingerprint, in the order of registration."""
    rows = session.scalars(select(Backbone).order_by(Backbone.registered_at, Backbone.fingerprint))
    return {row.fingerprint: BackboneRow(row.fingerprint, _manifest(row), row.registered_at) for row in rows}


def _manifest(row: Backbone) -> BackboneManifest:
    return BackboneManifest.from_json(json.dumps(row.manifest), f"registered backbone {row.fingerprint}")


def newest_plan(session: Session, device: str | None = None) -> TapPlan | None:
    """The plan in force for a device (its own, if it has one) or, without `device`, for the fleet."""
    for owner in (device, FLEET):
        if owner is not None:
            newest = select(TapPlanRow.plan).where(TapPlanRow.owner == owner).order_by(TapPlanRow.version.desc()).limit(1)
            payload = session.scalar(newest)
            if payload is not None:
                return TapPlan.from_bytes(payload)
    return None


def insert_plan(session: Session, plan: TapPlan, device: str | None = None, at: datetime | None = None) -> None:
    """Give out a plan. The same one again changes nothing.

    Raises:
        StoreError: the version is not above every version given out so far, so devices would not take it, or a frame
            could not tell which plan it follows.
    """
    newest = session.scalar(select(func.max(TapPlanRow.version))) or 0
    owner = device or FLEET
    if plan.version <= newest:
        known = session.get(TapPlanRow, plan.version)
        if known is not None and known.owner == owner and known.plan == plan.to_bytes():
            return
        raise StoreError(f"tap plan version {plan.version} is not above {newest}, the newest given out: use {newest + 1}")
    session.add(TapPlanRow(version=plan.version, owner=owner, plan=plan.to_bytes(), created_at=at or datetime.now(timezone.utc)))
    session.flush()


def plans(session: Session) -> list[PlanRow]:
    """Every plan ever given out, oldest first."""
    rows = session.scalars(select(TapPlanRow).order_by(TapPlanRow.version))
    return [
        PlanRow(row.version, None if row.owner == FLEET else row.owner, TapPlan.from_bytes(row.plan), row.created_at) for row in rows
    ]
