"""Who gets a certificate: the rules of enrolment, pure. No clock, no store, no keys of ours.

Rules: the coordinator's own clock decides, never the asker's; a claim is good for one key of one device; a request
that is repeated gets the same certificate again, so that a lost answer costs nothing; in doubt nobody gets anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from coordinator.authority import BACKDATED
from coordinator.store.identities import CertificateRow, ClaimRow, IdentityRow
from side_tuning.wire.bounded import FrameError
from side_tuning.wire.topics import check_device_name

Outcome = Literal["issue", "repeat", "hold", "wait", "refuse"]

# A device renews at two thirds of a certificate's life; one that asks far more often than that is broken or hostile,
# and each certificate that replaces another makes the revocation list longer.
MOST_PER_DAY = 10
DAY = timedelta(days=1)


@dataclass(frozen=True)
class RequestFacts:
    """What a request (CSR) says, its signature checked; `error` says why it cannot be used at all."""

    common_name: str = ""
    key_digest: str = ""
    error: str = ""


@dataclass(frozen=True)
class Decision:
    """`hold` keeps the request until a person approves it, `repeat` answers with `certificate`, `refuse` has a `reason`.

    `reason` is one of those that side_tuning/wire/certificates.py lists; `text` is for people, on the device and in the audit.
    """

    outcome: Outcome
    device: str | None = None
    reason: str = ""
    text: str = ""
    certificate: CertificateRow | None = None


def decide_claim(
    facts: RequestFacts,
    claim: ClaimRow | None,
    identity: IdentityRow | None,
    certificate: CertificateRow | None,
    held_key: str | None,
    *,
    by_hand: bool,
    now: datetime,
) -> Decision:
    """What becomes of a request that a claim's holder sent.

    Args:
        facts: the request.
        claim: the row of the asker's name.
        identity: of the claim's device.
        certificate: the newest one of that device for the requested key.
        held_key: digest of the key that waits for approval (or was approved) under this claim.
        by_hand: a person approves every first certificate.
        now: the coordinator's clock.
    """
    if claim is None:
        return Decision("refuse", None, "unknown-claim", "this coordinator knows no such claim; ask for a new bundle")
    device = claim.device
    again = f"ask for a new bundle (`coordinator enrol {device}`)"

    def refuse(reason: str, text: str) -> Decision:
        return Decision("refuse", device, reason, text)

    try:
        check_device_name(device)  # else whoever can write to the store could become the gateway, or this program
    except FrameError as error:
        return refuse("wrong-name", str(error))
    if identity is None or identity.revoked_at is not None:
        return refuse("revoked", f"device {device!r} was revoked; its owner must let it in again")
    if claim.withdrawn_at is not None:
        return refuse("claim-withdrawn", f"the claim was withdrawn on {_minute(claim.withdrawn_at)}; {again}")
    if facts.error:
        return refuse("bad-request", facts.error)
    if facts.common_name != device:
        return refuse("wrong-name", f"the claim is for device {device!r}, the request is for {facts.common_name[:64]!r}")
    if claim.spent_at is not None:
        if facts.key_digest != claim.key_digest:
            return refuse("claim-spent", f"the claim was spent on another key on {_minute(claim.spent_at)}; {again}")
        return _repeat(device, certificate, now) or refuse("claim-spent", f"the claim is spent and its certificate over; {again}")
    if claim.expires_at <= now:
        return refuse("claim-expired", f"the claim expired on {_minute(claim.expires_at)}; {again}")
    if held_key is not None and held_key != facts.key_digest:
        return refuse("claim-spent", f"another key waits for approval under this claim; withdraw it and {again}")
    if by_hand and claim.approved_at is None:
        text = f"waits for a person: `coordinator devices approve {device}`"
        return Decision("hold" if held_key is None else "wait", device, text=text)
    if certificate is not None and certificate.revoked_at is not None:
        return refuse("revoked", "the certificate for this key was revoked; make a new key")
    return Decision("issue", device)


def decide_renewal(
    facts: RequestFacts, device: str, identity: IdentityRow | None, certificates: Sequence[CertificateRow], *, now: datetime
) -> Decision:
    """What becomes of a request that an enrolled device sent; `certificates` are all that it ever had."""

    def refuse(reason: str, text: str) -> Decision:
        return Decision("refuse", device, reason, text)

    if identity is None:
        return refuse("unknown-claim", f"this coordinator has no device {device!r}; enrol it with `coordinator enrol {device}`")
    if identity.revoked_at is not None:
        return refuse("revoked", f"device {device!r} was revoked on {_minute(identity.revoked_at)}")
    if facts.error:
        return refuse("bad-request", facts.error)
    if facts.common_name != device:
        return refuse("wrong-name", f"device {device!r} asks for a certificate of {facts.common_name[:64]!r}")
    same_key = [row for row in certificates if row.key_digest == facts.key_digest]
    if any(row.revoked_at is not None for row in same_key):
        return refuse("revoked", "the certificate for this key was revoked; make a new key")
    fresh = [row for row in same_key if _begun(row, now) and now < row.issued_at + (row.expires_at - row.issued_at) / 2]
    if fresh:
        return Decision("repeat", device, certificate=max(fresh, key=lambda row: row.expires_at))
    if sum(_begun(row, now) and row.issued_at > now - DAY for row in certificates) >= MOST_PER_DAY:
        return Decision("wait", device, text=f"{MOST_PER_DAY} certificates within a day are enough; ask again tomorrow")
    return Decision("issue", device)


def _repeat(device: str, certificate: CertificateRow | None, now: datetime) -> Decision | None:
    if certificate is None or certificate.expires_at <= now or not _begun(certificate, now):
        return None
    if certificate.revoked_at is not None:
        return Decision("refuse", device, "revoked", "the certificate for this claim was revoked; ask for a new bundle")
    return Decision("repeat", device, certificate=certificate)


def _begun(certificate: CertificateRow, now: datetime) -> bool:
    """False for one that was made while the coordinator's clock was ahead: no broker takes it."""
    return certificate.issued_at - BACKDATED <= now


def _minute(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC"
