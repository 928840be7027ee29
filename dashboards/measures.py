"""What `/metrics` shows beyond the shared snapshot: a few small queries and the room on the disk."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from datetime import datetime

from coordinator.settings import CoordinatorSettings
from coordinator.store import figures
from coordinator.store.engine import Store
from coordinator.store.views import Measured, score_series
from dashboards.snapshot import FleetSnapshot

_MOST_BACKBONES = 256


@dataclass(frozen=True)
class Measures:
    """The rest of one look; what cannot be found out is empty or None, and left out of the metrics."""

    backbone_scores: dict[str, float] = field(default_factory=dict)  # fingerprint -> newest
    worst_device: Measured | None = None
    certificate_lifetimes: dict[str, tuple[datetime, datetime]] = field(default_factory=dict)  # device -> issued, expires
    backbones: int = 0
    database_bytes: int = 0
    disk_size_bytes: int | None = None
    disk_free_bytes: int | None = None


def take_measures(store: Store, snapshot: FleetSnapshot, settings: CoordinatorSettings) -> Measures:
    """Look at the rest. Raises StoreError as the store does."""
    with store.read() as session:
        run = snapshot.run
        by_backbone = score_series(session, run, "backbone", limit=_MOST_BACKBONES) if run else []
        worst = score_series(session, run, "worst-device", limit=1) if run else []
        lifetimes = figures.certificate_lifetimes(session)
        backbones = figures.registered_backbones(session)
        database_bytes = figures.database_bytes(session)
    try:
        disk = shutil.disk_usage(settings.data_directory)
    except OSError:
        disk = None
    return Measures(
        backbone_scores={measured.name: measured.score for measured in by_backbone},
        worst_device=worst[-1] if worst else None,
        certificate_lifetimes=lifetimes,
        backbones=backbones,
        database_bytes=database_bytes,
        disk_size_bytes=disk and disk.total,
        disk_free_bytes=disk and disk.free,
    )
