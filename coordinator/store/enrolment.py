"""What `coordinator enrolment` looks at again and again: decisions of people and of devices that it has to act on."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime

from sqlalchemy import exists, select
from sqlalchemy.orm import Session, aliased

from coordinator.store.models import Certificate, Claim, Identity


def approved_requests(session: Session, now: datetime) -> Sequence[tuple[str, bytes]]:
    """(claim, request) of the requests that a person has approved and nobody has signed yet."""
    query = select(Claim.id, Claim.request).where(
        Claim.approved_at.is_not(None),
        Claim.request.is_not(None),
        Claim.spent_at.is_(None),
        Claim.withdrawn_at.is_(None),
        Claim.expires_at > now,
    )
    return [(claim, request) for claim, request in session.execute(query.order_by(Claim.approved_at)) if request is not None]


def replaced_certificates(session: Session, now: datetime) -> Sequence[tuple[str, str]]:
    """(serial, device) of certificates that still let their device in though it has been seen with a younger one."""
    younger = aliased(Certificate)
    in_use = exists().where(
        younger.device == Certificate.device,
        younger.issued_at > Certificate.issued_at,
        younger.issued_at <= now,  # else made while this machine's clock was ahead: of no use now
        younger.seen_at.is_not(None),
        younger.revoked_at.is_(None),
    )
    query = select(Certificate.serial, Certificate.device).where(Certificate.revoked_at.is_(None), Certificate.expires_at > now, in_use)
    return [(serial, device) for serial, device in session.execute(query.order_by(Certificate.issued_at))]


def revoked_devices(session: Session) -> dict[str, datetime]:
    """Devices that are shut out, and when they were."""
    query = select(Identity.device, Identity.revoked_at).where(Identity.revoked_at.is_not(None))
    return {device: at for device, at in session.execute(query) if at is not None}


def unknown_serials(session: Session, serials: Collection[str]) -> set[str]:
    """Those of `serials` that no certificate in this store has."""
    if not serials:
        return set()
    return set(serials) - set(session.scalars(select(Certificate.serial).where(Certificate.serial.in_(sorted(serials)))))
