"""Who may come in: identities, claims and certificates. Every change of access writes its audit row in the same transaction.

Nothing here looks at keys or signs; `coordinator enrolment` acts on what it reads here. There is one writing
transaction at a time, so reading a row and then changing it is safe.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from sqlalchemy import exists, func, select
from sqlalchemy.orm import Session

from coordinator.store.audit import audit, printable
from coordinator.store.models import Certificate, Claim, Identity

ClaimState = Literal["open", "waiting", "approved", "spent", "withdrawn", "expired"]

ENROLMENT = "enrolment"  # the actor where no person is


class IdentityError(ValueError):
    """What was asked cannot be done to this device or claim; the text says why and what can be done instead."""


@dataclass(frozen=True)
class IdentityRow:
    """A device that may, might or may no more come in."""

    device: str
    group: str
    created_at: datetime
    enrolled_at: datetime | None
    revoked_at: datetime | None
    revoked_reason: str


@dataclass(frozen=True)
class ClaimRow:
    """A one-time right to a device's first certificate."""

    id: str
    device: str
    serial: str
    created_at: datetime
    expires_at: datetime
    withdrawn_at: datetime | None
    requested_at: datetime | None
    request: bytes | None
    approved_at: datetime | None
    spent_at: datetime | None
    key_digest: str | None

    def state(self, now: datetime) -> ClaimState:
        """`waiting`: for a person; `approved`: the device gets its certificate when it asks next."""
        if self.spent_at is not None:
            return "spent"
        if self.withdrawn_at is not None:
            return "withdrawn"
        if self.expires_at <= now:
            return "expired"
        if self.approved_at is not None:
            return "approved"
        return "open" if self.requested_at is None else "waiting"


@dataclass(frozen=True)
class CertificateRow:
    """A device certificate ever issued."""

    serial: str
    device: str
    key_digest: str
    pem: bytes
    issued_at: datetime
    expires_at: datetime
    claim: str | None
    seen_at: datetime | None
    revoked_at: datetime | None
    revoked_reason: str


# Identities.


def find_identity(session: Session, device: str) -> IdentityRow | None:
    row = session.get(Identity, device)
    return None if row is None else _identity(row)


def identities(session: Session) -> list[IdentityRow]:
    """Every device that was ever given a claim, by name."""
    return [_identity(row) for row in session.scalars(select(Identity).order_by(Identity.device))]


def revoke_device(session: Session, device: str, *, at: datetime, actor: str, reason: str = "") -> bool:
    """Shut a device out: it, its certificates and its open claims. False if it was out already.

    Raises:
        IdentityError: no such device.
    """
    row = _known(session, device)
    if row.revoked_at is not None:
        return False
    reason = printable(reason)
    row.revoked_at, row.revoked_reason = at, reason
    for certificate in session.scalars(select(Certificate).where(Certificate.device == device, Certificate.revoked_at.is_(None))):
        certificate.revoked_at, certificate.revoked_reason = at, reason
    audit(session, at=at, actor=actor, action="device revoked", device=device, detail=reason)
    _withdraw_open(session, device, at, actor, "the device was revoked")
    session.flush()
    return True


def readmit_device(session: Session, device: str, *, at: datetime, actor: str) -> bool:
    """Let a revoked device have claims again; its old certificates stay revoked. False if it was not revoked."""
    row = _known(session, device)
    if row.revoked_at is None:
        return False
    reason = row.revoked_reason
    row.revoked_at, row.revoked_reason = None, ""
    audit(session, at=at, actor=actor, action="device readmitted", device=device, detail=f"was revoked: {reason}" if reason else "")
    session.flush()
    return True


# Claims.


def add_claim(
    session: Session,
    claim: str,
    device: str,
    *,
    serial: str,
    at: datetime,
    expires_at: datetime,
    actor: str,
    group: str | None = None,
) -> list[ClaimRow]:
    """Note a new claim, and the device if it is new; gives the device's earlier claims that this one withdraws.

    `group` None leaves a known device where it is.

    Raises:
        IdentityError: the device is revoked; `readmit_device` first.
    """
    identity = session.get(Identity, device)
    if identity is None:
        identity = Identity(device=device, group=group or "", created_at=at)
        session.add(identity)
    elif identity.revoked_at is not None:
        because = f" ({identity.revoked_reason})" if identity.revoked_reason else ""
        raise IdentityError(
            f"device {device!r} was revoked on {identity.revoked_at:%Y-%m-%d %H:%M}{because}; to let it in again, add --readmit"
        )
    elif group is not None:
        identity.group = group
    withdrawn = _withdraw_open(session, device, at, actor, f"replaced by {claim}")
    session.add(Claim(id=claim, device=device, serial=serial, created_at=at, expires_at=expires_at))
    audit(
        session, at=at, actor=actor, action="claim issued", device=device, detail=f"{claim}, good until {expires_at:%Y-%m-%d %H:%M:%S}"
    )
    session.flush()
    return withdrawn


def find_claim(session: Session, claim: str) -> ClaimRow | None:
    row = session.get(Claim, claim)
    return None if row is None else _claim(row)


def claims_of(session: Session, device: str | None = None) -> list[ClaimRow]:
    """Every claim of a device, or of all devices, newest first."""
    query = select(Claim).order_by(Claim.created_at.desc(), Claim.id)
    if device is not None:
        query = query.where(Claim.device == device)
    return [_claim(row) for row in session.scalars(query)]


def withdraw_claim(session: Session, claim: str, *, at: datetime, actor: str, reason: str = "") -> bool:
    """Make a claim worthless. False if it was withdrawn already.

    Raises:
        IdentityError: no such claim, or it is spent.
    """
    row = session.get(Claim, claim)
    if row is None:
        raise IdentityError(f"no claim {claim!r}; `coordinator claims list` shows them")
    if row.spent_at is not None:
        raise IdentityError(
            f"claim {claim} is spent: {row.device!r} has its certificate; to shut the device out, `coordinator devices revoke {row.device}`"
        )
    if row.withdrawn_at is not None:
        return False
    _withdraw(session, row, at, actor, reason)
    session.flush()
    return True


def hold_request(session: Session, claim: str, *, request: bytes, at: datetime) -> bool:
    """Keep a valid claim's request (PEM) until a person approves it; False if just this one is kept already.

    Another request in its place needs an approval of its own: a person approved the earlier key.

    Raises:
        IdentityError: the claim is not open any more.
    """
    row = session.get(Claim, claim)
    if row is None or (state := _claim(row).state(at)) in ("spent", "withdrawn", "expired"):
        raise IdentityError(f"claim {claim!r} is {'unknown' if row is None else state}")
    if row.request == request:
        return False
    row.request, row.requested_at, row.approved_at = request, at, None
    audit(session, at=at, actor=claim, action="approval asked for", device=row.device)
    session.flush()
    return True


def approve_device(session: Session, device: str, *, at: datetime, actor: str) -> ClaimRow:
    """Approve the request that a device's claim waits with; the device gets its certificate when it asks next.

    Raises:
        IdentityError: nothing of this device waits.
    """
    _known(session, device)
    for row in session.scalars(select(Claim).where(Claim.device == device, Claim.requested_at.is_not(None))):
        if _claim(row).state(at) == "waiting":
            row.approved_at = at
            audit(session, at=at, actor=actor, action="device approved", device=device, detail=row.id)
            session.flush()
            return _claim(row)
    raise IdentityError(
        f"nothing of {device!r} waits for approval: it has not asked yet, has its certificate, or its claim has ended; "
        f"`coordinator devices show {device}` tells which"
    )


def spend_claim(session: Session, claim: str, *, key_digest: str, at: datetime) -> bool:
    """Spend an open claim on a key; False if it is not open (any more). The certificate's own audit row tells of it."""
    row = session.get(Claim, claim)
    if row is None or _claim(row).state(at) in ("spent", "withdrawn", "expired"):
        return False
    row.spent_at, row.key_digest, row.request = at, key_digest, None
    session.flush()
    return True


def revoked_claims(session: Session, now: datetime) -> list[tuple[str, datetime]]:
    """(serial, since when) of the claims for the revocation list: withdrawn, or spent on a certificate that came into use.

    A spent claim is kept open until then: a device that lost the answer asks again, and gets the same certificate.
    Claims that have expired need no list.
    """
    came_into_use = exists().where(Certificate.claim == Claim.id, Certificate.seen_at.is_not(None))
    query = (
        select(Claim.serial, func.coalesce(Claim.withdrawn_at, Claim.spent_at, now, type_=Claim.created_at.type))
        .where(Claim.expires_at > now, Claim.withdrawn_at.is_not(None) | came_into_use)
        .order_by(Claim.serial)
    )
    return [(serial, at) for serial, at in session.execute(query)]


# Certificates.


def add_certificate(
    session: Session,
    *,
    serial: str,
    device: str,
    key_digest: str,
    pem: bytes,
    issued_at: datetime,
    expires_at: datetime,
    claim: str | None = None,
    actor: str = ENROLMENT,
) -> None:
    """Note a signed certificate before it leaves the house; the first one makes the device enrolled."""
    row = _known(session, device)
    row.enrolled_at = row.enrolled_at or issued_at
    session.add(
        Certificate(
            serial=serial,
            device=device,
            key_digest=key_digest,
            pem=pem,
            issued_at=issued_at,
            expires_at=expires_at,
            claim=claim,
        )
    )
    audit(
        session,
        at=issued_at,
        actor=actor,
        action="certificate renewed" if claim is None else "certificate issued",
        device=device,
        detail=f"serial {serial}, until {expires_at:%Y-%m-%d %H:%M:%S}" + (f", for {claim}" if claim else ""),
    )
    session.flush()


def certificates_of(session: Session, device: str) -> list[CertificateRow]:
    """Every certificate of a device, newest first."""
    query = select(Certificate).where(Certificate.device == device).order_by(Certificate.issued_at.desc(), Certificate.serial)
    return [_certificate(row) for row in session.scalars(query)]


def certificate_for_key(session: Session, device: str, key_digest: str) -> CertificateRow | None:
    """The newest certificate of a device for this key."""
    query = (
        select(Certificate)
        .where(Certificate.device == device, Certificate.key_digest == key_digest)
        .order_by(Certificate.issued_at.desc(), Certificate.serial)
        .limit(1)
    )
    row = session.scalar(query)
    return None if row is None else _certificate(row)


def mark_certificate_seen(session: Session, device: str, serial: str, *, at: datetime) -> bool:
    """A device says that it uses this certificate; True the first time, False for any other word of it."""
    row = session.get(Certificate, serial.lower())
    if row is None or row.device != device or row.seen_at is not None:
        return False
    row.seen_at = at
    session.flush()
    return True


def revoke_certificate(session: Session, serial: str, *, at: datetime, actor: str, reason: str = "") -> bool:
    """Revoke one certificate, not its device. False if it was revoked already.

    Raises:
        IdentityError: no such certificate.
    """
    row = session.get(Certificate, serial.lower())
    if row is None:
        raise IdentityError(f"no certificate with the serial {serial[:80]!r}; `coordinator devices show DEVICE` lists them")
    if row.revoked_at is not None:
        return False
    reason = printable(reason)
    row.revoked_at, row.revoked_reason = at, reason
    words = f"serial {row.serial}" + (f": {reason}" if reason else "")
    audit(session, at=at, actor=actor, action="certificate revoked", device=row.device, detail=words)
    session.flush()
    return True


def revoked_certificates(session: Session, now: datetime) -> list[tuple[str, datetime]]:
    """(serial, since when) for the revocation list; expired certificates need no list."""
    query = (
        select(Certificate.serial, Certificate.revoked_at)
        .where(Certificate.revoked_at.is_not(None), Certificate.expires_at > now)
        .order_by(Certificate.serial)
    )
    return [(serial, at) for serial, at in session.execute(query) if at is not None]


# Shared pieces.


def _known(session: Session, device: str) -> Identity:
    row = session.get(Identity, device)
    if row is None:
        raise IdentityError(f"no device {device!r} was ever given a claim; `coordinator enrol {device}` gives it one")
    return row


def _withdraw_open(session: Session, device: str, at: datetime, actor: str, reason: str) -> list[ClaimRow]:
    query = select(Claim).where(
        Claim.device == device, Claim.spent_at.is_(None), Claim.withdrawn_at.is_(None), Claim.expires_at > at
    )
    rows = list(session.scalars(query.order_by(Claim.id)))
    for row in rows:
        _withdraw(session, row, at, actor, reason)
    return [_claim(row) for row in rows]


def _withdraw(session: Session, row: Claim, at: datetime, actor: str, reason: str) -> None:
    row.withdrawn_at, row.request = at, None
    words = row.id + (f": {reason}" if reason else "")
    audit(session, at=at, actor=actor, action="claim withdrawn", device=row.device, detail=words)


def _identity(row: Identity) -> IdentityRow:
    return IdentityRow(row.device, row.group, row.created_at, row.enrolled_at, row.revoked_at, row.revoked_reason)


def _claim(row: Claim) -> ClaimRow:
    return ClaimRow(
        id=row.id,
        device=row.device,
        serial=row.serial,
        created_at=row.created_at,
        expires_at=row.expires_at,
        withdrawn_at=row.withdrawn_at,
        requested_at=row.requested_at,
        request=row.request,
        approved_at=row.approved_at,
        spent_at=row.spent_at,
        key_digest=row.key_digest,
    )


def _certificate(row: Certificate) -> CertificateRow:
    return CertificateRow(
        serial=row.serial,
        device=row.device,
        key_digest=row.key_digest,
        pem=row.pem,
        issued_at=row.issued_at,
        expires_at=row.expires_at,
        claim=row.claim,
        seen_at=row.seen_at,
        revoked_at=row.revoked_at,
        revoked_reason=row.revoked_reason,
    )
