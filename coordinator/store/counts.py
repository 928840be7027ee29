"""The columns of `devices` and `spools` that frames move, as plain objects: read once a batch, written back once.

Mapped rows cost several times as much, and every frame of a large fleet is another device's. Rule: they belong to one
`insert_frames` call; the session's mapped rows are written before and forgotten after it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from operator import attrgetter
from typing import Any

from sqlalchemy import Table, select
from sqlalchemy.orm import Session

from coordinator.store.models import Device, Spool
from coordinator.store.statements import bind_moment, update_rows


@dataclass(slots=True)
class DeviceCounts:
    """See `models.Device`."""

    id: int
    name: str
    last_arrival_at: datetime | None
    rate_started_at: datetime | None
    rate_sum_60: float
    rate_sum_300: float
    rate_sum_3600: float
    interval_seconds: float | None
    interval_deviation_seconds: float
    backbone: str | None
    unattributed_rejections: int


@dataclass(slots=True)
class SpoolCounts:
    """See `models.Spool`."""

    id: int
    device_id: int
    spool: str
    floor: int
    stored_through: int
    highest_sequence: int
    known_sequences: int
    skipped_sequences: int
    stored_frames: int
    stored_samples: int
    stored_bytes: int
    duplicate_frames: int
    duplicate_samples: int
    rejected_frames: int
    rejected_samples: int
    unreadable_frames: int
    assembling_samples: int
    produced_seen: int
    newest_frame_at: datetime | None


AnyDevice = Device | DeviceCounts
AnySpool = Spool | SpoolCounts

_KEYS = ("id", "name", "device_id", "spool", "floor")  # never moved by frames
_MOMENTS = ("last_arrival_at", "rate_started_at", "newest_frame_at")


def read_devices(session: Session, names: Iterable[str]) -> dict[str, DeviceCounts]:
    """By name; devices that nobody has heard of are left out."""
    table: Table = Device.__table__  # type: ignore[assignment]
    return {row[1]: DeviceCounts(*row) for row in _read(session, table, DeviceCounts, table.c.name, set(names))}


def read_spools(session: Session, device_ids: Iterable[int]) -> list[SpoolCounts]:
    """All spools of these devices. By device alone: each has few, and pairs would be looked up as all devices times all spools."""
    table: Table = Spool.__table__  # type: ignore[assignment]
    return [SpoolCounts(*row) for row in _read(session, table, SpoolCounts, table.c.device_id, set(device_ids))]


def write_counts(session: Session, counts: Sequence[DeviceCounts] | Sequence[SpoolCounts]) -> None:
    """Write these back, all of one kind."""
    if not counts:
        return
    kind = type(counts[0])
    table = Device.__tablename__ if kind is DeviceCounts else Spool.__tablename__
    columns = [name for name in _columns(kind) if name not in _KEYS]
    bind, moments = bind_moment(session), [place for place, name in enumerate(columns) if name in _MOMENTS]
    rows = []
    for values in map(attrgetter(*columns, "id"), counts):
        row = list(values)
        for place in moments:
            row[place] = None if row[place] is None else bind(row[place])
        rows.append(row)
    update_rows(session, table, columns, rows)


def _read(session: Session, table: Table, kind: type, key: Any, values: set[Any]) -> Iterable[Any]:
    return session.connection().execute(select(*(table.c[name] for name in _columns(kind))).where(key.in_(values)))


def _columns(kind: type) -> tuple[str, ...]:
    return tuple(one.name for one in fields(kind))
