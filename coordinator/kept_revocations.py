"""What the present revocation lists know and a backup does not: a restore must not let in again who was shut out after it."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from coordinator.authority import AuthorityError, load_certificate
from coordinator.identities import CLAIMS_AUTHORITY, CLAIMS_REVOKED, FLEET_AUTHORITY, FLEET_REVOKED
from coordinator.store import identities
from coordinator.store.engine import open_store

_REASON = "on the revocation list that a restored backup found in its place"
_ACTOR = "restore"


def keep_revocations(present: Path, restored: Path, database_url: str, now: datetime) -> int:
    """Keep the lists in `present` that are younger than those in `restored`, and write what they say into the database.

    Lists of another authority than the restored one are of no use and are left to be replaced.

    Returns:
        The certificates and claims that the database did not know to be worthless.

    """
    fleet = _younger_list(present / FLEET_REVOKED, restored / FLEET_REVOKED, restored / f"{FLEET_AUTHORITY}.pem")
    claims = _younger_list(present / CLAIMS_REVOKED, restored / CLAIMS_REVOKED, restored / f"{CLAIMS_AUTHORITY}.pem")
    if not fleet and not claims:
        return 0
    store = open_store(database_url)
    changed = 0
    try:
        with store.write() as session:
            for row in identities.identities(session):
                for certificate in identities.certificates_of(session, row.device):
                    if certificate.serial in fleet and certificate.revoked_at is None:
                        changed += identities.revoke_certificate(session, certificate.serial, at=now, actor=_ACTOR, reason=_REASON)
            for claim in identities.claims_of(session):
                if claim.serial in claims and claim.withdrawn_at is None and claim.spent_at is None:
                    changed += identities.withdraw_claim(session, claim.id, at=now, actor=_ACTOR, reason=_REASON)
    finally:
        store.close()
    return changed


def _younger_list(present: Path, restored: Path, authority: Path) -> set[str]:
    """Put the present list in the restored one's place if it is younger; gives the serials on it (hexadecimal), if so."""
    try:
        content = present.read_bytes()
        found, older = x509.load_pem_x509_crl(content), x509.load_pem_x509_crl(restored.read_bytes())
        signer = load_certificate(authority)
        ours = found.is_signature_valid(signer.public_key())  # type: ignore[arg-type]
    except (OSError, ValueError, TypeError, InvalidSignature, AuthorityError):
        return set()
    if not ours or found.last_update_utc < older.last_update_utc:
        return set()
    restored.write_bytes(content)
    return {f"{row.serial_number:x}" for row in found}
