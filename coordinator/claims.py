"""A claim from its making to its bundle, and what people are told and may ask about a device's access."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone

from sqlalchemy.orm import Session

from coordinator.authority import (
    certificate_pem,
    key_pem,
    load_authority,
    load_certificate,
    new_key,
    serial_hex,
)
from coordinator.identities import CLAIMS_AUTHORITY, FLEET_AUTHORITY, public_host
from coordinator.settings import ConfigError, CoordinatorSettings
from coordinator.store.audit import audit
from coordinator.store.commands import add_command
from coordinator.store.engine import Store
from coordinator.store.fleet import heard_devices
from coordinator.store.identities import (
    ClaimRow,
    IdentityError,
    add_claim,
    certificates_of,
    claims_of,
    find_identity,
    identities,
    readmit_device,
    withdraw_claim,
)
from coordinator.store.views import device_access
from coordinator.timeline import late_first_steps
from side_tuning.bundle import Bundle
from side_tuning.wire.topics import CLAIM_PREFIX


@dataclass(frozen=True)
class ClaimWish:
    """What a person asks for."""

    device: str
    lifetime: timedelta
    group: str | None
    readmit: bool
    actor: str


@dataclass(frozen=True)
class PreparedClaim:
    """A signed claim that nobody knows of yet."""

    bundle: Bundle
    serial: str
    at: datetime
    expires_at: datetime


def prepare_claim(settings: CoordinatorSettings, wish: ClaimWish, now: datetime) -> PreparedClaim:
    """Make the claim's key and certificate; the key will be nowhere but in the bundle.

    Raises:
        ConfigError: `coordinator init` has not run here, or the authorities' files cannot be used.

    """
    authority = load_authority(settings.authority_directory, CLAIMS_AUTHORITY)
    fleet = load_certificate(settings.broker_directory / f"{FLEET_AUTHORITY}.pem")
    try:
        public_key = settings.public_key_file.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigError(f"{settings.public_key_file} cannot be read: {error.strerror}; run `coordinator init`") from error
    claim, key = f"{CLAIM_PREFIX}{secrets.token_hex(16)}", new_key()
    days = wish.lifetime / timedelta(days=1)
    certificate = authority.issue(key.public_key(), claim, now=now, days=days, usage="client")
    expires_at = certificate.not_valid_after_utc
    enrolment = settings.enrolment
    bundle = Bundle(
        device=wish.device,
        claim=claim,
        group=wish.group or "",
        claim_certificate=certificate_pem(certificate).decode(),
        claim_key=key_pem(key).decode(),
        host=public_host(settings),
        port=enrolment.public_port or settings.broker.port,
        claims_port=enrolment.public_claims_port or enrolment.claims_port,
        authorities=certificate_pem(fleet).decode(),
        checkpoint_public_key=public_key,
        issued_at=now.timestamp(),
        expires_at=expires_at.timestamp(),
    )
    return PreparedClaim(bundle, serial_hex(certificate), now, expires_at)


def make_claim(store: Store, wish: ClaimWish, prepared: PreparedClaim, hand_out: Callable[[], None]) -> list[ClaimRow]:
    """Note the claim, then hand out its bundle; gives the earlier claims that it replaces.

    A bundle that could not be handed out is withdrawn at once.

    Raises:
        IdentityError: the device is revoked and `readmit` was not asked for.
        OSError: the bundle could not be handed out.

    """
    claim, device = prepared.bundle.claim, wish.device
    with store.write() as session:
        if wish.readmit and find_identity(session, device) is not None:
            readmit_device(session, device, at=prepared.at, actor=wish.actor)
        withdrawn = add_claim(
            session,
            claim,
            device,
            serial=prepared.serial,
            at=prepared.at,
            expires_at=prepared.expires_at,
            actor=wish.actor,
            group=wish.group,
        )
    try:
        hand_out()
    except BaseException:
        with store.write() as session:
            withdraw_claim(session, claim, at=datetime.now(timezone.utc), actor=wish.actor, reason="its bundle could not be written")
        raise
    return withdrawn


def ask_for_renewal(session: Session, device: str, *, at: datetime, actor: str, lifetime: timedelta) -> None:
    """Order a device to make a new key and ask for its certificate.

    Raises:
        IdentityError: it has no certificate that lets it in to hear of it.

    """
    identity = find_identity(session, device)
    if identity is None or identity.revoked_at is not None:
        state = "was never given a claim" if identity is None else "is revoked"
        raise IdentityError(f"device {device!r} {state}; `coordinator enrol {device}` lets it in")
    if not any(row.revoked_at is None and row.expires_at > at for row in certificates_of(session, device)):
        raise IdentityError(f"device {device!r} has no valid certificate to renew; `coordinator enrol {device}` gives it a new claim")
    add_command(session, device, "renew-certificate", by=actor, now=at, lifetime=lifetime)
    audit(session, at=at, actor=actor, action="renewal asked for", device=device)


def access_lines(session: Session, now: datetime) -> list[str]:
    """A line for each device of which the table of arrivals tells too little: it waits, never came, or is shut out."""
    newest: dict[str, ClaimRow] = {}
    for claim in claims_of(session):
        newest.setdefault(claim.device, claim)
    heard = heard_devices(session)
    access = device_access(session)
    lines = []
    for row in identities(session):
        claim_state = newest[row.device].state(now) if row.device in newest else "expired"
        if row.revoked_at is not None:
            because = f" ({row.revoked_reason})" if row.revoked_reason else ""
            lines.append(f"{row.device}  revoked {row.revoked_at:%Y-%m-%d %H:%M:%S}{because}")
        elif claim_state == "waiting":
            lines.append(f"{row.device}  WAITS FOR APPROVAL: `coordinator devices approve {row.device}` or `revoke`")
        elif row.enrolled_at is None and claim_state in ("open", "approved"):
            lines.append(f"{row.device}  not enrolled yet; its claim is good until {newest[row.device].expires_at:%Y-%m-%d %H:%M:%S}")
        elif row.enrolled_at is None:
            lines.append(f"{row.device}  not enrolled, and its claim is {claim_state}: `coordinator enrol {row.device}` makes a new one")
        elif row.device not in heard:
            lines.append(f"{row.device}  enrolled {row.enrolled_at:%Y-%m-%d %H:%M:%S}, not heard of yet")
        if row.device not in heard:
            lines += [f"{'':<{len(row.device)}}  ! {late.words}" for late in late_first_steps(access[row.device], None, now)]
    return lines
