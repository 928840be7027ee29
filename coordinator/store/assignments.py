"""Which backbone a device without one is to be sent: its own assignment, or else the fleet's."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import select
from sqlalchemy.orm import Session

from coordinator.store.audit import audit
from coordinator.store.errors import StoreError
from coordinator.store.models import Backbone, BackboneAssignment
from side_tuning.wire.topics import FLEET


def find_backbone(session: Session, beginning: str) -> str:
    """The fingerprint of the registered backbone that begins like this.

    Raises:
        StoreError: none does, or several.
    """
    known = session.scalars(select(Backbone.fingerprint).order_by(Backbone.fingerprint)).all()
    found = [fingerprint for fingerprint in known if beginning and fingerprint.startswith(beginning.lower())]
    if len(found) != 1:
        said = "several backbones begin" if found else "no registered backbone begins"
        raise StoreError(f"{said} with {beginning!r}; registered are: {', '.join(known) or 'none, run `coordinator backbone register FOLDER`'}")
    return found[0]


def assign_backbone(session: Session, fingerprint: str, device: str | None, *, at: datetime, actor: str) -> None:
    """Offer a backbone to one device, or to all that have no assignment of their own; an empty fingerprint offers none any more."""
    owner = device or FLEET
    row = session.get(BackboneAssignment, owner)
    if row is None:
        session.add(BackboneAssignment(owner=owner, fingerprint=fingerprint, assigned_at=at))
    elif row.fingerprint == fingerprint:
        return
    else:
        row.fingerprint, row.assigned_at = fingerprint, at
    audit(session, at=at, actor=actor, action="backbone assigned", device=device, detail=f"{fingerprint or 'none'}{'' if device else ' to the fleet'}")
    session.flush()


def assignments(session: Session) -> dict[str | None, str]:
    """Fingerprint by device; None is the fleet, an empty fingerprint an assignment that was taken back."""
    rows = session.scalars(select(BackboneAssignment).order_by(BackboneAssignment.owner))
    return {None if row.owner == FLEET else row.owner: row.fingerprint for row in rows}
