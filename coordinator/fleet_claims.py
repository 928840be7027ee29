"""Claims for a whole fleet file: which devices need a bundle, so that the same command again makes only what is missing."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from sqlalchemy.orm import Session

from coordinator.store.identities import find_claim, find_identity
from side_tuning.bundle import BundleError, read_bundle
from side_tuning.fleet_file import FleetFileError, FleetLine, Problems, read_fleet_file


def fleet_lines(path: Path) -> list[FleetLine]:
    """The lines of a fleet file that is right from beginning to end.

    Raises:
        FleetFileError: all that is wrong, line by line.

    """
    lines, wrong = read_fleet_file(path), Problems()
    for line in lines:
        for problem in line.problems:
            wrong.add(problem, line.number, line.device)
    if wrong:
        raise FleetFileError("\n  ".join([f"fleet file {path} cannot be used; no bundle was made:", *wrong.words()]))
    return lines


def needs_no_claim(session: Session, line: FleetLine, bundle: Path, now: datetime) -> str | None:
    """Why a device is left as it is, in words: it is enrolled, or its bundle is still good for it and for the group of its line."""
    identity = find_identity(session, line.device)
    if identity is not None and identity.enrolled_at is not None and identity.revoked_at is None:
        return "is enrolled already"
    try:
        found = read_bundle(bundle)
    except BundleError:
        return None
    claim = find_claim(session, found.claim)
    if claim is None or claim.device != line.device or claim.state(now) not in ("open", "waiting", "approved") or found.group != line.values.get("group", found.group):
        return None
    return f"has a bundle, {bundle}, good until {claim.expires_at:%Y-%m-%d %H:%M:%S} UTC"


def revoked_among(session: Session, lines: list[FleetLine]) -> list[str]:
    """The devices that are shut out."""
    return [line.device for line in lines if (identity := find_identity(session, line.device)) is not None and identity.revoked_at is not None]
