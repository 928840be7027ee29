"""What one scrape shows, read in one short transaction and from a few small files, as plain values."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from cryptography import x509

from coordinator.store import figures
from coordinator.store.engine import Store
from coordinator.store.fleet import DeviceOverview, FleetTotals, device_overview, fleet_totals
from coordinator.store.programs import ProgramState, program_states

# Names of the files are those of `coordinator init`; only public halves are read.
_BROKER_CERTIFICATES = ("broker", "fleet-authority", "claims-authority")
_REVOCATION_LISTS = ("fleet", "claims")
_PROGRAMS = ("gateway", "enrolment", "doctor")
_MAX_FILE_BYTES = 64 * 1024 * 1024  # a revocation list of a million devices


@dataclass(frozen=True)
class Places:
    """Where to look besides the store; what is None or missing is left out of the metrics."""

    data_directory: Path | None = None
    broker_directory: Path | None = None


@dataclass(frozen=True)
class Measures:
    """One look at everything, at `now`."""

    now: datetime
    devices: list[DeviceOverview]
    totals: FleetTotals
    checkpoints: figures.CheckpointFigures
    programs: dict[str, ProgramState] = field(default_factory=dict)
    measured: list[figures.Measured] = field(default_factory=list)
    certificate_lifetimes: dict[str, tuple[datetime, datetime]] = field(default_factory=dict)
    backbones: int = 0
    database_bytes: int = 0
    log_bytes: int | None = None  # of SQLite's write-ahead log
    disk_size_bytes: int | None = None
    disk_free_bytes: int | None = None
    certificates: dict[str, datetime] = field(default_factory=dict)  # name -> expires
    revocation_lists: dict[str, datetime] = field(default_factory=dict)  # name -> next update


class FileCache:
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


def take_measures(store: Store, now: datetime, places: Places, cache: FileCache) -> Measures:
    """Read everything. Raises StoreUnavailable or StoreError as the store does."""
    with store.read() as session:
        values: dict[str, Any] = {
            "devices": device_overview(session, now),
            "totals": fleet_totals(session),
            "checkpoints": figures.checkpoint_figures(session),
            "programs": program_states(session),
            "measured": figures.newest_measurements(session),
            "certificate_lifetimes": figures.certificate_lifetimes(session),
            "backbones": figures.registered_backbones(session),
            "database_bytes": figures.database_bytes(session),
        }
    if places.data_directory is not None:
        try:
            disk = shutil.disk_usage(places.data_directory)
        except OSError:
            pass
        else:
            values |= {"disk_size_bytes": disk.total, "disk_free_bytes": disk.free}
    return Measures(
        now=now,
        log_bytes=store.log_bytes,
        certificates=_certificates(places, cache),
        revocation_lists=_revocation_lists(places, cache),
        **values,
    )


def _certificates(places: Places, cache: FileCache) -> dict[str, datetime]:
    paths: dict[str, Path] = {}
    if places.broker_directory is not None:
        paths |= {name: places.broker_directory / f"{name}.pem" for name in _BROKER_CERTIFICATES}
    if places.data_directory is not None:
        paths |= {name: places.data_directory / "identities" / name / "client.pem" for name in _PROGRAMS}
    found = {name: cache.expires(path, lambda pem: x509.load_pem_x509_certificate(pem).not_valid_after_utc) for name, path in paths.items()}
    return {name: at for name, at in found.items() if at is not None}


def _revocation_lists(places: Places, cache: FileCache) -> dict[str, datetime]:
    if places.broker_directory is None:
        return {}
    paths = {name: places.broker_directory / f"{name}-revoked.pem" for name in _REVOCATION_LISTS}
    found = {name: cache.expires(path, lambda pem: x509.load_pem_x509_crl(pem).next_update_utc) for name, path in paths.items()}
    return {name: at for name, at in found.items() if at is not None}
