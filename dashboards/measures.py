"""What `/metrics` shows beyond the shared snapshot: a few small queries, and the dates in public certificate files."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from cryptography import x509

from coordinator.settings import CoordinatorSettings
from coordinator.store import figures
from coordinator.store.engine import Store
from coordinator.store.views import Measured, accuracy_series
from dashboards.snapshot import FleetSnapshot

# Names of the files are those of `coordinator init`; only public halves are read.
_BROKER_CERTIFICATES = ("broker", "fleet-authority", "claims-authority")
_REVOCATION_LISTS = ("fleet", "claims")
_PROGRAMS = ("gateway", "enrolment", "doctor")
_MAX_FILE_BYTES = 64 * 1024 * 1024  # a revocation list of a million devices
_MOST_BACKBONES = 256


@dataclass(frozen=True)
class Measures:
    """The rest of one look; what cannot be found out is empty or None, and left out of the metrics."""

    backbone_accuracy: dict[str, float] = field(default_factory=dict)  # fingerprint -> newest
    worst_device: Measured | None = None
    certificate_lifetimes: dict[str, tuple[datetime, datetime]] = field(default_factory=dict)  # device -> issued, expires
    backbones: int = 0
    database_bytes: int = 0
    disk_size_bytes: int | None = None
    disk_free_bytes: int | None = None
    certificates: dict[str, datetime] = field(default_factory=dict)  # name -> expires
    revocation_lists: dict[str, datetime] = field(default_factory=dict)  # authority -> next update


class FileDates:
    """Expiry times in certificates and revocation lists, parsed again only when a file has changed."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[tuple[int, int, int], datetime | None]] = {}

    def expires(self, path: Path, parse: Callable[[bytes], datetime | None]) -> datetime | None:
        """When the file at `path` expires; None where it is absent, unreadable or damaged."""
        try:
            stat = path.stat()
            mark = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
            known = self._known.get(path)
            if known is None or known[0] != mark:
                expires = parse(path.read_bytes()) if stat.st_size <= _MAX_FILE_BYTES else None
                known = self._known[path] = (mark, expires)
        except (OSError, ValueError):
            return None
        return known[1]


def take_measures(store: Store, snapshot: FleetSnapshot, settings: CoordinatorSettings, dates: FileDates) -> Measures:
    """Look at the rest. Raises StoreError as the store does."""
    with store.read() as session:
        run = snapshot.run
        by_backbone = accuracy_series(session, run, "backbone", limit=_MOST_BACKBONES) if run else []
        worst = accuracy_series(session, run, "worst-device", limit=1) if run else []
        lifetimes = figures.certificate_lifetimes(session)
        backbones = figures.registered_backbones(session)
        database_bytes = figures.database_bytes(session)
    try:
        disk = shutil.disk_usage(settings.data_directory)
    except OSError:
        disk = None
    return Measures(
        backbone_accuracy={measured.name: measured.accuracy for measured in by_backbone},
        worst_device=worst[-1] if worst else None,
        certificate_lifetimes=lifetimes,
        backbones=backbones,
        database_bytes=database_bytes,
        disk_size_bytes=disk and disk.total,
        disk_free_bytes=disk and disk.free,
        certificates=_certificates(settings, dates),
        revocation_lists=_revocation_lists(settings, dates),
    )


def _certificates(settings: CoordinatorSettings, dates: FileDates) -> dict[str, datetime]:
    paths = {name: settings.broker_directory / f"{name}.pem" for name in _BROKER_CERTIFICATES}
    paths |= {name: settings.data_directory / "identities" / name / "client.pem" for name in _PROGRAMS}
    found = {name: dates.expires(path, lambda pem: x509.load_pem_x509_certificate(pem).not_valid_after_utc) for name, path in paths.items()}
    return {name: at for name, at in found.items() if at is not None}


def _revocation_lists(settings: CoordinatorSettings, dates: FileDates) -> dict[str, datetime]:
    paths = {name: settings.broker_directory / f"{name}-revoked.pem" for name in _REVOCATION_LISTS}
    found = {name: dates.expires(path, lambda pem: x509.load_pem_x509_crl(pem).next_update_utc) for name, path in paths.items()}
    return {name: at for name, at in found.items() if at is not None}
