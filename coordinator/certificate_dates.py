"""Until when certificates and revocation lists are good, for a program's heartbeat.

Each program tells of the files that it can see: nobody needs a key's folder mounted just to watch a date.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from cryptography import x509

from coordinator.identities import (
    BROKER,
    CLAIMS_AUTHORITY,
    CLAIMS_REVOKED,
    FLEET_AUTHORITY,
    FLEET_REVOKED,
    identity_directory,
)
from coordinator.settings import CoordinatorSettings

_MAX_FILE_BYTES = 64 * 1024 * 1024  # a revocation list of a million devices


class CertificateDates:
    """Called for the figures; a file is parsed again only when it has changed.

    Args:
        certificates: name -> file; what is absent, unreadable or damaged is left out of the figures.
        revocation_lists: the same for revocation lists.

    """

    def __init__(self, certificates: Mapping[str, Path], revocation_lists: Mapping[str, Path]) -> None:
        self._certificates = certificates
        self._revocation_lists = revocation_lists
        self._known: dict[Path, tuple[tuple[int, int, int], datetime | None]] = {}

    def __call__(self) -> dict[str, Any]:
        """`certificates` and `revocation_lists`: seconds since 1970 by name."""
        return {
            "certificates": self._dates(self._certificates, lambda pem: x509.load_pem_x509_certificate(pem).not_valid_after_utc),
            "revocation_lists": self._dates(self._revocation_lists, lambda pem: x509.load_pem_x509_crl(pem).next_update_utc),
        }

    def _dates(self, files: Mapping[str, Path], parse: Callable[[bytes], datetime | None]) -> dict[str, float]:
        found = {name: self._ends(path, parse) for name, path in files.items()}
        return {name: at.timestamp() for name, at in found.items() if at is not None}

    def _ends(self, path: Path, parse: Callable[[bytes], datetime | None]) -> datetime | None:
        try:
            stat = path.stat()
            mark = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
            known = self._known.get(path)
            if known is None or known[0] != mark:
                ends = parse(path.read_bytes()) if stat.st_size <= _MAX_FILE_BYTES else None
                known = self._known[path] = (mark, ends)
        except (OSError, ValueError):
            return None
        return known[1]


def own_certificate(settings: CoordinatorSettings, program: str) -> dict[str, Path]:
    """The certificate that `program` shows to the broker, where it has one."""
    return {program: settings.broker.certificate_file or identity_directory(settings, program) / "client.pem"}


def enrolments_dates(settings: CoordinatorSettings) -> CertificateDates:
    """Everything that the enrolment program sees: the broker's folder, its own certificate and the doctor's."""
    folder = settings.broker_directory
    certificates = {name: folder / f"{name}.pem" for name in (BROKER, FLEET_AUTHORITY, CLAIMS_AUTHORITY)}
    certificates |= own_certificate(settings, "enrolment") | {"doctor": identity_directory(settings, "doctor") / "client.pem"}
    return CertificateDates(certificates, {"fleet": folder / FLEET_REVOKED, "claims": folder / CLAIMS_REVOKED})
